"""The leading R singular triplets of one matrix (N,K) by a full SVD: the definition.

A V = U S        A^T U = V S        U^T U = V^T V = I        S descending
"""

import torch
from torch import Tensor


def canonical_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each pair (u, v) so that the entry of u largest in magnitude, the first among equals, is positive."""
    sign = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign()
    return (U * sign).contiguous(), (Vh * sign.mT).contiguous()


def residual(A: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """max(||A V - U S||, ||A^T U - V S||) / ||A||, Frobenius, in float64; 0 for a zero matrix."""
    A, U, S, Vh = (t.double() for t in (A, U, S, Vh))
    norm, right, left = map(torch.linalg.vector_norm, (A, A @ Vh.t() - U * S, A.t() @ U - Vh.t() * S))
    return torch.where(norm > 0, torch.maximum(right, left) / norm, 0.0)


def truncated_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N,R), S (R,), Vh (R,K), in the dtype of A (float32 or float64)."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    U, Vh = canonical_signs(U[:, :rank], Vh[:rank])
    return U, S[:rank].clone(), Vh
