"""The peak memory of a run beside the number of its clients."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from federa.config import changed, dump_config

ROOT = Path(__file__).parents[2]
RUN = """
import re, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from federa.checkpoint import State
from federa.cohort import Cohorts
from federa.config import load_config
from federa.experiment import build
from federa.folder import RunFolder
from federa.rounds import run_rounds

experiment = build(load_config(sys.argv[1]))
count = int(sys.argv[3])
own = [np.arange(client, client + 4) % len(experiment.train) for client in range(count)]
experiment = replace(experiment, partition=replace(experiment.partition, indices=own))
folder = RunFolder.create(sys.argv[2], experiment.config)
run_rounds(experiment, folder, State(0, experiment.learner.state()), lambda event, facts: None, Cohorts(5))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="getrusage's peak begins with the parent's")
def test_ten_thousand_clients_take_no_more_than_ten(tiny_config, tmp_path):
    """Within 64 MiB plus 1 KiB a client, five a round in a cohort."""
    config = changed(tiny_config, server={"rounds": 20, "clients_per_round": 5}, evaluation={"every": 20})
    (tmp_path / "config.yaml").write_text(dump_config(config))

    def peak(clients: int) -> int:
        command = [sys.executable, "-c", RUN, tmp_path / "config.yaml", tmp_path / f"{clients}", str(clients)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout.split()[-1])

    assert peak(10_000) <= peak(10) + 64 * 2**20 + 1024 * 10_000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_is_kept_until_it_is_returned():
    """Every other of 64 MiB of blocks, so that none of it lies at the heap's end."""
    code = """
import ctypes, re
from pathlib import Path
from federa.memory import return_memory, reuse_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

reuse_memory()
blocks = [bytes(range(256)) * 4096 for _ in range(128)]
full = resident()
blocks[::2] = [None] * 64
kept = resident()
return_memory()
print(full - kept, kept - resident())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    freed, returned = map(int, done.stdout.split())
    assert freed < 2**20 and returned > 60 * 2**20
