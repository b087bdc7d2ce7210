"""A study's folder -> one row a cell, their means with confidence intervals, and study.csv and sweep.csv."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from federa.config import ClientConfig, Config
from federa.folder import RunFolder
from federa.study.grid import ONLY, Cell, Choice, Kind, Study, depends_on_alpha, load_study
from federa.study.runner import StudyFolder, choose, score_of

CONFIDENCE = 0.95
SECONDS = ("seconds", "seconds_to_target", "seconds_to_adapt")  # study.csv's columns that a second run changes
FACTS = (
    *("model", "dataset", "method", "alpha", "seed", "swept", "metric", "state", "rounds"),
    *("test", "validation", "worst_client", "mean_client", "best_round", "test_at_best_round"),
    *("target", "rounds_to_target", "bytes_to_target", "bytes_total", "bytes_up_per_client", "bytes_once_per_client"),
    *("trainable_parameters", "total_parameters", "training_state_bytes"),
    *("update_norm", "magnitude_variation", "direction_variation", "drift"),
)


@dataclass(frozen=True)
class Row:
    """A finished or failed cell: its facts, one value for each of FACTS and SECONDS, and what it recorded by round."""

    cell: Cell
    config: Config
    facts: Mapping[str, Any]
    validation: Mapping[int, float]  # round -> score
    updates: Mapping[int, tuple[float, float | None, float | None]]  # round -> norm, magnitude and direction variation
    peak: int | None  # bytes of memory, as measured
    environment: Mapping[str, Any]


class Estimate(NamedTuple):
    """A mean over seeds. low and high: its Student t interval at CONFIDENCE, None with fewer than two values."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


class Setting(NamedTuple):
    """What methods are compared in."""

    model: str
    dataset: str
    alpha: float

    @property
    def title(self) -> str:
        return f"{place_of(self.model, self.dataset)}, alpha {self.alpha:g}"


def place_of(model: str, dataset: str) -> str:
    """A data set, and its model where a study names models."""
    return dataset if model == ONLY else f"{dataset}, {model}"


class Results(NamedTuple):
    study: Study
    path: Path
    choices: dict[Kind, Choice]  # of the kinds whose sweep is finished
    rows: list[Row]
    baselines: dict[tuple[str, str, str, float], dict[str, Any]]  # model, dataset, name, alpha -> its row
    sessions: list[dict[str, Any]]
    cells: int  # of the whole grid

    def of(self, kind: Kind, alpha: float | None = None) -> list[Row]:
        """The finished rows of a kind, in the order of their seeds."""
        rows = [row for row in self.rows if row.cell.kind == kind and row.facts["state"] == "finished"]
        return [row for row in rows if alpha is None or row.cell.alpha == alpha]

    def metric(self, dataset: str) -> str:
        """What the dataset's runs are judged by."""
        known = (row.facts["metric"] for row in self.rows if row.cell.kind.dataset == dataset)
        return next((metric for metric in known if metric), "score")

    def settings(self) -> list[Setting]:
        """Those with a finished run, in the study's order."""
        kinds = [(kind, alpha) for kind in self.study.kinds for alpha in self.study.alphas(kind)]
        return list(dict.fromkeys(Setting(*kind[:2], alpha) for kind, alpha in kinds if self.of(kind, alpha)))

    def places(self) -> dict[str, list[Setting]]:
        """The settings of every data set and model."""
        places: dict[str, list[Setting]] = {}
        for setting in self.settings():
            places.setdefault(place_of(setting.model, setting.dataset), []).append(setting)
        return places

    def kinds(self, setting: Setting) -> list[Kind]:
        """The methods with finished runs in a setting."""
        return [kind for kind in self.study.kinds if kind[:2] == setting[:2] and self.of(kind, setting.alpha)]

    def mean(self, kind: Kind, alpha: float) -> "Estimate":
        """Of the test scores of a kind with finished runs at this alpha."""
        found = estimate(row.facts["test"] for row in self.of(kind, alpha))
        assert found is not None
        return found

    def yardsticks(self, setting: Setting) -> list[tuple[str, float, str]]:
        """(name, test score, note) of a setting's baselines; one that does not depend on alpha stands in all."""
        metric, found = self.metric(setting.dataset), []
        for (*place, name, alpha), row in self.baselines.items():
            stands = alpha == setting.alpha or not depends_on_alpha(name)
            if stands and (*place,) == setting[:2] and row.get(metric) is not None:
                found.append((name, row[metric], row["note"]))
        return found


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """mean -+ t_{(1 + CONFIDENCE) / 2, n - 1} s / sqrt(n) with s the sample deviation; None without values."""
    from scipy.stats import t

    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Estimate(mean, None, None, None, 1)
    deviation = float(np.std(known, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)) * deviation / math.sqrt(len(known))
    return Estimate(mean, deviation, mean - half, mean + half, len(known))


def paired(one: Sequence[Row], other: Sequence[Row], fact: str = "test") -> Estimate | None:
    """`one` minus `other` over the seeds that both have: equal seeds share data, partition and sampled clients."""
    theirs = {row.cell.seed: row.facts[fact] for row in other}
    pairs = [(row.facts[fact], theirs.get(row.cell.seed)) for row in one]
    return estimate(a - b for a, b in pairs if a is not None and b is not None)


def read_study(path: str | Path) -> Results:
    """Whatever a study's folder holds so far. InputError names a file that is missing or corrupt."""
    folder = StudyFolder(path)
    study = load_study(folder.study_file)
    choices: dict[Kind, Choice] = {}
    rows: list[Row] = []
    baselines: dict[tuple[str, str, str, float], dict[str, Any]] = {}
    cells = 0
    for kind in study.kinds:
        cells += len(study.grid(kind, study.points(kind)[0]))
        if not all(_ended(folder.run(cell)) for cell in study.sweep(kind)):
            continue
        choices[kind] = choose(study, folder, kind)
        grid = study.grid(kind, choices[kind].point)
        rows += [read_row(study, cell, folder.run(cell)) for cell in grid if _ended(folder.run(cell))]
        for name, alpha in study.baselines(kind):
            own = folder.baseline(name, next(cell for cell in grid if cell.alpha == alpha))
            if (own / "baseline.json").is_file():
                row = RunFolder(own).read_json(own / "baseline.json", ("name", "note"))
                baselines[kind.model, kind.dataset, name, alpha] = row
    return Results(study, folder.path, choices, rows, baselines, folder.sessions(), cells)


def _ended(path: Path) -> bool:
    return any((path / name).is_file() for name in ("result.json", "failed.json"))


def read_row(study: Study, cell: Cell, path: Path) -> Row:
    """A finished or failed cell's row."""
    files, config = RunFolder(path), study.run_config(cell)
    target = study.target(cell.kind.dataset)
    facts: dict[str, Any] = dict.fromkeys((*FACTS, *SECONDS))
    facts |= cell.kind._asdict() | {"alpha": cell.alpha, "seed": cell.seed, "target": target}
    facts["swept"] = " ".join(f"{key}={value:.10g}" for key, value in cell.point)
    result = files.result()
    if result is None:
        facts["state"] = "failed"
        return Row(cell, config, facts, {}, {}, None, {})
    metric = study.metric(cell.kind.dataset, result)
    records = files.metrics()
    scored = {record["round"]: record["validation"] for record in records if record["validation"]}
    validation = {round: score_of(scores, metric, path) for round, scores in scored.items()}
    validation = {round: score for round, score in validation.items() if score is not None}
    updates = variations(records)
    sent = [record["bytes"] for record in records if record.get("bytes")]
    best = result["best"]
    environment = files.read_json(files.environment_file) if files.environment_file.is_file() else {}
    facts |= {
        "state": "finished",
        "metric": metric,
        "rounds": result["rounds"],
        "test": score_of(result["test"], metric, path),
        "validation": score_of(result["validation"], metric, path),
        "worst_client": result["test"].get("worst_client"),
        "mean_client": result["test"].get("mean_client"),
        "best_round": best and best["round"],
        "test_at_best_round": best and best.get("test") and best["test"].get(metric),
        "bytes_total": result["bytes_total"],
        "bytes_up_per_client": sent[-1]["up_per_client"] if sent else None,
        "bytes_once_per_client": _once(records),
        "trainable_parameters": result["trainable_parameters"],
        "total_parameters": result["total_parameters"],
        "training_state_bytes": training_state_bytes(result, config.client),
        "update_norm": _mean(norm for norm, _, _ in updates.values()),
        "magnitude_variation": _mean(magnitude for _, magnitude, _ in updates.values()),
        "direction_variation": _mean(direction for _, _, direction in updates.values()),
        "drift": _mean(record.get("drift") for record in records),
        "seconds": result["seconds"],
        "seconds_to_adapt": environment.get("adapt_seconds"),
    }
    facts |= _to_target(records, validation, target)
    memory = path / "memory.json"
    peak = files.read_json(memory, ("bytes",))["bytes"] if memory.is_file() else None
    return Row(cell, config, facts, validation, updates, peak, environment)


def variations(records: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float | None, float | None]]:
    """round -> (‖U_t‖, | ‖U_t‖ / ‖U_{t-1}‖ - 1 |, 1 - cos(U_t, U_{t-1})), as `federa.variation.DEFINITION` has them."""
    found: dict[int, tuple[float, float | None, float | None]] = {}
    before = None
    for record in records:
        if (update := record.get("update")) is None:
            continue
        norm, cosine = update["norm"], update["cosine"]
        magnitude = abs(norm / before - 1) if before else None
        found[record["round"]] = (norm, magnitude, None if cosine is None else 1 - cosine)
        before = norm
    return found


def training_state_bytes(result: Mapping[str, Any], client: ClientConfig) -> int:
    """float32 weights, gradients and optimiser moments of a client in training; activations come on top."""
    moments = 2 if client.optimizer == "adamw" else int(client.momentum > 0)
    return 4 * (result["total_parameters"] + result["trainable_parameters"] * (1 + moments))


def _once(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes that a client downloads once, from the first round, in which every sampled client is new."""
    first = next((record for record in records if record.get("bytes")), None)
    return first and first["bytes"]["broadcast"] // max(len(first["sampled"]), 1)


def _to_target(
    records: Sequence[Mapping[str, Any]], validation: Mapping[int, float], target: float | None
) -> dict[str, Any]:
    """The first round whose validation score reaches the target, and the bytes and seconds spent by then."""
    reached = [round for round, score in validation.items() if target is not None and score >= target]
    if not reached:
        return {}
    upto = [record for record in records if 0 < record["round"] <= reached[0]]
    seconds = math.fsum(sum(record["seconds"].values()) for record in upto)
    sent = upto[-1]["bytes"]["total"] if upto else 0
    return {"rounds_to_target": reached[0], "bytes_to_target": sent, "seconds_to_target": seconds}


def study_csv(results: Results) -> str:
    """One line a cell of the grid; only the columns SECONDS differ between two runs of one study on one machine."""
    columns = (*FACTS, *SECONDS)
    return _csv(columns, ([row.facts[column] for column in columns] for row in results.rows))


def sweep_csv(results: Results) -> str:
    """One line a kind and point tried: its mean validation score, and whether it was chosen."""
    columns = (*Kind._fields, "swept", "validation", "chosen")
    lines = []
    for kind, choice in results.choices.items():
        for point, score in choice.tried:
            swept = " ".join(f"{key}={value:.10g}" for key, value in point)
            lines.append([*kind, swept, score, int(point == choice.point)])
    return _csv(columns, lines)


def _csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in line] for line in lines)
    return buffer.getvalue()


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
