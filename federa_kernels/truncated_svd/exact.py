"""Direct methods, and what turns a subspace into singular triplets with a measured residual."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference


class Triplets(NamedTuple):
    """U (N,R), S (R,), Vh (R,K) in the dtype of A, before signs are fixed; `left` (R,) ||A^T u - s v|| in float64."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    left: Tensor
    residual: Tensor  # (), float64, max(||A V - U S||, ||A^T U - V S||) / ||A||


def finish(A: Any, V: Tensor, norm: float) -> Triplets:
    """Rayleigh-Ritz on a subspace: the SVD of A V through a QR in float64, whatever the conditioning of A V.

    A (N,K), or what multiplies like it; V (K,R) nearly orthonormal, norm: ||A||
    """
    V = V.double()
    lower = torch.linalg.cholesky(V.mT @ V)
    V = torch.linalg.solve_triangular(lower.mT, V, upper=True, left=False)
    Q, T = torch.linalg.qr((A @ V.to(A.dtype)).double())
    rotation, S, Zh = torch.linalg.svd(T)
    U, Vh = Q @ rotation, Zh @ V.mT
    right = torch.linalg.vector_norm(T @ Zh.mT - rotation * S)
    U, S, Vh = U.to(A.dtype), S.to(A.dtype), Vh.to(A.dtype)
    left = torch.linalg.vector_norm((A.mT @ U - Vh.mT * S).double(), dim=0)
    return Triplets(U, S, Vh, left, torch.maximum(right, torch.linalg.vector_norm(left)) / norm)


def full(A: Tensor, rank: int, norm: float) -> tuple[Triplets, float]:
    """All singular triplets by LAPACK or cuSOLVER, the leading ones kept; and the square of the next.

    Small matrices in float64: float32 mixes vectors whose values differ by 1e-6, which can cost 1e-6 of the energy.
    """
    U, S, Vh = torch.linalg.svd(A.double() if min(A.shape) <= 192 else A, full_matrices=False)
    following = _next(S.double().square(), rank)
    U, S, Vh = (f.to(A.dtype) for f in (U[:, :rank], S[:rank].clone(), Vh[:rank]))
    U, Vh = _polished(U), _polished(Vh.mT).mT.contiguous()
    left = torch.linalg.vector_norm((A.mT @ U - Vh.mT * S).double(), dim=0)
    right = torch.linalg.vector_norm((A @ Vh.mT - U * S).double())
    return Triplets(U, S, Vh, left, torch.maximum(right, torch.linalg.vector_norm(left)) / norm), following


def _polished(U: Tensor) -> Tensor:
    """One Newton-Schulz step towards orthonormal columns: LAPACK's sgesdd leaves up to 1e-5, this 5e-7."""
    excess = U.mT @ U
    excess.diagonal().sub_(1)
    return U - 0.5 * (U @ excess)


def gram(A: Tensor, rank: int, norm: float) -> tuple[Triplets, float]:
    """The leading eigenvectors of A^T A (N >= K) and Rayleigh-Ritz on them; and the next eigenvalue.

    Squaring costs the small singular values their digits, the leading ones nothing that counts (loss 1e-12).
    LAPACK syevr for a part of the spectrum where scipy is installed (768x768, R=16: 18 ms, all of it 37 ms).
    Float32 leaves every eigenvalue off by some 1e-7 n^(1/2) of the largest: float64 where that may change their order,
    and where it costs nothing.
    """
    count = min(rank + 1, A.shape[1])
    values = vectors = torch.empty(0)
    if A.shape[1] > 128 or A.dtype == torch.float64:
        values, vectors = leading_eigenvectors(A.mT @ A, count)
    if not len(values) or (A.dtype != torch.float64 and float(values[rank - 1]) < 1e-3 * float(values[0])):
        wide = A.double()
        values, vectors = leading_eigenvectors(wide.mT @ wide, count)
    following = _next(values.double().clamp(min=0), rank)
    return finish(A, vectors[:, :rank], norm), following


def _next(values: Tensor, rank: int) -> float:
    return float(values[rank]) if rank < values.shape[0] else 0.0


def leading_eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """In descending order."""
    n = gram.shape[0]
    eigh = _scipy_eigh() if gram.device.type == "cpu" and 4 * count < n else None
    if eigh is not None:
        found = eigh(gram.numpy(), subset_by_index=[n - count, n - 1], driver="evr", check_finite=False)
        values, vectors = map(torch.from_numpy, found)
    if eigh is None or len(values) < count:  # syevr returned 13 of 17 for A^T A of an orthogonal A
        values, vectors = torch.linalg.eigh(gram)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def _scipy_eigh():
    try:
        from scipy.linalg import eigh
    except ImportError:
        return None
    return eigh


def zero(A: Tensor, rank: int) -> Triplets:
    """The triplets of a zero matrix: unit vectors."""
    N, K = A.shape
    U, Vh = torch.eye(N, rank, dtype=A.dtype, device=A.device), torch.eye(rank, K, dtype=A.dtype, device=A.device)
    nothing = torch.zeros(rank, dtype=torch.float64, device=A.device)
    return Triplets(U, nothing.to(A.dtype), Vh, nothing, nothing.sum())


def none_is_missing(A: Tensor, S: Tensor, tol: float) -> bool:
    """Whether the triplets found are the leading ones, up to a loss of tol, by Sylvester's law of inertia.

    With mu such that sum_i max(mu - s_i^2, 0) = tol / 2 sum_i s_i^2, the pivots of A^T A - mu I = L D L^T tell how many
    eigenvalues exceed mu: if as many as were found above it, what is missing cannot add more than that sum.
    Float64, K^3 / 3 + N K^2 multiplications; A (N,K), N >= K.
    """
    theta = S.double().square()
    gram = A.double().mT @ A.double()
    for level in (1.0, 0.5, 0.25):  # a value found just below mu may in truth lie just above it
        mu = _water_level(theta, 0.5 * tol * level * theta.sum())
        shifted = gram.clone()
        shifted.diagonal().sub_(mu)
        if _positive_pivots(shifted) == int((theta > mu).sum()):
            return True
    return False


def _water_level(theta: Tensor, volume: Tensor) -> Tensor:
    """mu with sum_i max(mu - theta_i, 0) = volume."""
    ascending = theta.flip(0)
    count = torch.arange(1, theta.shape[0] + 1, dtype=theta.dtype, device=theta.device)
    levels = (ascending.cumsum(0) + volume) / count  # the level if it covered just the first 1, 2, ... values
    return levels.min()


def _positive_pivots(matrix: Tensor) -> int:
    LD, pivots, _ = torch.linalg.ldl_factor_ex(matrix)  # an exact zero among the pivots is no error here
    diagonal, pairs = LD.diagonal(), int((pivots < 0).sum())  # each 2x2 pivot has one eigenvalue of either sign
    return int(((diagonal > 0) & (pivots > 0)).sum()) + pairs // 2


def signed(found: Triplets) -> Triplets:
    U, Vh = reference.canonical_signs(found.U, found.Vh)
    return found._replace(U=U, Vh=Vh)


def loss_bound(found: Triplets, following: float) -> float:
    """krylov.energy_bound with the measured residuals: ||A^T A v - s^2 v|| = s ||A^T u - s v||."""
    S = found.S.tolist()
    captured = sum(s * s for s in S)
    lost = 0.0
    for s, left in zip(S, found.left.tolist(), strict=True):
        coupling, gap = s * left, s * s - following
        lost += min(coupling, coupling * coupling / gap) if gap > 0 else coupling
    return lost / captured if captured > 0 else 0.0
