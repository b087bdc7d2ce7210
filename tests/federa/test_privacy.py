"""Client-level privacy: what clipping and noise do, epsilon against closed forms, and what no seed gives again."""

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from federa.aggregate import PrivateMean, Terms
from federa.checkpoint import State
from federa.client import ClientUpdate
from federa.config import PrivacyConfig, ServerConfig, changed
from federa.experiment import build
from federa.flower.server_app import line_of
from federa.folder import RunFolder
from federa.privacy import draw_normal, epsilon
from federa.progress import RunProgress
from federa.rounds import run_rounds


def test_mean_by_hand():
    """Changes (3, 4), clipped to 1, and (0.6, 0), whatever their examples, and 2 * 1 * noise, over a count of 4."""
    current = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    privacy = PrivacyConfig(clip=1.0, noise=2.0)
    mean = PrivateMean(Terms(ServerConfig(), current), privacy, 4, lambda shape: torch.full(shape, 0.5).double())
    for client, (change, examples) in enumerate((((3.0, 4.0), 1), ((0.6, 0.0), 1000))):
        tensors = {name: current[name] + value for name, value in zip("ab", change, strict=True)}
        mean.add(ClientUpdate(client, examples, 1, tensors, {"loss": 1.0}))
    result = mean.result().mean
    assert result["a"].item() == pytest.approx(1 + (0.6 + 0.6 + 1.0) / 4)
    assert result["b"].item() == pytest.approx(1 + (0.8 + 0.0 + 1.0) / 4)


def test_noise_is_normal_and_never_the_same():
    first, second = (draw_normal(torch.Size([200_000])) for _ in range(2))
    for noise in (first, second):
        assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.02


def gaussian_epsilon(noise: float, releases: int, delta: float) -> float:
    """Exact for the Gaussian mechanism (Balle and Wang, arXiv 1805.06530): T releases are one of noise z / sqrt(T)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = math.sqrt(releases) / noise

    def lost(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(lost, 0, 500)


@pytest.mark.parametrize(("noise", "releases"), [(4.0, 1), (8.0, 50)])
@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_epsilon_with_all_clients_is_the_gaussian_mechanisms(noise, releases, sampling):
    """The Renyi accountant's bound is at most 25 % above the exact epsilon; fixed sizes compare clients replaced, which
    changes the sum by twice the clip, so that the noise counts half."""
    pytest.importorskip("dp_accounting")
    exact = gaussian_epsilon(noise / 2 if sampling == "fixed" else noise, releases, 1e-5)
    found = epsilon(PrivacyConfig(clip=1.0, noise=noise, sampling=sampling), 20, 20, releases)
    assert exact <= found <= 1.25 * exact


def test_sampling_amplifies_and_releases_add_up(caplog):
    pytest.importorskip("dp_accounting")
    assert epsilon(PrivacyConfig(clip=1.0, noise=1.0, sampling="poisson"), 5, 1, 6) > 0  # some orders do not converge
    assert not caplog.records
    for sampling in ("fixed", "poisson"):
        privacy = PrivacyConfig(clip=1.0, noise=4.0, sampling=sampling)
        everyone, some = epsilon(privacy, 1000, 1000, 10), epsilon(privacy, 1000, 10, 10)
        assert some < 0.2 * everyone and some < epsilon(privacy, 1000, 10, 20)
        assert epsilon(privacy, 1000, 10, 0) == 0.0


@pytest.fixture(scope="module")
def go(tiny_config, tmp_path_factory):
    def go(train=None, **sections):
        pytest.importorskip("dp_accounting")
        privacy = {"clip": 0.5, "noise": 1.0} | sections.pop("privacy", {})
        config = changed(tiny_config, privacy=privacy, **sections)
        experiment, folder = build(config), RunFolder(tmp_path_factory.mktemp("private"))
        start = State(0, experiment.learner.state())
        extra = {} if train is None else {"train": train}
        return run_rounds(experiment, folder, start, lambda event, facts: None, **extra), folder.metrics(), start

    return go


def test_runs_differ_and_record_epsilon(go):
    """Two runs of one seed are two draws; epsilon of every round is the accountant's."""
    first, records, _ = go(method={"name": "ffa-lora"})
    second, _, _ = go(method={"name": "ffa-lora"})
    assert not torch.equal(first.tensors["classifier.weight"], second.tensors["classifier.weight"])
    privacy = PrivacyConfig(clip=0.5, noise=1.0)
    for record in records:
        expected = {"epsilon": epsilon(privacy, 5, 2, record["round"]), "delta": 1e-5, "releases": record["round"]}
        assert record["privacy"] == pytest.approx(expected)


def test_the_noise_has_its_deviation(go):
    """Clients that change nothing leave noise alone: z S / clients_per_round = 1 * 0.5 / 2 by coordinate."""

    def idle(experiment, state, round, clients):
        for client in clients:
            sent = {name: state.tensors[name].clone() for name in experiment.learner.names_in(round)}
            yield ClientUpdate(client, 7, 1, sent, {"loss": 1.0})

    state, _, start = go(idle, server={"rounds": 1, "clients_per_round": 2})
    noise = torch.cat([(tensor - start.tensors[name]).flatten() for name, tensor in state.tensors.items()])
    assert float(noise.std()) == pytest.approx(0.25, rel=0.05) and abs(float(noise.mean())) < 0.02


def test_retries_are_paid_for(go):
    """A round whose first attempt was refused counts twice."""
    calls = []

    def train(experiment, state, round, clients):
        calls.append(round)
        for client in clients:
            sent = {name: state.tensors[name].clone() for name in experiment.learner.names_in(round)}
            yield ClientUpdate(client, 7 if len(calls) > 1 else 0, 1, sent, {"loss": 1.0})

    _, records, _ = go(train, server={"rounds": 2, "clients_per_round": 2})
    assert [record["privacy"]["releases"] for record in records] == [2, 3]


def test_poisson_rounds_have_different_sizes(go):
    """One of five on average; rounds that ask nobody (a third of them) are noise alone, are not tried again, and are
    told of as the others."""

    def idle(experiment, state, round, clients):
        for client in clients:
            sent = {name: state.tensors[name].clone() for name in experiment.learner.names_in(round)}
            yield ClientUpdate(client, 7, 1, sent, {"loss": 1.0})

    _, records, _ = go(
        idle, privacy={"sampling": "poisson"}, server={"rounds": 40, "clients_per_round": 1},
        method={"name": "head-only"}, evaluation={"every": 99}, run={"checkpoint_every": 99},
    )  # fmt: skip
    sizes = [len(record["sampled"]) for record in records]
    assert min(sizes) == 0 and max(sizes) > 1 and {record["attempts"] for record in records} == {1}
    assert all(record["update_norm"] > 0 and (record["train_loss"] is None) == (not record["sampled"])
               for record in records)  # fmt: skip
    assert records[-1]["privacy"]["releases"] == 40
    watch = RunProgress(Console(file=io.StringIO()))
    for record in records:
        watch("round", record)
        assert (", loss " in line_of(record)) == bool(record["sampled"])
