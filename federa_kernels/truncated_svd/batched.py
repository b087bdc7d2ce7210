"""The GPU path: all matrices of one shape at once, in a fixed number of launches that look at nothing they find.

Block Lanczos on A^T A with full reorthogonalisation, as krylov.py's but for a fixed number of steps; the leading
eigenpairs of the projected matrix, or of A^T A where R is no small part of K, by Chebyshev iteration (Zhou and Saad
2007); Rayleigh-Ritz on A V, and a bound on the loss from measured residuals. What is no product of matrices is a panel
or an eigenproblem as small as a block.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, krylov, reference

OVERSAMPLING = 8  # beside R columns a block: memory decides on a GPU, so wide blocks and few readings of A
DEGREE = 6  # of the Chebyshev polynomials
STEEP = 2.5  # where Ritz values far above the rest are moved to, which are mapped to [-1, 1]
LIFT = 256.0  # brings columns of norm 1 out of what float16 rounds to multiples of 6e-8
RUNS = 2  # each from what the one before found
MOST_BYTES = 2**31  # of copies at a time


class Leading(NamedTuple):
    """Of a batch A (G,N,K) with N >= K.

    U         (G,N,R)  orthonormal columns
    S         (G,R)    descending
    V         (G,K,b)  orthonormal columns, of which the first R are the right singular vectors
    residual  (G,)     float64, max(||A V - U S||, ||A^T U - V S||) / ||A||
    lost      (G,)     float64, the bound on the loss; infinite or NaN where nothing can be said
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    lost: Tensor


def takes(A: Tensor, rank: int) -> bool:
    """Whether a matrix is for this path; smaller ones are little work for a direct method."""
    return A.device.type == "cuda" and A.dtype != torch.float64 and min(A.shape) >= 4 * (rank + OVERSAMPLING)


def most(A: Tensor, rank: int) -> int:
    """How many matrices like it to take at a time."""
    n = min(A.shape)
    m = steps_for(n, rank, 1e-6) * (rank + OVERSAMPLING) or n
    return max(1, MOST_BYTES // (A.dtype.itemsize * A.numel() + 4 * n * m + 16 * m * m))


def steps_for(n: int, rank: int, goal: float) -> int:
    """Blocks of the Krylov space of n = min(N, K) columns; 0 where that would not be much smaller than n.

    At 1e-6 and R = 16 11 for 384, 12 for 768 and 15 for 4096; one more divides the bound by about 16, and ranks twice
    as high take one more.
    """
    b = rank + OVERSAMPLING
    if n < 16 * b:
        return 0
    return max(2, min(n.bit_length() + b.bit_length() - 8 + math.ceil(-math.log(goal, 16)), n // b - 1))


class Products:
    """`scale` A times panels in float32; where A has 16 bits, panels are split into parts of 16 bits.

    Such products are exact in float32: in an iteration two parts do as well as float32, three parts are float32.
    """

    def __init__(self, A: Tensor, norms: Tensor):
        self.A = A
        exponents = torch.zeros_like(norms) if A.dtype == torch.float32 else -torch.frexp(norms)[1]
        self.scale = torch.ldexp(torch.ones_like(norms), exponents)[:, None, None]
        self.lowered = self.scale / LIFT

    def __call__(self, X: Tensor, *, transposed: bool = False, parts: int = 2) -> Tensor:
        A = self.A.mT if transposed else self.A
        if A.dtype == torch.float32:
            return torch.bmm(A, X)
        split = X.new_empty(*X.shape[:2], parts, X.shape[2], dtype=A.dtype)
        rest = X * LIFT
        for i in range(parts):
            rest = rest - split[:, :, i - 1] if i else rest
            split[:, :, i] = rest
        return cuda.product(A, split.flatten(2)).unflatten(2, (parts, -1)).sum(2).mul_(self.lowered)

    def gram(self) -> Tensor:
        """`scale`^2 A^T A."""
        if self.A.dtype == torch.float32:
            return torch.bmm(self.A.mT, self.A)
        return cuda.product(self.A.mT, self.A).mul_(self.scale.square())


def _projected(A: Products, start: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Krylov space of start (G,K,b): basis (G,K,steps b), A^T A projected to it in float64, and whether each block
    came out orthogonal to the others (G,)."""
    G, K, b = start.shape
    basis, inner = start.new_empty(G, K, steps * b), start.new_empty(G, steps, b, b)
    first, second = (start.new_empty(G, steps, b, b, dtype=torch.float64) for _ in range(2))
    Y = start
    for step in range(steps):
        known, block = basis[..., : step * b], basis[..., step * b : (step + 1) * b]
        fresh = noise[step : step + K]
        for factors, Q in ((first, start.new_empty(G, K, b)), (second, block)):
            if step:
                Y = torch.baddbmm(Y, known, known.mT @ Y, alpha=-1)
            cuda.orthonormalise(Y, fresh, Q, factors[:, step])
            Y = Q
        W = A(block)
        torch.bmm(W.mT, W, out=inner[:, step])
        if step + 1 < steps:
            Y = A(W, transposed=True)
    H = start.new_zeros(G, steps, b, steps, b, dtype=torch.float64)
    H.diagonal(0, 1, 3).copy_(inner.permute(0, 2, 3, 1))
    coupling = (second @ first)[:, 1:]
    H.diagonal(-1, 1, 3).copy_(coupling.permute(0, 2, 3, 1))
    H.diagonal(1, 1, 3).copy_(coupling.permute(0, 3, 2, 1))
    sound = second.diagonal(dim1=-2, dim2=-1).amin((1, 2)) > 0.01
    return basis, H.view(G, steps * b, steps * b), sound


def _ritz_vectors(H: Tensor, X: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (G,m,b) of a positive semidefinite H (G,m,m) float64; what their values gained last.

    X (G,m,b): orthonormal, to start from. Filters by Chebyshev polynomials on [0, the least Ritz value], between which
    Ritz vectors are taken. Those that are found and lie far above the rest are moved down to STEEP: the filter would
    raise what is left of them in others above everything else.
    """
    G, m, b = X.shape
    theta, R = H.new_zeros(G, b), H.new_empty(G, b, b)
    turns = max(5, b.bit_length())  # R = 16: 30 products with H, R = 128: 48
    for turn in range(turns + 1):
        image, before = H @ X, theta
        theta, rotation = cuda.eigenpairs(X.mT @ image)
        X = X @ rotation
        if turn == turns:
            break
        cut = torch.maximum(theta[:, -1:], 1e-8 * theta[:, :1])  # [0, cut] becomes [-1, 1]
        above = torch.sub(theta, cut, alpha=(1 + STEEP) / 2)
        off = torch.linalg.vector_norm(torch.addcmul(image @ rotation, X, theta[:, None], value=-1), dim=1)
        kept = (above > 0) & (off < torch.add(1e-6 * cut, theta[:, :1], alpha=3e-13))
        mapped = torch.baddbmm(H, X * (above * kept)[:, None], X.mT, alpha=-1)
        mapped.mul_((2 / cut)[:, None]).diagonal(dim1=-2, dim2=-1).sub_(1)
        last, filtered = X, mapped @ X
        for _ in range(DEGREE - 1):
            last, filtered = filtered, torch.baddbmm(last, mapped, filtered, beta=-1, alpha=2)
        filtered = filtered / torch.linalg.vector_norm(filtered, dim=1, keepdim=True)
        X = torch.where(kept[:, None], X, filtered)
        for repeat in range(2):
            cuda.orthonormalise(X, noise[2 * turn + repeat :][:m], X, R)
    return X, (theta - before).abs()


def random_rows(K: int, b: int, device: torch.device) -> Tensor:
    """(K + K // 4, b): rows 0 to K are a block to start from, others stand in where a block finds nothing new."""
    return (krylov.uniform(0, K + K // 4, b) * 2.0 ** -(K.bit_length() // 2)).to(device, torch.float32)


def leading_fixed(A: Tensor, start: Tensor, noise: Tensor, rank: int, steps: int) -> Leading:
    """The R leading singular triplets of each of a batch, with the bound on their loss that was measured.

    A      (G,N,K)  N >= K; float32, bfloat16 or float16, which is not copied
    start  (G,K,b)  float32, R < b: random_rows(...)[:K], or the V of an earlier call
    noise           random_rows(K, b, device)
    steps           blocks of the Krylov space; 0 takes all space, the eigenvectors of A^T A

    Never synchronises, and launches depend on shapes alone: with the kernels of csrc/cuda the call can be captured in a
    CUDA graph (torch's eigh, which replaces them elsewhere, waits for the device). Reads A 2 steps + 2 times.
    """
    norms = torch.linalg.vector_norm(A, dim=(1, 2), dtype=torch.float32)
    times = Products(A, norms)
    G, K, b = start.shape
    R = start.new_empty(G, b, b, dtype=torch.float64)
    if steps:
        basis, H, sound = _projected(times, start, noise, steps)
        X, gained = _ritz_vectors(
            H, torch.eye(steps * b, b, dtype=H.dtype, device=H.device).expand(G, -1, -1), noise.double()
        )
        V = basis @ X.to(basis.dtype)
    else:
        X, sound = start.new_empty(G, K, b, dtype=torch.float64), norms > 0
        cuda.orthonormalise(start.double(), noise[:K].double(), X, R)
        X, gained = _ritz_vectors(times.gram().double(), X, noise.double())
        V = X.to(start.dtype)
    for _ in range(2):
        cuda.orthonormalise(V, noise[:K], V, R)
    W = times(V, parts=3)
    wide = W.double()
    theta, rotation = cuda.eigenpairs(wide.mT @ wide)
    theta = theta.clamp(min=0)
    sound = sound & (R.diagonal(dim1=-2, dim2=-1).amin(-1) > 0.9) & (theta[:, rank - 1] > 1e-8 * theta[:, 0])
    sound = sound & (norms > 1e-12) & (norms < 1e12)
    values = theta[:, :rank].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    image, V = wide @ rotation[..., :rank], (V.double() @ rotation).to(V.dtype)
    U, S = (image / values[:, None]).to(V.dtype), values[:, None].to(V.dtype)
    left = torch.linalg.vector_norm(times(U, transposed=True, parts=3) - V[..., :rank] * S, dim=1, dtype=torch.float64)
    right = torch.linalg.vector_norm(image - U * S, dim=(1, 2))
    lost = krylov.energy_bound(values.square(), values * left, theta[:, rank] + gained[:, rank])
    lost = lost + gained[:, :rank].sum(-1) / theta[:, :rank].sum(-1)
    scale = times.scale[:, 0, 0]
    residual = torch.maximum(torch.linalg.vector_norm(left, dim=1), right) / (norms * scale)
    return Leading(U, S[:, 0] / scale[:, None], V, residual, lost.masked_fill(~sound, torch.inf))


def factor(matrices: Sequence[Tensor], rank: int, goal: float) -> list[tuple[Tensor, ...] | None]:
    """(U, S, Vh, residual, matvecs, certified) of each; None where the bound on the loss is not below `goal`.

    matrices  of one device and dtype, (N,K) or (K,N)

    Waits for the device once a run; what nearly converged gets a second one, which goes on from the first.
    """
    tall = [A if A.shape[0] >= A.shape[1] else A.mT for A in matrices]
    A = torch.stack(tall) if len(tall) > 1 else tall[0][None]
    G, _, K = A.shape
    b, steps = rank + OVERSAMPLING, steps_for(K, rank, goal)
    noise = random_rows(K, b, A.device)
    found = leading_fixed(A, noise[:K].expand(G, -1, -1), noise, rank, steps)
    products = b * max(1, 2 * steps) + rank
    matvecs = torch.full((G,), products, dtype=torch.int64, device=A.device)
    lost = found.lost.tolist()
    for _ in range(RUNS - 1):
        again = [g for g, bound in enumerate(lost) if goal < bound < math.inf]
        if not again:
            break
        which = torch.tensor(again, device=A.device)
        more = leading_fixed(A if len(again) == G else A[which], found.V[which], noise, rank, steps)
        for whole, part in zip(found, more, strict=True):
            whole[which] = part
        matvecs[which] += products
        lost = found.lost.tolist()
    V, certified = found.V[..., :rank], found.lost <= goal
    turned = [each is not matrix for each, matrix in zip(tall, matrices, strict=True)]
    both = {False: (found.U, V.mT), True: (V, found.U.mT)}
    signed = {side: reference.canonical_signs(*both[side]) for side in set(turned)}
    results: list[tuple[Tensor, ...] | None] = []
    for g, bound in enumerate(lost):
        left, right = signed[turned[g]]
        measured = found.residual[g], matvecs[g], certified[g]
        results.append((left[g], found.S[g], right[g], *measured) if bound <= goal else None)
    return results
