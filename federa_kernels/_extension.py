"""Finds federa_kernels._C, or says exactly why it is not there and which command builds it."""

import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent
NOTE = FOLDER / "_C.missing"  # written by setup.py when the build failed
EDITABLE = "-e " if (FOLDER.parent / "setup.py").exists() else ""
BUILD = f"pip install -v --no-deps --force-reinstall {EDITABLE}."


def _is_built() -> bool:
    return any((FOLDER / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


@functools.cache
def load_extension() -> ModuleType | None:
    """The compiled module, or None where it was not built. Loaded at the first call, never at import.

    Raises RuntimeError where the module is there and does not load: a broken build is never hidden.
    """
    if not _is_built():
        return None
    try:
        from federa_kernels import _C
    except ImportError as problem:
        raise RuntimeError(f"federa_kernels._C must load, got: {problem}; build it again: {BUILD}") from problem
    return _C


def why_no_extension() -> str | None:
    """Why there is no compiled module and the command that builds it, or None where there is one."""
    if _is_built():
        return None
    others = sorted(path.name for path in FOLDER.glob("_C.*") if path != NOTE)
    reason = f"built for another Python ({', '.join(others)})" if others else "never built"
    if NOTE.exists():
        reason = f"not built: {NOTE.read_text().strip()}"
    return f"{reason}; with a C++17 compiler, in the folder of setup.py: {BUILD}"
