"""Saved states, and runs that were killed: SIGKILL on real processes, by the clock and between file operations."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from federa.checkpoint import (
    State,
    checkpoint_rounds,
    clear_leftovers,
    load_checkpoint,
    mismatch,
    newest_checkpoint,
    save_checkpoint,
)
from federa.config import changed, dump_config
from federa.errors import InputError
from federa.folder import RunFolder
from federa.simulation import restore, resume

TEMPLATE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def state_of(round: int, best: int | None = None) -> State:
    rng = torch.Generator().manual_seed(round)
    tensors = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in TEMPLATE.items()}
    server = {f"m.{name}": tensor * 2 for name, tensor in tensors.items()}
    facts = None if best is None else {"round": best, "validation": {"loss": 0.1, "accuracy": 1 / 3}}
    base = {"base.residual": torch.randn(3, 2, generator=rng)}
    variates = {7: {"a": torch.randn(2, 3, generator=rng)}, 11: {"a": torch.randn(2, 3, generator=rng)}}
    moves = [{"base.residual": 4}] * round
    return State(round, tensors, server, base, variates, {0: 1, 3: 2}, moves, 5, 123, 4.5, facts)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_states_come_back_bit_for_bit(folder):
    saved = state_of(7, best=5)
    save_checkpoint(folder, saved, "digest")
    loaded = load_checkpoint(folder, 7, "digest", TEMPLATE)
    for group in ("tensors", "server", "base"):
        assert getattr(loaded, group).keys() == getattr(saved, group).keys()
        assert all(torch.equal(getattr(loaded, group)[n], t) for n, t in getattr(saved, group).items())
    assert (loaded.round, loaded.seen, loaded.bytes_total, loaded.seconds) == (7, {0: 1, 3: 2}, 123, 4.5)
    assert loaded.moves == saved.moves and loaded.releases == 5 and loaded.variates.keys() == {7, 11}
    assert all(torch.equal(loaded.variates[client]["a"], own["a"]) for client, own in saved.variates.items())
    assert loaded.best == saved.best


def test_the_newest_two_and_the_best_are_kept(folder):
    for round in range(6):
        save_checkpoint(folder, state_of(round, best=min(round, 1)), "digest")
    assert checkpoint_rounds(folder) == [1, 4, 5]
    save_checkpoint(folder, state_of(6, best=6), "digest")
    assert checkpoint_rounds(folder) == [5, 6]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["round-00005", "round-00006"]


def test_saving_a_round_again_replaces_it(folder):
    save_checkpoint(folder, state_of(1), "digest")
    again = state_of(1)
    again.tensors["a"] += 1
    save_checkpoint(folder, again, "digest")
    assert torch.equal(load_checkpoint(folder, 1, "digest", TEMPLATE).tensors["a"], again.tensors["a"])
    assert [p.name for p in folder.checkpoints.iterdir()] == ["round-00001"]


def test_the_newest_is_taken(folder):
    assert newest_checkpoint(folder, "digest", TEMPLATE) is None
    for round in (9, 10):
        save_checkpoint(folder, state_of(round), "digest")
    assert newest_checkpoint(folder, "digest", TEMPLATE).round == 10


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_every_flipped_byte_is_noticed(folder, name):
    save_checkpoint(folder, state_of(1), "digest")
    file = folder.checkpoints / "round-00001" / name
    content = file.read_bytes()
    for place in random.Random(0).sample(range(len(content)), 60):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match="round-00001"):
            load_checkpoint(folder, 1, "digest", TEMPLATE)
    file.write_bytes(content)
    load_checkpoint(folder, 1, "digest", TEMPLATE)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_cut_and_missing_files_are_noticed(folder, name):
    save_checkpoint(folder, state_of(1), "digest")
    file = folder.checkpoints / "round-00001" / name
    content = file.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 2):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match="round-00001"):
            load_checkpoint(folder, 1, "digest", TEMPLATE)
    file.unlink()
    with pytest.raises(InputError, match="round-00001"):
        load_checkpoint(folder, 1, "digest", TEMPLATE)


def test_checkpoints_of_other_runs_are_refused(folder):
    save_checkpoint(folder, state_of(1), "digest")
    with pytest.raises(InputError, match="is a checkpoint of another configuration"):
        load_checkpoint(folder, 1, "other", TEMPLATE)
    with pytest.raises(InputError, match="does not fit the run: c is missing"):
        load_checkpoint(folder, 1, "digest", TEMPLATE | {"c": torch.zeros(1)})
    (folder.checkpoints / "round-00001").rename(folder.checkpoints / "round-00002")
    with pytest.raises(InputError, match="is corrupt"):
        load_checkpoint(folder, 2, "digest", TEMPLATE)


def test_mismatches_in_words():
    assert mismatch(TEMPLATE, TEMPLATE) is None
    assert mismatch({"a": TEMPLATE["a"]}, TEMPLATE) == "b is missing"
    assert mismatch(TEMPLATE, {"a": TEMPLATE["a"]}) == "b is not a trainable tensor of this run"
    wrong = TEMPLATE | {"b": torch.zeros(3)}
    assert mismatch(wrong, TEMPLATE) == "b must be torch.float32 (4,), got torch.float32 (3,)"


def test_leftovers_go_and_everything_else_stays(folder):
    save_checkpoint(folder, state_of(1), "digest")
    for name in (
        ".config.yaml.7.tmp",
        "checkpoints/.round-00002.7.tmp",
        ".adapter.7.old",
        "checkpoints/.round-00001.7.old",
    ):
        (folder.path / name).mkdir()
        (folder.path / name / "file").touch()
    (folder.path / ".result.json.7.tmp").touch()
    (folder.path / ".lock").touch()
    clear_leftovers(folder.path)
    assert sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()) == [
        ".lock",
        "checkpoints/round-00001/state.json",
        "checkpoints/round-00001/state.safetensors",
    ]


# Runs that are killed. One process imports everything and forks; each child is `federa run` or, as soon as there is
# something to take up, `federa resume`, and gets a real SIGKILL: after so many seconds, or at the n-th moment when it
# opens, renames, makes or removes something in its folder.

KILLER = """
import json, os, signal, sys, time
import datasets, matplotlib.figure, sklearn.metrics
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast
import federa.baselines, federa.report, federa.simulation
from federa.cli import app

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def watch(folder, deadly):
    count = 0

    def hook(event, args):
        nonlocal count
        path = args[0] if event in CHANGES and isinstance(args[0], (str, os.PathLike)) else None
        if path is not None and (str(path).startswith(folder) or not os.path.isabs(path)):
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)
    return lambda: count


def attempt(config, folder, kind=None, moment=None):
    started = time.monotonic()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        count = watch(folder, moment if kind == "event" else None)
        begun = os.path.exists(os.path.join(folder, "config.yaml"))
        app(["resume", folder] if begun else ["run", config, "--output", folder], standalone_mode=False)
        os.write(writer, str(count()).encode())
        os._exit(0)
    os.close(writer)
    if kind == "time":
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(reader) as file:
        events = file.read()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return {"killed": True}
    assert status == 0, status
    return {"killed": False, "events": int(events), "seconds": time.monotonic() - started}


for line in sys.stdin:
    config, folder, moments = json.loads(line)
    kills = [attempt(config, folder, *moment)["killed"] for moment in moments]
    print(json.dumps(attempt(config, folder) | {"kills": sum(kills)}), flush=True)
"""


@pytest.fixture(scope="module")
def killer():
    """killer(config file, folder, moments) -> {"kills": how many hit, "events", "seconds": of the last attempt}."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [sys.executable, "-c", KILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def killer(config: Path, folder: Path, moments: list):
            process.stdin.write(json.dumps([str(config), str(folder), moments]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the killer died, see its stderr"
            return json.loads(line)

        yield killer
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(tiny_config, killer, tmp_path_factory):
    """(config file, folder, events, seconds) of a run that nothing stopped: FedAdam, 2 of 5 clients, dropout of hidden
    states, best not last."""
    config = changed(
        tiny_config,
        model={"dropout": 0.1},
        server={"rounds": 5, "clients_per_round": 2, "optimizer": "fedadam", "lr": 0.02},
        client={"optimizer": "sgd", "lr": 1.0},
        failures={"dropout": 0.2},
        evaluation={"per_client": True, "test_every": 2},
        run={"checkpoint_every": 2},
    ).model_copy(update={"seed": 2})
    place = tmp_path_factory.mktemp("whole")
    (place / "config.yaml").write_text(dump_config(config))
    facts = killer(place / "config.yaml", place / "run", [])
    assert facts["kills"] == 0
    return place / "config.yaml", place / "run", facts["events"], facts["seconds"]


def facts_of(folder: Path) -> dict:
    """Everything that a run leaves, without what a clock says."""
    files = RunFolder(folder)
    records = [{key: value for key, value in record.items() if key != "seconds"} for record in files.metrics()]
    result = {key: value for key, value in files.result().items() if key != "seconds"}
    adapter = {file.name: file.read_bytes() for file in files.adapter.iterdir() if file.suffix != ".md"}
    saved = [files.checkpoints / f"round-{round:05d}" for round in (result["rounds"], result["best"]["round"])]
    states = [(path / "state.safetensors").read_bytes() for path in saved]
    partition = files.partition_file.read_bytes()
    init = files.init_file.read_bytes()
    return {"records": records, "result": result, "partition": partition, "init": init} | adapter | {"states": states}


def check(whole, folder: Path) -> None:
    expected, got = facts_of(whole[1]), facts_of(folder)
    assert [record["round"] for record in got["records"]] == list(range(6))
    for key, value in expected.items():
        assert got[key] == value, key
    assert (folder / "report.html").is_file()
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"]


def test_the_whole_run_says_something(whole):
    """Server memory, clients that drop out and a best round in the middle: there is something to get wrong."""
    facts = facts_of(whole[1])
    assert 0 < facts["result"]["best"]["round"] < 5
    assert any(record["dropped"] for record in facts["records"][1:])
    assert len({tuple(record["sampled"]) for record in facts["records"][1:]}) > 1
    _, newest = restore(whole[1])
    assert newest.server and all(tensor.any() for tensor in newest.server.values())


def draws(seed: int, count: int, most: float) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(0, most) for _ in range(count)]


def test_a_run_killed_by_the_clock_ends_the_same(whole, killer, tmp_path):
    """Six times, from its first moments on; how many hit depends on how busy the machine is."""
    config, _, _, seconds = whole
    moments = [["time", 0.01], *(["time", share * seconds] for share in sorted(draws(0, 5, 0.6)))]
    assert killer(config, tmp_path / "run", moments)["kills"] >= 2
    check(whole, tmp_path / "run")


def test_a_run_killed_between_its_file_operations_ends_the_same(whole, killer, tmp_path):
    """Sixteen kills in a row, most of them while something is being written."""
    config, _, events, _ = whole
    moments = [["event", int(share * events)] for share in sorted(draws(1, 16, 0.5))]
    assert killer(config, tmp_path / "run", moments)["kills"] >= 8
    check(whole, tmp_path / "run")


def test_a_run_killed_at_its_end_ends_the_same(whole, killer, tmp_path):
    """While the adapter, result.json and the report are written, four times over."""
    config, _, events, _ = whole
    moments = [["event", events - 30], *(["event", moment] for moment in (12, 16, 20))]
    assert killer(config, tmp_path / "run", moments)["kills"] >= 3
    check(whole, tmp_path / "run")


def test_a_run_killed_before_its_report_still_gets_one(whole, killer, tmp_path):
    killer(whole[0], tmp_path / "run", [])
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / ".curves.png.1.tmp").touch()
    resume(tmp_path / "run")
    check(whole, tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", range(8))
def test_every_moment_is_survived(whole, killer, tmp_path, step):
    """One kill before each single file operation of a run."""
    config, _, events, _ = whole
    for moment in range(step, events, 8):
        assert killer(config, tmp_path / f"run{moment}", [["event", moment]])["kills"] == 1, moment
        check(whole, tmp_path / f"run{moment}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(20))
def test_many_kills_are_survived(whole, killer, tmp_path, seed):
    rng, (config, _, events, seconds) = random.Random(seed), whole
    moments = [
        ["time", rng.uniform(0, seconds)] if rng.random() < 0.5 else ["event", rng.randrange(events)] for _ in range(20)
    ]
    killer(config, tmp_path / "run", moments)
    check(whole, tmp_path / "run")
