"""The GPU path: all matrices of one shape at once, in a fixed number of launches without a look at what they find.

Block Lanczos on A^T A with full reorthogonalisation, as krylov.py's but for a fixed number of steps; the leading
eigenpairs of the projected matrix by Chebyshev iteration (Zhou and Saad 2007); Rayleigh-Ritz on A V, and a bound on the
loss from measured residuals. What is no product of matrices is a panel or an eigenproblem as small as a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, krylov

OVERSAMPLING = 8  # beside R columns a block: memory decides on a GPU, so wide blocks and few readings of A
STEPS = 10  # 768x768 to 4096x4096 with realistic spectra, R = 16: loss 5e-7 at most
ROUNDS, DEGREE = 5, 6  # of the Chebyshev iteration: 30 products with the projected matrix
STEEP = 2.5
LIFT = 256.0  # brings columns of norm 1 out of what float16 rounds to multiples of 6e-8
MOST_BYTES = 2**31  # of copies at a time


class Leading(NamedTuple):
    """Of a batch A (G,N,K), N >= K.

    U          (G,N,R)  orthonormal columns
    S          (G,R)    descending
    V          (G,K,b)  orthonormal columns, of which the first R are the right singular vectors
    residual   (G,)     float64, max(||A V - U S||, ||A^T U - V S||) / ||A||
    lost       (G,)     float64, the bound on the loss; infinite where nothing can be said
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    lost: Tensor


class Products:
    """`scale` A times panels in float32; a panel is split in parts of 16 bits where A has 16.

    Such products are exact in float32: with two parts they are as good as float32 for an iteration, with three equal.
    """

    def __init__(self, A: Tensor, norms: Tensor):
        self.A = A
        exponents = -torch.frexp(norms)[1] if A.dtype != torch.float32 else torch.zeros_like(norms)
        self.scale = torch.ldexp(torch.ones_like(norms), exponents)[:, None, None]

    def __call__(self, X: Tensor, *, transposed: bool = False, parts: int = 2) -> Tensor:
        A = self.A.mT if transposed else self.A
        if A.dtype == torch.float32:
            return torch.bmm(A, X)
        G, rows, b = X.shape
        split, rest = X.new_empty(G, rows, parts, b, dtype=A.dtype), X * LIFT
        for part in split.unbind(2):
            part.copy_(rest)
            rest = rest - part
        return cuda.product(A, split.flatten(2)).unflatten(2, (parts, b)).sum(2).mul_(self.scale / LIFT)


def _projected(A: Products, start: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Basis (G,K,steps b) of the Krylov space of start (G,K,b), the projected A^T A in float64, whether all is well."""
    G, K, b = start.shape
    basis = start.new_empty(G, K, steps * b)
    inner = start.new_empty(G, steps, b, b)
    first, second = (start.new_empty(G, steps, b, b, dtype=torch.float64) for _ in range(2))
    Y = start
    for step in range(steps):
        here, known = slice(step * b, (step + 1) * b), basis[..., : step * b]
        fresh = noise[step : step + K]
        if step:
            Y = torch.baddbmm(Y, known, known.mT @ Y, alpha=-1)
        Q = torch.empty_like(start)
        first[:, step] = cuda.orthonormalise(Y, fresh, Q)
        if step:
            Q = torch.baddbmm(Q, known, known.mT @ Q, alpha=-1)
        second[:, step] = cuda.orthonormalise(Q, fresh, basis[..., here])
        W = A(basis[..., here])
        inner[:, step] = W.mT @ W
        if step + 1 < steps:
            Y = A(W, transposed=True)
    H = start.new_zeros(G, steps, b, steps, b, dtype=torch.float64)
    H.diagonal(0, 1, 3).copy_(inner.permute(0, 2, 3, 1))
    coupling = (second @ first)[:, 1:]
    H.diagonal(-1, 1, 3).copy_(coupling.permute(0, 2, 3, 1))
    H.diagonal(1, 1, 3).copy_(coupling.permute(0, 3, 2, 1))
    sound = second.diagonal(dim1=-2, dim2=-1).amin((1, 2)) > 0.01
    return basis, H.view(G, steps * b, steps * b), sound


def _ritz_vectors(H: Tensor, b: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (G,m,b) of a positive semidefinite H (G,m,m) float64; what their values gained last.

    Starts from the first b unit vectors, which are the first block of the basis. Filters by Chebyshev polynomials on
    [0, the least Ritz value], between which Ritz vectors are taken. Those that are found and lie far above the rest are
    moved down to STEEP: the filter would raise what is left of them in others.
    """
    G, m, _ = H.shape
    X = torch.eye(m, b, dtype=H.dtype, device=H.device).expand(G, -1, -1)
    before = H.new_zeros(G, b)
    for turn in range(ROUNDS + 1):
        image = H @ X
        theta, rotation = cuda.eigenpairs(X.mT @ image)
        X = X @ rotation
        if turn == ROUNDS:
            break
        before = theta
        cut = torch.maximum(theta[:, -1:], 1e-8 * theta[:, :1]).clamp(min=1e-300)
        level = theta * (2 / cut) - 1
        off = torch.linalg.vector_norm(image @ rotation - X * theta[:, None], dim=1)
        kept = (level > STEEP) & (off < 1e-6 * cut + 3e-13 * theta[:, :1])
        mapped = torch.baddbmm(H, X * ((level - STEEP) * cut / 2 * kept)[:, None], X.mT, alpha=-1)
        mapped.mul_((2 / cut)[:, None]).diagonal(dim1=-2, dim2=-1).sub_(1)
        last, filtered = X, mapped @ X
        for _ in range(DEGREE - 1):
            last, filtered = filtered, torch.baddbmm(last, mapped, filtered, beta=-1, alpha=2)
        filtered = filtered / torch.linalg.vector_norm(filtered, dim=1, keepdim=True)
        X = torch.where(kept[:, None], X, filtered)
        for repeat in range(2):
            cuda.orthonormalise(X, noise[2 * turn + repeat :][:m], X)
    return X, (theta - before).abs()


def leading_fixed(A: Tensor, start: Tensor, noise: Tensor, rank: int, steps: int) -> Leading:
    norms = torch.linalg.vector_norm(A, dim=(1, 2), dtype=torch.float32)
    times = Products(A, norms)
    basis, H, sound = _projected(times, start, noise, steps)
    X, gained = _ritz_vectors(H, start.shape[-1], noise.double())
    V = basis @ X.to(basis.dtype)
    for window in range(2):
        excess = cuda.orthonormalise(V, noise[window:][: V.shape[1]], V)
    sound &= excess.diagonal(dim1=-2, dim2=-1).amin(-1) > 0.9
    W = times(V, parts=3)
    wide = W.double()
    theta, rotation = cuda.eigenpairs(wide.mT @ wide)
    theta = theta.clamp(min=0)
    sound &= theta[:, rank - 1] > 1e-8 * theta[:, 0]
    S = theta[:, :rank].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    images = wide @ rotation[:, :, :rank]
    U = (images / S[:, None]).to(V.dtype)
    V = (V.double() @ rotation).to(V.dtype)
    S32 = S.to(V.dtype)
    back = times(U, transposed=True, parts=3) - V[..., :rank] * S32[:, None]
    left = torch.linalg.vector_norm(back, dim=1, dtype=torch.float64)
    right = torch.linalg.vector_norm(images - U * S32[:, None].double(), dim=(1, 2))
    residual = torch.maximum(torch.linalg.vector_norm(left, dim=1), right)
    lost = krylov.energy_bound(S.square(), S * left, theta[:, rank] + gained[:, rank])
    lost = lost + gained[:, :rank].sum(-1) / S.square().sum(-1)
    unscale = 1 / times.scale[:, 0].double()
    sound &= (norms > 1e-12) & (norms < 1e12)
    return Leading(U, (S * unscale).to(V.dtype), V, residual * unscale[:, 0] / norms, lost.masked_fill(~sound, torch.inf))
