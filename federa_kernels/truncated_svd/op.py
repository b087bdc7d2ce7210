"""`truncated_svd`: checks and the public function."""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_float, check_rank, check_shape, failure
from . import batched, exact
from .single import METHODS, Options, Outcome, Prepared, by_threads, factor, in_threads, prepare, smallest


class TruncatedSVD(NamedTuple):
    """Leading singular triplets; the shapes below lose their G where one (N,K) matrix was given.

    U          (G,N,R)  orthonormal columns; of each, the entry largest in magnitude is positive
    S          (G,R)    descending
    Vh         (G,R,K)  orthonormal rows
    residual   (G,)     float64, max(||A V - U S||, ||A^T U - V S||) / ||A||, measured; 0 for a zero matrix
    matvecs    (G,)     int64, products with A or A^T spent by an iterative method; 0 for a direct one
    certified  (G,)     bool, the measured residuals bound the loss by tol, or the method was a full SVD
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


def _check_options(tol: float, method: str) -> None:
    if method not in METHODS:
        raise ValueError(failure("truncated_svd", "method", "be one of " + ", ".join(METHODS), repr(method)))
    if not 0 < tol < 1:
        raise ValueError(failure("truncated_svd", "tol", "be between 0 and 1", tol))


def _result(outcome: Outcome, device: torch.device) -> TruncatedSVD:
    U, S, Vh, _, residual = outcome.found
    home = residual.device
    matvecs = torch.tensor(outcome.matvecs, dtype=torch.int64, device=home)
    return TruncatedSVD(U.to(device), S.to(device), Vh.to(device), residual, matvecs,
                        torch.tensor(outcome.certified, device=home))  # fmt: skip


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever autocast and torch.set_float32_matmul_precision say."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _by_batches(matrices: Sequence[Tensor], rank: int, options: Options) -> dict[int, TruncatedSVD]:
    """What a GPU finds and certifies, by the number of the matrix; all others are factored one by one."""
    groups, results = defaultdict(list), {}
    if options.method in ("auto", "krylov") and not options.reproducible:
        for index, matrix in enumerate(matrices):
            if batched.takes(matrix, rank):
                groups[matrix.device, matrix.dtype, *sorted(matrix.shape)].append(index)
    goal = options.tol * (0.1 if options.verify else 1.0)  # so that what is lost does not look like a missing value
    for indices in groups.values():
        most = batched.most(matrices[indices[0]], rank)
        for some in (indices[i : i + most] for i in range(0, len(indices), most)):
            with torch.cuda.device_of(matrices[some[0]]):
                found = batched.factor([matrices[index].detach() for index in some], rank, goal)
            for index, factors in zip(some, found, strict=True):
                A = matrices[index]
                tall = A if A.shape[0] >= A.shape[1] else A.mT
                if factors and not (options.verify and not exact.none_is_missing(tall, factors[1], options.tol)):
                    results[index] = TruncatedSVD(*factors)
    return results


@full_precision()
def _factor_all(matrices: Sequence[Tensor], rank: int, options: Options) -> list[TruncatedSVD]:
    _check(matrices, rank)
    results = _by_batches(matrices, rank, options)
    waiting: dict[int, Prepared] = {}

    def put(index: int, outcome: Outcome) -> None:
        if options.reproducible and rank < min(matrices[index].shape) and outcome.gap < 1e-9:
            warnings.warn(
                f"truncated_svd: matrix {index} has no unique product of rank {rank}: "
                f"its singular values {rank} and {rank + 1} differ by {outcome.gap:.1e} of themselves",
                stacklevel=5,
            )
        results[index] = _result(outcome, matrices[index].device)

    def work_off() -> None:
        for (index, prepared), outcome in zip(
            waiting.items(), by_threads([*waiting.values()], rank, options), strict=True
        ):
            put(index, outcome or factor(prepared, rank, options))
        waiting.clear()

    for index, matrix in enumerate(matrices):
        if index in results:
            continue
        prepared = prepare(matrix, options, index)
        if not in_threads(prepared, rank, options):
            put(index, factor(prepared, rank, options))
            continue
        waiting[index] = prepared
        if len(waiting) >= 4 * torch.get_num_threads():  # more would hold more copies of 16-bit matrices than help
            work_off()
    if waiting:
        work_off()
    return [results[index] for index in range(len(matrices))]


@torch.no_grad()
def truncated_svd(
    matrices: Tensor | Sequence[Tensor],
    rank: int,
    *,
    tol: float = 1e-6,
    method: str = "auto",
    reproducible: bool = False,
    verify: bool = False,
) -> TruncatedSVD | list[TruncatedSVD]:
    """The `rank` leading singular triplets of one matrix, of a batch, or of a list of matrices of any shapes.

        A ~ U diag(S) V^T,        1 - ||U^T A||^2 / (s_1^2 + ... + s_R^2) <= tol

    matrices      (N,K), (G,N,K) or a list of (N,K); bfloat16 and float16 are factored in float32, float64 in float64
    rank          R, from 1 to min(N,K)
    tol           the energy that may be lost, as a part of what the best rank-R matrix captures
    method        full    LAPACK gesdd, or cuSOLVER on a GPU
                  gram    eigenvectors of the smaller of A^T A and A A^T
                  krylov  block Lanczos on it (arXiv 1504.05477), stopped by a bound on the loss; on a GPU whole batches
                          in a fixed number of steps, then the bound
                  auto    the one that measures fastest for the shape and rank
    reproducible  iterate, in float64, until U S V^T is within 1e-4 of what any device, thread count and seed gives;
                  warns, naming the gap, where singular values R and R + 1 are tied and no such product exists
    verify        count the singular values above the last by inertia (float64, min(N,K)^3 / 3 multiplications)

    Returns a TruncatedSVD, for a list one per matrix in the order given. A matrix whose certificate fails is factored
    again by the next surer method, gram, then full. Residuals prove singular triplets, not that these lead: a leading
    direction stays unseen where a random block of b uniform columns has less than d of its usual share in it, with a
    probability below (0.8 d)^b; a run that converges amplifies d = 1e-6, b = 4 enough to be seen, so below 1e-24 for
    each. More than b equal singular values are looked for when b are found. `verify` leaves nothing to chance.

    No global randomness is used: a matrix gives the same bits alone and among others, for one number of threads; on a
    GPU in any place of a batch of one size.
    Raises ValueError for shapes, the rank, options and entries that are not finite, TypeError for dtypes.
    """
    _check_options(tol, method)
    options = Options(tol, method, reproducible, verify)
    if not isinstance(matrices, Tensor):
        return _factor_all(list(matrices), rank, options)
    if matrices.dim() == 2:
        return _factor_all([matrices], rank, options)[0]
    if matrices.dim() != 3 or matrices.shape[0] == 0:
        raise ValueError(
            failure("truncated_svd", "matrices", "have shape (N, K) or (G, N, K) with G > 0", tuple(matrices.shape))
        )
    return TruncatedSVD(*map(torch.stack, zip(*_factor_all(matrices.unbind(), rank, options), strict=True)))


@torch.no_grad()
@full_precision()
def smallest_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N,R), S (R,), Vh (R,K) of the R smallest of min(N,K) singular values, descending; float64, signs canonical.

    Raises what `truncated_svd` raises.
    """
    _check([matrix], rank)
    U, S, Vh = smallest(matrix, rank)
    return U.to(matrix.device), S.to(matrix.device), Vh.to(matrix.device)
