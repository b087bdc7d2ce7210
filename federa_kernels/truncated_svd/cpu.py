"""The CPU path: block Krylov in C++, a matrix a thread."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import load_extension
from .exact import Triplets, finish, signed

FOUND, NOT_CONVERGED, ILL_CONDITIONED = range(3)


def block_of(rank: int) -> int:
    """Columns of a block: 768x768 and R = 16 need 92 columns with blocks of 4, 128 with 8, 176 with 16.

    At larger R the share of the block in them falls, and values that lie closer together want wider ones.
    """
    return 4 if rank < 24 else 8 if rank < 64 else 16


def by_gram(N: int, K: int) -> bool:
    """Whether to iterate on the smaller Gram matrix: where tile units (AMX) make it in the time of 8 products with A.

    3072x768: 3 of the 11 ms that 25 products take. A square one would save half of that and cost the same.
    """
    return max(N, K) >= 2 * min(N, K) and 64 <= min(N, K) <= 1536 and load_extension().has_tiles()


class Found(NamedTuple):
    """`following`: the Ritz value of A^T A after the R-th. Signs are canonical."""

    triplets: Triplets
    following: float
    matvecs: int


def available() -> bool:
    """Whether the module is built, with this function in it."""
    return hasattr(load_extension(), "truncated_svd")


def krylov(matrices: Sequence[tuple[Tensor, float]], rank: int, goal: float) -> list[Found | None]:
    """Of each (A (N,K) float32, contiguous, its norm): its leading triplets, or None without convergence.

    The norms must lie from 1e-12 to 1e12. Each matrix is the work of one thread, so that its bits do not depend on
    their number.
    """
    module: Any = load_extension()
    tasks, outputs, block = [], [], block_of(rank)
    for A, _ in matrices:
        N, K = A.shape
        columns = min(max(8 * rank + 64, min(N, K) // 2), 40 * rank + 256, min(N, K) - block)
        U, S, Vh = A.new_empty(N, rank), A.new_empty(rank), A.new_empty(rank, K)
        left = torch.empty(rank, dtype=torch.float64)
        outputs.append((U, S, Vh, left))
        addresses = (tensor.data_ptr() for tensor in outputs[-1])
        tasks.append((A.data_ptr(), N, K, A.stride(0), rank, block, columns, goal, by_gram(N, K), *addresses))
    results = module.truncated_svd(tasks, torch.get_num_threads())
    return [_found(*each) for each in zip(matrices, outputs, results, strict=True)]


def _found(matrix: tuple[Tensor, float], output: tuple[Tensor, ...], result: tuple) -> Found | None:
    (A, norm), (U, S, Vh, left), (status, right, following, matvecs) = matrix, output, result
    if status == NOT_CONVERGED:
        return None
    if status == ILL_CONDITIONED:
        triplets = signed(finish(A, Vh.mT, norm))
    else:
        residual = max(math.hypot(*left.tolist()), right) / norm
        triplets = Triplets(U, S, Vh, left, torch.tensor(residual, dtype=torch.float64))
    return Found(triplets, following, matvecs)
