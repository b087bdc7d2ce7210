"""Labelled texts -> tokenised examples -> batches."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from federa.randomness import Purpose, generator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_TOKENISE_AT_ONCE = 1024  # texts
_SORT_AT_ONCE = 16  # batches


@dataclass(frozen=True)
class Texts:
    texts: list[str]
    labels: np.ndarray  # (n,) int64
    clients: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Texts":
        clients = None if self.clients is None else [self.clients[i] for i in indices]
        return Texts([self.texts[i] for i in indices], self.labels[indices], clients)


@dataclass(frozen=True)
class Corpus:
    source: str  # one line: what was read
    train: Texts
    test: Texts
    label_names: list[str]


def text_key(text: str) -> str:
    """SHA-256 of a text's letters and digits, case-folded: equal for texts that differ in nothing else."""
    return hashlib.sha256("".join(filter(str.isalnum, text.casefold())).encode()).hexdigest()


def is_test(key: str) -> bool:
    """Whether the text of a `text_key` belongs to the test split: one in five."""
    return int(key, 16) % 5 == 0


@dataclass(frozen=True)
class Examples:
    """Tokenised texts in one flat array: example i is input_ids[offsets[i] : offsets[i + 1]]."""

    input_ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64
    labels: np.ndarray  # (n,) int64
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def units(self) -> np.ndarray:
        """How many predictions each example asks for, (n,) int64: a step's loss is the mean over its units."""
        return np.ones(len(self), np.int64)

    def take(self, indices: np.ndarray) -> "Examples":
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        offsets = _offsets(lengths)
        shift = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        return Examples(self.input_ids[np.arange(offsets[-1]) + shift], offsets, self.labels[indices], self.pad_id)

    def batch(self, indices: np.ndarray) -> "dict[str, torch.Tensor]":
        """input_ids, attention_mask (batch, its longest example) and labels (batch,), int64, padded on the right."""
        import torch

        rows = self.take(indices)
        mask = np.arange(rows.lengths.max(initial=0)) < rows.lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = rows.input_ids
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(rows.labels),
        }


def validation_split(size: int, fraction: float, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (train, validation) indices: every label gives its share, and keeps at least one example for training."""
    if fraction == 0:
        return np.arange(size), np.arange(0)
    order = generator(seed, Purpose.VALIDATION).permutation(size)
    order = order[np.argsort(labels[order], kind="stable")]
    spare = np.delete(order, np.unique(labels[order], return_index=True)[1])
    count = min(max(1, round(size * fraction)), len(spare))
    # Evenly spaced positions of an order sorted by label: each label's share, to within one example.
    validation = np.sort(spare[(np.arange(count) * len(spare)) // max(count, 1)])
    return np.setdiff1d(np.arange(size), validation), validation


def tokenise(texts: Texts, tokenizer: "PreTrainedTokenizerBase", max_length: int, cache: str | None) -> Examples:
    """At most `max_length` tokens a text, special tokens included; kept in a cache folder by the hash of all inputs."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    pad_id = next(token for token in candidates if token is not None)
    key = json.dumps([_definition(tokenizer), pad_id, max_length, texts.texts])
    file = cache_folder(cache) / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    tokens = _load_tokens(file)
    if tokens is None:
        tokens = _tokenise(texts.texts, tokenizer, max_length, pad_id)
        _store_tokens(file, *tokens)
    return Examples(*tokens, texts.labels, pad_id)


def _tokenise(texts: list[str], tokenizer, max_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    rows: list[list[int]] = []
    for start in range(0, len(texts), _TOKENISE_AT_ONCE):
        part = texts[start : start + _TOKENISE_AT_ONCE]
        rows += tokenizer(part, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    rows = [row or [pad_id] for row in rows]
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32), _offsets([len(row) for row in rows])


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _definition(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """All that decides a tokenizer's output, but not what a call sets: truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, tokenizer.truncation_side, sorted(tokenizer.get_vocab().items())]
    definition = json.loads(backend.to_str())
    return [tokenizer.truncation_side, {**definition, "truncation": None, "padding": None}]


def cache_folder(cache: str | None = None) -> Path:
    """Where tokenised data are kept: data.cache, or a folder of the user's cache."""
    return Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "federa")).expanduser()


def _digest(input_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(input_ids.tobytes() + offsets.tobytes()).digest(), dtype=np.uint8)


def _load_tokens(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(file.read_bytes())
        input_ids, offsets = tensors["input_ids"], tensors["offsets"]
        return (input_ids, offsets) if np.array_equal(tensors["digest"], _digest(input_ids, offsets)) else None
    except (OSError, SafetensorError, KeyError):
        return None


def _store_tokens(file: Path, input_ids: np.ndarray, offsets: np.ndarray) -> None:
    from safetensors.numpy import save

    content = save({"input_ids": input_ids, "offsets": offsets, "digest": _digest(input_ids, offsets)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"data.cache: tokens are not kept, cannot write to {file.parent}: {error}", stacklevel=3)


def length_grouped_batches(
    lengths: np.ndarray, indices: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch in batches of similar length: every index once, the last short batch kept, in random order."""
    shuffled = rng.permutation(indices)
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), _SORT_AT_ONCE * batch_size):
        part = shuffled[start : start + _SORT_AT_ONCE * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]
