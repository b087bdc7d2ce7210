"""A deployment of real processes on loopback, TLS and node keys on: SuperLink, three SuperNodes, their workers, MiniLM.

The tests build on one another: one deployment, started once, is used and then damaged.
"""

import json
import os
import shutil
import signal
import socket
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save

from federa import simulation
from federa.flower.parcel import Parcel
from federa.flower.project import CONNECTION, init_project
from federa.folder import RunFolder
from federa.stdlib_docs import stdlib_docs

from .deployment import Deployment, wait_for

pytestmark = pytest.mark.flower

SITES, ROUNDS = 3, 3
LAST = f"checkpoints/round-{ROUNDS:05d}/state.safetensors"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """120 docstrings: all/ with a column "site", site-I/ with one site's alone, server/ with 60 others."""
    train, test, names = stdlib_docs()
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("texts")

    def rows(part, count):
        chosen = np.sort(rng.permutation(len(part.texts))[:count])
        return [
            {"text": part.texts[i], "label": names[part.labels[i]], "site": f"s{part.labels[i] % SITES}"}
            for i in chosen
        ]

    def write(place: str, split: str, content) -> None:
        (folder / place).mkdir(exist_ok=True)
        (folder / place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))

    ours, theirs = rows(train, 120), rows(test, 60)
    for place, content in (("all", ours), ("server", theirs)):
        write(place, "train", content)
        write(place, "test", theirs)
        (folder / place / "labels.json").write_text(json.dumps(names))
    for site in range(SITES):
        write(f"site-{site}", "train", [row for row in ours if row["site"] == f"s{site}"])
    return folder


@pytest.fixture(scope="module")
def config(texts, minilm_path, tmp_path_factory):
    return {
        "model": {"name": str(minilm_path)},
        "data": {"path": str(texts / "server"), "max_length": 32, "cache": str(tmp_path_factory.mktemp("tokens"))},
        "partition": {"scheme": "sites", "clients": SITES},
        "client": {"lr": 0.005},
        "server": {"rounds": ROUNDS},
        "run": {"threads": 1},
    }


@pytest.fixture(scope="module")
def deployed(config, texts, tmp_path_factory):
    """The deployment, its sites registered and online, and three that must not be: see the first test."""
    # A unix socket's path has 107 bytes, which pytest's folders may exceed.
    base = tmp_path_factory.mktemp("d")
    file = base / "config.json"
    file.write_text(json.dumps(config))
    port = free_port()
    folder = init_project(file, base / "p", address=f"127.0.0.1:{port}")
    for site in range(SITES):
        with open(folder / f"site-{site}" / "node.toml", "a") as node:
            node.write(f"data.path = {json.dumps(str(texts / f'site-{site}'))}\n")
    stranger = init_project(file, base / "q", address=f"127.0.0.1:{port}")
    with Deployment(folder, f"127.0.0.1:{port}", free_port()) as deployment:
        deployment.superlink()
        deployment.register(*range(SITES))
        for site in range(SITES):
            deployment.worker(site)
            deployment.supernode(site)

        def with_stranger(name: str):
            theirs, ours = stranger / "site-0" / name, "key" if name == "key" else "ca.crt"
            return lambda command: [str(theirs) if part == ours else part for part in command]

        deployment.supernode(0, "wrong-ca", with_stranger("ca.crt"))
        deployment.supernode(0, "wrong-key", with_stranger("key"))
        deployment.supernode(
            0, "plaintext", lambda command: [*command[: command.index("--root-certificates")], "--insecure"]
        )
        wait_for("sites online", lambda: deployment.online() == SITES)
        yield deployment


def records(folder) -> list[dict]:
    """The rounds that are recorded so far."""
    return RunFolder(folder).metrics()


def rounds_of_sites(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "sites.jsonl").open()]


def equal(ours, theirs) -> bool:
    ours, theirs = load_file(ours), load_file(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(deployed):
    """The folder of an uninterrupted run over the three sites."""
    process = deployed.run("run")
    assert process.wait(300) == 0 and (deployed.folder / "run" / "result.json").is_file(), deployed.log("run")
    return deployed.folder / "run"


def test_the_simulators_bits(deployed, whole, config, texts, tmp_path):
    """Three sites with a folder each, and a simulation that has all three in one: the same adapter, byte for byte."""
    data = config["data"] | {"path": str(texts / "all"), "client": "site", "validation": 0.0}
    simulated = simulation.run(config | {"data": data, "partition": {"scheme": "natural"}}, tmp_path / "simulated")
    assert equal(whole / LAST, simulated.folder / LAST)
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (simulated.folder / name).read_bytes()
    losses = [record["validation"]["loss"] for record in records(whole)]
    assert losses[-1] < losses[0] - 0.1


def test_the_base_model_is_loaded_once(whole):
    lines = rounds_of_sites(whole)
    assert [line["round"] for line in lines] == [1, 2, 3]
    for client in range(SITES):
        mine = [line["clients"][client] for line in lines]
        assert [entry["site"]["loads"] for entry in mine] == [1] * ROUNDS
        assert len({entry["site"]["pid"] for entry in mine}) == 1
        for entry in mine:
            assert entry["sent"] == entry["site"]["received"] and entry["received"] == entry["site"]["sent"]
        assert mine[0]["sent"] > mine[1]["sent"] == mine[2]["sent"]  # the initial factors once


def test_who_is_refused(deployed, whole):
    """A whole run later, neither another authority's certificate nor plain text nor an unknown key has come in."""
    assert deployed.online() == SITES
    for name in ("wrong-ca", "wrong-key", "plaintext"):
        deployed.kill(name)
    plain = deployed.folder.parent / "plain"
    shutil.copytree(deployed.folder / "server", plain / "server")
    (plain / "server" / "config.toml").write_text(
        f'[superlink.{CONNECTION}]\naddress = "{deployed.address}"\ninsecure = true\n'
    )
    assert Deployment(plain, deployed.address, 0).flwr("ls", CONNECTION).returncode != 0


def test_a_killed_worker_and_a_killed_superlink(deployed, whole):
    """kill -9 of a worker after round 1, of the SuperLink after round 2; `federa resume` ends in the same bits."""
    folder = deployed.folder / "second"
    deployed.run("second", output=str(folder))
    wait_for("round 1", lambda: len(records(folder)) > 1)
    os.kill(int(rounds_of_sites(folder)[0]["clients"][0]["site"]["pid"]), signal.SIGKILL)
    wait_for("round 2", lambda: len(records(folder)) > 2)
    deployed.kill("superlink")
    deployed.kill("second", signal.SIGTERM)
    refused = deployed.federa("resume", folder)
    assert refused.returncode == 1 and "is the SuperLink running?" in refused.stderr, refused.stderr
    assert not (folder / "result.json").exists()
    deployed.superlink()
    resumed = deployed.federa("resume", folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert equal(folder / LAST, whole / LAST)
    last = rounds_of_sites(folder)
    first, later = last[0]["clients"], last[-1]["clients"]
    assert later[0]["site"]["pid"] != first[0]["site"]["pid"] and later[0]["site"]["loads"] == 1
    assert [entry["site"]["loads"] for entry in later[1:]] == [1, 1]  # of all rounds of both runs
    assert all(record.get("rejected", []) == [] for record in records(folder))


def test_a_killed_supernode_and_a_site_that_lies(deployed, whole):
    """Site 1 sends NaN, then a wrong shape, then too much; site 2's SuperNode is killed in round 2. Site 0 goes on."""
    deployed.kill("worker-1", signal.SIGTERM)
    path = deployed.folder / "site-1" / "worker.sock"
    wait_for("the worker's end", lambda: not _listening(path))
    path.unlink()
    lies = [
        lambda tensors, name: tensors | {name: tensors[name] * float("nan")},
        lambda tensors, name: tensors | {name: tensors[name][:-1].clone()},
        lambda tensors, name: tensors | {"tensors/more": torch.zeros(4_000_000)},
    ]
    folder = deployed.folder / "third"
    began = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        liar = threading.Thread(target=_lie, args=(listener, lies, began), daemon=True)
        liar.start()
        process = deployed.run("third", output=str(folder))
        assert began.wait(120), deployed.log("third")
        deployed.kill("supernode-2")
        assert process.wait(300) == 0, deployed.log("third")
        liar.join(10)
    _, *rounds = records(folder)
    first, second, third = (record["completed"] for record in rounds)
    assert first == [0, 2] and third == [0]
    assert second in ([0], [0, 2])  # what site 2 has answered before the kill counts
    why = [{item["client"]: item["why"] for item in record["rejected"]} for record in rounds]
    assert why[0][1].endswith("holds NaN or Inf") and list(why[0]) == [1]
    assert " must be torch.float32 " in why[1][1], why[1]
    assert second == [0, 2] or "its site failed: " in why[1][2], why[1]
    assert why[2][1].startswith("its payload is oversized: ") and "site" in why[2][2], why[2]


def _listening(path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _lie(listener: socket.socket, lies, began: threading.Event) -> None:
    """Answers one request a lie, with the tensors it was sent; `began` once the second is there."""
    for number, lie in enumerate(lies):
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as stream:
            request = Parcel.read(stream)
            if number == 1:
                began.set()
            tensors = load(request.blobs["state"])
            name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
            facts = {"examples": 5, "steps": 1, "metrics": {"loss": 1.0}, "finite": True, "client": 1}
            Parcel({"update": facts}, {"update": save(lie(tensors, name))}).write(stream)
