"""What the public functions ask of their arguments, before any launch."""

import torch
from torch import Tensor

from .._checks import FLOATS, check_device, check_float, check_shape, failure
from .segments import Segments


def _fits(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> bool:
    """Whether `check` has nothing to say, in a fifth of its time: layers are called hundreds of times a step."""
    if weight.dim() != 2 or x.dim() == 0:
        return False
    (N, K), R = weight.shape, lora_A.shape[0] if lora_A.dim() else -1
    if x.shape[-1] != K or lora_A.shape != (R, K) or lora_B.shape != (N, R):
        return False
    if bias is not None and bias.shape != (N,):
        return False
    device = x.device
    for t in (x, weight, lora_A, lora_B) if bias is None else (x, weight, lora_A, lora_B, bias):
        if t.dtype not in FLOATS or t.device != device:
            return False
    return True


def check(op: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    if _fits(x, weight, lora_A, lora_B, bias):
        return
    check_shape(op, "weight", weight, N=None, K=None)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(failure(op, "x", f"have shape (..., K) with K={K}", tuple(x.shape)))
    check_shape(op, "lora_A", lora_A, R=None, K=K)
    check_shape(op, "lora_B", lora_B, N=N, R=lora_A.shape[0])
    if bias is not None:
        check_shape(op, "bias", bias, N=N)
    _check_kinds(op, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)


def _check_kinds(op: str, x: Tensor, **others: Tensor | None) -> None:
    for argument, t in (("x", x), *others.items()):
        if t is not None:
            check_float(op, argument, t)
            check_device(op, argument, t, x.device)


def check_clients(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, segments: Segments, bias: Tensor | None
) -> None:
    op, C = "lora_linear_clients", len(segments)
    check_shape(op, "weight", weight, N=None, K=None)
    N, K = weight.shape
    check_shape(op, "x", x, M=None, K=K)
    check_shape(op, "lora_A", lora_A, C=C, R=None, K=K)
    R = lora_A.shape[1]
    check_shape(op, "lora_B", lora_B, C=C, N=N, R=R)
    if bias is not None and bias.dim() == 2:
        check_shape(op, "bias", bias, C=C, N=N)
    elif bias is not None:
        check_shape(op, "bias", bias, N=N)
    _check_kinds(op, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    check_device(op, "segments", segments.offsets, x.device)
    if segments.max_rank is not None and segments.max_rank > R:
        raise ValueError(failure(op, "segments", f"have ranks up to R={R}", segments.max_rank))
    # A traced graph must not be bound to one batch's number of rows.
    if not torch.compiler.is_compiling() and x.shape[0] != segments.rows:
        raise ValueError(failure(op, "x", f"have the {segments.rows} rows of segments", x.shape[0]))
