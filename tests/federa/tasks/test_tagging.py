"""Tags of words: alignment with pieces, scores of entities."""

import json
from itertools import pairwise

import numpy as np
import pytest

from federa.config import DataConfig, TaskConfig
from federa.data import IGNORED, Texts
from federa.errors import InputError
from federa.sources import load_corpus
from federa.tasks import Predictions, make_task
from federa.tasks.task import objects

TASK = make_task(TaskConfig(name="token-classification"))
NAMES = ["O", "B-person", "I-person"]


@pytest.fixture(scope="module")
def tokenizer(minilm_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_path)


def examples(tokenizer, tmp_path, sentences, max_length=32):
    tags = [[i % len(NAMES) for i in range(len(sentence))] for sentence in sentences]
    fields = {"tokens": sentences, "tags": tags, "names": [[NAMES[t] for t in row] for row in tags]}
    texts = Texts([" ".join(s) for s in sentences], np.zeros(len(sentences), np.int64), None, fields)
    return TASK.examples(texts, tokenizer, DataConfig(max_length=max_length, cache=str(tmp_path)))


SENTENCES = [
    ["Schwarzenegger", "met", "O'Brien-Smith", ",", "@paulwalk", "&", "Co."],
    ["http://tinyurl.com/24agj38", "naïve", "日本語", "😀", "x"],
    ["one"],
]


def test_tags_sit_on_the_first_piece_as_by_the_tokenizers_own_words(tokenizer, tmp_path):
    """Against transformers' word_ids of the same words given one by one, which BERT's splits into the same pieces."""
    ours = examples(tokenizer, tmp_path, SENTENCES, max_length=64)
    assert ours.units.tolist() == [7, 5, 1]
    for index, sentence in enumerate(SENTENCES):
        encoded = tokenizer(sentence, is_split_into_words=True)
        own = slice(ours.offsets[index], ours.offsets[index + 1])
        assert ours.input_ids[own].tolist() == encoded["input_ids"]
        words = encoded.word_ids()
        first = [w is not None and w != words[t - 1] for t, w in enumerate(words)]
        expected = [w % 3 if is_first else IGNORED for w, is_first in zip(words, first, strict=True)]
        assert ours.targets[own].tolist() == expected


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-untrimmed", "sentencepiece"])
def test_every_word_has_its_piece_under_other_tokenizers(kind, tmp_path):
    """RoBERTa's, GPT-2's and DeBERTa's ways with the space before a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "sentencepiece":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=kind == "byte-level")
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    backend.train_from_iterator([" ".join(sentence) for sentence in SENTENCES], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    ours = examples(tokenizer, tmp_path, SENTENCES, max_length=512)
    assert ours.units.tolist() == [7, 5, 1]
    for index, sentence in enumerate(SENTENCES):
        own = slice(ours.offsets[index], ours.offsets[index + 1])
        ids, targets = ours.input_ids[own], ours.targets[own]
        assert targets[targets != IGNORED].tolist() == [i % 3 for i in range(len(sentence))]
        starts = [*np.flatnonzero(targets != IGNORED), len(ids)]
        for word, (a, b) in zip(sentence, pairwise(starts), strict=True):
            if kind != "sentencepiece":  # bytes give a word back to the letter
                assert tokenizer.decode(ids[a:b]).strip() == word


def test_words_that_a_tokenizer_drops_become_unknown(tokenizer, tmp_path):
    ours = examples(tokenizer, tmp_path, [["\u200d", "one", "\u200d"], ["\u200d"]])
    assert ours.units.tolist() == [3, 1]
    assert tokenizer.convert_ids_to_tokens(ours.input_ids[:5]) == ["[CLS]", "[UNK]", "one", "[UNK]", "[SEP]"]


def test_words_cut_off_count_as_outside(tokenizer, tmp_path):
    ours = examples(tokenizer, tmp_path, [["one", "two", "three", "four", "five"]], max_length=5)
    assert ours.units.tolist() == [3]
    predictions = TASK.gather(ours, [["O", "B-person", "I-person"]], np.ones(1))
    assert predictions.predicted[0] == ["O", "B-person", "I-person", "O", "O"]
    assert predictions.labels[0] == ["O", "B-person", "I-person", "O", "B-person"]
    assert TASK.score(predictions)["entity_f1"] == pytest.approx(2 / 3)  # precision 1, recall 1/2


def predictions(*pairs) -> Predictions:
    truth, predicted = zip(*((one.split(), other.split()) for one, other in pairs), strict=True)
    return Predictions(objects(predicted), objects(truth), np.ones(len(truth)), np.array([len(t) for t in truth]))


def test_entity_scores_by_hand():
    """4 entities true, 5 found, 2 of them right in type and both ends; 8 of 11 words tagged right."""
    told = predictions(
        ("B-person I-person O B-group O", "B-person I-person O B-person O"),  # right; a group called a person
        ("B-group I-group O", "B-group O O"),  # cut short
        ("O B-person O", "O B-person B-person"),  # right; one too many
    )
    scores = TASK.score(told)
    precision, recall = 2 / 5, 2 / 4
    assert scores["precision"] == precision and scores["recall"] == recall
    assert scores["entity_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["accuracy"] == 8 / 11
    assert scores["loss"] == 3 / 11


def test_no_entity_anywhere_is_right_and_one_out_of_nowhere_is_wrong():
    assert TASK.score(predictions(("O O", "O O")))["entity_f1"] == 1
    assert TASK.score(predictions(("O O", "O B-person")))["entity_f1"] == 0
    assert TASK.score(predictions(("O B-person", "O O")))["entity_f1"] == 0


def test_client_scores_are_entity_f1_of_each():
    told = predictions(("B-person O", "B-person O"), ("O B-person", "O O"), ("O", "O"))
    assert TASK.client_scores(told, [np.array([0]), np.array([1]), np.array([], int), np.array([2])]) == {
        "worst_client": 0.0,
        "mean_client": pytest.approx(2 / 3),
    }


# Sources


def write(folder, rows, **files):
    for name in ("train", "test"):
        lines = (json.dumps(row) + "\n" for row in files.get(name, rows))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return DataConfig(path=str(folder))


GOOD = [{"tokens": ["Ada", "Lovelace", "wrote"], "tags": ["B-person", "I-person", "O"]}] * 3


def test_tags_are_strings_or_ids_with_names(tmp_path):
    corpus = load_corpus(write(tmp_path, GOOD), 0, TASK)
    assert corpus.label_names == ["O", "B-person", "I-person"] and corpus.strata == ["sentence"]
    assert corpus.train.fields["tags"] == [[1, 2, 0]] * 3
    (tmp_path / "labels.json").write_text(json.dumps(["O", "I-person", "B-person"]))
    ids = [row | {"tags": [2, 1, 0]} for row in GOOD]
    corpus = load_corpus(write(tmp_path, ids), 0, TASK)
    assert corpus.train.fields["names"] == [["B-person", "I-person", "O"]] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "Ada wrote"}, r"data.tokens must hold lists of words, got 'Ada wrote' in row 1 of train.jsonl"),
        ({"tokens": ["Ada", "", "x"]}, r"data.tokens must hold lists of words, got \['Ada', '', 'x'\] in row 1"),
        ({"tags": ["O", "O"]}, r"data.tags must hold a tag for each of 3 words, got \['O', 'O'\] in row 1"),
        ({"tags": ["NOUN", "O", "O"]}, r"data.tags must be O or B-, I-, E-, S- and an entity's type, got"),
        ({"tags": [0, 1, 2]}, r"data.tags must be O or B-, .* got .*; ids want labels.json beside the files"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    config = write(tmp_path, [GOOD[0] | row])
    with pytest.raises(InputError, match=message) as raised:
        load_corpus(config, 0, TASK)
    assert "\n" not in str(raised.value)


def test_tags_outside_the_list_are_named(tmp_path):
    config = write(tmp_path, GOOD, test=[GOOD[0] | {"tags": ["B-place", "O", "O"]}])
    (tmp_path / "labels.json").write_text(json.dumps(["O", "B-person", "I-person"]))
    with pytest.raises(InputError, match=r"data.tags must be among 3 tags .*, got 'B-place' in row 1 of test.jsonl"):
        load_corpus(config, 0, TASK)


def test_missing_columns_name_the_nearest(tmp_path):
    config = write(tmp_path, [{"tokens": ["a"], "ner_tags": ["O"]}])
    with pytest.raises(InputError, match=r"data.tags must be a column of train.jsonl .*; did you mean ner_tags\?"):
        load_corpus(config, 0, TASK)


def test_wnut(data_dir):
    """The task's README: 3,394 and 1,287 sentences with 1,975 and 1,079 entities, 13 tags."""
    corpus = load_corpus(DataConfig(path=str(data_dir / "wnut17")), 0, TASK)
    assert (len(corpus.train), len(corpus.test), len(corpus.label_names)) == (3394, 1287, 13)
    for part, entities in ((corpus.train, 1975), (corpus.test, 1079)):
        assert sum(tag.startswith("B-") for tags in part.fields["names"] for tag in tags) == entities
