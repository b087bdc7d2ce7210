"""The CPU path: packed frozen weights and C++ kernels."""

from torch import Tensor, dtype


def packs(rows: dtype, weight: Tensor) -> bool:
    """Whether a packed form of this weight serves rows of this dtype on this machine."""
    return False


def takes(rows: dtype, rank: int) -> bool:
    return False
