"""Rows of a source -> tokenised examples -> batches."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from federa.randomness import Purpose, generator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the target of a token that nothing is asked of

TOKENISE_AT_ONCE = 1024  # texts
_READ_AT_ONCE = 4096  # examples
_SORT_AT_ONCE = 16  # batches
_CACHE_FORMAT = 2
_STORED = {"I8": np.int8, "I32": np.int32, "I64": np.int64}  # safetensors' names


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
    """Tokenised rows in flat arrays, which may lie on disk: example i is input_ids[offsets[j] : offsets[j + 1]] with
    j = places[i], or i where there are no places.

    Only what a task needs is there besides. targets: what is asked of every token (tokens,), IGNORED for nothing, or of
    the example (n, 2); without them it is the label. types: segment ids. spans: the characters of its text behind each
    token, [-1, -1] for none. rows: the row of the source that an example is of (a long one gives several), and truth,
    what each row of the source is scored by.
    """

    input_ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64; of all that are stored, where there are places
    labels: np.ndarray  # (n,) int64
    pad_id: int
    targets: np.ndarray | None = None  # (tokens,) int32 or (n, 2) int64
    types: np.ndarray | None = None  # (tokens,) int8
    spans: np.ndarray | None = None  # (tokens, 2) int32
    rows: np.ndarray | None = None  # (n,) int64
    truth: Sequence[Any] | None = None
    places: np.ndarray | None = None  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        lengths = np.diff(self.offsets)
        return lengths if self.places is None else lengths[self.places]

    @cached_property
    def units(self) -> np.ndarray:
        """How many predictions each example asks for, (n,) int64: a step's loss is the mean over its units."""
        if self.targets is None or self.targets.ndim == 2:
            return np.ones(len(self), np.int64)
        counts = [np.empty(0, np.int64)]
        for tokens, offsets in map(self._tokens, self._stretches()):
            asked = np.concatenate([[0], np.cumsum(self.targets[tokens] != IGNORED)])
            counts.append(np.diff(asked[offsets]))
        return np.concatenate(counts)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The indices of the examples of these rows of the source: the rows themselves where each gives one."""
        return rows if self.rows is None else np.flatnonzero(np.isin(self.rows, rows))

    def part(self, indices: np.ndarray) -> "Examples":
        """Some of the examples, whose tokens stay where they are."""
        indices = np.asarray(indices, dtype=np.int64)
        own = {name: array[indices] for name, array in self._arrays() if not self._by_token(name) and name != "offsets"}
        return replace(self, **own, places=indices if self.places is None else self.places[indices])

    def take(self, indices: np.ndarray) -> "Examples":
        """Copies of some of the examples, one after another."""
        indices = np.asarray(indices, dtype=np.int64)
        tokens, offsets = self._tokens(indices)
        own = {name: array[tokens if self._by_token(name) else indices] for name, array in self._arrays()
               if name != "offsets"}  # fmt: skip
        return replace(self, **own, offsets=offsets, places=None)

    def pieces(self) -> Iterator[np.ndarray]:
        """All arrays as `take` would copy them, one after another and no large one at once: what a digest covers."""
        for name, array in self._arrays():
            if self._by_token(name):
                yield from (array[self._tokens(indices)[0]] for indices in self._stretches())
            else:
                yield _offsets(self.lengths) if name == "offsets" else array

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        held = ((item.name, getattr(self, item.name)) for item in fields(self) if item.name != "places")
        return ((name, array) for name, array in held if isinstance(array, np.ndarray))

    def _by_token(self, name: str) -> bool:
        return name in ("input_ids", "types", "spans") or (name == "targets" and self.targets.ndim == 1)

    def _tokens(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of some examples are, and the offsets at which each begins among these."""
        lengths = self.lengths[indices]
        offsets = _offsets(lengths)
        stored = indices if self.places is None else self.places[indices]
        return np.arange(offsets[-1]) + np.repeat(self.offsets[stored] - offsets[:-1], lengths), offsets

    def _stretches(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _READ_AT_ONCE):
            yield np.arange(start, min(start + _READ_AT_ONCE, len(self)))

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

    def batch_on(self, device: "torch.device", indices: np.ndarray) -> dict[str, Any]:
        """`batch` on a device, which nobody waits for, and the examples' `lengths`, a tuple that stays on the host."""
        from federa_kernels import to_device

        batch = {name: to_device(tensor, device) for name, tensor in self.batch(indices).items()}
        return batch | {"lengths": tuple(self.lengths[indices].tolist())}


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
    """The arrays that `tokens()` makes of a tokenizer and `inputs`, kept in the cache folder and mapped from there:
    read-only, and read from disk as they are used. Only where they cannot be written do they stay in memory."""
    key = hashlib.sha256()
    for piece in json.JSONEncoder().iterencode([_CACHE_FORMAT, _definition(tokenizer), pad_id_of(tokenizer), *inputs]):
        key.update(piece.encode())
    folder = cache_folder(cache)
    file = _find_tokens(folder, key.hexdigest())
    if file is None:
        arrays = tokens()
        file = _store_tokens(folder, key.hexdigest(), arrays)
        if file is None:
            return arrays
    return _mapped(file)


def _tokenise(texts: list[str], tokenizer, max_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    rows: list[np.ndarray] = []
    for start in range(0, len(texts), TOKENISE_AT_ONCE):
        part = texts[start : start + TOKENISE_AT_ONCE]
        found = tokenizer(part, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
        rows += (np.array(row or [pad_id], np.int32) for row in found)
    return flat(rows)


def flat(rows: Sequence[Sequence[int] | np.ndarray], dtype: type = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length as one array, and the offsets (n + 1,) at which they begin."""
    offsets = _offsets([len(row) for row in rows])
    return np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)]), offsets


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _definition(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """All that decides a tokenizer's output, but not what a call sets: truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings = sorted((name, repr(value)) for name, value in tokenizer.init_kwargs.items())
        vocabulary = sorted(tokenizer.get_vocab().items())
        return [type(tokenizer).__name__, tokenizer.truncation_side, settings, vocabulary]
    definition = json.loads(backend.to_str())
    return [tokenizer.truncation_side, {**definition, "truncation": None, "padding": None}]


def cache_folder(cache: str | None = None) -> Path:
    """Where tokenised data are kept: data.cache, or a folder of the user's cache."""
    return Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "federa")).expanduser()


def _find_tokens(folder: Path, key: str) -> Path | None:
    """The file of a key whose name tells its own SHA-256, which is read and compared: a damaged one is no such file."""
    for file in folder.glob(f"{key}-*.safetensors"):
        with suppress(OSError), open(file, "rb") as content:
            if file.stem == f"{key}-{hashlib.file_digest(content, 'sha256').hexdigest()}":
                return file
    return None


def _store_tokens(folder: Path, key: str, arrays: Mapping[str, np.ndarray]) -> Path | None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as content:
            temporary = Path(content.name)
        save_file(dict(arrays), temporary)
        with open(temporary, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        file = folder / f"{key}-{digest}.safetensors"
        os.replace(temporary, file)
        return file
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        warnings.warn(f"data.cache: tokens are not kept, cannot write to {folder}: {error}", stacklevel=4)
        return None


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, none of them read. (safetensors' own numpy reader copies; torch's mapping may
    be written to, so that the system counts it as memory.)"""
    content = np.asarray(np.memmap(file, np.uint8, "r"))
    start = 8 + int(content[:8].view("<u8")[0])
    arrays = {}
    for name, facts in json.loads(content[8:start].tobytes()).items():
        begin, end = facts["data_offsets"]
        values = content[start + begin : start + end]
        arrays[name] = values.view(_STORED[facts["dtype"]]).reshape(facts["shape"])
    return arrays


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
