"""Rows of a source -> tokenised examples -> batches."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from federa.randomness import Purpose, generator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the target of a token that nothing is asked of

TOKENISE_AT_ONCE = 1024  # texts
_SORT_AT_ONCE = 16  # batches


@dataclass(frozen=True)
class Texts:
    """Rows of a split. texts: each row as one text, which k-means embeds; fields: the columns a task reads besides."""

    texts: list[str]
    labels: np.ndarray  # (n,) int64; zeros where a row has no one label
    clients: list[str] | None
    fields: Mapping[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Texts":
        clients = None if self.clients is None else [self.clients[i] for i in indices]
        fields = {name: [column[i] for i in indices] for name, column in self.fields.items()}
        return Texts([self.texts[i] for i in indices], self.labels[indices], clients, fields)


@dataclass(frozen=True)
class Corpus:
    source: str  # one line: what was read
    train: Texts
    test: Texts
    label_names: list[str]  # what the model predicts: labels or tags; empty for tasks without
    unlabelled: str | None = None  # what a row is ("question"), where rows have no one label each

    @property
    def strata(self) -> list[str]:
        """The names of the ids in `Texts.labels`, by which rows are counted and shared out."""
        return self.label_names if self.unlabelled is None else [self.unlabelled]


def text_key(text: str) -> str:
    """SHA-256 of a text's letters and digits, case-folded: equal for texts that differ in nothing else."""
    return hashlib.sha256("".join(filter(str.isalnum, text.casefold())).encode()).hexdigest()


def is_test(key: str) -> bool:
    """Whether the text of a `text_key` belongs to the test split: one in five."""
    return int(key, 16) % 5 == 0


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in flat arrays: example i is input_ids[offsets[i] : offsets[i + 1]].

    Only what a task needs is there besides. targets: what is asked of every token (tokens,), IGNORED for nothing, or of
    the example (n, 2); without them it is the label. types: segment ids. spans: the characters of its text behind each
    token, [-1, -1] for none. rows: the row of the source that an example is of (a long one gives several), and truth,
    what each row of the source is scored by.
    """

    input_ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64
    labels: np.ndarray  # (n,) int64
    pad_id: int
    targets: np.ndarray | None = None  # (tokens,) int32 or (n, 2) int64
    types: np.ndarray | None = None  # (tokens,) int8
    spans: np.ndarray | None = None  # (tokens, 2) int32
    rows: np.ndarray | None = None  # (n,) int64
    truth: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def units(self) -> np.ndarray:
        """How many predictions each example asks for, (n,) int64: a step's loss is the mean over its units."""
        if self.targets is None or self.targets.ndim == 2:
            return np.ones(len(self), np.int64)
        asked = np.concatenate([[0], np.cumsum(self.targets != IGNORED)])
        return np.diff(asked[self.offsets])

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        held = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: array for name, array in held.items() if isinstance(array, np.ndarray)}

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The indices of the examples of these rows of the source: the rows themselves where each gives one."""
        return rows if self.rows is None else np.flatnonzero(np.isin(self.rows, rows))

    def take(self, indices: np.ndarray) -> "Examples":
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        offsets = _offsets(lengths)
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        own = {name: array[tokens if self._by_token(name) else indices] for name, array in self.arrays.items()}
        return replace(self, **own | {"offsets": offsets})

    def _by_token(self, name: str) -> bool:
        return name in ("input_ids", "types", "spans") or (name == "targets" and self.targets.ndim == 1)

    def batch(self, indices: np.ndarray) -> "dict[str, torch.Tensor]":
        """input_ids and attention_mask (batch, its longest example), padded on the right, and labels: (batch,) of whole
        texts, (batch, longest) of tokens, (batch, 2) of spans; token_type_ids where there are types. All int64."""
        import torch

        rows = self.take(indices)
        mask = np.arange(rows.lengths.max(initial=0)) < rows.lengths[:, None]

        def padded(tokens: np.ndarray, filling: int) -> np.ndarray:
            table = np.full(mask.shape, filling, dtype=np.int64)
            table[mask] = tokens
            return table

        labels = rows.labels if rows.targets is None else rows.targets
        batch = {
            "input_ids": padded(rows.input_ids, self.pad_id),
            "attention_mask": mask.astype(np.int64),
            "labels": padded(labels, IGNORED) if rows.targets is not None and labels.ndim == 1 else labels,
        }
        if rows.types is not None:
            batch["token_type_ids"] = padded(rows.types, 0)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


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
    pad_id = pad_id_of(tokenizer)

    def tokens() -> dict[str, np.ndarray]:
        input_ids, offsets = _tokenise(texts.texts, tokenizer, max_length, pad_id)
        return {"input_ids": input_ids, "offsets": offsets}

    return Examples(**cached(cache, tokenizer, [max_length, texts.texts], tokens), labels=texts.labels, pad_id=pad_id)


def pad_id_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that batches are padded with."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    return next(token for token in candidates if token is not None)


def cached(
    cache: str | None, tokenizer: "PreTrainedTokenizerBase", inputs: list[Any], tokens: Callable[[], dict]
) -> dict[str, np.ndarray]:
    """The arrays that `tokens()` makes of a tokenizer and `inputs`, from the cache folder if they are there."""
    key = json.dumps([_definition(tokenizer), pad_id_of(tokenizer), *inputs])
    file = cache_folder(cache) / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    arrays = _load_tokens(file)
    if arrays is None:
        arrays = tokens()
        _store_tokens(file, arrays)
    return arrays


def _tokenise(texts: list[str], tokenizer, max_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    rows: list[list[int]] = []
    for start in range(0, len(texts), TOKENISE_AT_ONCE):
        part = texts[start : start + TOKENISE_AT_ONCE]
        rows += tokenizer(part, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    return flat([row or [pad_id] for row in rows])


def flat(rows: Sequence[Sequence[int]], dtype: type = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length as one array, and the offsets (n + 1,) at which they begin."""
    return np.fromiter(chain.from_iterable(rows), dtype=dtype), _offsets([len(row) for row in rows])


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


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def _load_tokens(file: Path) -> dict[str, np.ndarray] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(file.read_bytes())
        digest = arrays.pop("digest")
        return arrays if np.array_equal(digest, _digest(arrays)) else None
    except (OSError, SafetensorError, KeyError):
        return None


def _store_tokens(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    content = save({**arrays, "digest": _digest(arrays)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"data.cache: tokens are not kept, cannot write to {file.parent}: {error}", stacklevel=4)


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
