"""A study's folder -> study.html, study.csv and sweep.csv, written again at any time."""

from pathlib import Path

from federa import page
from federa.folder import write_atomic
from federa.page import duration, escape, megabytes, number, percent
from federa.study import pictures
from federa.study.grid import point_text
from federa.study.results import (
    CONFIDENCE,
    Estimate,
    Results,
    Row,
    estimate,
    paired,
    place_of,
    read_study,
    study_csv,
    sweep_csv,
)
from federa.study.runner import StudyFolder, edge_warning
from federa.variation import DEFINITION

FIGURES = 24  # of curves and of variations; keeps the page well under 5 MiB
MINUS = "−"


def is_study(path: str | Path) -> bool:
    return StudyFolder(path).study_file.is_file()


def write_study(path: str | Path) -> Path:
    """Writes study.csv, sweep.csv and study.html into the study's folder; returns the page's path."""
    results = read_study(path)
    write_atomic(results.path / "study.csv", study_csv(results))
    write_atomic(results.path / "sweep.csv", sweep_csv(results))
    page_file = results.path / "study.html"
    write_atomic(page_file, study_page(results))
    return page_file


def study_page(results: Results) -> str:
    finished = sum(row.facts["state"] == "finished" for row in results.rows)
    state = "" if len(results.rows) == results.cells else f", {len(results.rows)} of {results.cells} runs done"
    reference, rivals = next(iter(results.study.config.methods)), _rivals(results)
    shown = ", ".join(rivals[:4]) + (f" and {len(rivals) - 4} more" if len(rivals) > 4 else "")
    title = f"{reference} against {shown}" if rivals else reference
    body = [
        f'<header><p class="over">Federated fine-tuning, a study{state}</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_outcome(results))}</p></header>',
        page.facts(_facts(results).items()),
    ]
    if finished:
        body += [
            page.section("Test scores", _scores(results)),
            page.section("Differences", _differences(results)),
            page.section("Heterogeneity", _against_alpha(results)),
            page.section("Training", _curves(results)),
            page.section("To the target", _to_target(results)),
            page.section("How updates vary", _variation(results)),
            page.section("Cost", _costs(results)),
        ]
    body += [
        page.section("Learning rates", _sweep(results)) if results.choices else "",
        page.details("Every run", _every_run(results)) if results.rows else "",
        page.details("Predicted and measured time", _sessions(results)) if results.sessions else "",
        page.details("Configuration", f"<pre>{escape(results.study.dump())}</pre>"),
    ]
    return page.document("A study of federated fine-tuning", body)


def _rivals(results: Results) -> list[str]:
    return list(results.study.config.methods)[1:]


def _outcome(results: Results) -> str:
    """What the grid says of its first method, wins and losses alike."""
    reference = next(iter(results.study.config.methods))
    leads, behind, above, below, zero = 0, [], 0, 0, 0
    compared = 0
    for setting in results.settings():
        kinds = {kind.method: kind for kind in results.kinds(setting)}
        own = kinds.pop(reference, None)
        if own is None or not kinds:
            continue
        compared += 1
        means = {name: results.mean(kind, setting.alpha).mean for name, kind in kinds.items()}
        best = max(means, key=means.__getitem__)
        lead = results.mean(own, setting.alpha).mean - means[best]
        leads += lead > 0
        if lead <= 0:
            by = f"{best} by {100 * -lead:.1f} points" if lead <= -5e-4 else f"level with {best}"
            behind.append(f"{setting.title} ({by})")
        difference = paired(results.of(own, setting.alpha), results.of(kinds[best], setting.alpha))
        if difference and difference.low is not None and difference.high is not None:
            above, below = above + (difference.low > 0), below + (difference.high < 0)
            zero += difference.low <= 0 <= difference.high
    if not compared:
        return "No two methods have finished runs in one setting yet."
    text = f"{reference} has the highest mean test score in {leads} of {compared} settings."
    if behind:
        more = f" and {len(behind) - 6} more" if len(behind) > 6 else ""
        text += f" It does not lead on {'; '.join(behind[:6])}{more}."
    text += _against_probe(results)
    if above + below + zero == 0:
        return text + " With one seed there is no interval: a difference says nothing yet."
    return text + (
        f" Against the best other method the paired {percent(CONFIDENCE, 0)} interval of the difference lies above "
        f"zero in {above}, below it in {below}, and holds it in {zero}."
    )


def _against_probe(results: Results) -> str:
    """Where no method gets past a logistic regression on frozen features, which has seen all the data."""
    settings = results.settings()
    probes = {setting: row for setting in settings for row in results.yardsticks(setting) if row[0] == "linear-probe"}
    below = [
        setting.title
        for setting, (_, score, _) in probes.items()
        if all(results.mean(kind, setting.alpha).mean <= score for kind in results.kinds(setting))
    ]
    if not probes:
        return ""
    if not below:
        return " Some method is ahead of the linear probe on pooled frozen features in every setting with one."
    return f" No method is ahead of the linear probe on pooled frozen features on {'; '.join(below)}."


def _facts(results: Results) -> dict[str, str]:
    config, first = results.study.config, results.study.kinds[0]
    run = results.study.run_config(results.study.grid(first, results.study.points(first)[0])[0])
    server = run.server
    facts = {
        "Methods": ", ".join(config.methods),
        "Data": ", ".join(config.datasets),
        "Alphas": ", ".join(f"{alpha:g}" for alpha in config.alphas),
        "Seeds": ", ".join(map(str, config.seeds)),
        "Model": run.model.name if len(config.models) == 1 else ", ".join(config.models),
        "Clients": f"{run.partition.clients} ({run.partition.scheme}), "
        + (f"{server.clients_per_round} a round" if server.clients_per_round else "all in every round"),
        "Rounds": f"{server.rounds}",
        "Chosen on": f"{percent(run.data.validation, 0)} of the training data, held out; the test set chooses nothing",
        "Intervals": f"Student's t over seeds, {percent(CONFIDENCE, 0)}; few seeds give wide ones",
    }
    environment = next((row.environment for row in results.rows if row.environment), {})
    keys = ("device", "threads", "torch", "git")
    if known := {key: environment[key] for key in keys if environment.get(key) is not None}:
        facts["Measured on"] = ", ".join(f"{key} {value}" for key, value in known.items())
    return facts


def _interval(value: Estimate | None, scale: float = 100, digits: int = 1) -> str:
    if value is None or value.low is None or value.high is None:
        return "–"
    low, high = (f"{scale * end:.{digits}f}".replace("-", MINUS) for end in (value.low, value.high))
    return f"{low} to {high}"


def _scores(results: Results) -> str:
    parts = []
    for place, settings in results.places().items():
        rows = []
        for setting in settings:
            for kind in results.kinds(setting):
                test = results.mean(kind, setting.alpha)
                worst = estimate(row.facts["worst_client"] for row in results.of(kind, setting.alpha))
                rows.append(
                    (
                        f"{setting.alpha:g}",
                        escape(kind.method),
                        page.bar(test.mean),
                        _interval(test),
                        number(test.deviation, lambda share: f"{100 * share:.1f}"),
                        number(worst and worst.mean, percent),
                        f"{test.count} of {len(results.study.config.seeds)}",
                    )
                )
            rows += [
                (f"{setting.alpha:g}", escape(name), page.bar(score), "", "", "", escape(note))
                for name, score, note in results.yardsticks(setting)
            ]
        metric = results.metric(settings[0].dataset)
        interval = f"{percent(CONFIDENCE, 0)} interval"
        columns = ("Alpha", "Method", f"Test {escape(metric)}", interval, "Spread", "Worst client", "Seeds")
        parts.append(f"<h3>{escape(place)}</h3>" + page.table(columns, rows, numeric=(0, 3, 4, 5)))
    note = (
        "Means over seeds of the score after the last round. Spread: the sample standard deviation, in points. Worst "
        "client: the mean over seeds of the lowest score on a client's own share of the test set. Yardsticks stand "
        "once for a data set, with the first method and seed. pooled: one site with all the data. local: every client "
        "alone, each on its own share of the test set, which is the easier the fewer labels it has: not what the "
        "others are scored on. An interval tells how much seeds differ, not how few test examples there are."
    )
    return "".join(parts) + f'<p class="note">{note}</p>'


def _differences(results: Results) -> str:
    reference = next(iter(results.study.config.methods))
    rows = []
    for setting in results.settings():
        kinds = {kind.method: kind for kind in results.kinds(setting)}
        for rival in _rivals(results):
            if reference in kinds and rival in kinds:
                one, other = (results.of(kinds[name], setting.alpha) for name in (reference, rival))
                if difference := paired(one, other):
                    name = f"{reference} {MINUS} {rival}"
                    mean = f"{100 * difference.mean:+.1f}".replace("-", MINUS)
                    rows.append((setting.title, name, mean, _interval(difference), f"{difference.count}"))
    if not rows:
        return "<p>Nothing to compare yet.</p>"
    seeds = len(results.study.config.seeds)
    note = (
        "Points of test score, seed by seed: both methods of a pair have the same data, partition and sampled clients. "
        f"{percent(CONFIDENCE, 0)} Student's t interval of the mean difference over {seeds} "
        f"seed{'s' * (seeds != 1)}. Several comparisons stand side by side, and no interval is widened for it."
    )
    columns = ("Setting", "Difference", "Mean", f"{percent(CONFIDENCE, 0)} interval", "Pairs")
    cells = [tuple(map(escape, row)) for row in rows]
    return page.table(columns, cells, numeric=(2, 3, 4)) + f'<p class="note">{note}</p>'


def _against_alpha(results: Results) -> str:
    if not (figures := pictures.against_alpha(results)):
        return "<p>One alpha: nothing to compare it with.</p>"
    note = (
        f"Means over seeds with {percent(CONFIDENCE, 0)} intervals as bars, cut at 0 and 100 %; one seed has none. "
        "Dotted: every client alone. Thin lines: the other yardsticks."
    )
    return page.figures(figures) + f'<p class="note">{note}</p>'


def _curves(results: Results) -> str:
    figures = pictures.curves(results)
    more = len(figures) > FIGURES
    left_out = f" The first {FIGURES} of {len(figures)} settings; the runs' folders hold all." if more else ""
    banded = len(results.study.config.methods) <= pictures.BANDS
    bands = "; bands reach from the lowest to the highest seed" if banded else ""
    note = f"Means over seeds{bands}. Thin lines: yardsticks, on the test set.{left_out}"
    return page.figures(figures[:FIGURES]) + f'<p class="note">{note}</p>'


def _to_target(results: Results) -> str:
    rows = []
    for setting in results.settings():
        target = results.study.target(setting.dataset)
        for kind in results.kinds(setting) if target else ():
            runs = results.of(kind, setting.alpha)
            reached = [row for row in runs if row.facts["rounds_to_target"] is not None]
            means = {
                fact: found.mean
                for fact in ("rounds_to_target", "bytes_to_target", "seconds_to_target")
                if (found := estimate(row.facts[fact] for row in reached))
            }
            rows.append(
                (
                    escape(setting.title),
                    escape(kind.method),
                    percent(target, 0),
                    f"{len(reached)} of {len(runs)}",
                    number(means.get("rounds_to_target"), "{:.1f}".format),
                    megabytes(means["bytes_to_target"], unit="") if means else "–",
                    duration(means["seconds_to_target"]) if means else "–",
                )
            )
    if not rows:
        return "<p>The study names no target.</p>"
    note = (
        "The first evaluated round whose validation score reaches the target. Means over the seeds that did: where "
        "fewer did, a mean is over the luckier ones. MB: all clients, both directions, first downloads included. "
        "Seconds: training, aggregation and evaluation on one machine that trains the clients of a round in turn or in "
        "cohorts, so neither the network nor parallel clients are in them."
    )
    columns = ("Setting", "Method", "Target", "Reached", "Rounds", "MB", "Time")
    return page.table(columns, rows, numeric=(2, 3, 4, 5, 6)) + f'<p class="note">{note}</p>'


def _variation(results: Results) -> str:
    rows = []
    facts = ("update_norm", "magnitude_variation", "direction_variation", "drift")
    for setting in results.settings():
        for kind in results.kinds(setting):
            runs = results.of(kind, setting.alpha)
            means = [estimate(row.facts[fact] for row in runs) for fact in facts]
            shown = (number(found and found.mean, "{:.3g}".format) for found in means)
            rows.append((escape(setting.title), escape(kind.method), *shown))
    columns = ("Setting", "Method", "Update norm", "Magnitude variation", "Direction variation", "Drift")
    note = f'<p class="note">{escape(DEFINITION)} The table gives means over rounds and seeds.</p>'
    figures = pictures.variation(results)[:FIGURES]
    return note + page.table(columns, rows, numeric=range(2, 6)) + page.figures(figures)


def _costs(results: Results) -> str:
    rows = []
    for kind in results.study.kinds:
        runs = results.of(kind)
        if not runs:
            continue
        facts = runs[0].facts
        peaks = [row.peak for row in runs if row.peak is not None]
        adapt = estimate(row.facts["seconds_to_adapt"] for row in runs)
        seconds = estimate(row.facts["seconds"] for row in runs)
        trained, total = facts["trainable_parameters"], facts["total_parameters"]
        rows.append(
            (
                escape(place_of(kind.model, kind.dataset)),
                escape(kind.method),
                f"{trained:,}",
                percent(trained / total, 2),
                number(facts["bytes_up_per_client"], lambda count: megabytes(count, unit="")),
                number(facts["bytes_once_per_client"], lambda count: megabytes(count, unit="")),
                number(adapt and adapt.mean, duration),
                megabytes(facts["training_state_bytes"], unit=""),
                megabytes(max(peaks), unit="") if peaks else "–",
                number(seconds and seconds.mean, duration),
            )
        )
    note = (
        "MB a round: sent by one client; MB once: downloaded by a new one. Adapting: hashing the base model, attaching "
        "adapters and, for federa, the truncated SVDs. State: float32 weights, gradients and optimiser moments of one "
        "client in training, computed. Peak: memory as measured during a run, of the whole process on a CPU (Python, "
        "data and what earlier runs left allocated), of tensors on a GPU. Run: training, aggregation and evaluation."
    )
    columns = (
        *("Data", "Method", "Trained", "Share", "MB a round", "MB once"),
        *("Adapting", "State, MB", "Peak, MB", "Run"),
    )
    return page.table(columns, rows, numeric=range(2, 10)) + f'<p class="note">{note}</p>'


def _sweep(results: Results) -> str:
    study = results.study
    warnings = [edge_warning(choice, key) for choice in results.choices.values() for key in choice.edges]
    parts = [f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in warnings)}</ul>"] if warnings else []
    rows = []
    for kind, choice in results.choices.items():
        for point, score in choice.tried or [(choice.point, None)]:
            chosen = "chosen" if point == choice.point else ""
            place = place_of(kind.model, kind.dataset)
            shown = page.bar(score) if score is not None else "failed" if choice.tried else "not swept"
            rows.append((escape(place), escape(kind.method), escape(point_text(point)), shown, chosen))
    note = (
        f"Mean score on the validation split after the last round, over alphas and seeds of the sweep "
        f"({escape(_sweep_of(results))}). The highest is taken, of equal ones the lowest rate."
    )
    parts += [page.figures(pictures.sweep(results))]
    columns = ("Data", "Method", "Tried", "Validation", "")
    table = page.table(columns, rows)
    parts += [table if len(rows) <= 24 else page.details("Every point tried", table)]
    swept = any(study.sweep(kind) for kind in results.choices)
    return "".join(parts) + (f'<p class="note">{note}</p>' if swept else "")


def _sweep_of(results: Results) -> str:
    study = results.study
    cells = [cell for kind in results.choices for cell in study.sweep(kind)]
    alphas, seeds = (dict.fromkeys(getattr(cell, name) for cell in cells) for name in ("alpha", "seed"))
    rounds = study.config.sweep.rounds
    length = f"{rounds} rounds" if rounds else "as many rounds as the grid"
    return f"alpha {', '.join(f'{a:g}' for a in alphas)}; seed {', '.join(map(str, seeds))}; {length}"


def _every_run(results: Results) -> str:
    columns = ("Model", "Data", "Method", "Alpha", "Seed", "Swept", "Test", "Validation", "Worst client", "Best round")
    return page.table(columns, [_run_cells(row) for row in results.rows], numeric=(3, 4, 6, 7, 8, 9))


def _run_cells(row: Row) -> tuple[str, ...]:
    facts = row.facts
    test = number(facts["test"], percent) if facts["state"] == "finished" else "failed"
    return (
        *(escape(name) for name in row.cell.kind),
        f"{facts['alpha']:g}",
        f"{facts['seed']}",
        escape(point_text(row.cell.point)),
        test,
        number(facts["validation"], percent),
        number(facts["worst_client"], percent),
        "–" if facts["best_round"] is None else f"{facts['best_round']}",
    )


def _sessions(results: Results) -> str:
    rows = []
    for session in results.sessions:
        predicted, took = session["predicted"], session["took"]
        error = f"{100 * (predicted / took - 1):+.0f}\xa0%".replace("-", MINUS) if took and predicted else "–"
        shown = duration(took) if took is not None else "interrupted"
        rows.append(
            (f"{session['units']} of {session['of']}", duration(session["warmup"]), duration(predicted), shown, error)
        )
    note = (
        "Predicted after a warm-up of a few rounds of every kind of run, whose work is kept; meant to hold within 25 %."
    )
    columns = ("Runs to do", "Warm-up", "Predicted", "Took", "Error")
    return page.table(columns, rows, numeric=range(1, 5)) + f'<p class="note">{note}</p>'
