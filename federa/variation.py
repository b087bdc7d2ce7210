"""How far and whither a round moves the weights that the model computes with, in whatever parameters it trains."""

import math
from collections.abc import Mapping

import torch

from federa.methods import Learner, adapted_layers

Tensors = Mapping[str, torch.Tensor]
Product = tuple[torch.Tensor, torch.Tensor]

DEFINITION = (
    "Uₜ is the change that round t makes to the weights which the model computes with: s (BₜAₜ − Bₜ₋₁Aₜ₋₁), and what "
    "moves the base, of every adapted layer; wₜ − wₜ₋₁ of every other trained tensor of the backbone; the task head "
    "counts only where nothing else trains. Magnitude variation: | ‖Uₜ‖ / ‖Uₜ₋₁‖ − 1 |. Direction variation: "
    "1 − cos(Uₜ, Uₜ₋₁), 0 for the same direction, 1 for a right angle, 2 for a reversal. ‖·‖ and cos are Frobenius, "
    "over all weights together. A falling learning rate shrinks Uₜ, so only runs of one schedule compare. Drift: the "
    "distance from the clients' mean product to that of the aggregated factors (BₜAₜ, unless a server's optimiser has "
    "its own step) over its distance to Bₜ₋₁Aₜ₋₁, where that is measured."
)


def update_geometry(
    learner: Learner, previous: Tensors, current: Tensors, following: Tensors
) -> dict[str, float | None]:
    """{"norm": ‖U_t‖, "cosine": cos(U_t, U_{t-1})} with U_t as in DEFINITION, from the global tensors of rounds t - 2
    (empty before round 2), t - 1 and t, and the frozen weights "LAYER.residual" among them where a round moves these.
    The cosine is None where there is no earlier update or one of them is zero."""
    now, before = _changes(learner, current, following), _changes(learner, previous, current) if previous else {}
    squares, products, earlier = [], [], []  # a weight each, added exactly: their order is no matter
    for name in now.keys() | before.keys():
        change, last = (_product(changes[name]) if name in changes else None for changes in (now, before))
        squares += [_inner(change, change)] if change else []
        earlier += [_inner(last, last)] if last else []
        products += [_inner(change, last)] if change and last else []
    square = max(math.fsum(squares), 0.0)
    scale = math.sqrt(square * max(math.fsum(earlier), 0.0))
    return {"norm": math.sqrt(square), "cosine": math.fsum(products) / scale if scale > 0 else None}


def _changes(learner: Learner, before: Tensors, after: Tensors) -> dict[str, tuple]:
    """What it takes to form each weight's change: name -> (before, after) of a tensor, (scaling, B before, B after,
    A before, A after) of an adapted layer, and its frozen weight before and after besides where that moves."""
    layers = adapted_layers(learner.model)
    names = [name for name in after if name not in learner.head] or list(after)
    changes: dict[str, tuple] = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B", "residual") and layer in layers:
            moving = [leaf for leaf in ("residual",) if f"{layer}.{leaf}" in after]
            parts = [(f"{layer}.{leaf}", getattr(layers[layer], leaf)) for leaf in ("lora_B", "lora_A", *moving)]
            pairs = [state.get(key, frozen.detach().cpu()) for key, frozen in parts for state in (before, after)]
            changes[layer] = (layers[layer].scaling, *pairs)
        else:
            changes[name] = (before[name], after[name])
    return changes


def _product(change: tuple) -> Product:
    """A change as left (N, R') @ right (R', K) in float64, formed without the cancellation of two large products:
    s (B' A' - B A) = s [B' - B, B] [A'; A' - A]. What is dense becomes one column."""
    if len(change) == 2:
        before, after = (tensor.double() for tensor in change)
        return _column(after - before)
    scaling, (B, B_after, A, A_after, *moved) = change[0], (tensor.double() for tensor in change[1:])
    left, right = scaling * torch.cat([B_after - B, B], dim=1), torch.cat([A_after, A_after - A])
    return _column(moved[1] - moved[0] + left @ right) if moved else (left, right)


def _column(dense: torch.Tensor) -> Product:
    return dense.reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64)


def _inner(one: Product, other: Product) -> float:
    """<L R, L' R'> = sum((L^T L') * (R R'^T))."""
    (left, right), (left_, right_) = one, other
    return float(((left.T @ left_) * (right @ right_.T)).sum())
