"""Records of lora_linear and lora_linear_clients -> tables in Markdown and figures. Pure but for the files drawn."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import geometric_mean

Row = Mapping[str, Any]
COLUMNS = {  # provider -> heading
    "peft": "PEFT",
    "peft autocast": "PEFT, fp32 adapter, autocast",
    "peft fp32 adapter": "PEFT, fp32 adapter",
    "reference": "PyTorch",
    "reference compiled": "torch.compile",
    "addmm": "addmm",
    "ours": "federa",
    "ours Triton": "federa, Triton",
    "ours CUDA C++": "federa, CUDA C++",
    "ours CUDA C++ for Hopper": "federa, Hopper",
    "ours bf16 residual": "federa, bf16 residual",
}
CLIENT_COLUMNS = {"ours": "federa", "chain per client": "one chain per client", "padded": "padded"}
COLORS = {
    "peft": "#d62728", "peft autocast": "#ff9896", "peft fp32 adapter": "#c49c94", "reference": "#ff7f0e",
    "reference compiled": "#bcbd22", "addmm": "#9467bd", "ours": "#1f77b4", "ours Triton": "#aec7e8",
    "ours CUDA C++": "#2ca02c", "ours CUDA C++ for Hopper": "#98df8a", "ours bf16 residual": "#17becf",
    "chain per client": "#d62728", "padded": "#9467bd",
}  # fmt: skip
NOT_YET = "Not measured yet.\n"
TICKS = [1, 2, 5, 10, 20]
SMALL = 512  # rows from which on a layer is worth more than its calls


def chosen(rows: Iterable[Row]) -> list[Row]:
    """Whole steps; on a GPU those in CUDA graphs. Of several machines the one measured last."""
    rows = [row for row in rows if row["phase"] == "fwd+bwd"]
    if not rows:
        return []
    last = max(rows, key=lambda row: row["environment"]["utc"])["environment"]
    mode = "graph" if last["kind"] == "cuda" else "eager"
    return [row for row in rows if row["environment"]["device"] == last["device"] and row["mode"] == mode]


def _threads(rows: Sequence[Row]) -> list[int]:
    return sorted({row["environment"]["threads"] for row in rows}, reverse=True)


def _at(rows: Sequence[Row], threads: int) -> list[Row]:
    return [row for row in rows if row["environment"]["threads"] == threads]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio']:.2f}" if row["ratio"] is not None else "refused"


def _summary(label: str, rows: Sequence[Row], providers: Iterable[str]) -> str:
    """Geometric mean / worst of each provider."""
    cells = []
    for provider in providers:
        ratios = [row["ratio"] for row in rows if row["provider"] == provider]
        fit = [ratio for ratio in ratios if ratio is not None]
        all_fit = fit and len(fit) == len(ratios)
        cells.append(f"**{geometric_mean(fit):.2f}** / {max(fit):.2f}" if all_fit else "")
    return f"| {label} | | " + " | ".join(cells) + " |"


def kernel_table(records: Sequence[Row]) -> str:
    """Ratios to the frozen linear at rank 16, on most threads; means and worst rows on every number of threads."""
    cuda = any(row["environment"]["kind"] == "cuda" for row in records)
    dtype = "bf16" if cuda else "fp32"
    rows = [row for row in chosen(records) if row["sizes"]["R"] == 16 and row["dtype"] == dtype]
    if not rows:
        return NOT_YET
    most, *_ = counts = _threads(rows)
    shown = _at(rows, most)
    providers = [provider for provider in COLUMNS if any(row["provider"] == provider for row in shown)]
    heads = [COLUMNS[provider] for provider in providers]
    lines = ["| K→N, rows | frozen, ms | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    for place in sorted({_place(row) for row in shown}):
        cells = {row["provider"]: row for row in shown if _place(row) == place}
        frozen = cells["frozen"]["ms"]
        label = f"{place[1]}→{place[2]}, {place[3]}"
        time = f"{frozen[1]:.2f}" if frozen else "refused"
        lines.append(f"| {label} | {time} | " + " | ".join(_cell(cells.get(name)) for name in providers) + " |")
    for threads in counts:
        here, suffix = _at(rows, threads), "" if cuda else f", {threads} thread{'s' * (threads > 1)}"
        for title, part in (
            (f"mean / worst, {SMALL} rows and more", [row for row in here if row["sizes"]["M"] >= SMALL]),
            (f"mean / worst, below {SMALL} rows", [row for row in here if row["sizes"]["M"] < SMALL]),
        ):
            if part:
                lines.append(_summary(title + suffix, part, providers))
    return "\n".join(lines) + f"\n\n{_facts(rows, dtype, 'frozen again')}\n"


def _place(row: Row) -> tuple[Any, ...]:
    sizes = row["sizes"]
    order = {"RoBERTa": 0, "MiniLM": 1}.get(row["group"], 2)
    return order, sizes["K"], sizes["N"], sizes["M"]


def _facts(rows: Sequence[Row], dtype: str, again: str) -> str:
    environment = max((row["environment"] for row in rows), key=lambda facts: facts["utc"])
    noise = [abs(row["ratio"] - 1) for row in rows if row["provider"] == again and row["ratio"] is not None]
    spread = f"; the same layer timed twice differs by {max(noise):.0%} at most" if noise else ""
    commits = ", ".join(sorted({row["environment"]["commit"] for row in rows}))
    versions, most = environment["versions"], max(row["environment"]["threads"] for row in rows)
    how = "in CUDA graphs" if environment["kind"] == "cuda" else f"on {most} CPU thread{'s' * (most > 1)}"
    return (
        f"{dtype}, rank 16, {how}: {environment['device']}; torch {versions['torch']}, peft "
        f"{versions.get('peft', 'absent')}. Medians of steps taken in turns{spread}. Commit {commits}, "
        f"{environment['utc'][:10]}."
    )


def clients_table(records: Sequence[Row]) -> str:
    """Ratios to one adapter over the same rows, geometric means over shapes."""
    rows = chosen(records)
    if not rows:
        return NOT_YET
    shown = _at(rows, _threads(rows)[0])
    lines = ["| clients, rows | " + " | ".join(CLIENT_COLUMNS.values()) + " |", "|---|" + "---:|" * len(CLIENT_COLUMNS)]
    for C, cut in sorted({(row["sizes"]["C"], row["sizes"]["cut"]) for row in shown}):
        cells = []
        for provider in CLIENT_COLUMNS:
            ratios = _ratios(shown, provider, C, cut)
            cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "not tried")
        lines.append(f"| {C}, {cut} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{_facts(shown, shown[0]['dtype'], 'one adapter again')}\n"


def _ratios(rows: Sequence[Row], provider: str, C: int, cut: str) -> list[float]:
    return [
        row["ratio"]
        for row in rows
        if (row["provider"], row["sizes"]["C"], row["sizes"]["cut"]) == (provider, C, cut) and row["ratio"] is not None
    ]


def kernel_figure(records: Sequence[Row], path: Path) -> None:
    """One panel a shape: ratio to the frozen linear over the number of rows."""
    dtype = "bf16" if any(row["environment"]["kind"] == "cuda" for row in records) else "fp32"
    rows = [row for row in chosen(records) if row["sizes"]["R"] == 16 and row["dtype"] == dtype]
    if not rows:
        return
    rows = _at(rows, _threads(rows)[0])
    shapes = sorted({_place(row)[:3] for row in rows})
    width = min(len(shapes), 3)
    figure, axes = panels(-(-len(shapes) // width), width)
    for axis, shape in zip(axes, shapes, strict=False):
        here = [row for row in rows if _place(row)[:3] == shape]
        for provider, label in COLUMNS.items():
            line = sorted((row["sizes"]["M"], row["ratio"]) for row in here
                          if row["provider"] == provider and row["ratio"] is not None)  # fmt: skip
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", ms=3, label=label, color=COLORS[provider])
        frozen = {row["sizes"]["M"]: row["ms"][1] for row in here if row["provider"] == "frozen" and row["ms"]}
        limit = sorted((row["sizes"]["M"], row["floor_ms"] / frozen[row["sizes"]["M"]]) for row in here
                       if row["provider"] == "ours" and row["floor_ms"] and row["sizes"]["M"] in frozen)  # fmt: skip
        if limit:
            axis.plot(*zip(*limit, strict=True), color="0.6", ls=":", label="floor, at the highest rates seen")
        axis.axhline(1, color="0.3", lw=0.8)
        axis.set(title=f"{shape[1]}→{shape[2]}", xscale="log", xlabel="rows", ylim=(0, None))
        axis.set_xticks(sorted({row["sizes"]["M"] for row in here}))
        axis.set_xticklabels(sorted({row["sizes"]["M"] for row in here}))
        axis.minorticks_off()
    finish_figure(figure, axes[: len(shapes)], "time / frozen linear", path)


def clients_figure(records: Sequence[Row], path: Path) -> None:
    """One panel a way of cutting: ratio to one adapter over the number of clients."""
    rows = chosen(records)
    if not rows:
        return
    rows = _at(rows, _threads(rows)[0])
    cuts = sorted({row["sizes"]["cut"] for row in rows})
    counts = sorted({row["sizes"]["C"] for row in rows})
    figure, axes = panels(1, len(cuts), share=True)
    for axis, cut in zip(axes, cuts, strict=True):
        for provider, label in CLIENT_COLUMNS.items():
            line = [(C, geometric_mean(ratios)) for C in counts if (ratios := _ratios(rows, provider, C, cut))]
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", ms=3, label=label, color=COLORS[provider])
        axis.axhline(1, color="0.3", lw=0.8)
        axis.set(title=f"{cut} sizes", xscale="log", yscale="log", xlabel="clients")
        axis.set_yticks(TICKS)
        axis.set_yticklabels(TICKS)
        axis.set_xticks(counts)
        axis.set_xticklabels(counts)
        axis.minorticks_off()
    finish_figure(figure, axes, "time / one adapter", path)


def panels(height: int, width: int, share: bool = False, size: tuple[float, float] | None = None):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "federa"  # the same records give the same file
    figure, axes = pyplot.subplots(
        height, width, figsize=size or (3.2 * width, 2.5 * height + 0.5), squeeze=False, sharey=share
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def finish_figure(figure, axes, ylabel: str, path: Path, columns: int = 4) -> None:
    from matplotlib import pyplot

    for axis in figure.axes:
        if axis not in axes:
            axis.set_visible(False)
    labels = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.supylabel(ylabel, fontsize="medium")
    figure.legend(labels.values(), labels, loc="lower center", ncols=min(len(labels), columns), frameon=False)
    figure.tight_layout(rect=(0, (0.1 + 0.22 * -(-len(labels) // columns)) / figure.get_figheight(), 1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
