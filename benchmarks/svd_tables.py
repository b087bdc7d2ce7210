"""Records of truncated_svd -> tables in Markdown and the figure of accuracy against time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_tables import NOT_YET, finish_figure, panels

Row = Mapping[str, Any]
TOLERANCE = 1e-6
COLUMNS = {"full": "torch.linalg.svd", "svd_lowrank(16)": "svd_lowrank, niter=16",
           "svd_lowrank(24), q=2R": "svd_lowrank, niter=24, q=2R", "propack": "PROPACK"}  # fmt: skip
FACTORED = {"QR+QR+core": "QR, QR, core SVD", "dense + svd_lowrank(16)": "product, then svd_lowrank, niter=16",
            "ours, warm start": "federa, warm start"}  # fmt: skip
CLIENTS = {"similar": "1 % apart", "related": "30 % apart", "unrelated": "unrelated"}
LINES = {  # prefix of a provider's name in the frontier -> label, colour, marker: Okabe and Ito's, apart in grey, too
    "svd_lowrank q=R": ("svd_lowrank, q = R, niter 1 to 32", "#E69F00", "s"),
    "svd_lowrank q=2R": ("svd_lowrank, q = 2R, niter 1 to 24", "#56B4E9", "^"),
    "propack": ("PROPACK, tol 1e-1 to 1e-4", "#CC79A7", "D"),
    "full": ("torch.linalg.svd", "#000000", "X"),
    "ours": ("federa, tol 1e-2 to 1e-7", "#0072B2", "o"),
}


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of the machine and the number of threads measured last."""
    rows = [row for row in rows if row["mode"] == "eager"]
    if not rows:
        return []
    last = max(rows, key=lambda row: row["environment"]["utc"])["environment"]
    place = last["device"], last["threads"]
    return [row for row in rows if (row["environment"]["device"], row["environment"]["threads"]) == place]


def svd_table(records: Sequence[Row]) -> str:
    """Time of each provider over ours, with the worst loss it left; a loss that is too large is struck out."""
    rows = newest(records)
    dense = _lines([row for row in rows if row["group"] not in ("factored", "frontier")], COLUMNS, "matrices, R")
    factored = _lines([row for row in rows if row["group"] == "factored"], FACTORED, "average of pairs, R")
    tables = ["\n".join(lines) for lines in (dense, factored) if lines]
    if not tables:
        return NOT_YET
    environment = max((row["environment"] for row in rows), key=lambda facts: facts["utc"])
    commits, threads = ", ".join(sorted({row["environment"]["commit"] for row in rows})), environment["threads"]
    where = environment["device"] if environment["kind"] == "cuda" else (
        f"{threads} CPU thread{'s' * (threads > 1)}: {environment['device']}")  # fmt: skip
    facts = (
        f"How many times as long others take, and the share of the optimal energy they lose, at worst over the set; "
        f"struck out where that is above {TOLERANCE:.0e}. fp32, {where}; torch {environment['versions']['torch']}. "
        f"Medians of calls taken in turns. Commit {commits}, {environment['utc'][:10]}."
    )
    return "\n\n".join([*tables, facts]) + "\n"


def _lines(rows: Sequence[Row], columns: Mapping[str, str], first: str) -> list[str]:
    shown = {provider: head for provider, head in columns.items() if any(row["provider"] == provider for row in rows)}
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(_label(row), {})[row["provider"]] = row
    lines = []
    for label, here in cases.items():
        ours = here.get("ours")
        if not ours or not ours["ms"]:
            lines.append(f"| {label} | refused | " + " | ".join("" for _ in shown) + " |")
            continue
        cells = " | ".join(_cell(here.get(provider), ours) for provider in shown)
        lines.append(f"| {label} | {ours['ms'][1]:.1f}, {ours['error']['loss']:.0e} | {cells} |")
    if not lines:
        return []
    heads = [first, "federa, ms, loss", *shown.values()]
    return ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1), *lines]


def _label(row: Row) -> str:
    sizes = row["sizes"]
    if row["group"] == "factored":
        kind = CLIENTS[sizes["clients"]]
        return f"{sizes['N']}×{sizes['K']}, {sizes['C']} clients {kind}, {sizes['R']}"
    what = {"RoBERTa": f"{sizes['G']} of RoBERTa-base", "MiniLM": f"{sizes['G']} of MiniLM-L6, real",
            "square": f"{sizes.get('N')}×{sizes.get('K')}"}.get(row["group"], row["group"])  # fmt: skip
    return f"{what}, {sizes['R']}"


def _cell(row: Row | None, ours: Row) -> str:
    if row is None:
        return ""
    if not row["ms"]:
        return "refused"
    text = f"{row['ms'][1] / ours['ms'][1]:.1f}, {max(row['error']['loss'], 0.0):.0e}"
    return text if row["error"]["loss"] <= TOLERANCE else f"~~{text}~~"


def svd_figure(records: Sequence[Row], path: Path) -> None:
    """Lost energy over time, a line for each method: what is lower left of a line beats it."""
    rows = [row for row in newest(records) if row["group"] == "frontier" and row["ms"]]
    if not rows:
        return
    figure, (axis,) = panels(1, 1, size=(6.4, 4.2))
    for prefix, (label, color, marker) in LINES.items():
        line = [
            (row["ms"][1], max(row["error"]["loss"], 1e-12)) for row in rows if row["provider"].startswith(prefix + " ")
        ]
        if line:
            axis.plot(*zip(*line, strict=True), marker=marker, ms=6, lw=1.4, label=label, color=color)
    axis.axhline(TOLERANCE, color="0.4", lw=0.8, ls="--")
    axis.text(0.99, TOLERANCE, "what federa promises", transform=axis.get_yaxis_transform(), ha="right", va="bottom",
              fontsize="small", color="0.3")  # fmt: skip
    threads = rows[0]["environment"]["threads"]
    axis.set(xscale="log", yscale="log", ylim=(5e-13, 1),
             xlabel=f"ms for one layer of RoBERTa-base (6 matrices), R = 16, {threads} thread{'s' * (threads > 1)}",
             title="Share of the optimal energy that is lost, worst of the matrices (float64 check)")  # fmt: skip
    axis.title.set_fontsize("medium")
    finish_figure(figure, [axis], "lost energy (1e-12: or less)", path, columns=2)
