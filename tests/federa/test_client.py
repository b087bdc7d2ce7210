"""One client's training, against the same steps worked out with plain autograd in float64."""

from math import cos, pi

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from federa.client import local_steps, rate_factor, train_client
from federa.config import ClientConfig, changed
from federa.experiment import build

SGD = {"optimizer": "sgd", "lr": 0.5, "schedule": "constant", "clip_norm": None, "steps": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config


@pytest.fixture(scope="module")
def experiment(config):
    return build(config)


@pytest.fixture(scope="module")
def start(experiment):
    """Global tensors of some later round: none of them is where training began."""
    rng = torch.Generator().manual_seed(0)
    return {n: p.detach() + 0.1 * torch.randn(p.shape, generator=rng) for n, p in experiment.learner.trainable.items()}


@pytest.fixture(scope="module")
def train(experiment, config, start):
    def train(indices=range(16), client=0, round=1, start=start, model=None, seed=0, **settings):
        changes = {"client": {**SGD, **settings}} | ({"model": model} if model else {})
        used = changed(config, **changes).model_copy(update={"seed": seed})
        return train_client(experiment.learner, experiment.train, np.array(indices), client, round, start, used)

    return train


def change(update, start, name: str | None = None) -> torch.Tensor:
    """What training added, as one float64 vector."""
    names = [name] if name else start
    return torch.cat([(update.tensors[n].double() - start[n].double()).flatten() for n in names])


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def exact_gradient(experiment, config):
    """exact_gradient(tensors, indices): of the mean cross entropy, through transformers' own model in float64, its
    weights W + s (B A - B0 A0) with the original W."""
    plain = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=4).double().eval()
    weights = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    broadcast = experiment.learner.broadcast.factors
    scaling = config.method.alpha / config.method.rank

    def exact_gradient(tensors, indices):
        leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
        used = weights | {name: leaf for name, leaf in leaves.items() if "lora_" not in name}
        for layer, (A0, B0) in broadcast.items():
            low_rank = leaves[f"{layer}.lora_B"] @ leaves[f"{layer}.lora_A"] - B0.double() @ A0.double()
            used[f"{layer}.weight"] = weights[f"{layer}.weight"] + scaling * low_rank
        batch = experiment.train.batch(np.array(indices))
        labels = batch.pop("labels")
        loss = F.cross_entropy(torch.func.functional_call(plain, used, kwargs=batch).logits, labels)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), loss.item()

    return exact_gradient


def test_one_sgd_step_is_the_formula(train, start, exact_gradient):
    """w - lr grad, gradient and loss computed independently."""
    update = train()
    gradient, loss = exact_gradient(start, range(16))
    for name in start:
        assert error(change(update, start, name), -0.5 * gradient[name].flatten()) < 2e-5, name
    assert update.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert (update.client, update.examples, update.steps, update.finite) == (0, 16, 1, True)


def test_one_adamw_step_is_the_formula(train, start, exact_gradient):
    """m and v after one step, bias-corrected, are g and g^2: w - lr (g / (|g| + 1e-8) + decay w)."""
    update = train(optimizer="adamw", lr=0.01, weight_decay=0.1)
    gradient, _ = exact_gradient(start, range(16))
    for name in start:
        g = gradient[name]
        # g / (|g| + 1e-8) has slope 1e-8 / g^2: where g is small, float32's rounding of g decides it.
        sure = g.abs() > 1e-3 * g.abs().max() + 1e-6
        assert sure.double().mean() > 0.5
        expected = -0.01 * (g / (g.abs() + 1e-8) + 0.1 * start[name].double())
        assert error((update.tensors[name].double() - start[name])[sure], expected[sure]) < 1e-5, name
        assert sure.float().mean() > 0.4, name


def test_second_sgd_step_starts_where_the_first_ended(train, start, exact_gradient):
    """Momentum 0.9 over two steps on the same batch: -lr (g0 + 0.9 g0 + g1)."""
    update = train(steps=2, momentum=0.9)
    g0, _ = exact_gradient(start, range(16))
    middle = {name: tensor.double() - 0.5 * g0[name] for name, tensor in start.items()}
    g1, _ = exact_gradient(middle, range(16))
    expected = torch.cat([(-0.5 * (1.9 * g0[name] + g1[name])).flatten() for name in start])
    assert error(change(update, start), expected) < 1e-5


def test_accumulation_is_one_large_batch(train, start):
    large, accumulated = train(batch_size=16), train(batch_size=4, accumulate=4)
    assert error(change(accumulated, start), change(large, start)) < 1e-5
    for name in start:
        assert error(accumulated.tensors[name], large.tensors[name]) < 1e-6
    assert accumulated.steps == large.steps == 1
    assert accumulated.metrics["loss"] == pytest.approx(large.metrics["loss"], rel=1e-6)


def test_a_short_last_batch_weighs_by_its_examples(train, start, exact_gradient):
    """Batches of 4, 4 and 2: the mean over ten examples, not over three batches."""
    update = train(range(10), batch_size=4, accumulate=3)
    gradient, loss = exact_gradient(start, range(10))
    assert error(change(update, start), -0.5 * torch.cat([g.flatten() for g in gradient.values()])) < 1e-5
    assert update.metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_fedprox_pulls_back_to_the_start(train, start):
    """At the first step w = start; at the second the gradient has mu (w1 - start) more: -lr mu (w1 - start) in all."""
    first, plain, pulled = train(), train(steps=2), train(steps=2, proximal_mu=0.3)
    assert error(change(pulled, plain.tensors), -0.5 * 0.3 * change(first, start)) < 1e-5
    assert torch.equal(change(train(proximal_mu=0.3), start), change(first, start))


def test_clip_norm_bounds_a_step(train, start):
    free = change(train(), start)
    clipped = change(train(clip_norm=0.01), start)
    assert float(clipped.norm()) == pytest.approx(0.5 * 0.01, rel=1e-4)
    assert error(clipped / clipped.norm(), free / free.norm()) < 3e-4
    assert error(change(train(clip_norm=100.0), start), free) < 1e-6


def test_the_head_has_its_own_rate(train, start, experiment):
    head = experiment.learner.head
    assert head == {f"{layer}.{kind}" for layer in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    usual, slow, still = train(), train(head_lr=0.125), train(head_lr=0.0)
    for name in start:
        expected = change(usual, start, name)
        assert error(change(slow, start, name), expected / 4 if name in head else expected) < 1e-5
        assert torch.equal(still.tensors[name], start[name]) == (name in head)
    body_only = train(lr=0.0, head_lr=0.5)
    assert all(torch.equal(body_only.tensors[name], start[name]) == (name not in head) for name in start)


def test_rates_follow_the_schedule_over_all_rounds(train, start):
    """Round 2 of 3 with one step sits at half time: linear gives half the constant rate, cosine too."""
    constant = change(train(round=2), start)
    for schedule in ("linear", "cosine"):
        assert error(change(train(round=2, schedule=schedule), start), 0.5 * constant) < 1e-5
    # Round 1 with one step is at 1/6, half of a warm-up over a third.
    assert error(change(train(warmup=1 / 3), start), 0.5 * change(train(), start)) < 1e-5


def test_the_same_client_twice_is_bitwise_the_same(train, start):
    """Whatever trained before it, whatever the global generators hold."""
    settings = {"client": 3, "round": 2, "epochs": 2, "steps": None, "batch_size": 4, "optimizer": "adamw"}
    first = train(range(10), **settings)
    train(range(20, 50), client=1)
    torch.manual_seed(1)
    again = train(range(10), **settings)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in start)
    assert first.metrics == again.metrics and first.steps == again.steps == 6


@pytest.mark.parametrize("other", [{"client": 4}, {"round": 3}, {"seed": 1}], ids=str)
def test_batches_differ_by_client_round_and_seed(train, start, other):
    settings = {"client": 3, "round": 2, "batch_size": 4}
    first, second = train(range(10), **settings), train(range(10), **settings | other)
    assert not torch.equal(first.tensors["classifier.weight"], second.tensors["classifier.weight"])


def test_an_update_shares_no_memory(train, experiment, start):
    """Later training does not change what a client sent, and the global tensors stay as they were."""
    before = {name: tensor.clone() for name, tensor in start.items()}
    update = train()
    sent = {name: tensor.clone() for name, tensor in update.tensors.items()}
    train(range(30, 60), client=1)
    assert all(torch.equal(update.tensors[name], sent[name]) for name in start)
    assert all(torch.equal(start[name], before[name]) for name in start)
    assert not any(tensor.requires_grad for tensor in update.tensors.values())


def test_frozen_weights_do_not_move(train, experiment):
    model = experiment.learner.model
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(optimizer="adamw", lr=0.1, weight_decay=0.5, steps=3)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert len(frozen) + len(experiment.learner.trainable) == len(list(model.parameters()))


def test_a_loss_that_explodes_is_reported(train, start):
    update = train(lr=1e30, steps=3)
    assert not update.finite


@pytest.mark.parametrize(
    ("size", "settings", "steps"),
    [
        (1, {}, 1),
        (16, {}, 1),
        (17, {}, 2),
        (100, {"batch_size": 10, "epochs": 3}, 30),
        (95, {"batch_size": 10, "accumulate": 4}, 3),
        (95, {"batch_size": 10, "accumulate": 4, "epochs": 2}, 6),
        (5, {"steps": 40, "epochs": 3}, 40),
    ],
    ids=str,
)
def test_local_steps_by_hand(size, settings, steps):
    assert local_steps(size, ClientConfig(**settings)) == steps


@pytest.mark.parametrize(
    ("settings", "progress", "factor"),
    [
        ({"schedule": "constant"}, 0.99, 1.0),
        ({"schedule": "linear"}, 0.0, 1.0),
        ({"schedule": "linear"}, 0.75, 0.25),
        ({"schedule": "cosine"}, 0.0, 1.0),
        ({"schedule": "cosine"}, 0.5, 0.5),
        ({"schedule": "cosine"}, 0.25, 0.5 * (1 + cos(pi / 4))),
        ({"schedule": "linear", "warmup": 0.2}, 0.05, 0.25),
        ({"schedule": "linear", "warmup": 0.2}, 0.2, 1.0),
        ({"schedule": "linear", "warmup": 0.2}, 0.6, 0.5),
        ({"schedule": "cosine", "warmup": 0.5}, 0.75, 0.5),
        ({"schedule": "constant", "warmup": 0.5}, 0.25, 0.5),
    ],
    ids=str,
)
def test_rate_factor_by_hand(settings, progress, factor):
    assert rate_factor(ClientConfig(**settings), progress) == pytest.approx(factor, abs=1e-12)


def test_steps_go_through_whole_epochs(train, experiment, monkeypatch):
    """Ten examples in batches of 4 for 5 steps: one epoch of 4, 4, 2 in some order, then the start of another."""
    seen = []
    batch = type(experiment.train).batch
    monkeypatch.setattr(type(experiment.train), "batch", lambda self, i: (seen.append(i.tolist()), batch(self, i))[1])
    train(range(20, 30), batch_size=4, steps=5)
    assert sorted(index for batch in seen[:3] for index in batch) == list(range(20, 30)) and sorted(
        map(len, seen[:3])
    ) == [2, 4, 4]
    assert len(seen) == 5 and seen[:2] != seen[3:]
