"""A frozen linear layer with a low-rank adapter beside it: the definition, on rows.

    h = x A^T        y = x W^T + s h B^T + b

x (M,K), weight (N,K), lora_A (R,K), lora_B (N,R), bias (N,) or None, all of one dtype.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """y (M,N) and h (M,R)."""
    h = linear(x, lora_A)
    return linear(x, weight, bias).addmm_(h, lora_B.t(), alpha=scaling), h


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (x, weight, lora_A, lora_B, bias), None where `needs` is False; x and h may be None where unused.

    dh = s dy B    dx = dy W + dh A    dW = dy^T x    dA = dh^T x    dB = s dy^T h    db = sum of the rows of dy
    """
    need_x, need_weight, need_A, need_B, need_bias = needs
    dh = (dy @ lora_B).mul_(scaling) if need_x or need_A else None
    return [
        (dy @ weight).addmm_(dh, lora_A) if need_x else None,
        dy.t() @ x if need_weight else None,
        dh.t() @ x if need_A else None,
        (dy.t() @ h).mul_(scaling) if need_B else None,
        dy.sum(0) if need_bias else None,
    ]
