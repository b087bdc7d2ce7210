"""Aggregation that withstands hostile clients: by hand, and the curves of a run with and without it."""

from dataclasses import replace

import pytest
import torch

from federa.aggregate import Robust, Terms, shortened
from federa.checkpoint import State
from federa.client import ClientUpdate
from federa.config import ServerConfig, changed
from federa.experiment import build
from federa.folder import RunFolder
from federa.rounds import run_rounds, train_in_turn


def aggregate(kind: str, *values: list[float], hostile: float = 0.2) -> list[float]:
    robust = Robust(Terms(ServerConfig(aggregation=kind, hostile=hostile), {"w": torch.zeros(len(values[0]))}))
    for client, value in enumerate(values):
        robust.add(ClientUpdate(client, 10 ** min(client, 9), 1, {"w": torch.tensor(value)}, {"loss": 1.0}))
    return robust.result().mean["w"].tolist()


def test_medians_by_hand():
    assert aggregate("median", [1.0, -5.0], [9.0, 0.0], [3.0, 100.0]) == [3.0, 0.0]
    assert aggregate("median", [1.0], [2.0], [4.0], [1e9]) == [3.0]


def test_trimmed_means_by_hand():
    """Five clients, one hostile: without the least and the greatest."""
    assert aggregate("trimmed-mean", [1.0], [-1e9], [3.0], [5.0], [1e9]) == [3.0]
    assert aggregate("trimmed-mean", [1.0], [2.0], [6.0]) == [3.0]  # a fifth of three clients is none
    ones = [[1.0]] * 71  # 0.29 * 100 is 28.999999999999996
    assert aggregate("trimmed-mean", *ones, *[[8.0]] * 29, hostile=0.29) == [1.0]


def test_krum_by_hand():
    """Five clients, one hostile: the least sum of squared distances to 2 others is that of 1.0 (1 + 1)."""
    assert aggregate("krum", [0.0], [1.0], [2.0], [50.0], [4.0]) == [1.0]


def test_clipping_by_hand():
    """A change of (3, 4) shortened to 1; one of (0.3, 0.4) left as it is, bit for bit."""
    current = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    far = shortened({"a": torch.tensor([4.0]), "b": torch.tensor([5.0])}, current, 1.0)
    assert far["a"].item() == pytest.approx(1.6) and far["b"].item() == pytest.approx(1.8)
    near = {"a": torch.tensor([1.3]), "b": torch.tensor([1.4])}
    assert all(torch.equal(shortened(near, current, 1.0)[name], tensor) for name, tensor in near.items())


def test_clipped_updates_bound_a_round(tiny_config, tmp_path):
    config = changed(tiny_config, server={"clip_update": 0.01, "rounds": 1})
    experiment, folder = build(config), RunFolder(tmp_path)
    run_rounds(experiment, folder, State(0, experiment.learner.state()), lambda event, facts: None)
    assert 0.001 < folder.metrics()[0]["update_norm"] <= 0.01 * (1 + 1e-5)


@pytest.fixture(scope="module")
def curve(tiny_config, tmp_path_factory):
    """curve(hostile clients, **server) -> validation losses of 6 rounds of five clients with like data."""

    def curve(hostile=(), **server):
        def train(experiment, state, round, clients):
            for update in train_in_turn(experiment, state, round, clients):
                if update.client in hostile:
                    flipped = {n: state.tensors[n] - 8 * (t - state.tensors[n]) for n, t in update.tensors.items()}
                    update = replace(update, tensors=flipped)
                yield update

        config = changed(
            tiny_config,
            partition={"scheme": "iid"},
            client={"lr": 5e-3, "epochs": 2, "schedule": "constant"},
            evaluation={"drift": False},
            server={"rounds": 6, "clients_per_round": None} | server,
        )
        experiment, folder = build(config), RunFolder(tmp_path_factory.mktemp("curve"))
        run_rounds(experiment, folder, State(0, experiment.learner.state()), lambda event, facts: None, train)
        return [record["validation"]["loss"] for record in folder.metrics()]

    return curve


def test_sign_flips_of_a_fifth_of_the_clients(curve):
    """One of five sends the negative of what it learnt, eightfold. The mean runs away from what it should learn; with
    each robust aggregation the loss falls, nearly as without hostile clients."""
    honest, attacked = curve(), curve(hostile={1})
    assert honest[-1] < honest[0] - 0.1 and attacked[-1] > honest[0]
    for aggregation in ("median", "trimmed-mean", "krum"):
        defended = curve(hostile={1}, aggregation=aggregation)
        assert defended[-1] < defended[0] - 0.05 and defended[-1] < attacked[-1] - 0.2, (aggregation, defended)
