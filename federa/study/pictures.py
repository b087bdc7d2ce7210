"""A study's figures: PNG bytes and what they show in words."""

from collections.abc import Mapping, Sequence

from federa.figures import QUIET, Level, Line, draw_accuracy, draw_amounts, run_style
from federa.study.grid import Kind
from federa.study.results import Estimate, Results, Setting, place_of

BANDS = 4  # methods with bands around their curves; more would hide each other
APART = 1.04  # factor between methods' alphas, so that intervals do not hide each other
Picture = tuple[bytes, str]


def against_alpha(results: Results) -> list[Picture]:
    """Test scores against alpha with their intervals, one figure a place with two alphas or more."""
    pictures = []
    for place, settings in results.places().items():
        alphas, metric = [setting.alpha for setting in settings], results.metric(settings[0].dataset)
        if len(alphas) > 1:
            kinds = list(dict.fromkeys(kind for setting in settings for kind in results.kinds(setting)))
            shifts = [APART ** (index - (len(kinds) - 1) / 2) for index in range(len(kinds))]
            lines = [_interval_line(results, kind, alphas, shift) for kind, shift in zip(kinds, shifts, strict=True)]
            yardsticks = {setting.alpha: results.yardsticks(setting) for setting in settings}
            if local := {
                alpha: score for alpha, own in yardsticks.items() for name, score, _ in own if name == "local"
            }:
                lines.append(Line("local", list(local), list(local.values()), QUIET, ":"))
            levels = [level for level in _levels(results, settings[-1]) if not level.label.startswith("local")]
            xlabel = "alpha, more alike clients to the right"
            picture = draw_accuracy(lines, xlabel, f"{place}: test {metric}", levels, alphas)
            pictures.append((picture, f"Test {metric} on {place} against alpha"))
    return pictures


def curves(results: Results) -> list[Picture]:
    """Validation scores by round, one figure a setting."""
    pictures = []
    for setting in results.settings():
        metric, lines = results.metric(setting.dataset), []
        for kind in results.kinds(setting):
            own = [row.validation for row in results.of(kind, setting.alpha)]
            lines += _mean_line(results, kind, own)
        if lines:
            picture = draw_accuracy(lines, "round", f"{setting.title}: validation {metric}", _levels(results, setting))
            pictures.append((picture, f"Validation {metric} by round on {setting.title}"))
    return pictures


def variation(results: Results) -> list[Picture]:
    """Magnitude and direction variation by round, two figures a setting."""
    pictures = []
    for setting in results.settings():
        for which, title in ((1, "magnitude variation"), (2, "direction variation")):
            lines = []
            for kind in results.kinds(setting):
                rows = results.of(kind, setting.alpha)
                own = [
                    {t: facts[which] for t, facts in row.updates.items() if facts[which] is not None} for row in rows
                ]
                lines += _mean_line(results, kind, own)
            if lines:
                picture = draw_amounts(lines, "round", f"{setting.title}: {title}")
                pictures.append((picture, f"The updates' {title} by round on {setting.title}"))
    return pictures


def sweep(results: Results) -> list[Picture]:
    """Validation scores against what was swept, one figure a place and key, of the methods that sweep it alone."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for kind, choice in results.choices.items():
        known = [(point[0][1], score) for point, score in choice.tried if score is not None and len(point) == 1]
        if len(known) > 1 and all(rate > 0 for rate, _ in known):
            line = Line(kind.method, [x for x, _ in known], [y for _, y in known], *_style(results, kind))
            groups.setdefault((place_of(kind.model, kind.dataset), choice.point[0][0]), []).append(line)
    pictures = []
    for (place, key), lines in groups.items():
        ticks = sorted({x for line in lines for x in line.x})
        picture = draw_accuracy(lines, key, f"{place}: validation", ticks=ticks)
        pictures.append((picture, f"Validation score on {place} against {key}"))
    return pictures


def _style(results: Results, kind: Kind) -> tuple[str, str]:
    return run_style(list(results.study.config.methods).index(kind.method))


def _levels(results: Results, setting: Setting) -> list[Level]:
    return [Level(f"{name}, test", score) for name, score, _ in results.yardsticks(setting)]


def _interval_line(results: Results, kind: Kind, alphas: Sequence[float], shift: float) -> Line:
    known = {alpha: results.mean(kind, alpha) for alpha in alphas if results.of(kind, alpha)}
    ends = [_ends(value) for value in known.values()]
    means = [value.mean for value in known.values()]
    x = [alpha * shift for alpha in known]
    return Line(kind.method, x, means, *_style(results, kind), [low for low, _ in ends], [high for _, high in ends])


def _ends(value: Estimate) -> tuple[float, float]:
    """The interval within what a score can be; one seed's is its mean."""
    if value.low is None or value.high is None:
        return value.mean, value.mean
    return max(value.low, 0.0), min(value.high, 1.0)


def _mean_line(results: Results, kind: Kind, curves: Sequence[Mapping[int, float]]) -> list[Line]:
    """The mean of the seeds' curves over the rounds that all of them have, from the lowest to the highest seed; none
    where no round is shared."""
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    if not shared:
        return []
    values = [[curve[round] for curve in curves] for round in shared]
    mean = [sum(row) / len(row) for row in values]
    banded = len(curves) > 1 and len(results.study.config.methods) <= BANDS
    band = ([min(row) for row in values], [max(row) for row in values]) if banded else ()
    return [Line(kind.method, shared, mean, *_style(results, kind), *band)]
