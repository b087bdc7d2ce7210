"""Records of federated_round -> the README's table, the figure of its curves and the goals for whole rounds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernel_tables import COLORS, NOT_YET, finish_figure, panels
from benchmarks.svd_tables import newest

Row = Mapping[str, Any]
HEADS = {
    "peft": "transformers and PEFT's LoRA, clients in turn, batches at random",
    "peft bf16": "the same, autocast bf16, batches of like length",
    "flower": "PEFT's clients in Flower's simulation, one on each core",
    "plain": "FeDeRA in plain PyTorch",
    "alone": "federa, clients in turn",
    "cohort": "federa, the best cohort",
    "alone bf16": "federa in turn, bf16 residual",
    "cohort bf16": "federa, cohort, bf16 residual",
    "alone bf16 all": "federa in turn, bf16 residual and activations",
    "cohort bf16 all": "federa, cohort, bf16 residual and activations",
    "floor": "frozen encoder alone, forward and back to its inputs",
    "floor bf16": "frozen encoder alone in bf16, all clients together",
}


class Goal(NamedTuple):
    """The best of `ours` over `other`, in samples a second."""

    name: str
    ours: tuple[str, ...]
    other: str
    must: float
    aim: float
    batch: int = 16


FP32, BF16 = ("alone", "cohort"), ("alone bf16", "cohort bf16", "alone bf16 all", "cohort bf16 all")
TOGETHER = ("cohort bf16 all",)
CPU_GOALS = (
    Goal("a round on the CPU, fp32, against PEFT", FP32, "peft", 2.5, 3.2),
    Goal("a round on the CPU, bf16 residual, against PEFT", BF16, "peft", 4.0, 6.0),
    Goal("a round on the CPU, our best against PEFT's best", FP32 + BF16, "peft bf16", 1.25, 1.7),
    Goal("a cohort on the CPU against clients alone, 4 a batch", ("cohort",), "alone", 1.15, 1.4, batch=4),
)
GPU_GOALS = (
    Goal("32 clients on the H200 together against alone, bf16", TOGETHER, "alone bf16 all", 4.0, 8.0),
    Goal("32 clients on the H200 together against PEFT in bf16", TOGETHER, "peft bf16", 6.0, 10.0),
    Goal("32 clients on the H200 together against the frozen encoder in bf16", TOGETHER, "floor bf16", 0.7, 0.7),
)


FEDERA = {"color": COLORS["ours"], "marker": "o", "ms": 3, "label": "federa"}
OUTSIDE = (0.03, 0.01)  # of a round's time outside training and evaluation: must, aim
MANY, FEW = 10_000, 10  # clients, whose runs may differ in memory by this much:
MEMORY = 64 * 2**20 + 1024 * MANY


def of(records: Sequence[Row], phase: str) -> list[Row]:
    """Those of the machine and the number of threads that this phase was measured on last."""
    return newest([row for row in records if row["phase"] == phase])


def kind_of(provider: str) -> str:
    """ "cohort 8 bf16" -> "cohort bf16"."""
    return " ".join(word for word in provider.split() if not word.isdigit())


def cases(records: Sequence[Row]) -> dict[tuple[int, int, int], dict[str, Row]]:
    """(batch, tokens, clients) -> the fastest record of each kind, of the machine and threads measured last."""
    found: dict[tuple[int, int, int], dict[str, Row]] = {}
    simulated = [row for row in of(records, "flower") if row["provider"] == "flower"]
    for row in [*of(records, "round"), *simulated]:
        if row["samples_per_second"] is not None:
            here = found.setdefault((row["sizes"]["B"], row["sizes"]["T"], row["sizes"]["C"]), {})
            kind = kind_of(row["provider"])
            if kind not in here or row["samples_per_second"] > here[kind]["samples_per_second"]:
                here[kind] = row
    return dict(sorted(found.items(), reverse=True))


def round_table(records: Sequence[Row]) -> str:
    """Samples a second and, in brackets, how many times PEFT's."""
    found = cases(records)
    if not found:
        return NOT_YET
    heads = [f"{batch} a batch, up to {tokens} tokens" for batch, tokens, _ in found]
    lines = ["| samples/s (times PEFT's) | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind, label in HEADS.items():
        rows = [here.get(kind) for here in found.values()]
        if any(rows):
            lines.append(f"| {label} | " + " | ".join(map(_cell, rows)) + " |")
    environments = [row["environment"] for row in of(records, "round")]
    environment = max(environments, key=lambda facts: facts["utc"])
    commits = ", ".join(sorted({facts["commit"] for facts in environments}))
    if environment["kind"] == "cuda":
        model, place = "A random model of RoBERTa-base's size, texts as long as may be", environment["device"]
    else:
        model, place = (
            "all-MiniLM-L6-v2 on 20 Newsgroups",
            f"{environment['threads']} CPU threads: {environment['device']}",
        )
    facts = (
        f"{model}, rank 8 on all linear layers, four local steps a client, on {place}; "
        f"torch {environment['versions']['torch']}, "
        f"peft {environment['versions'].get('peft', 'absent')}. Medians of rounds taken in turns. "
        f"Commit {commits}, {environment['utc'][:10]}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    size = [word for word in row["provider"].split() if word.isdigit()]
    return f"{row['samples_per_second']:.1f} ({row['ratio']:.2f}{'; of ' + size[0] if size else ''})"


def round_verdicts(records: Sequence[Row]) -> list[tuple[bool | None, str]]:
    """The goals for a CPU."""
    return verdicts_of(CPU_GOALS, records) + _run_verdicts({r["sizes"]["clients"]: r for r in of(records, "clients")})


def verdicts_of(goals: Sequence[Goal], records: Sequence[Row]) -> list[tuple[bool | None, str]]:
    """Each goal in each case of its batch size: whether it is met (None: not measured) and a line."""
    verdicts: list[tuple[bool | None, str]] = []
    for goal in goals:
        here = {
            case: rows
            for case, rows in cases(records).items()
            if case[0] == goal.batch and goal.other in rows and any(kind in rows for kind in goal.ours)
        }
        if not here:
            verdicts.append((None, f"unknown  {goal.name}: not measured"))
        for (batch, tokens, _), rows in here.items():
            best = max((rows[kind] for kind in goal.ours if kind in rows), key=lambda row: row["samples_per_second"])
            ratio = best["samples_per_second"] / rows[goal.other]["samples_per_second"]
            met = ratio >= goal.must
            line = (
                f"{goal.name}, {batch} x {tokens}: {ratio:.2f} (must {goal.must}, aim {goal.aim}): {best['provider']}"
            )
            verdicts.append((met, f"{'PASS' if met else 'FAIL'}     {line}"))
    return verdicts


def _run_verdicts(runs: Mapping[int, Row]) -> list[tuple[bool | None, str]]:
    """Whole rounds of runs, by their number of clients."""
    verdicts: list[tuple[bool | None, str]] = []
    name = "a round's time outside training and evaluation"
    if not runs:
        verdicts.append((None, f"unknown  {name}: not measured"))
    else:
        clients, worst = max(runs.items(), key=lambda item: item[1]["outside"])
        met = worst["outside"] <= OUTSIDE[0]
        line = f"{name}: {worst['outside']:.2%} (must {OUTSIDE[0]:.0%}, aim {OUTSIDE[1]:.0%}): {clients:,} clients"
        verdicts.append((met, f"{'PASS' if met else 'FAIL'}     {line}"))
    name = f"memory of {MANY:,} clients over that of {FEW}"
    if not runs.keys() >= {MANY, FEW} or None in (runs[MANY]["peak_bytes"], runs[FEW]["peak_bytes"]):
        verdicts.append((None, f"unknown  {name}: not measured"))
    else:
        more = runs[MANY]["peak_bytes"] - runs[FEW]["peak_bytes"]
        met = more <= MEMORY
        line = f"{name}: {more / 2**20:.0f} MiB more (must {MEMORY / 2**20:.0f})"
        verdicts.append((met, f"{'PASS' if met else 'FAIL'}     {line}"))
    return verdicts


def round_figure(records: Sequence[Row], path: Path) -> None:
    """Speed and memory over the clients in a cohort, time and memory over the clients of a run."""
    cohorts = [row for row in of(records, "cohorts") if row["ms"]]
    runs = sorted(of(records, "clients"), key=lambda row: row["sizes"]["clients"])
    if not (cohorts and runs) or any(row["peak_bytes"] is None for row in (*cohorts, *runs)):
        return
    figure, axes = panels(2, 2, size=(7.4, 5.6))
    speed, memory, time, most = axes
    sizes = sorted((1 if row["provider"] == "alone" else int(row["provider"].split()[1]), row)
                   for row in cohorts if row["provider"] != "peft")  # fmt: skip
    peft = [row for row in cohorts if row["provider"] == "peft"]
    for axis, value in (
        (speed, lambda row: row["samples_per_second"]),
        (memory, lambda row: row["peak_bytes"] / 2**20),
    ):
        axis.plot([size for size, _ in sizes], [value(row) for _, row in sizes], **FEDERA)
        for row in peft:
            axis.axhline(value(row), color=COLORS["peft"], ls="--", lw=1, label="PEFT, clients in turn")
    predicted = [size * row["client_bytes"] / 2**20 for size, row in sizes]
    memory.plot([size for size, _ in sizes], predicted, color="0.5", ls=":", label="predicted")
    _name(speed, "samples a second", [size for size, _ in sizes], "clients in a cohort")
    memory.set_yscale("log")
    _name(memory, "MiB that a turn takes", [size for size, _ in sizes], "clients in a cohort")
    counts = [row["sizes"]["clients"] for row in runs]
    time.plot(counts, [row["seconds"]["all"] for row in runs], **FEDERA)
    time.plot(counts, [row["seconds"]["train"] for row in runs], color="0.5", marker="o", ms=3, label="training alone")
    most.plot(counts, [row["peak_bytes"] / 2**20 for row in runs], **FEDERA)
    each = f"clients, {runs[0]['sizes']['C']} of them in a round"
    _name(time, "seconds a round", counts, each)
    _name(most, "MiB of the process at most", counts, each)
    finish_figure(figure, axes, "", path)


def _name(axis, title: str, places: Sequence[int], xlabel: str) -> None:
    axis.set(xscale="log", xlabel=xlabel)
    axis.set_title(title, fontsize="medium")
    if axis.get_yscale() == "linear":
        axis.set_ylim(0, 1.2 * axis.dataLim.ymax)
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.minorticks_off()
