"""Which part of a weight its low-rank pair starts from."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ._checks import failure
from .truncated_svd import smallest_svd, truncated_svd

Factors = tuple[Tensor, Tensor]  # lora_A (R,K), lora_B (N,R), float32
Rng = torch.Generator | None
Progress = Callable[[int, int], object]  # (weights done, weights in all)
CHUNK = 24  # weights between two calls of the progress callback


def _root(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Factors:
    root = (S / scaling).sqrt()
    return (root[:, None] * Vh).float(), (U * root).float()


def _principal(weights: Sequence[Tensor], rank: int, scaling: float, generator: Rng) -> list[Factors]:
    return [_root(U, S, Vh, scaling) for U, S, Vh, *_ in truncated_svd(weights, rank)]


def _minor(weights: Sequence[Tensor], rank: int, scaling: float, generator: Rng) -> list[Factors]:
    return [_root(*smallest_svd(weight, rank), scaling) for weight in weights]


def _orthogonal(weights: Sequence[Tensor], rank: int, scaling: float, generator: Rng) -> list[Factors]:
    def factors(weight: Tensor) -> Factors:
        W = (weight.cpu() if weight.device.type == "mps" else weight).double()
        Q, T = torch.linalg.qr(W[:, :rank])  # the first R columns of Q depend on those of W alone
        Q = Q * torch.where(T.diagonal() < 0, -1.0, 1.0)
        return (Q.mT @ W / scaling).float().to(weight.device), Q.float().to(weight.device)

    return [factors(weight.detach()) for weight in weights]


def _zero(weights: Sequence[Tensor], rank: int, scaling: float, generator: Rng) -> list[Factors]:
    if generator is None:
        raise ValueError(failure("lora_init", "generator", 'be a torch.Generator for band "zero"', None))

    def factors(weight: Tensor) -> Factors:
        lora_A = torch.empty(rank, weight.shape[1], device=generator.device)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        return lora_A.to(weight.device), torch.zeros(weight.shape[0], rank, device=weight.device)

    return [factors(weight) for weight in weights]


BANDS = {"principal": _principal, "minor": _minor, "orthogonal": _orthogonal, "zero": _zero}


def check_band(op: str, band: str) -> None:
    if band not in BANDS:
        raise ValueError(failure(op, "band", "be one of " + ", ".join(BANDS), repr(band)))


@torch.no_grad()
def starting_factors(
    weights: Sequence[Tensor],
    rank: int,
    scaling: float,
    band: str,
    generator: Rng = None,
    progress: Progress | None = None,
) -> Iterator[Factors]:
    """lora_A, lora_B of each weight in the order given; see `lora_init`. Weights are checked by the caller.

    They are factored CHUNK at a time: beyond the weights no more than one chunk and all factors are in memory.
    """
    progress = progress or _bar(weights)
    for start in range(0, len(weights), CHUNK):
        chunk = weights[start : start + CHUNK]
        yield from BANDS[band](chunk, rank, scaling, generator)
        progress(start + len(chunk), len(weights))


def _bar(weights: Sequence[Tensor]) -> Progress:
    """A line on stderr that counts, for models of a size that takes a while and where someone watches."""
    if sum(weight.numel() for weight in weights) < 5e8 or not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        print(f"\rfactored {done} of {total} weights", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
