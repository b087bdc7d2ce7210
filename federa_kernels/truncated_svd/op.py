"""`truncated_svd`: checks and the public function over `reference`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_float, check_rank, check_shape, failure
from . import reference


class TruncatedSVD(NamedTuple):
    """Leading singular triplets; the shapes below lose their G where one (N,K) matrix was given.

    U          (G,N,R)  orthonormal columns; of each, the entry largest in magnitude is positive
    S          (G,R)    descending
    Vh         (G,R,K)  orthonormal rows
    residual   (G,)     float64, max(||A V - U S||, ||A^T U - V S||) / ||A||, measured; 0 for a zero matrix
    matvecs    (G,)     int64, products with A or A^T spent by an iterative method; 0 for a direct one
    certified  (G,)     bool, the triplets are known to be the leading ones; a full SVD always is
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor
    matvecs: Tensor
    certified: Tensor


def _check(matrices: Sequence[Tensor], rank: int) -> None:
    for index, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor):
            raise TypeError(failure("truncated_svd", f"matrix {index}", "be a tensor", type(matrix).__name__))
        check_shape("truncated_svd", f"matrix {index}", matrix, N=None, K=None)
        check_float("truncated_svd", f"matrix {index}", matrix)
        check_rank("truncated_svd", rank, tuple(matrix.shape))
        if bad := matrix.numel() - int(matrix.isfinite().sum()):
            raise ValueError(failure("truncated_svd", f"matrix {index}", "be finite", f"{bad} NaN or infinite entries"))


def _one(matrix: Tensor, rank: int) -> TruncatedSVD:
    # A copy of its own: BLAS may round by alignment, and a matrix must give the same bits alone and in a batch.
    # Apple's GPU has neither float64 nor an SVD: its matrices are factored, and measured, on the CPU.
    home = "cpu" if matrix.device.type == "mps" else matrix.device
    A = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32), copy=True).to(home)
    factors = reference.truncated_svd(A, rank)
    matvecs = torch.zeros((), dtype=torch.int64, device=home)
    certified = torch.ones((), dtype=torch.bool, device=home)
    measured = reference.residual(A, *factors)
    return TruncatedSVD(*(factor.to(matrix.device) for factor in factors), measured, matvecs, certified)


@torch.no_grad()
def truncated_svd(matrices: Tensor | Sequence[Tensor], rank: int) -> TruncatedSVD | list[TruncatedSVD]:
    """The `rank` leading singular triplets of one matrix, of a batch, or of a list of matrices of any shapes.

        A ~ U diag(S) V^T

    matrices  (N,K), (G,N,K) or a list of (N,K); bfloat16 and float16 are factored in float32, float64 in float64
    rank      R, from 1 to min(N,K)

    Returns a TruncatedSVD, for a list one per matrix in the order given. Matrices are factored one after another, so
    that each gives the same bits alone and among others. Raises ValueError for shapes, the rank and entries that are
    not finite, TypeError for dtypes.
    LAPACK gesdd on the CPU, cuSOLVER on a GPU (`torch.linalg.svd`).
    """
    if not isinstance(matrices, Tensor):
        matrices = list(matrices)
        _check(matrices, rank)
        return [_one(matrix, rank) for matrix in matrices]
    if matrices.dim() == 2:
        _check([matrices], rank)
        return _one(matrices, rank)
    if matrices.dim() != 3 or matrices.shape[0] == 0:
        raise ValueError(
            failure("truncated_svd", "matrices", "have shape (N, K) or (G, N, K) with G > 0", tuple(matrices.shape))
        )
    _check(matrices.unbind(), rank)
    parts = [_one(matrix, rank) for matrix in matrices.unbind()]
    return TruncatedSVD(*map(torch.stack, zip(*parts, strict=True)))
