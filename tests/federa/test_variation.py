"""The geometry of updates against the dense weights, in float64."""

import pytest
import torch

from federa.config import changed
from federa.experiment import build
from federa.methods import adapted_layers
from federa.variation import update_geometry


def moved(tensors, seed, size=0.01):
    rng = torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=rng) for name, t in tensors.items()}


def dense(learner, tensors):
    """All weights of the backbone that the model computes with, as one float64 vector, without the frozen ones."""
    layers, parts = adapted_layers(learner.model), []
    for name, tensor in sorted(tensors.items()):
        layer, _, factor = name.rpartition(".")
        if name in learner.head or factor == "lora_A":
            continue
        if factor == "lora_B":
            weight = layers[layer].scaling * tensor.double() @ tensors[f"{layer}.lora_A"].double()
        else:
            weight = tensor.double()
        parts.append(weight.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("method", ["federa", "lora", "full"])
def test_norm_and_cosine_are_those_of_the_dense_weights(tiny_config, method):
    learner = build(changed(tiny_config, method={"name": method})).learner
    start = learner.state()
    first = moved(start, 1)
    second = moved(first, 2)
    U, V = dense(learner, first) - dense(learner, start), dense(learner, second) - dense(learner, first)
    found = update_geometry(learner, start, first, second)
    assert found["norm"] == pytest.approx(float(V.norm()), rel=1e-9)
    assert found["cosine"] == pytest.approx(float(U @ V / U.norm() / V.norm()), abs=1e-9)


def test_frozen_weights_that_move_count(tiny_config):
    """What the adapters lose and the frozen weights take over is no change; the rest is the frozen weights' own."""
    learner = build(tiny_config).learner
    start, layers = learner.state(), adapted_layers(learner.model)
    base = {f"{name}.residual": layer.residual.detach().clone() for name, layer in layers.items()}
    first, emptied, folded = moved(start, 1), dict(start), dict(base)
    for name, layer in layers.items():
        for state, sign in ((first, 1), (start, -1)):
            product = layer.scaling * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
            folded[f"{name}.residual"] = folded[f"{name}.residual"] + sign * product
    assert update_geometry(learner, {}, first | base, emptied | folded)["norm"] < 1e-4 * learner_norm(base)
    shifted = {name: tensor + 0.5 for name, tensor in base.items()}
    size = sum(tensor.numel() for tensor in base.values())
    found = update_geometry(learner, start | base, start | shifted, start | base)
    assert found == {"norm": pytest.approx(0.5 * size**0.5, rel=1e-6), "cosine": pytest.approx(-1, abs=1e-9)}


def learner_norm(tensors):
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def test_a_reversal_a_repetition_and_no_update(tiny_config):
    learner = build(changed(tiny_config, method={"name": "full"})).learner
    start = learner.state()
    there = {name: tensor + 0.5 for name, tensor in start.items()}
    further = {name: tensor + 1.0 for name, tensor in start.items()}
    assert update_geometry(learner, {}, start, there)["cosine"] is None
    assert update_geometry(learner, start, there, start)["cosine"] == pytest.approx(-1)
    assert update_geometry(learner, start, there, further)["cosine"] == pytest.approx(1, abs=1e-6)
    assert update_geometry(learner, start, there, there) == {"norm": 0.0, "cosine": None}


def test_the_head_counts_where_nothing_else_trains(tiny_config):
    learner = build(changed(tiny_config, method={"name": "head-only"})).learner
    start = learner.state()
    there = {name: tensor + 0.5 for name, tensor in start.items()}
    size = sum(tensor.numel() for tensor in start.values())
    assert update_geometry(learner, {}, start, there)["norm"] == pytest.approx(0.5 * size**0.5)
