"""Pieces of a self-contained HTML page: no scripts, nothing loaded, images inside, light and dark."""

import base64
import html
import math
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #65707b; --rule: #e3e7eb; --wash: #f4f6f8; --paper: #fff;
  --accent: #0072b2; --bar: #cfe4f1 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --quiet: #98a3ae; --rule: #2b333b; --wash: #1b2127; --paper: #12161a; --accent: #6cbdf0;
    --bar: #1d4763 }
  img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
h1, h2, h3 { line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); margin: .2rem 0 1rem }
h2 { font-size: 1.2rem; margin: 0 0 .9rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
p { margin: 0 0 .8rem; max-width: 46rem; overflow-wrap: anywhere }
section { margin: 2.75rem 0 0 }
.over { margin: 0; color: var(--quiet); font-size: .85rem }
.lead { font-size: 1.2rem; line-height: 1.5 }
.note, footer { color: var(--quiet); font-size: .85rem }
.note { margin-top: .6rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 1.5rem 0 0; font-size: .92rem }
dt { color: var(--quiet) }
dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th { color: var(--quiet); font-weight: 400; font-size: .85rem; text-align: left; vertical-align: bottom }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap }
tr > :last-child { padding-right: 0 }
td:last-child:not(.n) { white-space: normal; min-width: 14rem }
.n { text-align: right }
.strong td { font-weight: 600 }
.strong td:last-child:not(.n) { font-weight: 400 }
.bar { display: inline-block; position: relative; width: clamp(4.5rem, 16vw, 7rem); padding-left: .5rem }
.bar i { position: absolute; inset: .1em auto .1em 0; background: var(--bar); border-radius: 2px }
.bar b { position: relative; font-weight: inherit }
.strong .bar i { background: var(--accent); opacity: .45 }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.scroll + .figures { margin-top: 1.2rem }
figure { margin: 0; max-width: 100%; overflow-x: auto }
img { display: block; max-width: 100%; height: auto }
.wide img { max-width: max(100%, 40rem) }
details { border-top: 1px solid var(--rule); padding: .7rem 0 }
section + details { margin-top: 1.5rem }
details[open] { padding-bottom: 1.5rem }
summary { cursor: pointer; font-weight: 600 }
details > :nth-child(2) { margin-top: .9rem }
details td, details th { font-size: .82rem; padding-right: .9rem }
pre { margin: 0; padding: 1rem; background: var(--wash); border-radius: 6px; overflow-x: auto; font-size: .82rem }
footer { margin-top: 3rem }
@media (max-width: 40rem) {
  body { padding-top: 1.5rem }
  dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin: 0 0 .5rem }
}
"""
FOOTER = (
    "Written by federa. FeDeRA: Yan et al., “FeDeRA: Efficient Fine-tuning of Language Models in Federated Learning "
    "Leveraging Weight Decomposition”, arXiv 2404.18848."
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

escape = html.escape


def document(title: str, body: Iterable[str]) -> str:
    """A whole page; `title` is text, `body` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
{chr(10).join(part for part in body if part)}
<footer><p>{FOOTER}</p></footer>
</body>
</html>
"""


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}</section>"


def details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n{body}</details>"


def facts(items: Iterable[tuple[str, Any]]) -> str:
    """Names and values, both text."""
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(_plain(value))}</dd>" for name, value in items) + "</dl>"
    )


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Collection[int] = (),
    strong: Collection[int] = (),
) -> str:
    """Cells are HTML; columns in `numeric` align to the right, rows in `strong` stand out."""
    classes = [' class="n"' if index in numeric else "" for index in range(len(columns))]
    head = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(classes, columns, strict=True))
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True))
        lines.append(f'<tr class="strong">{cells}</tr>' if index in strong else f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def bar(share: float) -> str:
    """A percentage on a bar of its length."""
    return f'<span class="bar"><i style="width:{100 * min(max(share, 0), 1):.1f}%"></i><b>{percent(share)}</b></span>'


def figures(pictures: Iterable[tuple[bytes, str]]) -> str:
    """PNG bytes with two device pixels per CSS pixel, and what they show in words."""
    parts = []
    for png, alt in pictures:
        width, height = (side // 2 for side in struct.unpack(">II", png[16:24]))
        data = base64.b64encode(png).decode()
        image = f'<img width="{width}" height="{height}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        wide = ' class="wide"' if width > 560 else ""
        parts.append(f"<figure{wide}>{image}</figure>")
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\xa0%"


def megabytes(count: float, unit: str = "\xa0MB") -> str:
    """Bytes in MB of 10^6."""
    if 0 < count < 5e3:
        return "<0.01" + unit
    return f"{count / 1e6:,.{2 if count < 1e8 else 0}f}{unit}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}\xa0s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\xa0min {rest:02d}\xa0s" if minutes < 60 else f"{minutes // 60:,}\xa0h {minutes % 60:02d}\xa0min"


def number(value: float | None, show: Callable[[float], str]) -> str:
    """A dash for what is missing or not finite."""
    return show(value) if value is not None and math.isfinite(value) else "–"


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)
