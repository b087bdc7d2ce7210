"""One matrix from its checks to its triplets: scaling, choice of the method, certificate, fall-back, signs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import failure
from . import cpu, exact, krylov

METHODS = ("auto", "full", "gram", "krylov")


class Options(NamedTuple):
    tol: float
    method: str
    reproducible: bool
    verify: bool


class Scaled(NamedTuple):
    """A (N,K) times 2^-exponent, float32 or float64, contiguous; norm: its Frobenius norm."""

    A: Tensor
    norm: float
    exponent: int


class Outcome(NamedTuple):
    """Of a (N,K) with N >= K. `gap`: (s_R - s_R+1) / s_R."""

    found: exact.Triplets
    matvecs: int
    certified: bool
    gap: float


def scaled(matrix: Tensor, index: int, dtype: torch.dtype) -> Scaled:
    """Raises ValueError where an entry is not finite."""
    A = matrix.detach()
    # BLAS may round by alignment, and a matrix must give the same bits alone and in a batch.
    A = A.to(dtype, copy=not A.is_contiguous() or A.data_ptr() % 64 != 0).contiguous()
    norm = float(torch.linalg.vector_norm(A))
    if 1e-12 < norm < 1e12:  # false for NaN too; 4 ms for 4096x4096, where isfinite takes 150
        return Scaled(A, norm, 0)
    if bad := A.numel() - int(A.isfinite().sum()):
        raise ValueError(failure("truncated_svd", f"matrix {index}", "be finite", f"{bad} NaN or infinite entries"))
    exponent = int(torch.frexp(torch.linalg.vector_norm(A, float("inf")))[1])
    half = exponent // 2  # in two steps: 2^-exponent alone may be out of range
    A = A * 2.0**-half * 2.0 ** (half - exponent)
    return Scaled(A, float(torch.linalg.vector_norm(A)), exponent)


def pick(n: int, rank: int, compiled: bool) -> str:
    """The fastest method for n = min(N, K) by measurement: one core with AVX-512, torch 2.13 with MKL, scipy 1.17."""
    if n >= (5 * rank if compiled else max(48, 40 * rank)):
        return "krylov"
    return "full" if n <= 192 or 2 * rank >= n else "gram"


def _certified(A: Tensor, found: exact.Triplets, following: float, options: Options) -> bool:
    if exact.loss_bound(found, following) > options.tol:
        return False
    return not options.verify or exact.none_is_missing(A if A.shape[0] >= A.shape[1] else A.mT, found.S, options.tol)


def _gap(found: exact.Triplets, following: float) -> float:
    last = float(found.S[-1])
    return 1 - following**0.5 / last if last > 0 else 0.0


def _krylov(A: Tensor, rank: int, norm: float, options: Options) -> Outcome | None:
    """None where it did not converge."""
    bound, goal = (krylov.product_bound, 2e-5) if options.reproducible else (krylov.energy_bound, 0.5 * options.tol)
    if options.verify:
        goal *= 0.1  # so that what is lost does not look like a missing value
    columns = max(A.shape[1] // 2, 4 * rank)
    subspace = krylov.leading_subspace(krylov.dense(A[None]), rank, bound, goal, columns)
    if not bool(subspace.converged):
        return None
    found, following = exact.finish(A, subspace.V[0], norm), float(subspace.following)
    if exact.loss_bound(found, following) > options.tol or (
        options.verify and not exact.none_is_missing(A, found.S, options.tol)
    ):
        return None
    return Outcome(found, int(subspace.matvecs) + 2 * rank, True, _gap(found, following))


def _tall(A: Tensor, rank: int, norm: float, options: Options) -> Outcome:
    """The method asked for, and where its certificate fails the next, up to a full SVD."""
    if norm == 0:
        return Outcome(exact.zero(A, rank), 0, True, 0.0)
    method = pick(min(A.shape), rank, compiled=False) if options.method == "auto" else options.method
    if method == "krylov" and (outcome := _krylov(A, rank, norm, options)):
        return outcome
    if method != "full":
        found, following = exact.gram(A, rank, norm)
        if exact.loss_bound(found, following) <= options.tol:
            return Outcome(found, 0, True, _gap(found, following))
    found, following = exact.full(A, rank, norm)
    return Outcome(found, 0, True, _gap(found, following))


class Prepared(NamedTuple):
    """A matrix (N,K), scaled, and what is needed to give its triplets back in its own terms."""

    scaled: Scaled
    dtype: torch.dtype


def prepare(matrix: Tensor, options: Options, index: int) -> Prepared:
    """Raises ValueError where an entry is not finite."""
    # Apple's GPU has neither float64 nor an SVD: its matrices are factored, and measured, on the CPU.
    home = matrix.cpu() if matrix.device.type == "mps" else matrix
    double = options.reproducible or matrix.dtype == torch.float64
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return Prepared(scaled(home, index, torch.float64 if double else torch.float32), dtype)


def in_threads(prepared: Prepared, rank: int, options: Options) -> bool:
    """Whether C++ takes it, a matrix a thread."""
    A, norm, _ = prepared.scaled
    if A.device.type != "cpu" or A.dtype != torch.float32 or norm == 0 or options.method not in ("auto", "krylov"):
        return False
    return cpu.available() and (options.method == "krylov" or pick(min(A.shape), rank, compiled=True) == "krylov")


def by_threads(several: Sequence[Prepared], rank: int, options: Options) -> list[Outcome | None]:
    """The outcomes of C++, None where the certificate fails."""
    goal = options.tol * (0.07 if options.verify else 0.7)  # so that what is lost does not look like a missing value
    outcomes = []
    for each, found in zip(several, cpu.krylov([p.scaled[:2] for p in several], rank, goal), strict=True):
        outcome = None
        if found and _certified(each.scaled.A, found.triplets, found.following, options):
            outcome = Outcome(found.triplets, found.matvecs, True, _gap(found.triplets, found.following))
        outcomes.append(outcome and _restored(outcome, each))
    return outcomes


def _swapped(found: exact.Triplets) -> exact.Triplets:
    """Of the transposed matrix."""
    return found._replace(U=found.Vh.mT.contiguous(), Vh=found.U.mT.contiguous())


def factor(prepared: Prepared, rank: int, options: Options) -> Outcome:
    """The triplets of a matrix in torch."""
    A, norm, _ = prepared.scaled
    wide = A.shape[0] < A.shape[1]
    outcome = _tall(A.mT if wide else A, rank, norm, options)
    if wide:
        outcome = outcome._replace(found=_swapped(outcome.found))
    return _restored(outcome._replace(found=exact.signed(outcome.found)), prepared)


def _restored(outcome: Outcome, prepared: Prepared) -> Outcome:
    """In the scale and the dtype of the matrix."""
    found, dtype, exponent = outcome.found, prepared.dtype, prepared.scaled.exponent
    S = found.S
    if exponent:
        S = S * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    return outcome._replace(found=found._replace(U=found.U.to(dtype), S=S.to(dtype), Vh=found.Vh.to(dtype)))


def smallest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N,R), S (R,), Vh (R,K) of the R smallest of the min(N,K) singular values, descending, in canonical signs.

    Eigenvectors of the smaller Gram matrix in float64, where squaring costs nothing that float32 entries had.
    """
    home = matrix.cpu() if matrix.device.type == "mps" else matrix
    A, norm, exponent = scaled(home, 0, torch.float64)
    tall = A if A.shape[0] >= A.shape[1] else A.mT
    _, vectors = exact.leading_eigenvectors(-(tall.mT @ tall), rank)
    found = exact.finish(tall, vectors, norm)
    if tall is not A:
        found = _swapped(found)
    found = exact.signed(found)
    return found.U, torch.ldexp(found.S, torch.tensor(exponent)), found.Vh
