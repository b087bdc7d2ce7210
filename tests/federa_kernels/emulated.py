"""Builds sources of csrc/cuda for the CPU, over the emulator in tests/emulator, and loads them."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # unroll is nvcc's
ORDERS = (0, -1, 1, 2)  # of blocks, warps and lanes: forward, backward, shuffled twice


def compiler() -> str:
    """g++ on Linux; the test is skipped elsewhere."""
    found = shutil.which("g++")
    if found and sys.platform == "linux":
        return found
    reason = "no g++ on Linux, which builds the CUDA kernels for the CPU"
    pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def build(folder: Path, *sources: str, flags: Sequence[str] = ("-shared",)) -> Path:
    """The library (or, without that flag, the program) of these sources, named from ROOT."""
    library = folder / f"{Path(sources[0]).stem}.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/emulator'}"]
    paths = [str(ROOT / source) for source in sources]
    command = [compiler(), *FLAGS, *WARNINGS, *flags, *includes, "-o", str(library), "-x", "c++", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Emulated:
    """A library's EXPORTED functions; one that returns text raises it as RuntimeError."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.count_launches.restype = ctypes.c_long

    def __call__(self, name: str, *arguments) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        if error := function(*arguments):
            raise RuntimeError(error.decode())

    def order(self, seed: int) -> None:
        """In which blocks, warps and lanes run: 0 forward, -1 backward, else shuffled by this seed."""
        self.library.set_order(ctypes.c_long(seed))

    def launches(self) -> int:
        return self.library.count_launches()


def assert_within_bounds(folder: Path, *sources: str) -> None:
    """Runs a program over buffers of the exact size under the address and undefined behaviour sanitizers."""
    program = build(folder, *sources, flags=["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-g"])
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == "nothing beyond its end\n"
