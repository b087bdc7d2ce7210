"""The plan of benchmarks/gpu_suite.sh; what it runs needs a GPU."""

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_suite.sh"


def plan(suite: str) -> str:
    done = subprocess.run(["bash", SCRIPT, "--dry-run", suite], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_step_together_stays_below_nine_minutes():
    """Of each suite, with the steps that are skipped where a tool is missing."""
    limits = dict(re.findall(r"^\s*step (\w+) (\d+) ", SCRIPT.read_text(), re.MULTILINE))
    assert {"correctness", "sanitizer", "lora_linear", "clients", "truncated_svd", "plot"} <= limits.keys()
    rounds = {"rounds_right", "rounds"}
    both = {"device", "build", "plot", "targets"}
    assert sum(int(limits[name]) for name in limits.keys() - rounds) <= 540
    assert sum(int(limits[name]) for name in both | rounds) <= 540


def test_the_dry_run_prints_the_plan_and_runs_nothing():
    kernels, rounds = plan("kernels"), plan("rounds")
    assert "-m gpu tests/federa_kernels tests/benchmarks" in kernels
    assert "lora_linear --device cuda --record" in kernels and "federated_round" not in kernels
    assert "federated_round --device cuda --record" in rounds and "lora_linear" not in rounds
    assert subprocess.run(["bash", SCRIPT, "--nonsense"], capture_output=True).returncode == 2
