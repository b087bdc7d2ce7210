"""A run's folder -> figures and one self-contained page; several folders -> one comparison.

Everything comes from the folders' files, so a report can be written again at any time, of unfinished runs too.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from federa import page
from federa.catalogue import METHODS
from federa.errors import InputError
from federa.figures import BLUE, GREEN, VERMILION, Level, Line, draw_accuracy, draw_loss, draw_partition, run_style
from federa.folder import write_atomic
from federa.metrics import Metric
from federa.page import duration, escape, megabytes, number, percent
from federa.records import Partition, Round, Run, Scores, Traffic, Yardstick, read_run

SHOWN = 500  # rows of a long table


class ResultRow(NamedTuple):
    name: str
    score: float  # of the task's metric
    second: float | None
    note: str


def results_table(folder: str | Path) -> list[ResultRow]:
    """The run and its yardsticks, best first."""
    return _results(read_run(folder))


def plot_partition(
    counts: Sequence[Sequence[int]],
    label_names: Sequence[str],
    path: Path,
    convention: str,
    names: Sequence[str] | None = None,
) -> None:
    """Writes the heat map of who holds what as PNG. counts: (C, L) examples of each client and label."""
    write_atomic(Path(path), draw_partition(counts, label_names, convention, names))


def write_report(folder: str | Path) -> Path:
    """Writes report.html into the run's folder, and curves.png, loss.png and partition.png where there is data."""
    run = read_run(folder)
    curves = _curves(run)
    for name, png in curves.items():
        write_atomic(run.path / name, png)
    if run.partition:
        plot_partition(
            run.partition.counts,
            run.partition.label_names,
            run.path / "partition.png",
            run.partition.convention,
            run.partition.names,
        )
    title = f"{run.method} on {run.source}"
    body = [
        f'<header><p class="over">Federated fine-tuning{"" if run.result else ", unfinished run"}</p>',
        f'<h1>{escape(title)}</h1><p class="lead">{escape(_outcome(run))}</p></header>',
        page.facts(_facts(run).items()),
        _results_section(run),
        page.section("Training", page.figures((png, _alt(name, run)) for name, png in curves.items()))
        if curves
        else "",
        _partition_section(run.partition) if run.partition else "",
        _rounds_section(run) if run.rounds else "",
        page.details("Configuration", f"<pre>{escape((run.path / 'config.yaml').read_text(encoding='utf-8'))}</pre>"),
        page.details("Environment", page.facts(run.environment.items())) if run.environment else "",
    ]
    path = run.path / "report.html"
    write_atomic(path, page.document(title, body))
    return path


def write_comparison(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Writes one page on several runs: validation scores by round and by bytes, final numbers, differing settings."""
    if not folders:
        raise InputError("comparison: must get at least one run's folder, got none")
    runs = [read_run(folder) for folder in folders]
    if len(metrics := sorted({run.metric.key for run in runs})) > 1:
        raise InputError(f"comparison: must get runs judged by one metric, got {', '.join(metrics)}")
    metric = runs[0].metric
    names = _distinct_names([run.path for run in runs])
    title = f"Comparison of {len(runs)} run{'s' * (len(runs) > 1)}"
    body = [
        f'<header><p class="over">Federated fine-tuning</p><h1>{title}</h1>',
        f'<p class="lead">{escape(_comparison_outcome(runs, names))}</p></header>',
        page.section("Results", _comparison_table(runs, names)),
        page.section(f"Validation {metric.noun}", _comparison_figures(runs, names)),
        page.section("Settings that differ", _differences(runs, names)),
    ]
    write_atomic(Path(out), page.document(title, body))
    return Path(out)


def _results(run: Run) -> list[ResultRow]:
    rows = [_row(run, row.name, row, row.note) for row in run.yardsticks]
    split = "test" if run.last("test") else "validation"
    if last := run.last(split):
        note = f"{split}, after round {last[0]}" + ("" if run.result else " (unfinished)")
        rows.append(_own_row(run, run.method, last[1], note))
    best = run.result.best if run.result else None
    if best and best.test and best.round != run.done:
        rows.append(
            _own_row(run, f"{run.method}, best round", best.test, f"test, round {best.round} chosen on validation")
        )
    return sorted(rows, key=lambda row: -row.score if run.metric.share else row.score)


def _own_row(run: Run, name: str, scores: Scores, note: str) -> ResultRow:
    for label, value in (("worst client", scores.worst_client), ("mean client", scores.mean_client)):
        if value is not None:
            note += f"; {label} {run.metric.show(value)}"
    return _row(run, name, scores, note)


def _row(run: Run, name: str, scores: Scores, note: str) -> ResultRow:
    score = run.metric.value(scores)
    return ResultRow(name, math.inf if score is None else score, run.second.value(scores), note)


def _draw(metric: Metric, lines: Sequence[Line], xlabel: str, title: str, levels: Sequence[Level] = ()) -> bytes:
    """Curves of a metric: shares in percent, others as numbers from 0."""
    return (draw_accuracy if metric.share else draw_loss)(lines, xlabel, title, levels)


def _curves(run: Run) -> dict[str, bytes]:
    figures = {}
    splits = (("validation", BLUE), ("test", VERMILION))
    lines = [Line(split, *run.curve(split), color) for split, color in splits]
    if lines := [line for line in lines if line.x]:
        levels = [Level(row.name, value) for row in run.yardsticks if (value := run.metric.value(row)) is not None]
        figures["curves.png"] = _draw(run.metric, lines, "round", run.metric.title, levels)
    trained = [(row.round, row.train_loss) for row in run.rounds if row.train_loss is not None]
    lines = [Line("training", [x for x, _ in trained], [y for _, y in trained], GREEN)]
    lines += [Line(split, *run.curve(split, "loss"), color) for split, color in splits]
    if lines := [line for line in lines if line.x]:
        figures["loss.png"] = draw_loss(lines, "round", "Loss")
    return figures


def _alt(name: str, run: Run) -> str:
    if name == "loss.png":
        return f"Loss over {run.done} rounds"
    last = run.last("validation") or run.last("test")
    return f"{run.metric.title} over {run.done} rounds" + (f", last {_shown(run.metric, last[1])}" if last else "")


def _shown(metric: Metric, scores: Scores | Yardstick | None) -> str:
    return number(metric.value(scores), metric.show)


def _outcome(run: Run) -> str:
    """The run in one sentence."""
    rounds, clients = _count(run.done, "round"), _count(run.clients, "client")
    if not run.result:
        split = "validation" if run.last("validation") else "test"
        last = run.last(split)
        so_far = f", at {_shown(run.metric, last[1])} {split} {run.metric.noun} after round {last[0]}" if last else ""
        return f"{run.done} of {run.config.server.rounds} rounds are done with {clients}{so_far}."
    total, trained = run.result.total_parameters, run.result.trainable_parameters
    sentence = f"After {rounds}, {clients} "
    if test := run.result.test:
        second = run.second.value(test)
        beside = f" ({run.second.noun} {run.second.show(second)})" if second is not None else ""
        sentence += f"reached {_shown(run.metric, test)} test {run.metric.noun}{beside}, training "
    else:
        sentence += "had trained "
    sentence += f"{percent(trained / total, 2)} of {total / 1e6:,.1f}\xa0M parameters"
    if run.bytes_per_client:
        up, full = run.bytes_per_client[0], 4 * total
        sentence += f" and sending {megabytes(up)} per client a round"
        if 0 < up < full / 1.5:
            sentence += (
                f", where the full model in float32 would take {megabytes(full)} ({full / up:,.0f}\xa0times as much)"
            )
    return sentence + "."


def _facts(run: Run) -> dict[str, str]:
    config = run.config
    method, client, server = config.method, config.client, config.server
    adapters = METHODS[method.name].band is not None
    targets = method.target_modules if isinstance(method.target_modules, str) else ", ".join(method.target_modules)
    local = _count(client.steps, "step") if client.steps else _count(client.epochs, "epoch")
    facts = {
        "Model": run.result.model if run.result else config.model.name,
        "Method": run.method
        + (f", rank {method.rank}, alpha {method.alpha or method.rank:g}, {targets}" if adapters else ""),
        "Clients": f"{run.clients} ({run.partition.scheme if run.partition else config.partition.scheme}), "
        + (f"{server.clients_per_round} a round" if server.clients_per_round else "all in every round"),
        "Local training": f"{client.optimizer}, lr {client.lr:g}, batch {client.batch_size}, {local} a round",
        "Server": server.optimizer + (f", {server.aggregation}" if server.aggregation != "fedavg" else ""),
    }
    if spent := [row.privacy for row in run.rounds if row.privacy]:
        facts["Privacy"] = f"epsilon {spent[-1].epsilon:.2f} at delta {spent[-1].delta:g}, for whole clients"
    if drifts := [row.drift for row in run.rounds if row.drift is not None]:
        facts["Drift"] = (
            f"{percent(max(drifts))} of a round's change at most: averaged factors against averaged products"
        )
    if run.bytes_per_client:
        up, down = run.bytes_per_client
        facts["Traffic"] = (
            f"{megabytes(up)} up, {megabytes(down)} down per client a round; "
            f"{megabytes(run.bytes_total)} in all with first downloads"
        )
    facts["Time"] = duration(run.seconds)
    return facts


def _results_section(run: Run) -> str:
    rows = _results(run)
    if not rows:
        return ""
    cells = [
        (escape(row.name), _bar(run.metric, row.score), number(row.second, run.second.show), escape(row.note))
        for row in rows
    ]
    yardsticks = {row.name for row in run.yardsticks}
    ours = [index for index, row in enumerate(rows) if row.name not in yardsticks]
    return page.section(
        "Results", page.table(("", run.metric.title, run.second.title, ""), cells, numeric=(2,), strong=ours)
    )


def _bar(metric: Metric, value: float) -> str:
    return page.bar(value) if metric.share else number(value, metric.show)


def _partition_section(partition: Partition) -> str:
    sizes = [sum(row) for row in partition.counts]
    if not any(sizes):  # real sites, whose data the server does not see
        return page.section("Who holds what", f"<p>{escape(partition.convention or partition.scheme)}</p>")
    held = [sum(count > 0 for count in row) for row in partition.counts]
    labels = len(partition.label_names)
    text = f"{sum(sizes):,} examples; a client holds {min(sizes):,} to {max(sizes):,} of them" + (
        f", with {sum(held) / len(held):.1f} of {_count(labels, 'label')} on average." if labels > 1 else "."
    )
    picture = draw_partition(partition.counts, partition.label_names, names=partition.names)
    alt = f"Heat map of {len(sizes)} clients{f' and {labels} labels' if labels > 1 else ''}. {text}"
    rows = []
    for client, row in enumerate(partition.counts[:SHOWN]):
        top = max(range(labels), key=row.__getitem__)
        most = (
            f"{escape(partition.label_names[top][:60])} ({percent(row[top] / sizes[client])})" if sizes[client] else ""
        )
        name = f"{client} {partition.names[client][:60]}" if partition.names else f"{client}"
        rows.append((escape(name), f"{sizes[client]:,}", f"{held[client]}", most))
    columns = ("Client", "Examples", "Labels held", "Most frequent label")
    note = f"<p>The first {SHOWN} of {len(sizes):,} clients.</p>" if len(sizes) > SHOWN else ""
    shown = len(columns) if labels > 1 else 2
    table = note + page.table(columns[:shown], [row[:shown] for row in rows], numeric=(1, 2))
    body = f"<p>{escape(partition.convention or partition.scheme)}</p><p>{text}</p>{page.figures([(picture, alt)])}"
    return page.section("Who holds what", body) + page.details("Clients", table)


def _rounds_section(run: Run) -> str:
    rounds = run.rounds
    step = math.ceil(len(rounds) / SHOWN)
    note = f"<p>One round in {step}; metrics.jsonl holds all.</p>" if step > 1 else ""
    shown = [row for index, row in enumerate(rounds) if index % step == 0 or row is rounds[-1]]
    columns = (
        *("Round", "Clients", "Lost", "Examples", "Steps", "Training loss", "Update norm"),
        *("Validation", "Test", "MB up", "MB down", "MB so far", "Time"),
    )
    table = page.table(columns, [_round_cells(row, run.metric) for row in shown], numeric=[0, 1, *range(3, 13)])
    rejected = [(row.round, item) for row in rounds for item in row.rejected][:SHOWN]
    reasons = "".join(
        f"<li>Round {index}, client {item.client}: {escape(item.why[:200])}</li>" for index, item in rejected
    )
    return page.details("Rounds", note + table + (f"<h3>Rejected updates</h3><ul>{reasons}</ul>" if reasons else ""))


def _round_cells(row: Round, metric: Metric) -> tuple[str, ...]:
    losses = (("dropped", row.dropped), ("late", row.late), ("rejected", row.rejected))
    traffic = row.bytes or Traffic()
    return (
        f"{row.round}",
        f"{len(row.completed)} of {len(row.sampled)}" if row.sampled else "–",
        ", ".join(f"{len(clients)} {why}" for why, clients in losses if clients),
        number(row.examples, "{:,}".format),
        number(row.steps, "{:,}".format),
        number(row.train_loss, "{:.3f}".format),
        number(row.update_norm, "{:.3g}".format),
        _shown(metric, row.validation),
        _shown(metric, row.test),
        *(megabytes(sent, unit="") for sent in (traffic.up, traffic.down + traffic.broadcast, traffic.total)),
        duration(sum(value or 0 for value in (row.seconds or {}).values())),
    )


def _best(runs: Sequence[Run]) -> tuple[float, int] | None:
    """The best test score and the index of its run, if any run has one."""
    lasts = [(run.last("test"), index) for index, run in enumerate(runs)]
    scored = [(score, i) for last, i in lasts if last and (score := runs[i].metric.value(last[1])) is not None]
    best = max if runs[0].metric.share else min
    return best(scored, key=lambda pair: pair[0]) if scored else None


def _comparison_outcome(runs: Sequence[Run], names: Sequence[str]) -> str:
    best = _best(runs)
    metric = runs[0].metric
    if not best:
        return f"None of the runs has a test {metric.noun} yet."
    score, index = best
    run = runs[index]
    extreme = "highest" if metric.share else "lowest"
    text = (
        f"The {extreme} test {metric.noun} is {metric.show(score)}, of {names[index]} ({run.method}), "
        f"after {_count(run.done, 'round')} and {megabytes(run.bytes_total)} sent"
    )
    scores = [metric.value(last[1]) if (last := other.last("test")) else None for other in runs]
    level = [name for i, name in enumerate(names) if i != index and scores[i] == score]
    more = f" and {len(level) - 4} more" if len(level) > 4 else ""
    return text + (f"; level with it: {', '.join(level[:4])}{more}." if level else ".")


def _comparison_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    columns = (
        *("Run", "Method", f"Test {runs[0].metric.noun}", runs[0].second.title, "Worst client", "Validation"),
        *("Rounds", "Trained", "MB a round", "MB in all", "Time"),
    )
    rows = []
    for run, name in zip(runs, names, strict=True):
        test, validation = ((run.last(split) or (0, None))[1] for split in ("test", "validation"))
        result = run.result
        rows.append(
            (
                escape(name),
                run.method,
                _bar(run.metric, run.metric.value(test)) if test else "–",
                number(run.second.value(test), run.second.show),
                number(getattr(test, "worst_client", None), run.metric.show),
                _shown(run.metric, validation),
                f"{run.done}" if result else f"{run.done} of {run.config.server.rounds}",
                percent(result.trainable_parameters / result.total_parameters, 2) if result else "–",
                megabytes(run.bytes_per_client[0], unit="") if run.bytes_per_client else "–",
                megabytes(run.bytes_total, unit=""),
                duration(run.seconds),
            )
        )
    note = '<p class="note">MB a round: sent by one client. MB in all: both directions, all clients.</p>'
    return page.table(columns, rows, numeric=range(3, 11), strong=(_best(runs) or ())[1:]) + note


def _comparison_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
    metric = runs[0].metric
    by_round, by_bytes = [], []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        scored = [(row.round, row.bytes, metric.value(row.validation)) for row in run.rounds if row.validation]
        scored = [point for point in scored if point[2] is not None]
        if not scored:
            continue
        style = run_style(index)
        by_round.append(Line(name, [r for r, _, _ in scored], [y for _, _, y in scored], *style))
        sent = [(traffic.total / 1e6, y) for _, traffic, y in scored if traffic and traffic.total]
        if sent:
            by_bytes.append(Line(name, [x for x, _ in sent], [y for _, y in sent], *style))
    pictures = []
    if by_round:
        pictures.append((_draw(metric, by_round, "round", "By round"), f"Validation {metric.noun} by round"))
    if by_bytes:
        label = "MB sent so far, all clients, both directions"
        pictures.append((_draw(metric, by_bytes, label, "By traffic"), f"Validation {metric.noun} by MB sent"))
    shown = {line.label for line in by_round}
    missing = [name for name in names if name not in shown]
    note = f'<p class="note">Without validation {metric.noun}: {escape(", ".join(missing))}.</p>' if missing else ""
    return page.figures(pictures) + note


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    settings = [dict(_flatten(run.config.model_dump(mode="json"))) for run in runs]
    keys = [key for key in settings[0] if any(values[key] != settings[0][key] for values in settings)]
    if not keys:
        return "<p>None.</p>"
    rows = [(f"<code>{key}</code>", *(escape(str(values[key])) for values in settings)) for key in keys]
    return page.table(("", *map(escape, names)), rows, numeric=range(1, len(names) + 1))


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value) if value is None or isinstance(value, bool) else value


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = next((n for n in range(1, 9) if len({part[-n:] for part in parts}) == len(parts)), 1)
    return [os.path.join(*part[-depth:]) for part in parts]


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
