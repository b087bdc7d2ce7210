"""Which kernels multiply on a GPU: Triton's, unless others were measured to be faster there for such a problem.

dispatch.json says which; `python -m benchmarks dispatch` writes it from measurements, and nobody by hand. Nothing is
timed when layers run, so the same run takes the same kernels every time.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import mma, sm90

KERNELS = ("triton", "mma", "sm90", "torch")
KINDS = tuple(f"{form} {phase}" for form in ("one", "clients", "shared") for phase in ("forward", "backward"))
TABLE = Path(__file__).with_name("dispatch.json")


def bucket(M: int, N: int, K: int, R: int) -> tuple[int, int, int, int]:
    """What an entry stands for: M from here to less than four times as many, N and K to less than twice as many, ranks
    that are padded to R. N and R are those of all projections together."""
    return 4 ** ((M.bit_length() - 1) // 2), 1 << N.bit_length() - 1, 1 << K.bit_length() - 1, padded(R)


def padded(R: int) -> int:
    """Components that the kernels multiply: a power of two from 16 on."""
    return max(16, 1 << (R - 1).bit_length())


def why_not(name: str) -> str | None:
    """What keeps this build from launching kernels of this name; None where nothing does."""
    return {"mma": mma.why_not, "sm90": sm90.why_not}.get(name, lambda: None)()


def able(name: str, kind: str, dtype: torch.dtype, arch: int) -> bool:
    """Whether kernels of this name are for such problems at all. PyTorch's loop over clients waits for the device."""
    if name == "torch":
        return not kind.startswith("clients")
    return name == "triton" or (dtype in mma.DTYPES and (name == "mma" or arch == 90))


@functools.cache
def entries() -> Mapping[tuple[Any, ...], tuple[str, ...]]:
    """(arch, dtype, kind, *bucket) -> the kernels that are faster than Triton's, fastest first."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["entries"]
    return {
        (row["arch"], getattr(torch, row["dtype"]), row["kind"], *(row[size] for size in "MNKR")): tuple(row["kernels"])
        for row in rows
    }


@functools.lru_cache(maxsize=2**12)
def fastest(kind: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int) -> str:
    """The kernels to take for a weight in the dtype of the rows, among those that this build has."""
    if min(M, N, K, R) < 1 or N % 8 or K % 8:  # nothing such is measured: rows beside 16 bytes go other ways
        return "triton"
    found = entries().get((arch, dtype, kind, *bucket(M, N, K, R)), ())
    return next((name for name in found if able(name, kind, dtype, arch) and not why_not(name)), "triton")


def measured(dtype: torch.dtype, arch: int) -> bool:
    """Whether anything but Triton's kernels is ever taken for this dtype on this GPU."""
    return any(key[:2] == (arch, dtype) for key in entries())
