"""`lora_linear`: schema, implementations, fakes, the autograd Function and the public function, in this order.

The ops work on rows and take x (or dy) in the dtype to compute in; the other tensors may be of any float dtype, and
gradients come back in the dtype of what they belong to.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import check_device, check_float, check_shape, failure
from . import reference

torch.library.define(
    "federa::lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling) -> (Tensor y, Tensor h)",
)
torch.library.define(
    "federa::lora_linear_bwd",
    "(Tensor dy, Tensor? x, Tensor? h, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, "
    "bool[] needs) -> Tensor[]",
)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.to(dtype) for t in tensors]


@torch.library.impl("federa::lora_linear_fwd", "default")
def _lora_linear_fwd(x, weight, lora_A, lora_B, bias, scaling):
    with torch.autocast(x.device.type, enabled=False):
        return reference.forward(x, *_cast(x.dtype, weight, lora_A, lora_B, bias), scaling)


@torch.library.impl("federa::lora_linear_bwd", "default")
def _lora_linear_bwd(dy, x, h, weight, lora_A, lora_B, bias, scaling, needs):
    with torch.autocast(dy.device.type, enabled=False):
        grads = reference.backward(dy, x, h, *_cast(dy.dtype, weight, lora_A, lora_B), scaling, needs)
    return [d.to(t.dtype) for d, t in zip(grads, (dy, weight, lora_A, lora_B, bias), strict=True) if d is not None]


@torch.library.register_fake("federa::lora_linear_fwd")
def _lora_linear_fwd_fake(x, weight, lora_A, lora_B, bias, scaling):
    M = x.shape[0]
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, lora_A.shape[0]))


@torch.library.register_fake("federa::lora_linear_bwd")
def _lora_linear_bwd_fake(dy, x, h, weight, lora_A, lora_B, bias, scaling, needs):
    dx_shape = (dy.shape[0], weight.shape[1])
    owners = (dy, weight, lora_A, lora_B, bias)
    return [t.new_empty(dx_shape if t is dy else t.shape) for t, need in zip(owners, needs, strict=True) if need]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling):
        rows = x.reshape(-1, x.shape[-1])
        y, h = torch.ops.federa.lora_linear_fwd(rows, weight, lora_A, lora_B, bias, scaling)
        _, need_weight, need_A, need_B, *_ = ctx.needs_input_grad
        saved_x, saved_h = rows if need_weight or need_A else None, h if need_B else None
        ctx.save_for_backward(saved_x, saved_h, weight, lora_A, lora_B, bias)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:5])
        rows = dy.reshape(-1, dy.shape[-1])
        found = iter(torch.ops.federa.lora_linear_bwd(rows, *ctx.saved_tensors, ctx.scaling, needs))
        dx, *others = [next(found) if need else None for need in needs]
        return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[-1]), *others, None


def _check(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    check_shape("lora_linear", "weight", weight, N=None, K=None)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(failure("lora_linear", "x", f"have shape (..., K) with K={K}", tuple(x.shape)))
    check_shape("lora_linear", "lora_A", lora_A, R=None, K=K)
    check_shape("lora_linear", "lora_B", lora_B, N=N, R=lora_A.shape[0])
    if bias is not None:
        check_shape("lora_linear", "bias", bias, N=N)
    for argument, t in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if t is not None:
            check_float("lora_linear", argument, t)
            check_device("lora_linear", argument, t, x.device)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """As F.linear has it: autocast decides, except over float64, which it leaves alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """A linear layer and its low-rank adapter in one call.

        y = x W^T + s (x A^T) B^T + b

    Computes in the dtype of x, or of autocast where it is on; the other tensors are cast to it, products accumulate in
    float32 or better. Each gradient comes in the dtype of its tensor; differentiable once. Between forward and backward
    it keeps x and h = x A^T, each only where a gradient asks for it.

    x       (..., K)  float32, bfloat16, float16 or float64, as all others
    weight  (N, K)
    lora_A  (R, K)
    lora_B  (N, R)
    bias    (N,) or None
    y       (..., N)  in the dtype computed in

    Raises ValueError for shapes and devices, TypeError for dtypes. LoRA: Hu et al., arXiv 2106.09685.
    """
    _check(x, weight, lora_A, lora_B, bias)
    x = x.to(_compute_dtype(x))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, lora_A, lora_B, bias)):
        return _LoraLinear.apply(x, weight, lora_A, lora_B, bias, scaling)
    y, _ = torch.ops.federa.lora_linear_fwd(x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, bias, scaling)
    return y.view(*x.shape[:-1], y.shape[-1])
