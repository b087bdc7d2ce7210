"""Clients trained in one batch, against each of them trained alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federa import cohort
from federa.checkpoint import State
from federa.client import train_client
from federa.cohort import Cohorts, choose_size, memory_of_client, train_cohort, why_alone
from federa.config import changed
from federa.data import length_grouped_batches
from federa.experiment import build

from .as_alone import CUTS, SGD, bytes_kept, check, distance, moved, shares

STACKED = ("federa", "lora", "ffa-lora", "rolora", "fedsvd", "bitfit", "adapter", "head-only")


@pytest.mark.parametrize("method", STACKED)
def test_every_method_as_alone(tiny_config, method):
    config = changed(tiny_config, method={"name": method}, client=SGD)
    experiment = build(config)
    for round in (1, 2) if method == "rolora" else (1,):
        check(experiment, moved(experiment), config, round)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "gpt2"])
def test_every_family_as_alone(tiny_config, tiny_models, family):
    """Packed where the encoder can be, padded where it cannot (gpt2)."""
    config = changed(tiny_config, model={"name": str(tiny_models(family))}, client=SGD)
    experiment = build(config)
    check(experiment, moved(experiment), config)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "deberta-v3", "deberta-v2-xlarge"])
def test_dropout_as_alone(tiny_config, tiny_models, family):
    """Every client's masks are its own, packed and padded, over gathered batches and unequal numbers of steps."""
    client = SGD | {"accumulate": 2, "batch_size": 4}
    config = changed(tiny_config, model={"name": str(tiny_models(family)), "dropout": 0.2}, client=client)
    experiment, plain = build(config), build(changed(config, model={"dropout": 0.0}))
    assert why_alone(experiment.learner, config) is None
    start, own = moved(experiment), list(enumerate(shares()))
    check(experiment, start, config)
    dropped, whole = (train_cohort(e.learner, e.train, own, 1, start, e.config) for e in (experiment, plain))
    assert all(distance(one, other, start) > 0.05 for one, other in zip(whole, dropped, strict=True))


def test_masks_from_elsewhere_are_found_out(tiny_config):
    """Before the first round: one dropout that does not know clients makes cohorts of one."""
    experiment = build(changed(tiny_config, model={"dropout": 0.1}))
    assert why_alone(experiment.learner, experiment.config) is None
    experiment.learner.model.dropout.__class__ = torch.nn.Dropout
    why = why_alone(experiment.learner, experiment.config)
    assert why == "model.dropout is on, and a bert draws masks for a whole batch"


@pytest.mark.parametrize(
    "client",
    [
        {"accumulate": 3, "batch_size": 4},
        {"proximal_mu": 0.3},
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"weight_decay": 0.1, "warmup": 0.2, "schedule": "cosine", "head_lr": 0.01},
        {"steps": 7, "clip_norm": None},
        {"epochs": 3, "clip_norm": 0.01},
    ],
    ids=str,
)
def test_every_setting_as_alone(tiny_config, client):
    config = changed(tiny_config, client=client)
    experiment = build(config)
    check(experiment, moved(experiment), config, round=2)


def test_ranks_and_corrections_are_each_clients_own(tiny_config):
    config = changed(tiny_config, method={"name": "lora", "client_ranks": [4, 1, 2]}, server={"aggregation": "flora"})
    experiment = build(config)
    check(experiment, moved(experiment), config)
    config = changed(tiny_config, client={"control_variates": True, "optimizer": "sgd", "lr": 0.1})
    experiment = build(config)
    rng = torch.Generator().manual_seed(3)
    state = experiment.learner.state()
    corrections = [{n: 0.1 * torch.randn(t.shape, generator=rng) for n, t in state.items()} for _ in CUTS]
    check(experiment, moved(experiment), config, corrections=[*corrections[:-1], None])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=7), batch=st.integers(1, 9), accumulate=st.integers(1, 3))
def test_any_cut_as_alone(tiny_config, tiny_experiment, cuts, batch, accumulate):
    """SGD, whose steps do not blow up rounding: each client's gradients are its own."""
    client = {"batch_size": batch, "accumulate": accumulate, "optimizer": "sgd", "lr": 0.2}
    config, experiment = changed(tiny_config, client=client), tiny_experiment
    start, own = moved(experiment), shares(cuts)
    together = train_cohort(experiment.learner, experiment.train, list(enumerate(own)), 1, start, config)
    for client, update in enumerate(together):
        alone = train_client(experiment.learner, experiment.train, own[client], client, 1, start, config)
        assert distance(alone, update, start) <= 2e-5


@pytest.fixture(scope="module")
def tiny_experiment(tiny_config):
    return build(tiny_config)


@pytest.fixture(scope="module")
def minilm(tiny_config, minilm_path):
    client = {"batch_size": 8, "steps": 3}
    config = changed(tiny_config, model={"name": str(minilm_path)}, data={"max_length": 64}, client=client)
    return build(config)


def test_minilm_as_alone(minilm):
    check(minilm, moved(minilm), minilm.config)


def test_minilm_with_dropout_as_alone(minilm):
    experiment = build(changed(minilm.config, model={"dropout": 0.1}))
    check(experiment, moved(experiment), experiment.config)


def test_a_run_twice_is_the_same_bits(tiny_experiment):
    start, own = moved(tiny_experiment), list(enumerate(shares()))
    first, second = (
        train_cohort(tiny_experiment.learner, tiny_experiment.train, own, 1, start, tiny_experiment.config)
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_a_diverged_client_harms_nobody(tiny_experiment):
    start, own = moved(tiny_experiment), list(enumerate(shares()))
    nothing = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    poison = {name: torch.full_like(tensor, torch.nan) for name, tensor in start.items()}
    arguments = (tiny_experiment.learner, tiny_experiment.train, own, 1, start, tiny_experiment.config)
    good = train_cohort(*arguments, [nothing] * 5)
    bad = train_cohort(*arguments, [nothing, nothing, poison, nothing, nothing])
    assert not bad[2].finite
    for client in (0, 1, 3, 4):
        for name, tensor in good[client].tensors.items():
            assert torch.equal(tensor, bad[client].tensors[name])


def test_the_model_is_left_as_it_was(tiny_experiment):
    learner = tiny_experiment.learner
    modules = dict(learner.model.named_modules())
    train_cohort(learner, tiny_experiment.train, list(enumerate(shares())), 1, moved(tiny_experiment),
                 tiny_experiment.config)  # fmt: skip
    after = dict(learner.model.named_modules())
    assert modules.keys() == after.keys() and all(after[name] is module for name, module in modules.items())
    assert all(learner.model.get_parameter(name) is p and p.grad is None for name, p in learner.trainable.items())


def test_out_of_memory_halves_the_cohort(tiny_experiment, monkeypatch):
    """The round is not lost, and its updates are those of the smaller cohorts."""
    sizes = []

    def scarce(learner, examples, group, *others):
        sizes.append(len(group))
        if len(group) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_cohort(learner, examples, group, *others)

    experiment = replace(tiny_experiment, partition=replace(tiny_experiment.partition, indices=shares()))
    state = State(0, moved(experiment))
    expected = list(Cohorts(2)(experiment, state, 1, range(5)))
    monkeypatch.setattr(cohort, "train_cohort", scarce)
    cohorts = Cohorts(5)
    updates = list(cohorts(experiment, state, 1, range(5)))
    assert sizes == [5, 2, 2, 1] and cohorts.size == 2
    for one, other in zip(expected, updates, strict=True):
        assert one.client == other.client
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"method": {"name": "full"}}, "method full trains the whole backbone"),
        ({"method": {"name": "fed-sb"}}, "method fed-sb trains tensors that cannot be stacked"),
        ({"model": {"dropout": 0.1, "attention_dropout": 0.1}}, "model.attention_dropout is on"),
    ],
)
def test_who_must_train_alone(tiny_config, sections, why):
    config = changed(tiny_config, run={"cohort": 4}, **sections)
    experiment = build(config)
    assert why_alone(experiment.learner, config).startswith(why) and choose_size(experiment) == 1


def test_the_first_deberta_must_train_alone(tiny_config, tiny_models):
    experiment = build(changed(tiny_config, model={"name": str(tiny_models("deberta"))}))
    assert "relative positions" in why_alone(experiment.learner, experiment.config)


def test_size(tiny_experiment):
    assert why_alone(tiny_experiment.learner, tiny_experiment.config) is None
    assert choose_size(tiny_experiment) == tiny_experiment.clients_per_round == 2
    assert choose_size(tiny_experiment, processes=2) == 1
    assert choose_size(replace(tiny_experiment, config=changed(tiny_experiment.config, run={"cohort": 3}))) == 3


def test_padding_is_not_multiplied_by_itself(tiny_config, tiny_models):
    """On a CPU, where it costs more than a larger batch gains."""
    experiment = build(changed(tiny_config, model={"name": str(tiny_models("gpt2")), "device": "cpu"}))
    assert why_alone(experiment.learner, experiment.config) is None and choose_size(experiment) == 1
    assert choose_size(replace(experiment, config=changed(experiment.config, run={"cohort": 3}))) == 3


def test_memory_is_as_predicted(minilm):
    """What the backward of one client's batches keeps, counted, is 70 to 130 % of the formula."""
    rng = np.random.default_rng(0)
    parameters = 16 * sum(p.numel() for p in minilm.learner.trainable.values())
    ratios = []
    for indices in length_grouped_batches(minilm.train.lengths, np.arange(144), 8, rng):
        share = minilm.train.lengths[indices].sum() / (8 * minilm.train.lengths.mean())
        ratios.append(bytes_kept(minilm, indices) / ((memory_of_client(minilm) - parameters) * share))
    assert 0.7 < np.mean(ratios) < 1.3
