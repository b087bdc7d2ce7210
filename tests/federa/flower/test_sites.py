"""Rounds over Flower's messages in one process: the simulator's bits, and every way in which a site can fail."""

import json

import pytest
import torch
from safetensors.torch import load_file

from federa import simulation
from federa.flower import client_app
from federa.flower.sites import Sites
from federa.folder import RunFolder

from .conftest import InProcessGrid


def over_sites(config, folder, change=lambda node, message, reply: reply, nodes=3, **settings):
    """(result, grid, lines of sites.jsonl) of a run over sites in this process."""
    grid = InProcessGrid(client_app.app, nodes, change, **settings)
    result = simulation.run(config, folder, train=Sites(grid, RunFolder(folder)))
    return result, grid, [json.loads(line) for line in (folder / "sites.jsonl").open()]


def final(folder, round=2):
    return load_file(folder / "checkpoints" / f"round-{round:05d}" / "state.safetensors")


@pytest.fixture(scope="module")
def simulated(pilot, tmp_path_factory):
    return simulation.run(pilot, tmp_path_factory.mktemp("simulated") / "run").folder


def test_the_simulators_bits(pilot, simulated, tmp_path):
    result, _, lines = over_sites(pilot, tmp_path / "run")
    assert (result.folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        simulated / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    ours, theirs = final(tmp_path / "run"), final(simulated)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["round"] for line in lines] == [1, 2]
    assert [entry["site"]["loads"] for line in lines for entry in line["clients"]] == [1] * 6
