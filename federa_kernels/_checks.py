"""Argument checks with one message shape: `<op>: <argument> must <expectation>, got <actual>`."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def failure(op: str, argument: str, expectation: str, actual: object) -> str:
    return f"{op}: {argument} must {expectation}, got {actual}"


def check_shape(op: str, argument: str, tensor: Tensor, **sizes: int | None) -> None:
    """Sizes by name, in order; None leaves one free: `check_shape(op, "lora_A", lora_A, R=None, K=K)`."""
    shape = tensor.shape
    if len(shape) == len(sizes) and all(s is None or s == n for n, s in zip(shape, sizes.values(), strict=True)):
        return
    form = f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
    known = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
    raise ValueError(failure(op, argument, f"have shape {form}" + (f" with {known}" if known else ""), tuple(shape)))


def check_float(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(failure(op, argument, "be float32, bfloat16, float16 or float64", tensor.dtype))


def check_device(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(failure(op, argument, f"be on {device}", tensor.device))


def check_rank(op: str, rank: int, shape: tuple[int, ...], argument: str = "rank") -> None:
    limit = min(shape)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(failure(op, argument, "be an int", type(rank).__name__))
    if not 1 <= rank <= limit:
        raise ValueError(failure(op, argument, f"be between 1 and {limit} for a {tuple(shape)} matrix", rank))
