"""Data and configurations of runs over sites, and a cache of their own for them."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from federa.config import Config, changed

if find_spec("flwr") is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("flwr is not installed: pip install 'federa[flower]'")
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _identity(monkeypatch, tmp_path):
    """Since flwr 1.39 a message asks for the identity of the process that makes it, which Flower's launcher sets."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def pilot(tiny_config) -> Config:
    """Three clients one by one, all of them in each of two rounds; every site has all texts and takes its share."""
    return changed(
        tiny_config,
        partition={"clients": 3},
        server={"rounds": 2, "clients_per_round": None},
        run={"cohort": 1},
    )


@pytest.fixture(scope="session")
def site_data(tiny_data, tmp_path_factory) -> Path:
    """The tiny data by label modulo 3: all/ with a column "site", and site-0/, site-1/, site-2/ with theirs alone; two
    of them hold one label only, and none says what labels there are."""
    folder = tmp_path_factory.mktemp("site_data")
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").open()]
    labels = sorted({row["label"] for row in rows})
    rows = [row | {"site": f"s{labels.index(row['label']) % 3}"} for row in rows]
    test = [json.loads(line) | {"site": "s0"} for line in (tiny_data / "test.jsonl").open()]

    def write(file: Path, chosen) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen))

    write(folder / "all" / "train.jsonl", rows)
    for site in range(3):
        write(folder / f"site-{site}" / "train.jsonl", [row for row in rows if row["site"] == f"s{site}"])
    for name in ("all", "server"):
        write(folder / name / "test.jsonl", test)
    write(folder / "server" / "train.jsonl", test)
    return folder
