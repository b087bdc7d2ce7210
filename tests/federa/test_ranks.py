"""Cohorts spread over the processes of torchrun: two real ones over gloo, against one."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from federa.config import changed, dump_config
from federa.experiment import build
from federa.ranks import share_out

ROOT = Path(__file__).parents[2]


def federa(*arguments, ranks: int = 1) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] * (ranks > 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *several, "-m", "federa", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_ranks_are_one(tiny_config, tmp_path):
    """The tensors of every checkpoint, bit for bit; a finished run is shown again by two ranks as by one."""
    config = changed(
        tiny_config,
        model={"dropout": 0.1},
        run={"cohort": 2, "checkpoint_every": 1},
        server={"clients_per_round": 5, "rounds": 2},
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    federa("run", tmp_path / "config.yaml", "--output", tmp_path / "one")
    federa("run", tmp_path / "config.yaml", "--output", tmp_path / "two", ranks=2)
    for round in (1, 2):
        name = f"checkpoints/round-0000{round}/state.safetensors"
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert one.keys() == two.keys() and all(tensor.equal(two[key]) for key, tensor in one.items())
    assert (tmp_path / "two" / "report.html").is_file()
    federa("run", tmp_path / "config.yaml", "--output", tmp_path / "two", ranks=2)


def test_shares_are_balanced_by_work(tiny_config):
    experiment = build(changed(tiny_config, client={"batch_size": 4}))
    own = np.split(np.arange(100), [60, 70, 80, 90])  # one long client and four short ones
    experiment = replace(experiment, partition=replace(experiment.partition, indices=own))
    long, short = share_out(experiment, range(5), 1, 2)
    assert long == [[0]] and sorted(short) == [[1], [2], [3], [4]]
    assert share_out(experiment, range(5), 2, 1) == [[[0, 1], [2, 3], [4]]]
    assert sorted(map(tuple, [*chain(*share_out(experiment, [0, 2, 4], 1, 3))])) == [(0,), (2,), (4,)]
