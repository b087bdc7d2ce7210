"""Many clients' adapters over the rows of one batch, against the same rows with one adapter.

Ratios are to `one adapter`: lora_linear over all rows. Others are one chain of products per client, and every client
padded to the longest, whose rows arrive padded and leave so.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from benchmarks.clock import slots_past_cache
from benchmarks.harness import (
    Case,
    Ceilings,
    Contender,
    Judgement,
    Record,
    arguments,
    measure,
    prepare,
)
from benchmarks.lora_linear import SCALING, Several, Slot, run, slots
from benchmarks.lora_linear import floor as one_adapter_floor
from federa_kernels import FrozenWeight, Segments, lora_linear, lora_linear_clients
from federa_kernels.lora_linear import reference

SUBJECT = "lora_linear_clients"
MOST_PADDING = 16  # times the rows; beyond it padding is not tried


def client_sizes(M: int, C: int, cut: str) -> list[int]:
    """Rows of each client: equal, skewed (one row each, the last all others) or Zipf's 1, 1/2, 1/3, ..."""
    if cut == "skewed":
        return [1] * (C - 1) + [M - C + 1]
    shares = [1 / (c + 1) if cut == "zipf" else 1 for c in range(C)]
    sizes = [int(M * share / sum(shares)) for share in shares]
    return [sizes[0] + M - sum(sizes), *sizes[1:]]


def _cases(M: int, shapes: Sequence[tuple[str, int, int]], dtype: str) -> Iterator[Case]:
    for C in (32, 8, 128, 1):
        for cut in ("zipf", "equal", "skewed") if C > 1 else ("equal",):
            for group, K, N in shapes:
                yield Case(group, {"M": M, "N": N, "K": K, "R": 16, "C": C, "cut": cut}, dtype)


CASES = {
    "cpu": list(_cases(2048, [("RoBERTa", 768, 768), ("MiniLM", 384, 1536)], "fp32")),
    "cuda": list(_cases(8192, [("RoBERTa", 768, 768), ("RoBERTa", 768, 3072), ("RoBERTa", 3072, 768)], "bf16")),
}


class Clients(Several):
    """A problem whose rows are cut among clients, each with its own factors; the inherited ones are the one adapter."""

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        self.sizes = client_sizes(case.sizes["M"], case.sizes["C"], str(case.sizes["cut"]))
        self.segments = Segments.from_sizes(self.sizes, scalings=SCALING, device=device)
        self.lora_As, self.lora_Bs = (  # each turned by another number of rows
            torch.stack([(t if c % 2 else -t).roll(c, dims=0) for c in range(len(self.sizes))]).contiguous()
            for t in (self.lora_A, self.lora_B)
        )

    def by_definition(self, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = (self.x, self.dy, self.weight, self.lora_As, self.lora_Bs, self.bias)
        x, dy, W, A, B, b = (t.to(dtype) for t in tensors)
        R = self.lora_A.shape[0]
        cut = (self.segments.offsets, self.segments.scalings, self.segments.ranks.clamp(max=R))
        y, h = reference.clients_forward(x, W, A, B, b, *cut)
        dx, _, dA, dB, _ = reference.clients_backward(dy, x, h, W, A, B, b, *cut, (True, False, True, True, False))
        return {"y": y, "dx": dx, "dA": dA, "dB": dB}


class Way(NamedTuple):
    """A way through one step: what it is given of a slot, its y, what it trains, and its results by name."""

    inputs: Callable[[Slot], tuple[Tensor, Tensor]]
    call: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    named: Callable[..., dict[str, Tensor]]


def _as_they_are(slot: Slot) -> tuple[Tensor, Tensor]:
    return slot.x, slot.dy


def _plain_names(y: Tensor, dx: Tensor, *others: Tensor) -> dict[str, Tensor]:
    return {"y": y, "dx": dx} | dict(zip(("dA", "dB"), others, strict=False))


def one_adapter(problem: Clients) -> Way:
    weight, bias = FrozenWeight(problem.weight.clone(), dtype=problem.dtype), problem.bias.to(problem.dtype)
    A, B = (t.clone().requires_grad_() for t in (problem.lora_A, problem.lora_B))
    return Way(_as_they_are, lambda x: lora_linear(x, weight, A, B, SCALING, bias), (A, B), _plain_names)


def frozen(problem: Clients) -> Way:
    weight, bias = problem.weight.to(problem.dtype, copy=True), problem.bias.to(problem.dtype)
    return Way(_as_they_are, lambda x: linear(x, weight, bias), (), _plain_names)


def ours(problem: Clients) -> Way:
    weight, bias = FrozenWeight(problem.weight.clone(), dtype=problem.dtype), problem.bias.to(problem.dtype)
    A, B = (t.clone().requires_grad_() for t in (problem.lora_As, problem.lora_Bs))
    segments = problem.segments
    return Way(_as_they_are, lambda x: lora_linear_clients(x, weight, A, B, segments, bias), (A, B), _plain_names)


def chain(problem: Clients) -> Way:
    """Each client's rows by themselves, in plain torch."""
    weight, bias = problem.weight.to(problem.dtype, copy=True), problem.bias.to(problem.dtype)
    As, Bs = ([t.to(problem.dtype, copy=True).requires_grad_() for t in each]
              for each in (problem.lora_As, problem.lora_Bs))  # fmt: skip

    def call(x: Tensor) -> Tensor:
        parts = zip(x.split(problem.sizes), As, Bs, strict=True)
        return torch.cat([linear(x, weight, bias) + SCALING * (x @ A.T) @ B.T for x, A, B in parts])

    def named(y: Tensor, dx: Tensor, *grads: Tensor) -> dict[str, Tensor]:
        return {"y": y, "dx": dx, "dA": torch.stack(grads[: len(As)]), "dB": torch.stack(grads[len(As) :])}

    return Way(_as_they_are, call, (*As, *Bs), named)


def padded(problem: Clients) -> Way:
    """Clients side by side as (C, longest, K), in batched products of plain torch."""
    M, C, longest = len(problem.x), len(problem.sizes), max(problem.sizes)
    if C * longest > MOST_PADDING * M:
        raise ValueError(f"padding makes {C * longest} rows of {M}")
    weight, bias = problem.weight.to(problem.dtype, copy=True), problem.bias.to(problem.dtype)
    A, B = (t.to(problem.dtype, copy=True).requires_grad_() for t in (problem.lora_As, problem.lora_Bs))

    def side_by_side(rows: Tensor) -> Tensor:
        return torch.stack([pad(part, (0, 0, 0, longest - len(part))) for part in rows.split(problem.sizes)])

    x, dy = (side_by_side(t) for t in (problem.x, problem.dy))
    count = slots_past_cache(x.nbytes + dy.nbytes, x.device.type)
    inputs = [(x.clone().requires_grad_(), dy.clone()) for _ in range(count)]

    def call(x: Tensor) -> Tensor:
        return linear(x, weight, bias) + SCALING * torch.bmm(torch.bmm(x, A.mT), B.mT)

    def named(y: Tensor, dx: Tensor, dA: Tensor, dB: Tensor) -> dict[str, Tensor]:
        y, dx = (torch.cat([part[:size] for part, size in zip(t, problem.sizes, strict=True)]) for t in (y, dx))
        return {"y": y, "dx": dx, "dA": dA, "dB": dB}

    return Way(lambda slot: inputs[slot.number % count], call, (A, B), named)


PROVIDERS = {  # and the kind of results it has: of one adapter, of none, of all clients'
    "one adapter": (one_adapter, "one"),
    "one adapter again": (one_adapter, "one"),
    "frozen": (frozen, "none"),
    "ours": (ours, "clients"),
    "chain per client": (chain, "clients"),
    "padded": (padded, "clients"),
}


def floor(case: Case, ceiling: Ceilings) -> dict[str, float]:
    """That of one adapter, and the other clients' factors read and their gradients written."""
    K, N, R, C = (case.sizes[name] for name in ("K", "N", "R", "C"))
    more = ceiling.ms(0, 4 * (C - 1) * R * (K + N), case.dtype, case.dtype)
    one = one_adapter_floor(case, ceiling)
    return {"fwd": one["fwd"] + more, "bwd": one["bwd"] + 2 * more, "fwd+bwd": one["fwd+bwd"] + 3 * more}


def run_case(case: Case, ceiling: Ceilings, environment: dict, options: argparse.Namespace) -> list[Record]:
    problem = Clients(case, options.device)
    sets = slots(problem.x, problem.dy)

    def judge(got: dict[str, Tensor], kind: str) -> Judgement:
        return problem.judge_all(got) if kind == "clients" else problem.judge(got, adapter=kind == "one")

    def build(make: Callable[[Clients], Way], kind: str) -> Contender:
        way = make(problem)

        def fwd(slot: Slot) -> tuple[Tensor, Tensor, Tensor]:
            x, dy = way.inputs(slot)
            return way.call(x), x, dy

        def bwd(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            y, x, dy = state
            return torch.autograd.grad(y, [x, *way.parameters], dy)

        def judged() -> Judgement:
            state = fwd(sets[0])
            return judge(way.named(state[0].detach(), *bwd(state)), kind)

        return Contender({"fwd": fwd, "bwd": bwd}, judged, floor(case, ceiling))

    providers = {name: functools.partial(build, *provider) for name, provider in PROVIDERS.items()}
    return measure(SUBJECT, case, providers, sets, environment, options, baseline="one adapter")


def select(options: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES[options.device] if (options.only or "") in str(case)]
    return [case for case in cases if case.sizes["C"] == 8][:2] if options.quick else cases


def main(argv: Sequence[str] | None = None) -> int:
    options = prepare(arguments(__doc__, SUBJECT), argv, seconds=2.0)
    records = run(select(options), run_case, options)
    return 1 if any(record.refused and record.provider == "ours" for record in records) else 0
