"""The goals that the operators were given, held against the records of results/: one line each, PASS, FAIL or unknown.

python -m benchmarks targets        ends with 1 where a goal that was measured is missed
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import records as store
from benchmarks.clock import geometric_mean
from benchmarks.round_tables import GPU_GOALS, round_verdicts, verdicts_of

Row = Mapping[str, Any]


class Target(NamedTuple):
    """Ratios of `provider` over the records that `where` lets through; must and aim as (geometric mean, worst row)."""

    name: str
    subject: str
    device: str
    where: Callable[[Row], bool]
    must: tuple[float, float | None]
    aim: tuple[float, float | None]
    provider: str = "ours"


ENCODERS = ("RoBERTa", "MiniLM")


def _cpu(least: int, most: float = math.inf) -> Callable[[Row], bool]:
    return lambda r: (
        r["group"] in ENCODERS and r["dtype"] == "fp32" and r["sizes"]["R"] == 16 and least <= r["sizes"]["M"] <= most
    )


def _h200(group: str, least: int, most: float = math.inf) -> Callable[[Row], bool]:
    return lambda r: (
        "H200" in r["environment"]["device"]
        and (r["group"], r["dtype"], r["mode"], r["sizes"]["R"]) == (group, "bf16", "graph", 16)
        and least <= r["sizes"]["M"] <= most
    )


def _h200_zipf(row: Row) -> bool:
    return _h200("RoBERTa", 8192, 8192)(row) and (row["sizes"]["C"], row["sizes"]["cut"]) == (32, "zipf")


TARGETS = (
    Target("CPU fp32, widths 384-3072, M >= 512", "lora_linear", "cpu", _cpu(512), (0.85, 0.95), (0.78, 0.90)),
    Target(
        "CPU bf16 residual, M >= 512", "lora_linear", "cpu", _cpu(512), (0.55, None), (0.45, None), "ours bf16 residual"
    ),
    Target("CPU fp32, M 64-256", "lora_linear", "cpu", _cpu(64, 256), (1.25, None), (1.05, None)),
    Target("H200 bf16, Llama-3-8B, M >= 2048, CUDA graph", "lora_linear", "cuda",
           _h200("Llama-3-8B", 2048), (1.13, None), (1.10, None)),
    Target("H200 bf16, RoBERTa, M = 8192, CUDA graph", "lora_linear", "cuda",
           _h200("RoBERTa", 8192, 8192), (1.5, None), (1.35, None)),
    Target("H200 bf16, 32 Zipf clients, 8192 rows, to one adapter", "lora_linear_clients", "cuda",
           _h200_zipf, (1.09, None), (1.06, None)),
)  # fmt: skip


class Speed(NamedTuple):
    """How many times as long others take as ours where `where` holds: provider -> (must, aim)."""

    name: str
    where: Callable[[Row], bool]
    over: Mapping[str, tuple[float, float]]
    subject: str = "truncated_svd"


def _svd(group: str, **sizes: int | str) -> Callable[[Row], bool]:
    wanted = {"R": 16} | sizes
    return lambda r: r["group"] == group and all(r["sizes"].get(name) == size for name, size in wanted.items())


def _averages(*kinds: str) -> Callable[[Row], bool]:
    return lambda r: _svd("factored", N=4096, K=4096, C=32)(r) and r["sizes"]["clients"] in kinds


SPEEDS = (
    Speed("CPU, roberta-base set", _svd("RoBERTa", G=72), {"full": (18, 26), "svd_lowrank(16)": (2.5, 3.3)}),
    Speed("CPU, 36 MiniLM matrices", _svd("MiniLM"), {"full": (6, 9), "svd_lowrank(16)": (1.2, 2)}),
    Speed("CPU, 4096x4096", _svd("square", N=4096), {"svd_lowrank(16)": (1.6, 3), "propack": (1.1, 2)}),
    Speed("CPU, factored_svd, related clients", _averages("similar", "related"),
          {"QR+QR+core": (6, 12), "dense + svd_lowrank(16)": (20, 40)}),
    Speed("CPU, factored_svd, unrelated clients", _averages("unrelated"), {"QR+QR+core": (1.4, 1.7)}),
)  # fmt: skip


def speed_verdicts(goal: Speed, rows: Sequence[Row]) -> list[tuple[bool | None, str]]:
    """Each case on one thread: whether all its ratios reach `must` (None: not measured) and a line."""
    rows = [r for r in rows if r["environment"]["threads"] == 1 and goal.where(r)]
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(" ".join(str(size) for size in row["sizes"].values()), {})[row["provider"]] = row
    if not cases:
        return [(None, f"unknown  {goal.name}: not measured")]
    found = []
    for sizes, here in cases.items():
        if not here["ours"]["ms"]:
            found.append((False, f"FAIL     {goal.name} ({sizes}): {here['ours']['refused']}"))
            continue
        ratios = {name: here[name]["ms"][1] / here["ours"]["ms"][1] for name in goal.over if name in here}
        met = all(ratios.get(name, 0) >= must for name, (must, _) in goal.over.items())
        shown = ", ".join(
            f"{ratio:.2f} times {name} (must {goal.over[name][0]}, aim {goal.over[name][1]})"
            for name, ratio in ratios.items()
        )
        found.append((met, f"{'PASS' if met else 'FAIL'}     {goal.name} ({sizes}): {shown}"))
    return found


def name_of(row: Row) -> str:
    sizes = row["sizes"]
    return f"{row['group']} {sizes['K']}x{sizes['N']} M={sizes['M']}"


def verdicts(target: Target, rows: Sequence[Row]) -> list[tuple[bool | None, str]]:
    """For each machine and number of threads among `rows`: whether the goal is met (None: not measured) and a line."""
    rows = [r for r in rows if r["provider"] == target.provider and r["phase"] == "fwd+bwd" and target.where(r)]
    if not rows:
        return [(None, f"unknown  {target.name}: not measured")]
    places: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        places.setdefault((row["environment"]["device"], row["environment"]["threads"]), []).append(row)
    found = []
    for (device, threads), here in sorted(places.items()):
        where = device if target.device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
        wrong = [row for row in here if row["ratio"] is None]
        if wrong:
            found.append((False, f"FAIL     {target.name}, {where}: {name_of(wrong[0])}: {wrong[0]['refused']}"))
            continue
        worst = max(here, key=lambda row: row["ratio"])
        mean = geometric_mean([row["ratio"] for row in here])
        goals = [
            f"{what} {value:.3f}" + (f" (must {must}, aim {aim})" if must else "")
            for what, value, must, aim in zip(
                ("geometric mean", "worst row"), (mean, worst["ratio"]), target.must, target.aim, strict=True
            )
        ]
        met = mean <= target.must[0] and (target.must[1] is None or worst["ratio"] <= target.must[1])
        line = f"{'PASS' if met else 'FAIL'}     {target.name}, {where}: {', '.join(goals)}: {name_of(worst)}"
        found.append((met, f"{line}; {len(here)} rows"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("python -m benchmarks targets", description=__doc__, formatter_class=form).parse_args(argv)
    found = [
        verdict
        for target in TARGETS
        for verdict in verdicts(target, store.read(store.path_of(target.subject, target.device)))
    ]
    found += [
        verdict for goal in SPEEDS for verdict in speed_verdicts(goal, store.read(store.path_of(goal.subject, "cpu")))
    ]
    found += round_verdicts(store.read(store.path_of("federated_round", "cpu")))
    gpu = store.read(store.path_of("federated_round", "cuda"))
    found += verdicts_of(GPU_GOALS, [row for row in gpu if "H200" in row["environment"]["device"]])
    print(*(line for _, line in found), sep="\n")
    return 1 if any(met is False for met, _ in found) else 0


if __name__ == "__main__":
    sys.exit(main())
