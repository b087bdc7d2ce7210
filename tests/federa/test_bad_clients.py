"""Rounds with clients that send nonsense or nothing: rejected by name, retried, or failed with the state saved."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from federa import cli, simulation
from federa.aggregate import WeightedMean
from federa.checkpoint import State, checkpoint_rounds
from federa.client import ClientUpdate, train_client
from federa.config import Config, changed, dump_config
from federa.errors import InputError, RunError
from federa.experiment import build
from federa.folder import RunFolder
from federa.rounds import client_durations, run_rounds

NAME = "classifier.weight"


@pytest.fixture(scope="module")
def config(tiny_config) -> Config:
    """Two rounds of all five clients, one step each."""
    return changed(
        tiny_config,
        server={"rounds": 2, "clients_per_round": None, "retries": 1},
        client={"steps": 1},
        evaluation={"every": 2},
    )


def in_turn(train: Callable[..., ClientUpdate]):
    """A round's clients through `train`, which takes the arguments of `train_client`, one after another."""

    def call(experiment, state, round, clients):
        for client in clients:
            own = experiment.clients[client]
            yield train(experiment.learner, experiment.train, own, client, round, state.tensors, experiment.config)

    return call


@pytest.fixture(scope="module")
def rounds(config, tmp_path_factory):
    """rounds(train, **sections) -> (experiment, state, records) of the configuration with some sections changed."""
    begun = build(config)
    initial = begun.learner.state()

    def call(train: Callable[..., ClientUpdate] = train_client, **sections):
        experiment = replace(begun, config=changed(config, **sections))
        folder = RunFolder.create(tmp_path_factory.mktemp("rounds") / "run", experiment.config)
        start = State(0, {name: tensor.clone() for name, tensor in initial.items()})
        state = run_rounds(experiment, folder, start, lambda event, facts: None, in_turn(train))
        return experiment, state, folder.metrics()

    return call


def _with(name: str, change: Callable[[torch.Tensor], object]):
    return lambda update: replace(update, tensors=dict(update.tensors) | {name: change(update.tensors[NAME])})


def _without(update: ClientUpdate) -> ClientUpdate:
    return replace(update, tensors={name: tensor for name, tensor in update.tensors.items() if name != NAME})


POISONS = {
    "NaN": (_with(NAME, lambda t: t.index_fill(1, torch.tensor([3]), math.nan)), f"{NAME} holds NaN or Inf"),
    "Inf": (_with(NAME, lambda t: t - math.inf), f"{NAME} holds NaN or Inf"),
    "shape": (_with(NAME, lambda t: t.T), f"{NAME} must be torch.float32 (4, 32), got torch.float32 (32, 4)"),
    "dtype": (_with(NAME, lambda t: t.double()), f"{NAME} must be torch.float32 (4, 32), got torch.float64 (4, 32)"),
    "key": (_with("classifier.wieght", lambda t: t), "classifier.wieght is not a trainable tensor of this run"),
    "missing": (_without, f"{NAME} is missing"),
    "list": (_with(NAME, lambda t: t.tolist()), f"{NAME} must be a tensor, got list"),
    "sparse": (_with(NAME, lambda t: t.to_sparse()), f"{NAME} must be dense and hold data"),
    "count": (lambda update: replace(update, examples=0), "examples must be an integer from 1 to 2**31 - 1, got 0"),
    "steps": (lambda update: replace(update, steps=10**12), "steps must be 1 for "),
    "loss": (lambda update: replace(update, finite=False), "the training loss was NaN or Inf"),
}


def poisoned(poison, clients, rounds=None, good: list[ClientUpdate] | None = None):
    """`train_client`, with the updates of some clients in some rounds (None: all) changed by `poison`."""

    def train(learner, examples, indices, client, round, start, config):
        update = train_client(learner, examples, indices, client, round, start, config)
        if client in clients and (rounds is None or round in rounds):
            return poison(update)
        if good is not None:
            good.append(update)
        return update

    return train


@pytest.mark.parametrize(("poison", "why"), POISONS.values(), ids=POISONS)
def test_bad_updates_are_rejected_by_name(rounds, poison, why):
    """The others are averaged as if the bad clients had not been sampled, bit for bit."""
    good: list[ClientUpdate] = []
    _, state, (record,) = rounds(poisoned(poison, {1, 4}, good=good), server={"rounds": 1})
    assert [(item["client"], item["why"][: len(why)]) for item in record["rejected"]] == [(1, why), (4, why)]
    assert (record["attempts"], record["sampled"], record["completed"]) == (1, [0, 1, 2, 3, 4], [0, 2, 3])
    mean = WeightedMean()
    for update in good:
        mean.add(update.tensors, update.examples)
    expected = mean.result(state.tensors)
    assert state.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.tensors.items())
    weights = [update.examples for update in good]
    assert record["examples"] == sum(weights)
    assert record["train_loss"] == pytest.approx(np.average([u.metrics["loss"] for u in good], weights=weights))


def test_a_round_with_too_few_is_tried_again(rounds):
    calls: list[int] = []

    def train(learner, examples, indices, client, round, start, config):
        calls.append(client)
        update = train_client(learner, examples, indices, client, round, start, config)
        return POISONS["NaN"][0](update) if len(calls) <= 3 else update

    _, _, records = rounds(train, server={"min_updates": 3})
    assert [record["attempts"] for record in records] == [2, 1]
    assert calls == [*range(5)] * 3
    assert [item["client"] for item in records[0]["rejected"]] == [0, 1, 2]  # of the first attempt, by name
    assert records[0]["completed"] == [0, 1, 2, 3, 4]
    size = records[0]["bytes"]["up_per_client"]
    assert (records[0]["bytes"]["up"], records[1]["bytes"]["up"]) == (10 * size, 5 * size)  # both attempts were sent


def test_too_few_in_every_attempt(rounds):
    with pytest.raises(RunError) as caught:
        rounds(poisoned(POISONS["NaN"][0], {0, 2, 3}, {2}), server={"min_updates": 3})
    assert str(caught.value).startswith(
        "round 2: got 2 good updates in the last of 2 attempts, server.min_updates is 3; 0 dropped out, "
        f"0 missed the deadline, client 0 was rejected ({NAME} holds NaN or Inf), "
    )
    assert "the state after round 1 is saved" in str(caught.value)


def test_everyone_drops_out(rounds):
    with pytest.raises(RunError, match="round 1: got 0 good updates in the last of 2 attempts.* 5 dropped out"):
        rounds(failures={"dropout": 0.999999999})


def test_a_failed_run_is_resumed(config, tmp_path, monkeypatch, capsys):
    """Exit code 1 and one line; the rounds before it stay, and `resume` ends in the bits of a run that never failed."""

    def federa(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["federa", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, capsys.readouterr().err
        return 0, capsys.readouterr().err

    folder = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    bad = poisoned(POISONS["shape"][0], range(5), {2})
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "run_rounds", lambda *arguments: run_rounds(*arguments[:4], in_turn(bad)))
        code, err = federa("run", tmp_path / "config.yaml", "--output", folder)
    assert code == 1 and err.count("\n") == 1 and err.startswith("federa: round 2: got 0 good updates")
    assert "the state after round 1 is saved" in err and "`federa resume DIR --set server.retries=N`" in err
    assert checkpoint_rounds(RunFolder(folder)) == [0, 1] and not (folder / "result.json").exists()
    assert federa("resume", folder) == (0, "")
    whole = simulation.run(config, tmp_path / "whole")
    name = "checkpoints/round-00002/state.safetensors"
    assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_failures_are_functions_of_the_seed(rounds):
    """Dropped and late clients: the same in every run of a seed, and every sampled client has exactly one fate."""
    failures = {"dropout": 0.4, "deadline": 1.0, "speed_spread": 1.0}
    experiment, first, records = rounds(failures=failures)
    _, second, again = rounds(failures=failures)
    fates = [[record[key] for key in ("sampled", "dropped", "late", "completed", "attempts")] for record in records]
    assert fates == [
        [record[key] for key in ("sampled", "dropped", "late", "completed", "attempts")] for record in again
    ]
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())
    durations = client_durations(experiment)
    slow = {*np.flatnonzero(durations > np.median(durations)).tolist()}
    assert any(record["dropped"] for record in records) and any(record["late"] for record in records)
    for sampled, dropped, late, completed, _ in fates:
        assert sorted(dropped + late + completed) == sampled and {*late} == slow - {*dropped}


def test_dropout_has_its_rate(rounds):
    """200 rounds of 5 clients at 0.3: 1,000 draws, five standard deviations of 0.0145."""
    trained: list[ClientUpdate] = []

    def train(learner, examples, indices, client, round, start, config):
        if not trained:
            trained.append(train_client(learner, examples, indices, client, round, start, config))
        return replace(trained[0], client=client)

    server, rarely = {"rounds": 200, "retries": 20}, {"evaluation": {"every": 200}, "run": {"checkpoint_every": 200}}
    _, _, records = rounds(train, failures={"dropout": 0.3}, server=server, **rarely)
    assert abs(sum(len(record["dropped"]) for record in records) / 1000 - 0.3) < 0.0725


def test_a_run_that_failed_goes_on_with_more_retries(config, tmp_path):
    """Failures are functions of the seed, so only other settings help; they change no finished round."""
    hard = changed(
        config,
        server={"rounds": 3, "retries": 0, "min_updates": 4},
        failures={"dropout": 0.4},
        run={"checkpoint_every": 50},
    )
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"round (\d): got . good updates.*--set server.retries=N"):
        simulation.run(hard, folder)
    finished = RunFolder(folder).metrics()[-1]["round"]
    assert checkpoint_rounds(RunFolder(folder))[-1] == finished  # saved although none was due
    with pytest.raises(RunError):
        simulation.resume(folder)
    with pytest.raises(
        InputError, match=r"^--set: may change data.cache, server.min_updates, server.retries, sites.* of .*client.lr"
    ):
        simulation.resume(folder, overrides=["client.lr=1.0"])
    result = simulation.resume(folder, overrides=["server.retries=50"])
    assert [record["round"] for record in result.records] == [0, 1, 2, 3]
    assert RunFolder(folder).config().server.retries == 50


def test_a_begun_run_keeps_its_partition(config, tmp_path):
    """The texts and labels stay as they are, one example changes hands: resume says so."""
    rows = [{"text": f"a sentence of {i}", "label": i % 2, "site": f"s{i % 3}"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    natural = changed(
        config,
        data={"path": str(data), "client": "site", "max_train": None, "max_test": None},
        partition={"scheme": "natural"},
        server={"rounds": 2, "min_updates": 3, "retries": 0},
    )
    failing = changed(natural, failures={"dropout": 0.9})
    with pytest.raises(RunError):
        simulation.run(failing, tmp_path / "run")
    rows[0]["site"] = "s1"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="must give the texts that this run began with"):
        simulation.resume(tmp_path / "run", overrides=["server.retries=9"])
