"""Pairs of texts and marked entities, read by the classifier of single texts."""

import json

import numpy as np
import pytest

from federa.config import DataConfig, TaskConfig
from federa.data import Texts
from federa.errors import InputError
from federa.sources import load_corpus
from federa.tasks import make_task

PAIRS = make_task(TaskConfig(name="pair-classification"))
ENTITIES = make_task(TaskConfig(name="entity-classification"))


@pytest.fixture(scope="module")
def tokenizer(minilm_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_path)


def marked(tokenizer, tmp_path, text, max_length) -> str:
    """What the model reads of a text, decoded."""
    texts = Texts([text], np.zeros(1, np.int64), None)
    config = DataConfig(max_length=max_length, cache=str(tmp_path))
    examples = ENTITIES.examples(texts, tokenizer, config)
    assert examples.lengths[0] <= max_length
    return tokenizer.decode(examples.input_ids, skip_special_tokens=True).replace(" ", "")


def test_pairs_are_the_tokenizers_own_with_their_segments(tokenizer, tmp_path):
    first, second = ["one two", "three " * 30], ["four five six", "seven " * 5]
    texts = Texts(["", ""], np.array([1, 0]), None, {"first": first, "second": second})
    examples = PAIRS.examples(texts, tokenizer, DataConfig(max_length=16, cache=str(tmp_path)))
    theirs = tokenizer(first, second, truncation="longest_first", max_length=16)
    for index in range(2):
        own = slice(examples.offsets[index], examples.offsets[index + 1])
        assert examples.input_ids[own].tolist() == theirs["input_ids"][index]
        assert examples.types[own].tolist() == theirs["token_type_ids"][index]
    batch = examples.batch(np.array([0, 1]))
    assert batch["labels"].tolist() == [1, 0] and batch["token_type_ids"].shape == (2, 16)
    assert examples.lengths[1] == 16 and theirs["input_ids"][1].count(tokenizer.convert_tokens_to_ids("seven")) == 5


def test_tokenizers_without_separators_get_a_line_between(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"Ċ": 0, "a": 1, "b": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a")
    texts = Texts([""], np.array([0]), None, {"first": ["aa"], "second": ["b"]})
    examples = PAIRS.examples(texts, tokenizer, DataConfig(max_length=16, cache=str(tmp_path)))
    assert examples.input_ids.tolist() == [1, 1, 0, 2]


def test_marks_are_plain_tokens(tokenizer, tmp_path):
    text = "The <e1>child</e1> lay in the <e2>cradle</e2>."
    assert marked(tokenizer, tmp_path, text, 64) == "the<e1>child</e1>layinthe<e2>cradle</e2>."


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_long_texts_keep_both_entities(tokenizer, tmp_path, place):
    before, after = {"start": (0, 200), "middle": (100, 100), "end": (200, 0)}[place]
    core = "<e1>child</e1> lay in the <e2>cradle</e2>"
    text = " ".join(["before"] * before + [core] + ["after"] * after)
    read = marked(tokenizer, tmp_path, text, 64)
    assert core.replace(" ", "") in read
    kept = read.count("before"), read.count("after")  # 62 tokens without the special ones, 23 of them the core's
    assert kept == {"start": (0, 39), "middle": (19, 20), "end": (39, 0)}[place]


def test_entities_too_far_apart_are_refused(tokenizer, tmp_path):
    text = "<e1>child</e1> " + "between " * 40 + "<e2>cradle</e2>"
    with pytest.raises(
        InputError, match="data.max_length must leave room for both entities and what lies between, 60 "
    ):
        marked(tokenizer, tmp_path, text, 40)


@pytest.mark.parametrize(
    "text", ["no marks", "<e1>a</e1> <e2>b", "<e1>a</e1> <e1>b</e1> <e2>c</e2>", "</e1>a<e1> <e2>b</e2>"]
)
def test_texts_without_their_marks_are_named(tmp_path, text):
    good = {"text": "<e1>a</e1> <e2>b</e2>", "label": "x"}
    for name in ("train", "test"):
        rows = [good, {"text": text, "label": "y"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError, match=r"data.text must mark one <e1>..</e1> and one <e2>..</e2>, got .* in row 2 of tr"
    ):
        load_corpus(DataConfig(path=str(tmp_path)), 0, ENTITIES)


def test_semeval(data_dir, tokenizer, tmp_path):
    """The README's 8,000 and 2,717 rows and 19 relations; every text fits 128 tokens with both entities."""
    corpus = load_corpus(DataConfig(path=str(data_dir / "semeval2010_task8")), 0, ENTITIES)
    assert (len(corpus.train), len(corpus.test), len(corpus.label_names)) == (8000, 2717, 19)
    examples = ENTITIES.examples(corpus.test, tokenizer, DataConfig(max_length=96, cache=str(tmp_path)))
    end = tokenizer("</e2>", add_special_tokens=False)["input_ids"]
    for start, stop in zip(examples.offsets[:200], examples.offsets[1:201], strict=True):
        ids = examples.input_ids[start:stop].tolist()
        assert any(ids[i : i + len(end)] == end for i in range(len(ids)))
