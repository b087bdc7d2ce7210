import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa.data import (
    IGNORED,
    Examples,
    Texts,
    cache_folder,
    cached,
    length_grouped_batches,
    tokenise,
    validation_split,
)

# Validation


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array),
    fraction=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_validation_split_shares_out_every_label(labels, fraction, seed):
    train, validation = validation_split(len(labels), fraction, labels, seed)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    assert np.array_equal(train, np.sort(train))
    assert np.array_equal(validation, np.sort(validation))
    assert set(labels[train]) == set(labels)
    spare = np.bincount(labels) - (np.bincount(labels) > 0)
    if spare.sum():
        share = len(validation) * spare / spare.sum()
        assert np.abs(np.bincount(labels[validation], minlength=len(spare)) - share).max() < 1
    if fraction == 0:
        assert len(validation) == 0


def test_validation_split_depends_on_the_seed_only():
    labels = np.arange(100) % 2
    first, again, other = (validation_split(100, 0.1, labels, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.bincount(labels[first]).tolist() == [5, 5]


# Tokens and batches


@pytest.fixture(scope="session")
def tokenizer(minilm_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_path)


SOME = Texts(["one two three", "", "one two three four five six seven eight nine"], np.array([1, 0, 1]), None)


def equal(left: Examples, right: Examples) -> bool:
    return left.pad_id == right.pad_id and all(
        getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in ("input_ids", "offsets", "labels")
    )


def test_tokens_are_the_tokenizers_own(tokenizer, tmp_path):
    examples = tokenise(SOME, tokenizer, 8, str(tmp_path))
    expected = [tokenizer(text, truncation=True, max_length=8)["input_ids"] for text in SOME.texts]
    found = np.split(examples.input_ids, examples.offsets[1:-1])
    assert [ids.tolist() for ids in found] == expected
    assert examples.lengths.tolist() == [5, 2, 8]
    assert (examples.input_ids.dtype, examples.offsets.dtype) == (np.int32, np.int64)
    assert examples.pad_id == tokenizer.pad_token_id
    assert len(tokenise(Texts([], np.arange(0), None), tokenizer, 8, str(tmp_path))) == 0


def test_cache_hit_is_the_same_and_calls_no_tokenizer(tokenizer, tmp_path, monkeypatch):
    first = tokenise(SOME, tokenizer, 8, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("federa.data._tokenise", lambda *arguments: pytest.fail("tokenised again"))
        assert equal(tokenise(SOME, tokenizer, 8, str(tmp_path)), first)
    tokenise(SOME, tokenizer, 6, str(tmp_path))
    tokenise(Texts([*SOME.texts[:2], "other"], SOME.labels, None), tokenizer, 8, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    tokenizer.pad_token, before = tokenizer.unk_token, tokenizer.pad_token
    tokenise(SOME, tokenizer, 8, str(tmp_path))
    tokenizer.pad_token = before
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_corrupt_cache_is_rebuilt(tokenizer, tmp_path, damage):
    from safetensors.numpy import save

    first = tokenise(SOME, tokenizer, 8, str(tmp_path)).take(range(3))  # a copy: the file is damaged under it
    [file] = tmp_path.iterdir()
    good = file.read_bytes()
    bad = {
        "empty": b"",
        "cut": good[:-3],
        "flipped": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
        "other": save({"input_ids": first.input_ids}),
    }
    file.write_bytes(bad[damage])
    assert equal(tokenise(SOME, tokenizer, 8, str(tmp_path)), first)
    assert [file.read_bytes()] == [good]


def test_cached_tokens_stay_on_disk(tokenizer, tmp_path):
    """64 MiB of tokens, all of them read, take no memory of the process's own."""
    offsets = np.arange(0, 2**24 + 1, 64)

    def load() -> Examples:
        arrays = cached(str(tmp_path), tokenizer, [1], lambda: {"input_ids": ids(), "offsets": offsets})
        return Examples(**arrays, labels=np.zeros(len(offsets) - 1, np.int64), pad_id=0)

    def ids() -> np.ndarray:
        return np.arange(2**24, dtype=np.int32)

    def own() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc/self/status")
    load()
    before = own()
    examples = load().part(np.arange(2**18)[::-2])
    assert examples.units.sum() == 2**17 and examples.lengths.sum() == 2**23
    total = sum(int(piece.sum()) for piece in examples.pieces())
    assert own() - before < 24 * 2**20
    assert not examples.input_ids.flags.writeable
    kept = np.arange(2**24).reshape(-1, 64)[1::2]
    assert total == kept.sum() + np.arange(0, 2**23 + 1, 64).sum()


def test_a_slow_tokenizers_settings_are_part_of_the_name(tmp_path):
    """Two of one vocabulary, of which one folds case."""
    from transformers import BertJapaneseTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ada", "ada"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    rows = Texts(["Ada"], np.zeros(1, np.int64), None)
    for folded, word in ((True, "ada"), (False, "Ada")):
        slow = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=folded, word_tokenizer_type="basic")
        found = tokenise(rows, slow, 8, str(tmp_path / "cache"))
        assert found.input_ids.tolist() == [2, words.index(word), 3]


def test_unwritable_cache_warns(tokenizer, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.warns(UserWarning, match="data.cache: tokens are not kept, cannot write to"):
        examples = tokenise(SOME, tokenizer, 8, str(occupied))
    assert equal(examples, tokenise(SOME, tokenizer, 8, str(tmp_path)))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "federa"
    assert cache_folder("/elsewhere").as_posix() == "/elsewhere"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "federa"


def test_tokenizer_without_special_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "<end>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    examples = tokenise(Texts(["one one", ""], np.array([0, 1]), None), bare, 4, str(tmp_path))
    assert examples.pad_id == 2
    assert examples.input_ids.tolist() == [1, 1, 2]
    assert examples.lengths.tolist() == [2, 1]


def test_batches_are_padded_to_their_own_longest():
    examples = Examples(
        np.array([5, 6, 7, 8, 9, 10], dtype=np.int32), np.array([0, 1, 3, 6]), np.array([1, 0, 2]), pad_id=99
    )
    batch = examples.batch(np.array([1, 0]))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[6, 7], [5, 99]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [0, 1],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert examples.batch([2])["input_ids"].tolist() == [[8, 9, 10]]
    assert examples.batch([])["input_ids"].shape == (0, 0)
    taken = examples.take([2, 0, 2])
    assert taken.input_ids.tolist() == [8, 9, 10, 5, 8, 9, 10]
    assert taken.offsets.tolist() == [0, 3, 4, 7]
    assert taken.labels.tolist() == [2, 1, 2]


@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=12), data=st.data())
def test_a_part_is_what_its_copy_is(cuts, data):
    """Tokens, everything beside them, batches and digest; also of a part of a part."""
    rng, tokens, n = np.random.default_rng(len(cuts)), sum(cuts), len(cuts)
    examples = Examples(
        np.arange(tokens, dtype=np.int32), np.concatenate([[0], np.cumsum(cuts)]), rng.integers(0, 3, n), pad_id=7,
        targets=rng.choice([IGNORED, 1, 2], tokens).astype(np.int32), types=rng.integers(0, 2, tokens).astype(np.int8),
        spans=rng.integers(0, 9, (tokens, 2)).astype(np.int32), rows=np.arange(n) // 2,
    )  # fmt: skip
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1))
    fewer = data.draw(st.lists(st.integers(0, len(some) - 1)))
    for part, copy in (
        (examples.part(some), examples.take(some)),
        (examples.part(some).part(fewer), examples.take(some).take(fewer)),
        (examples.part(some).take(fewer).part(np.arange(len(fewer))), examples.take(some).take(fewer)),
    ):
        assert len(part) == len(copy) and part.lengths.tolist() == copy.lengths.tolist()
        assert part.units.tolist() == copy.units.tolist() and part.rows.tolist() == copy.rows.tolist()
        assert b"".join(p.tobytes() for p in part.pieces()) == b"".join(p.tobytes() for p in copy.pieces())
        for name, tensor in part.batch(np.arange(len(part))).items():
            assert tensor.equal(copy.batch(np.arange(len(copy)))[name])
    assert examples.part(some).input_ids is examples.input_ids


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 128), min_size=1, max_size=400).map(np.array),
    batch_size=st.integers(1, 20),
    data=st.data(),
)
def test_length_grouped_batches_hold_every_index_once(lengths, batch_size, data):
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    indices = np.array(chosen, dtype=np.int64)
    batches = length_grouped_batches(lengths, indices, batch_size, np.random.default_rng(0))
    assert sorted(index for batch in batches for index in batch) == sorted(chosen)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    again = length_grouped_batches(lengths, indices, batch_size, np.random.default_rng(0))
    assert all(np.array_equal(left, right) for left, right in zip(batches, again, strict=True))


def test_length_grouped_batches_save_padding():
    lengths = np.random.default_rng(0).integers(1, 128, 1000)

    def padded(batches):
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    grouped = length_grouped_batches(lengths, np.arange(1000), 16, np.random.default_rng(1))
    plain = np.split(np.random.default_rng(1).permutation(1000), range(16, 1000, 16))
    assert padded(grouped) < 1.1 * lengths.sum()
    assert padded(plain) > 1.6 * lengths.sum()
    assert [lengths[batch].max() for batch in grouped] != sorted(lengths[batch].max() for batch in grouped)
