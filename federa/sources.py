"""Reads the rows of a task: the embedded `stdlib-docs`, local files (jsonl, json, csv, tsv or parquet, gzipped or not)
or a dataset of the Hugging Face hub.

Whatever is wrong with it raises `InputError`: one line that names the key and the row, counted from 1.
"""

import contextlib
import glob
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from federa.columns import Rows, Table
from federa.config import DataConfig
from federa.data import Corpus, Texts, is_test, text_key
from federa.errors import InputError
from federa.hub import ask_hub
from federa.randomness import Purpose, generator
from federa.tasks import CLASSIFICATION, Task

STDLIB_DOCS = "stdlib-docs"
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_corpus(config: DataConfig, seed: int, task: Task = CLASSIFICATION, at_site: bool = False) -> Corpus:
    """The train and test rows of a source. A single file is split by a hash of the text, a fifth for test.

    A real site may hold one label only.
    """
    if config.path is not None:
        source, train, test, names = _read_path(config, task)
    elif config.name == STDLIB_DOCS:
        if task.name != CLASSIFICATION.name:
            raise InputError(
                f"data.name: {STDLIB_DOCS} holds texts and labels only and cannot serve task.name {task.name}; "
                "give data.path or a dataset of the hub"
            )
        source, train, test, names = _read_stdlib_docs()
    else:
        source, train, test, names = _read_hub(config, task)
    train = _first_of_shuffle(train, config.max_train, seed, step=1)
    test = _first_of_shuffle(test, config.max_test, seed, step=2)
    if not at_site and task.unlabelled is None and len(np.unique(train.labels)) < 2:
        raise InputError(f"data.label must hold at least 2 distinct labels, got 1 in {len(train)} training examples")
    return Corpus(source, train, test, names, task.unlabelled)


def _first_of_shuffle(texts: Texts, count: int | None, seed: int, step: int) -> Texts:
    if count is None or count >= len(texts):
        return texts
    return texts.take(generator(seed, Purpose.VALIDATION, step=step).permutation(len(texts))[:count])


# Sources: each returns (what was read, train, test, label names).


def _read_stdlib_docs() -> tuple[str, Texts, Texts, list[str]]:
    from federa.stdlib_docs import stdlib_docs

    return f"{STDLIB_DOCS} ({platform.python_implementation()} {platform.python_version()})", *stdlib_docs()


def _read_path(config: DataConfig, task: Task) -> tuple[str, Texts, Texts, list[str]]:
    path = Path(config.path).expanduser()
    if path.is_dir():
        train_file = _split_file(path, "train")
        test_file = _split_file(path, "test") or _split_file(path, "validation")
        if train_file is None or test_file is None:
            missing = "train" if train_file is None else "test"
            held = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
            raise InputError(f"data.path must hold {missing}.* ({_extensions()}), got {held} in {path}")
        source = f"{path} ({train_file.name}, {test_file.name})"
        names = _read_label_names(path / "labels.json")
        return source, *task.encode(_read_file(train_file, config, task), _read_file(test_file, config, task), names)
    if not path.exists():
        raise InputError(f"data.path must be a file or a folder, got {path}, which does not exist")
    rows = _read_file(path, config, task)
    test = [is_test(text_key(text)) for text in rows.split_by or rows.texts]
    if all(test) or not any(test):
        raise InputError(
            f"data.path: {path} is too small to split into train and test ({len(test)} examples); "
            "give a folder with train.* and test.*"
        )
    train_rows = rows.take([i for i, held_out in enumerate(test) if not held_out])
    test_rows = rows.take([i for i, held_out in enumerate(test) if held_out])
    return f"{path} (split by text)", *task.encode(train_rows, test_rows, None)


def _read_hub(config: DataConfig, task: Task) -> tuple[str, Texts, Texts, list[str]]:
    import datasets

    splits = [config.train_split, config.test_split]
    problem = ask_hub("dataset", config.name)
    try:
        with _quiet(progress=sys.stderr.isatty()), _offline(problem is not None):
            train, test = datasets.load_dataset(config.name, config.subset, split=splits)
    except Exception as error:  # the hub, its cache, the network and seven file formats have no common error
        raise InputError(
            f"data.name: cannot load {config.name!r}: {problem or _reason(error)}; data.path reads local files instead"
        ) from error
    name = config.name if config.subset is None else f"{config.name} ({config.subset})"
    return f"hub dataset {name}", *task.encode(
        task.read(Table(train, splits[0]), config), task.read(Table(test, splits[1]), config), None
    )


def _split_file(folder: Path, split: str) -> Path | None:
    files = [file for file in sorted(folder.iterdir()) if file.name.split(".")[0] == split and _reader(file)]
    if len(files) > 1:
        raise InputError(f"data.path must hold one {split}.*, got {', '.join(f.name for f in files)} in {folder}")
    return files[0] if files else None


def _read_label_names(file: Path) -> list[str] | None:
    if not file.exists():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"data.path: cannot read {file}: {_reason(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise InputError(f"data.path: {file} must hold a list of distinct strings")
    return names


def _read_file(file: Path, config: DataConfig, task: Task) -> Rows:
    import datasets

    reader = _reader(file)
    if reader is None:
        raise InputError(f"data.path must end in {_extensions()}, got {file.name}")
    # "NA" and "None" are words here; an empty cell stays an empty string.
    options = {"sep": "\t" if ".tsv" in file.name else ",", "keep_default_na": False} if reader == "csv" else {}
    with _quiet(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            data = datasets.load_dataset(
                reader, data_files=glob.escape(str(file)), split="train", cache_dir=folder, **options
            )
        except Exception as error:  # gzip, json, pandas, pyarrow and datasets have no common error
            raise InputError(f"data.path: cannot read {file}: {_reason(error)}") from error
        return task.read(Table(data, file.name), config)


def _reader(file: Path) -> str | None:
    return _READERS.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def _extensions() -> str:
    return ", ".join(_READERS) + " or .gz of these"


@contextlib.contextmanager
def _offline(needed: bool) -> Iterator[None]:
    """Where the hub does not answer: read what its cache holds, without the client's half minute of retries."""
    import datasets
    import huggingface_hub

    settings = ((datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE"))
    before = [getattr(*setting) for setting in settings]
    for (module, name), value in zip(settings, before, strict=True):
        setattr(module, name, value or needed)
    try:
        yield
    finally:
        for (module, name), value in zip(settings, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def _quiet(progress: bool = False) -> Iterator[None]:
    """Keep the datasets library from logging what is about to be said in one line."""
    import datasets

    verbosity, bars_off = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_off:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return "it holds no examples"
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
