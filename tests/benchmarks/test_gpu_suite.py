"""The plan of benchmarks/gpu_suite.sh; what it runs needs a GPU."""

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_suite.sh"


def test_every_step_together_stays_below_nine_minutes():
    limits = re.findall(r"^\s*step (\w+) (\d+) ", SCRIPT.read_text(), re.MULTILINE)
    assert {"correctness", "sanitizer", "lora_linear", "clients", "truncated_svd", "plot"} <= {n for n, _ in limits}
    assert sum(int(seconds) for _, seconds in limits) <= 540


def test_the_dry_run_prints_the_plan_and_runs_nothing():
    done = subprocess.run(["bash", SCRIPT, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "-m gpu tests/federa_kernels tests/benchmarks" in done.stdout
        and "lora_linear --device cuda --record" in done.stdout
    )
    assert subprocess.run(["bash", SCRIPT, "--nonsense"], capture_output=True).returncode == 2
