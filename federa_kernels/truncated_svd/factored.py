"""The leading singular triplets of a weighted sum of low-rank products, which itself is never formed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_rank, check_shape, failure
from . import exact, krylov
from .op import TruncatedSVD, full_precision

OVERSAMPLING = 8
MORE_STEPS = 6  # at most, by the pace so far, or clients count as unrelated: each costs a tenth of the Gram core

Pairs = Sequence[tuple[Tensor, Tensor]]


class Stacked:
    """M = left @ right, left (N,L) = [w_1 B_1, ...], right (L,K) = [A_1; ...], L the sum of all ranks."""

    def __init__(self, left: Tensor, right: Tensor):
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[1])
        self.dtype = left.dtype

    def __matmul__(self, X: Tensor) -> Tensor:
        return self.left @ (self.right @ X)

    @property
    def mT(self) -> "Stacked":
        return Stacked(self.right.mT, self.left.mT)


class Separate:
    """The same of factors left where they are.

    5.5 ms for M^T M X, 4.4 stacked (4096x4096, 32 pairs of rank 16, 24 columns), and none of the 5 to 10 to stack them.
    """

    def __init__(self, lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Sequence[float]):
        self.lefts, self.rights, self.weights = lefts, rights, weights
        self.shape = (lefts[0].shape[0], rights[0].shape[1])
        self.dtype, self.device = lefts[0].dtype, lefts[0].device

    def __matmul__(self, X: Tensor) -> Tensor:
        Y = X.new_zeros(self.shape[0], X.shape[1])
        for left, right, weight in zip(self.lefts, self.rights, self.weights, strict=True):
            Y.addmm_(left, right @ X, alpha=weight)
        return Y

    @property
    def mT(self) -> "Separate":
        return Separate([A.mT for A in self.rights], [B.mT for B in self.lefts], self.weights)


def _check(pairs: Pairs, weights: Sequence[float] | Tensor, rank: int) -> None:
    if not pairs:
        raise ValueError(failure("factored_svd", "pairs", "not be empty", "no pair"))
    if len(weights) != len(pairs):
        raise ValueError(
            failure("factored_svd", "weights", f"have one entry for each of {len(pairs)} pairs", len(weights))
        )
    N, K, device = pairs[0][0].shape[0], pairs[0][1].shape[-1], pairs[0][0].device
    for index, (lora_B, lora_A) in enumerate(pairs):
        check_shape("factored_svd", f"lora_B {index}", lora_B, N=N, R=None)
        check_shape("factored_svd", f"lora_A {index}", lora_A, R=lora_B.shape[1], K=K)
        for name, factor in (("lora_B", lora_B), ("lora_A", lora_A)):
            check_float("factored_svd", f"{name} {index}", factor)
            check_device("factored_svd", f"{name} {index}", factor, device)
    check_rank("factored_svd", rank, (N, K))


def _separate(pairs: Pairs, weights: Sequence[float] | Tensor) -> Separate:
    dtype = torch.float32
    for factor in (factor for pair in pairs for factor in pair):
        dtype = torch.promote_types(dtype, factor.dtype)
    lefts, rights = ([factor.detach().to(dtype) for factor in side] for side in zip(*pairs, strict=True))
    return Separate(lefts, rights, [float(weight) for weight in weights])


def _stack(M: Separate, pairs: Pairs) -> tuple[Stacked, float]:
    """Both factors, scaled where squares would leave the range of the dtype; and the scale they lost."""
    left = torch.cat([B * weight for B, weight in zip(M.lefts, M.weights, strict=True)], 1)
    right = torch.cat(list(M.rights))
    scale = 1.0
    for factor in (left, right):
        if 1e-12 < torch.linalg.vector_norm(factor) < 1e12:
            continue
        _check_finite(pairs, M.weights)
        if largest := float(torch.linalg.vector_norm(factor, float("inf"))) if factor.numel() else 0.0:
            factor.div_(largest)
            scale *= largest
    return Stacked(left, right), scale


def _check_finite(pairs: Pairs, weights: Sequence[float] | Tensor) -> None:
    for index, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        if not math.isfinite(weight):
            raise ValueError(failure("factored_svd", f"weight {index}", "be finite", float(weight)))
        for name, factor in zip(("lora_B", "lora_A"), pair, strict=True):
            if bad := factor.numel() - int(factor.isfinite().sum()):
                actual = f"{bad} NaN or infinite entries"
                raise ValueError(failure("factored_svd", f"{name} {index}", "be finite", actual))


def _start(M: Separate, rank: int, warm_start: Tensor | None) -> Tensor | None:
    """(1,K,b): what last round found, and M^T of random columns, which already lean to what leads.

    None where they are out of range or not finite: every entry of every factor is in them.
    """
    N, K = M.shape
    known = 0 if warm_start is None else warm_start.shape[0]
    width = min(max(rank, known) + OVERSAMPLING, K)
    start = M.mT @ krylov.uniform(0, N, width - known).to(M.device, M.dtype)
    norms = torch.linalg.vector_norm(start, dim=0)
    if not (float(norms.min()) > 1e-12 and float(norms.max()) < 1e12):
        return None
    start = start / norms
    return start[None] if warm_start is None else torch.cat([warm_start.mT.to(start), start], 1)[None]


def _finish(M: Stacked | Separate, V: Tensor, following: float, tol: float) -> tuple[exact.Triplets, bool]:
    found = exact.finish(M, V, 1.0)
    return found, exact.loss_bound(found, following) <= tol


def _by_iteration(M: Separate, rank: int, tol: float, warm_start: Tensor | None) -> tuple[exact.Triplets | None, int]:
    """Subspace iteration, certified at every step; None in the place of triplets that are not, and the products spent.

    The block Krylov space of a second block holds more, but related clients leave so wide a gap after R that the next
    power alone is enough, and its certificate comes with it: 32 clients 30 % apart take 5 products instead of 7.
    """
    if (start := _start(M, rank, warm_start)) is None:
        return None, 0
    nothing, block, spent, before = start[..., :0], start.shape[-1], start.shape[-1], 0.0
    while True:
        Q = krylov._next_block(start, nothing, spent)[0][0]
        W = (M @ Q).double()
        theta, rotation = torch.linalg.eigh(W.mT @ W)
        theta, rotation = theta.flip(0).clamp(min=0), rotation.flip(1)
        spent += 2 * block
        if not theta[rank - 1] > 1e-6 * theta[0]:  # M Q is too far from orthogonal columns for its Gram matrix
            return None, spent
        S = theta.clamp(min=1e-12 * float(theta[0])).sqrt()
        W = W @ rotation
        U, V = (W / S).to(M.dtype), Q @ rotation.to(M.dtype)
        Y = M.mT @ U
        S, lead = S.to(M.dtype), slice(0, rank)
        left = torch.linalg.vector_norm((Y - V * S)[:, lead].double(), dim=0)
        right = torch.linalg.vector_norm((W - U.double() * S)[:, lead])
        found = exact.Triplets(U[:, lead].contiguous(), S[lead], V[:, lead].mT.contiguous(), left,
                               torch.maximum(right, torch.linalg.vector_norm(left)))  # fmt: skip
        lost = exact.loss_bound(found, float(theta[rank]) if rank < block else 0.0)
        if lost <= 0.5 * tol:
            return found, spent
        if (before and lost * (lost / before) ** MORE_STEPS > tol) or not math.isfinite(lost):
            return None, spent
        start, before = Y[None], lost


def _by_gram_core(M: Stacked, rank: int, tol: float) -> exact.Triplets | None:
    """None where it is not certified.

    M^T M has the eigenvalues of L^T right right^T L, where left^T left = L L^T (N,K >= the sum of ranks)."""
    gram = (M.left.mT @ M.left).double()
    gram.diagonal().add_(torch.finfo(M.dtype).eps * gram.diagonal().max())
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info) or not bool(gram.isfinite().all()):
        return None
    lower = lower.to(M.dtype)
    core = lower.mT @ ((M.right @ M.right.mT) @ lower)
    values, vectors = exact.leading_eigenvectors((core + core.mT) / 2, min(rank + 1, core.shape[0]))
    following = max(float(values[rank]), 0.0)  # there are 4 times as many as the rank
    V = M.right.mT @ (lower @ vectors[:, :rank])
    V = V / torch.linalg.vector_norm(V, dim=0).clamp(min=torch.finfo(V.dtype).tiny)
    if float(values[rank - 1]) <= 1e-6 * float(values[0]):
        return None
    found, certified = _finish(M, V, following, tol)
    return found if certified else None


def _by_qr_core(M: Stacked, rank: int) -> exact.Triplets:
    """QR of both factors and the SVD of what is between them, in float64."""
    wide = torch.float64
    left, right = M.left.to(wide), M.right.mT.to(wide)
    extra = max(0, rank - left.shape[1])  # a rank above the sum of ranks is filled with orthonormal columns
    left, right = (torch.cat([f, krylov.uniform(1, f.shape[0], extra).to(f)], 1) for f in (left, right))
    (Q, T), (P, W) = torch.linalg.qr(left), torch.linalg.qr(right)
    inner = M.left.shape[1]
    U, S, Vh = torch.linalg.svd(T[:, :inner] @ W[:, :inner].mT)
    U, S, Vh = (Q @ U[:, :rank]).to(M.dtype), S[:rank].to(M.dtype), (Vh[:rank] @ P.mT).to(M.dtype)
    left = torch.linalg.vector_norm((M.mT @ U - Vh.mT * S).double(), dim=0)
    right = torch.linalg.vector_norm((M @ Vh.mT - U * S).double())
    return exact.Triplets(U, S, Vh, left, torch.maximum(right, torch.linalg.vector_norm(left)))


@torch.no_grad()
@full_precision()
def factored_svd(
    pairs: Pairs,
    weights: Sequence[float] | Tensor,
    rank: int,
    warm_start: TruncatedSVD | Tensor | None = None,
    *,
    tol: float = 1e-6,
) -> TruncatedSVD:
    """The leading singular triplets of a weighted sum of products, from its factors alone.

        M = sum_c w_c B_c A_c ~ U diag(S) V^T

    pairs       [(B_c (N,R_c), A_c (R_c,K)), ...], any float dtypes; ranks may differ; float64 if one of them is
    weights     w_c, one number a pair
    rank        R, from 1 to min(N,K); above the rank of M singular values are 0 and vectors orthonormal
    warm_start  last round's result, or its Vh (R',K): a block to start from
    tol         the energy that may be lost, as for `truncated_svd`

    Subspace iteration with a measured stop; where clients have too little in common for it, the eigenvectors of the
    Gram core, and where its certificate fails QR of both factors in float64. `residual` is measured and relative to
    what was captured, sqrt(s_1^2 + ... + s_R^2). Peak memory: `svd_memory_needed`.
    Raises ValueError for shapes, devices, the rank and entries that are not finite, TypeError for dtypes.
    """
    pairs = list(pairs)
    _check(pairs, weights, rank)
    M, found, matvecs, scale = _separate(pairs, weights), None, 0, 1.0
    (N, K), inner = M.shape, sum(left.shape[1] for left in M.lefts)
    iterate = 4 * rank <= inner and inner > 64
    if iterate:
        warm = warm_start.Vh if isinstance(warm_start, TruncatedSVD) else warm_start
        if warm is not None and N < K:  # the factors of a wide M swap sides: its left vectors are iterated on
            warm = warm_start.U.mT if isinstance(warm_start, TruncatedSVD) else (M @ warm.mT.to(M.lefts[0])).mT
        found, matvecs = _by_iteration(M if N >= K else M.mT, rank, tol, warm)
    if found is None:
        stacked, scale = _stack(M, pairs)
        tall = stacked if N >= K else stacked.mT
        found = _by_gram_core(tall, rank, tol) if iterate else None
        found = found or _by_qr_core(tall, rank)
    if N < K:
        found = found._replace(U=found.Vh.mT.contiguous(), Vh=found.U.mT.contiguous())
    found = exact.signed(found)
    norm = torch.linalg.vector_norm(found.S.double())
    residual = torch.where(norm > 0, found.residual / norm, 0.0)
    spent, certified = (torch.tensor(value, device=M.device) for value in (matvecs, True))
    return TruncatedSVD(found.U, found.S * scale, found.Vh, residual, spent, certified)


def svd_memory_needed(
    N: int, K: int, ranks: Sequence[int], rank: int, dtype: torch.dtype = torch.float32, *, upto: str = "qr"
) -> int:
    """Bytes that `factored_svd` allocates at its peak, at most, beside its factors in `dtype`.

    dtype  float32, or float64 where a factor has it; factors stored in 16 bits are copied to it, which is not counted
    upto   iteration  related clients
           gram       unrelated clients too
           qr         the last resort too, which float64 and rounding need at times
    """
    size, inner, block = dtype.itemsize, sum(ranks), rank + OVERSAMPLING
    small, large = sorted((N, K))
    needed = block * (large + small) * (3 * size + 24)
    if upto in ("gram", "qr"):
        stacked = 2 * size * (N + K) * inner
        core = inner * inner * (3 * 8 + 4 * size) + rank * (N + K) * (8 + size)
        needed = max(needed, stacked + core)
        if upto == "qr":
            wide = max(inner, rank)
            needed = max(needed, stacked + 8 * (3 * (N + K) * wide + 6 * wide * wide))
    elif upto != "iteration":
        raise ValueError(failure("svd_memory_needed", "upto", "be one of iteration, gram, qr", repr(upto)))
    return needed
