"""Figures as PNG bytes: the same data gives the same bytes, with no pyplot state and no display."""

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

DPI = 192  # two device pixels per CSS pixel

# Okabe and Ito's colour-blind-safe palette, without the yellow that white paper swallows
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")
INK, QUIET, RULE = "#1F2933", "#69737D", "#E3E7EB"
COUNTS = LinearSegmentedColormap.from_list("counts", ["#F1F4F7", "#A6CFE6", "#0072B2", "#002B45"])

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": "#B8C0C8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


class Line(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashes: str = "-"
    low: Sequence[float] | None = None  # with `high` a band, or error bars where the x axis has ticks of its own
    high: Sequence[float] | None = None


class Level(NamedTuple):
    label: str
    y: float


def run_style(index: int) -> tuple[str, str]:
    """Colour and dashes of the index-th run of a comparison."""
    return PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]


def draw_accuracy(
    lines: Sequence[Line],
    xlabel: str,
    title: str,
    levels: Sequence[Level] = (),
    ticks: Sequence[float] | None = None,
) -> bytes:
    """Accuracies in 0..1 as lines in percent, with `levels` as thin horizontal lines.

    The axis starts at 0, or says where it starts if everything lies above 40 %. The x axis turns logarithmic where the
    lines' ends lie more than 20 times apart; with `ticks` it is logarithmic and marked there alone.
    """
    lines = [_in_percent(line) for line in lines]
    levels = [level._replace(y=100 * level.y) for level in levels]
    values = [y for line in lines for ys in (line.y, line.low or (), line.high or ()) for y in ys]
    values = [max(y, 0) for y in values + [level.y for level in levels]]
    low = 0 if min(values) < 40 else 10 * math.floor(min(values) / 10 - 0.1)
    high = min(100, max(10 * math.ceil(max(values) / 10 + 0.1), low + 20))
    title = f"{title}, %" + (f" (axis from {low})" if low else "")
    return _draw_lines(lines, levels, (low, high), xlabel, title, "{:.1f}", ticks)


def draw_loss(lines: Sequence[Line], xlabel: str, title: str, levels: Sequence[Level] = ()) -> bytes:
    """Losses as lines from 0, with `levels` as thin horizontal lines; what is not finite leaves a gap."""
    finite = [y for line in lines for y in line.y if math.isfinite(y)] + [level.y for level in levels]
    return _draw_lines(lines, levels, (0, 1.08 * max(finite, default=1) or 1), xlabel, title, "{:.3f}")


def draw_partition(
    counts: Sequence[Sequence[int]],
    label_names: Sequence[str],
    convention: str = "",
    names: Sequence[str] | None = None,
) -> bytes:
    """Who holds what: labels down, clients across, each client's number of examples on top.

    counts: (C, L) examples. Small maps carry their numbers, large ones a colour bar; tick labels thin out.
    """
    table = np.asarray(counts, dtype=float).T
    labels, clients = table.shape
    width, height = float(np.clip(0.37 * clients, 2.6, 7.4)), float(np.clip(0.27 * labels, 0.55, 6.0))
    annotated = clients <= 20 and labels <= 24 and table.max() < 1e5
    label_names = [_shorten(name, 24) for name in label_names]
    margin = 0.085 * max(map(len, label_names)) + 0.5
    heading = textwrap.wrap(convention, max(30, int(11 * (width + margin))))[:6]
    size = (width + margin + (0 if annotated else 0.8), height + 1.35 + 0.16 * len(heading) + (0.7 if names else 0))

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.05, hspace=0.02)
        figure = Figure(figsize=size, dpi=DPI, layout=layout)
        grid = figure.add_gridspec(2, 2, height_ratios=[0.5, height], width_ratios=[width, 0.13])
        heat = figure.add_subplot(grid[1, 0])
        sizes = figure.add_subplot(grid[0, 0], sharex=heat)
        norm = PowerNorm(0.5, 0, max(table.max(), 1))
        sampling = "nearest" if clients <= 1000 else "auto"
        image = heat.imshow(table, cmap=COUNTS, norm=norm, aspect="auto", interpolation=sampling)
        heat.spines[:].set_visible(False)
        heat.tick_params(length=0, which="both")
        if clients <= 100 and labels <= 40:
            heat.set_xticks(np.arange(clients + 1) - 0.5, minor=True)
            heat.set_yticks(np.arange(labels + 1) - 0.5, minor=True)
            heat.grid(which="minor", color="white", linewidth=1 if clients <= 40 else 0.4)
        shown = range(0, labels, _stride(labels, height / 0.15))
        heat.set_yticks(shown, [label_names[i] for i in shown], parse_math=False)
        shown = range(0, clients, _stride(clients, width / (0.3 if names is None else 0.2)))
        if names is None:
            heat.set_xticks(shown, [str(i) for i in shown])
        else:
            turned: dict[str, Any] = {"rotation": 55, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
            heat.set_xticks(shown, [_shorten(names[i], 16) for i in shown], **turned)
        heat.set_xlabel("client")

        if annotated:
            for (y, x), count in np.ndenumerate(table):
                if count:
                    color = "white" if norm(count) > 0.6 else INK
                    heat.text(x, y, f"{count:.0f}", ha="center", va="center", fontsize=7.5, color=color)
        else:
            bar = figure.colorbar(image, cax=figure.add_subplot(grid[1, 1]))
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0, labelsize=8)
            bar.locator = MaxNLocator(5 if height > 1.5 else 2, integer=True)
            bar.formatter = FuncFormatter(lambda count, _: f"{count:,.0f}")
            bar.update_ticks()

        total = table.sum(0)
        sizes.stairs(total, np.arange(clients + 1) - 0.5, fill=True, color="#B8C0C8")
        sizes.set_ylim(0, total.max() or 1)
        sizes.set_yticks([0, total.max()], ["0", f"{total.max():,.0f}"], fontsize=8)
        sizes.tick_params(length=0, which="both", labelbottom=False)
        sizes.spines[:].set_visible(False)
        sizes.set_title("examples per client", fontsize=8.5, color=QUIET, pad=4)
        if heading:
            figure.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=9.5, parse_math=False)
        return _png(figure)


def draw_amounts(lines: Sequence[Line], xlabel: str, title: str) -> bytes:
    """Amounts as lines from 0, with their bands."""
    values = [y for line in lines for ys in (line.y, line.high or ()) for y in ys]
    return _draw_lines(lines, [], (0, 1.08 * max(values) or 1), xlabel, title, "{:.2f}")


def _in_percent(line: Line) -> Line:
    low, high = ([100 * y for y in ys] if ys else None for ys in (line.low, line.high))
    return line._replace(y=[100 * y for y in line.y], low=low, high=high)


def _draw_lines(
    lines: Sequence[Line],
    levels: Sequence[Level],
    limits: tuple[float, float],
    xlabel: str,
    title: str,
    number: str,
    ticks: Sequence[float] | None = None,
) -> bytes:
    height = max(3.3, 0.17 * (len(lines) + len(levels)) + 0.9)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, height), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylim(limits)
        axes.set_title(title, color=INK)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        _set_x_axis(axes, lines, ticks)
        for level in levels:
            axes.axhline(level.y, color=QUIET, linewidth=0.8, dashes=(2, 2), zorder=1.5)
        for line in lines:
            marker = "o" if len(line.x) <= 30 else ""
            axes.plot(line.x, line.y, line.dashes + marker, color=line.color, linewidth=1.8, markersize=3.6)
            if line.low and line.high and ticks:
                axes.vlines(line.x, line.low, line.high, color=line.color, linewidth=1.1)
            elif line.low and line.high:
                axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.14, linewidth=0)
        _label_ends(axes, lines, levels, number, height)
        return _png(figure)


def _set_x_axis(axes: Axes, lines: Sequence[Line], ticks: Sequence[float] | None) -> None:
    if ticks:
        axes.set_xscale("log")
        axes.set_xlabel(axes.get_xlabel() + " (log scale)")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
        return
    ends = [max(line.x) for line in lines]
    positive = [end for end in ends if end > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_xscale("log")
        axes.set_xlabel(axes.get_xlabel() + " (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x == round(x) else f"{x:.3g}"))
        axes.set_xlim(0, (max(ends, default=0) or 1) * 1.01)


def _label_ends(axes: Axes, lines: Sequence[Line], levels: Sequence[Level], number: str, height: float) -> None:
    """Names and last values right of where lines and levels end, moved apart vertically; `height` in inches."""
    axes.get_xlim()  # settles the limits, which matplotlib leaves open until asked
    to_axes = axes.transScale + axes.transLimits
    ends: list[tuple[Line | Level, tuple[float, float]]]
    ends = [(line, end) for line in lines if (end := _last_finite(line))]
    ends += [(level, (axes.get_xlim()[1], level.y)) for level in levels]
    starts = [to_axes.transform(end) for _, end in ends]
    places = _spread([y for _, y in starts], 0.17 / (height - 0.8))
    for (mark, (_, value)), start, place in zip(ends, starts, places, strict=True):
        color = mark.color if isinstance(mark, Line) else QUIET
        axes.annotate(
            f"{_shorten(mark.label, 22)} {number.format(value)}",
            xy=tuple(start),
            xycoords="axes fraction",
            xytext=(start[0] + 0.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=0.8 * np.array(to_rgb(color)),
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)},
            path_effects=[withStroke(linewidth=3, foreground="white")],
            annotation_clip=False,
            parse_math=False,
        )


def _last_finite(line: Line) -> tuple[float, float] | None:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    return points[-1] if points else None


def _spread(values: Sequence[float], gap: float) -> np.ndarray:
    """The nearest places in [0, 1], in squared distance, that lie at least `gap` apart (isotonic regression)."""
    count = len(values)
    gap = min(gap, 1 / max(count - 1, 1))
    order = np.argsort(values, kind="stable")
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = values[index] - gap * rank, 1
        while blocks and blocks[-1][0] >= mean:
            other, weight = blocks.pop()
            mean, size = (mean * size + other * weight) / (size + weight), size + weight
        blocks.append((mean, size))
    starts = np.repeat([mean for mean, _ in blocks], [size for _, size in blocks]) if blocks else np.empty(0)
    places = np.empty(count)
    places[order] = starts.clip(0, 1 - gap * max(count - 1, 0)) + gap * np.arange(count)
    return places


def _stride(count: int, room: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that leaves at most `room` of `count` ticks."""
    return next(
        step for power in range(10) for step in (10**power, 2 * 10**power, 5 * 10**power) if count <= step * room
    )


def _shorten(text: str, length: int) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
