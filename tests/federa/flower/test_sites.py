"""Rounds over Flower's messages in one process: the simulator's bits, and every way in which a site can fail."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from safetensors.torch import load, load_file, save

from federa import privacy, simulation
from federa import rounds as rounds_module
from federa.aggregate import WeightedMean
from federa.checkpoint import State
from federa.client import train_client
from federa.config import changed
from federa.errors import InputError, RunError
from federa.experiment import Experiment, build
from federa.flower import client_app, sites
from federa.flower.parcel import Parcel
from federa.flower.site import Site, site_config
from federa.flower.sites import Sites
from federa.folder import RunFolder
from federa.rounds import run_rounds, train_in_turn

from .grid import InProcessGrid

NAME = "tensors/classifier.weight"


def honest(node, message, reply):
    return reply


def grid_of(config, nodes: int = 3, change: Callable = honest) -> InProcessGrid:
    """Nodes that find the run's texts where the server does."""
    return InProcessGrid(client_app.app, nodes, change, **{"data.path": config.data.path})


@pytest.fixture(scope="module", autouse=True)
def the_site(tmp_path_factory):
    """One site for all nodes and tests of this module, so that equal runs load the model once."""
    site, patch = Site(tmp_path_factory.mktemp("site")), pytest.MonkeyPatch()
    patch.setattr(client_app, "_site_in_process", lambda pid: site)
    patch.setattr(sites, "_POLL", 0.0)
    yield site
    patch.undo()


METHODS = {
    "dropout, FedAdam": {"model": {"dropout": 0.1}, "method": {"name": "lora"}, "server": {"optimizer": "fedadam"}},
    "FedEx, which moves the base": {"method": {"name": "federa"}, "server": {"aggregation": "fedex"}},
    "RoLoRA, by turns": {"method": {"name": "rolora"}},
    "SCAFFOLD": {"client": {"control_variates": True, "optimizer": "sgd", "lr": 0.01}},
    "mixed ranks": {"method": {"name": "lora", "client_ranks": [4, 2]}, "server": {"aggregation": "flora"}},
    "SLoRA, in two stages": {"method": {"name": "slora"}},
    "FedSVD": {"method": {"name": "fedsvd"}},
}


QUICK = ("dropout, FedAdam", "FedEx, which moves the base")


class Outcome(NamedTuple):
    experiment: Experiment
    start: dict[str, torch.Tensor]
    state: State
    records: list[dict[str, Any]]
    lines: list[dict[str, Any]]  # of sites.jsonl
    grid: InProcessGrid


@pytest.fixture(scope="module")
def begun(pilot):
    """(experiment, tensors before the first round): the learner trains in place."""
    experiment = build(pilot)
    return experiment, experiment.learner.state()


@pytest.fixture
def rounds(begun, tmp_path):
    """rounds(change, nodes, here, **sections) -> Outcome of the rounds alone, over some nodes or `here` in turn."""

    def call(change: Callable = honest, nodes: int = 3, here: bool = False, **sections) -> Outcome:
        first, start = begun
        experiment = replace(first, config=changed(first.config, **sections))
        folder = RunFolder.create(tmp_path / ("here" if here else "run"), experiment.config)
        experiment.learner.broadcast.save(folder.init_file)
        folder.write_json(folder.partition_file.name, {"data": experiment.data_digest()})
        grid = grid_of(experiment.config, nodes, change)
        train = train_in_turn if here else Sites(grid, folder)
        state = run_rounds(experiment, folder, State(0, dict(start)), lambda event, facts: None, train)
        lines = [] if here else [json.loads(line) for line in (folder.path / "sites.jsonl").open()]
        return Outcome(experiment, start, state, folder.metrics(), lines, grid)

    return call


def trained_here(outcome: Outcome, client: int, start: dict[str, torch.Tensor]):
    experiment = outcome.experiment
    own = experiment.clients[client]
    return train_client(experiment.learner, experiment.train, own, client, 1, start, experiment.config)


def mean_of(outcome: Outcome, clients: list[int]):
    """FedAvg of the first round over some clients, trained here one by one."""
    mean = WeightedMean()
    for client in clients:
        update = trained_here(outcome, client, outcome.start)
        mean.add(update.tensors, update.examples)
    return mean.result(outcome.start)


def equal(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:federa. no worker")
class TestRounds:
    @pytest.mark.parametrize(
        "method", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in QUICK)) for name in METHODS]
    )
    def test_whole_runs_have_the_simulators_bits(self, pilot, tmp_path, method):
        """Whatever a method sends: other tensors in every round, moved base weights, variates, mixed ranks."""
        config = changed(pilot, **METHODS[method])
        simulated = simulation.run(config, tmp_path / "simulated")
        folder = tmp_path / "run"
        grid = grid_of(config)
        result = simulation.run(config, folder, train=Sites(grid, RunFolder(folder)))
        name = f"checkpoints/round-{config.server.rounds:05d}/state.safetensors"
        assert equal(load_file(folder / name), load_file(simulated.folder / name))
        drop = {"seconds": None}
        assert [record | drop for record in result.records] == [record | drop for record in simulated.records]

    def test_sites_with_their_own_data(self, pilot, site_data, tmp_path):
        """Three folders, and a server that has none of them: the bits of a simulation that has them all."""
        natural = changed(
            pilot,
            data={"path": str(site_data / "all"), "client": "site", "validation": 0.0},
            partition={"scheme": "natural"},
        )
        simulated = simulation.run(natural, tmp_path / "simulated")
        real = changed(pilot, data={"path": str(site_data / "server")}, partition={"scheme": "sites"})
        replies = []
        grid = grid_of(real, change=lambda node, message, reply: replies.append(reply) or reply)
        for node in grid.nodes:
            grid.nodes[node]["data.path"] = str(site_data / f"site-{node - 1}")
        folder = tmp_path / "run"
        result = simulation.run(real, folder, train=Sites(grid, RunFolder(folder)))
        name = "checkpoints/round-00002/state.safetensors"
        assert equal(load_file(folder / name), load_file(simulated.folder / name))
        assert result.test == simulated.test and result.best is not None
        assert [r["examples"] for r in result.records[1:]] == [160, 160]
        assert (folder / "report.html").is_file()
        texts = [json.loads(line)["text"] for line in (site_data / "all" / "train.jsonl").open()]
        for message in (*grid.sent, *replies):
            parcel = Parcel.from_record(message.content)
            sent = json.dumps(parcel.facts) + b"".join(parcel.blobs.values()).decode("latin-1")
            assert not [text for text in texts if json.dumps(text)[1:30] in sent]

    def test_bytes_at_both_ends_and_the_factors_once(self, rounds):
        outcome = rounds()
        size = sum(tensor.nbytes for tensor in outcome.start.values())
        factors = outcome.experiment.learner.broadcast.bytes
        for line, overhead in zip(outcome.lines, (factors, 0), strict=True):
            for entry in line["clients"]:
                assert (entry["site"]["received"], entry["site"]["sent"]) == (entry["sent"], entry["received"])
                assert 0 <= entry["sent"] - size - overhead < 16384 and 0 <= entry["received"] - size < 8192
                assert entry["problem"] is None
        train = [message for message in outcome.grid.sent if message.metadata.message_type == "train"]
        assert ["init" in message.content["blobs"] for message in train] == [True] * 3 + [False] * 3
        assert [record["completed"] for record in outcome.records] == [[0, 1, 2]] * 2

    def test_factors_that_a_site_has_lost_are_sent_again(self, rounds, the_site):
        def forget(node, message, reply):
            if node == 2:
                shutil.rmtree(the_site.folder)
            return reply

        outcome = rounds(forget)
        assert [record["completed"] for record in outcome.records] == [[0, 1, 2]] * 2
        assert sum("init" in m.content["blobs"] for m in outcome.grid.sent if m.metadata.message_type == "train") > 3

    def test_a_site_for_many_clients(self, rounds):
        """Client c is at the site c modulo 2: the same bits as with a site each."""
        outcome = rounds(nodes=2, server={"rounds": 1})
        assert [entry["node"] for entry in outcome.lines[0]["clients"]] == [1, 2, 1]
        assert equal(outcome.state.tensors, mean_of(outcome, [0, 1, 2]))

    def test_bfloat16_by_hand(self, rounds):
        """Down: rounded. Up: each tensor's change, rounded, added to the server's unrounded state."""
        outcome = rounds(sites={"wire": "bfloat16"}, server={"rounds": 1})
        start = outcome.start
        rounded = {name: tensor.bfloat16().float() for name, tensor in start.items()}
        mean = WeightedMean()
        for client in range(3):
            update = trained_here(outcome, client, rounded)
            change = {name: (new - rounded[name]).bfloat16().float() for name, new in update.tensors.items()}
            mean.add({name: start[name] + change[name] for name in start}, update.examples)
        assert equal(outcome.state.tensors, mean.result(start))
        full = sum(tensor.nbytes for tensor in start.values())
        assert outcome.lines[0]["clients"][0]["received"] - full / 2 < 8192


@pytest.mark.filterwarnings("ignore:federa. no worker")
def test_differential_privacy_is_the_same_code(rounds, monkeypatch):
    """Clipped changes, noise and what they cost; with noise from a known seed, the simulator's bits."""

    def with_known_noise(**options):
        secret = np.random.default_rng(7)
        for module in (privacy, rounds_module):
            monkeypatch.setattr(module, "secret_generator", lambda: secret)
        return rounds(privacy={"clip": 0.5, "noise": 1.0}, client={"steps": 1}, **options)

    pytest.importorskip("dp_accounting", reason="pip install 'federa[dp]'")
    ours, theirs = with_known_noise(), with_known_noise(here=True)
    assert equal(ours.state.tensors, theirs.state.tensors)
    assert [record["privacy"] for record in ours.records] == [record["privacy"] for record in theirs.records]
    assert ours.records[1]["privacy"]["epsilon"] > ours.records[0]["privacy"]["epsilon"] > 0


def _tensors(change):
    """A poison that changes the tensors of an update as they are on the wire."""

    def poison(parcel: Parcel) -> Parcel:
        return replace(parcel, blobs={"update": save(change(load(parcel.blobs["update"])))})

    return poison


def _facts(**changes):
    return lambda parcel: replace(parcel, facts=parcel.facts | {"update": parcel.facts["update"] | changes})


def _at(name, change):
    return _tensors(lambda tensors: tensors | {name: change(tensors[NAME])})


HUGE = torch.zeros(1_000_000)
POISONS = {
    "NaN": (_at(NAME, lambda t: t * math.nan), "classifier.weight holds NaN or Inf"),
    "shape": (_at(NAME, lambda t: t.T.contiguous()), "classifier.weight must be torch.float32 (4, 32), got"),
    "dtype": (_at(NAME, lambda t: t.double()), "classifier.weight must be torch.float32 (4, 32), got torch.float64"),
    "extra": (_at("tensors/more", torch.clone), "more is not a trainable tensor of this run"),
    "oversized": (_at("tensors/more", lambda t: HUGE), "its payload is oversized: "),
    "cut": (lambda p: replace(p, blobs={"update": p.blobs["update"][:-5]}), "its payload is malformed: payload: must"),
    "random": (lambda p: replace(p, blobs={"update": b"\x80\x04]q\x00." * 99}), "its payload is malformed: payload:"),
    "absent": (lambda p: replace(p, blobs={}), "its payload is malformed: it holds no update"),
    "no facts": (lambda p: replace(p, facts={"update": [1]}), "its payload is malformed: update: must be a mapping"),
    "facts cut": (lambda p: replace(p, facts={"update": {}}), "its payload is malformed: update: metrics must be"),
    "examples": (_facts(examples=-3), "examples must be an integer from 1 to 2**31 - 1, got -3"),
    "metrics": (_facts(metrics={"loss": "low"}), "its payload is malformed: update: metrics must be numbers"),
    "diverged": (_facts(finite=False), "the training loss was NaN or Inf"),
    "wrong client": (_facts(client=0), None),
    "own words": (lambda p: Parcel({"error": "data.path: not here"}), "its site says: data.path: not here"),
}


@pytest.mark.filterwarnings("ignore:federa. no worker")
@pytest.mark.parametrize(("poison", "why"), POISONS.values(), ids=POISONS)
def test_what_a_site_must_not_send(rounds, poison, why):
    """Rejected by name; the others are averaged as if it had not been there. Who a client is, the server knows."""

    def change(node, message, reply):
        if message.metadata.message_type != "train" or node != 2:
            return reply
        return Message(poison(Parcel.from_record(reply.content)).to_record(), reply_to=message)

    outcome = rounds(change, server={"rounds": 1}, client={"steps": 1})
    record = outcome.records[0]
    completed = [0, 1, 2] if why is None else [0, 2]
    assert record["completed"] == completed
    assert [(item["client"], item["why"][: len(why or "")]) for item in record["rejected"]] == [(1, why)] * (
        why is not None
    )
    assert equal(outcome.state.tensors, mean_of(outcome, completed))


def _foreign(node, message, reply):
    return Message(Parcel({}).to_record(), reply_to=message) if node == 2 else reply


def _silent(node, message, reply):
    return reply if node != 2 or message.metadata.message_type == "query" else None


def _unavailable(node, message, reply):
    return reply if node != 2 else Message(Error(5, "Node Unavailable"), reply_to=message)


@pytest.mark.filterwarnings("ignore:federa. no worker")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_silent, "no reply within sites.timeout = 0.2 s"),
        (_unavailable, "no site serves it"),
        (_foreign, "no site serves it"),
    ],
    ids=["silent", "unavailable", "foreign"],
)
def test_who_does_not_answer(rounds, change, why):
    waiting = {"timeout": 0.2, "wait": 0.0}
    outcome = rounds(change, server={"rounds": 1}, client={"steps": 1}, sites=waiting)
    assert outcome.records[0]["rejected"] == [{"client": 1, "why": why}]
    assert outcome.lines[0]["clients"][1]["problem"] == why
    assert equal(outcome.state.tensors, mean_of(outcome, [0, 2]))


def test_nobody_there(rounds):
    with pytest.raises(RunError, match=r"sites.wait: no site came within 0 s"):
        rounds(nodes=0, sites={"wait": 0.0})


@pytest.mark.filterwarnings("ignore:federa. no worker")
def test_a_run_whose_network_fails_is_resumed(pilot, tmp_path):
    """Round 2 gets no update and the run stops; taken up again it ends in the bits of a run that never stopped."""

    def down(node, message, reply):
        lost = message.metadata.message_type == "train" and Parcel.from_record(message.content).facts["round"] == 2
        return Message(Error(5, "Node Unavailable"), reply_to=message) if lost else reply

    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match=r"round 2: got 0 good updates.*client 0 was rejected \(its site failed: Node"):
        simulation.run(pilot, folder.path, train=Sites(grid_of(pilot, 3, down), folder))
    simulation.run(pilot, folder.path, train=Sites(grid_of(pilot), folder))
    whole = simulation.run(pilot, tmp_path / "whole")
    name = "checkpoints/round-00002/state.safetensors"
    assert (folder.path / name).read_bytes() == (whole.folder / name).read_bytes()


class TestSiteConfig:
    def test_the_server_names_no_file_of_a_site(self, pilot):
        remote = changed(pilot, data={"path": "/etc"}, model={"trust_remote_code": True})
        with pytest.raises(InputError, match="data.path: the site must say where its data are"):
            site_config(remote, {})
        own = site_config(remote, {"data.path": "/srv/texts", "model.device": "cpu", "run.threads": 3})
        assert (own.data.path, own.model.trust_remote_code, own.run.threads) == ("/srv/texts", False, 3)
        assert site_config(changed(pilot, data={"path": None}), {}).data.name == "stdlib-docs"

    @pytest.mark.parametrize("key", ["client.lr", "data.max_length", "seed", "server.rounds", "data.path.x", "wire"])
    def test_what_is_the_runs(self, pilot, key):
        with pytest.raises(InputError, match=f"--node-config: {key} must be a key that a site may set"):
            site_config(pilot, {key: 1})

    def test_values_are_taken_as_they_are(self, pilot):
        assert site_config(pilot, {"data.path": "a: [b]"}).data.path == "a: [b]"

    @pytest.mark.filterwarnings("ignore:federa. no worker")
    def test_other_texts_are_named(self, rounds):
        """A pilot whose sites do not read what the server reads, as another Python's standard library."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Experiment, "data_digest", lambda experiment: str(id(experiment)))
            with pytest.raises(RunError, match="its site says: data: with partition.scheme other than sites"):
                rounds(server={"retries": 0}, client={"lr": 0.5})
