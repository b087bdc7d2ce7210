"""The embedded data source `stdlib-docs`: docstrings of Python's standard library, labelled by their package.

Real text that every machine with Python has, so a first run needs no network. The files are parsed, never imported.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from federa.data import Texts, is_test, text_key
from federa.errors import InputError

# Packages and modules of every CPython from 3.11 on that hold about 60 training texts or more. Ids are positions:
# they stay the same where one is missing.
LABELS = (
    "asyncio",
    "decimal",
    "email",
    "http",
    "importlib",
    "inspect",
    "io",
    "logging",
    "mailbox",
    "multiprocessing",
    "pydoc",
    "tarfile",
    "unittest",
    "urllib",
    "xml",
)
_FILES = {"decimal": "_pydecimal", "io": "_pyio"}  # the Python twins of C modules
_MIN_WORDS = 5
_MIN_LABELS = 4


def stdlib_docs() -> tuple[Texts, Texts, list[str]]:
    """(train, test, label names) from the running Python: no text twice, the order set by hash, a fifth for test.

    Raises InputError where the standard library comes without its source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, int]] = {}
    for label, name in enumerate(LABELS):
        for text in _docstrings(root, _FILES.get(name, name)):
            found.setdefault(text_key(text), (text, label))
    if len({label for _, label in found.values()}) < _MIN_LABELS:
        raise InputError(f"data.name: stdlib-docs needs the .py files of the standard library, found too few in {root}")
    train = _texts([found[key] for key in sorted(found) if not is_test(key)])
    test = _texts([found[key] for key in sorted(found) if is_test(key)])
    return train, test, list(LABELS)


def _texts(rows: list[tuple[str, int]]) -> Texts:
    return Texts([text for text, _ in rows], np.array([label for _, label in rows], dtype=np.int64), clients=None)


def _docstrings(root: Path, name: str) -> Iterator[str]:
    for file in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
        if not file.is_file() or "test" in file.relative_to(root).parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in string literals
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= _MIN_WORDS:
                    yield text
