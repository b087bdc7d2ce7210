"""The GPU path: all matrices of one shape in one block Krylov run of batched products, nothing factored one by one."""

import torch
from torch import Tensor

from . import krylov
from .exact import Triplets

OVERSAMPLING = 8  # beside R columns a block: memory decides on a GPU, so wide blocks and few readings of A
MOST_BYTES = 2**33  # of float32 copies at a time


def most(N: int, K: int) -> int:
    """How many matrices to take at a time."""
    return max(1, MOST_BYTES // (4 * N * K))


def leading(A: Tensor, rank: int, norms: Tensor, goal: float) -> tuple[list[Triplets], Tensor, Tensor, Tensor]:
    """Of a batch A (G,N,K) with N >= K: triplets each, following (G,), matvecs (G,), whether to trust them (G,).

    norms (G,) float64: ||A||. What cannot be trusted did not converge or has an A V too far from orthogonal columns for
    the Gram matrix that takes the place of a QR, which GPUs do slowly (pytorch #143281).
    """
    block = min(rank + OVERSAMPLING, A.shape[2])
    start = krylov.uniform(0, A.shape[2], block).to(A).expand(A.shape[0], -1, -1)
    columns = max(16 * block, A.shape[2] // 3)
    space = krylov.leading_subspace(
        krylov.dense(A), rank, krylov.energy_bound, goal, columns, start=start, patience=5 * block, falls=8.0
    )
    W = A @ space.V
    wide = W.double()
    theta, rotation = torch.linalg.eigh(wide.mT @ wide)
    theta, rotation = theta.flip(-1).clamp(min=0), rotation.flip(-1)
    sound = space.converged & (theta[:, -1] > 1e-6 * theta[:, 0])
    S = theta.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    U = (wide @ (rotation / S[:, None, :])).to(A.dtype)
    V = (space.V.double() @ rotation).to(A.dtype)
    left = torch.linalg.vector_norm(A.mT @ U - V * S[:, None, :].to(A.dtype), dim=1, dtype=torch.float64)
    right = torch.linalg.vector_norm(W @ rotation.to(A.dtype) - U * S[:, None, :].to(A.dtype), dim=(1, 2)).double()
    residual = torch.maximum(torch.linalg.vector_norm(left, dim=1), right) / norms
    triplets = [
        Triplets(U[g].contiguous(), S[g].to(A.dtype), V[g].mT.contiguous(), left[g], residual[g])
        for g in range(A.shape[0])
    ]
    return triplets, space.following, space.matvecs + 2 * rank, sound
