"""Runs a study: warm up and predict, sweep, choose, then the yardsticks and the grid; finished runs are read."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federa import simulation
from federa.baselines import run_baseline
from federa.config import Config
from federa.errors import InputError, RunError
from federa.folder import RunFolder, to_json, write_atomic
from federa.page import duration
from federa.rounds import Watch
from federa.study.forecast import Forecast
from federa.study.grid import Cell, Choice, Kind, Point, Study, load_study
from federa.study.memory import measured_peak

TOLERANCE = 0.25  # what a prediction claims of its error


def _silent(event: str, facts: dict[str, Any]) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Unit:
    """One thing to run: a cell, or a yardstick of a cell's configuration."""

    name: str
    kind: Kind
    config: Config
    folder: Path
    baseline: str | None = None

    @property
    def finished(self) -> bool:
        done = "baseline.json" if self.baseline else "result.json"
        return any((self.folder / name).is_file() for name in (done, "failed.json"))


class StudyFolder:
    """study.yaml, warmup.json, sessions.json, runs/, baselines/, and the results: study.html, study.csv, sweep.csv."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.study_file = self.path / "study.yaml"
        self.sessions_file = self.path / "sessions.json"

    def run(self, cell: Cell) -> Path:
        return self.path / "runs" / cell.name

    def baseline(self, name: str, cell: Cell) -> Path:
        return self.path / "baselines" / f"{name},{cell.kind.model},{cell.kind.dataset},alpha={cell.alpha:.10g}"

    def cell_unit(self, study: Study, cell: Cell) -> Unit:
        return Unit(cell.name, cell.kind, study.run_config(cell), self.run(cell))

    def baseline_unit(self, study: Study, name: str, cell: Cell) -> Unit:
        path = self.baseline(name, cell)
        return Unit(f"{name} of {cell.name}", cell.kind, study.run_config(cell), path, name)

    def sessions(self) -> list[dict[str, Any]]:
        return RunFolder(self.path).read_json(self.sessions_file) if self.sessions_file.is_file() else []


def run_study(
    source: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    budget: float | None = None,
    confirm: Callable[[str], bool] | None = None,
    watch: Watch = _silent,
) -> Path:
    """Runs a study into the folder `output`, or takes it up there, and returns the path of its study.html.

    Before anything but a warm-up has run, the whole is predicted. More than `budget` minutes (default: the study's)
    end in InputError unless `confirm(question)` says yes. `watch(event, facts)` hears "plan", "unit", "unit-done",
    "warn", and what `federa.run` says. A run that fails is recorded as failed; InputError and OSError stop the study.
    """
    from federa.study.report import write_study

    study = load_study(source, overrides)
    folder = StudyFolder(output)
    _claim(folder, study)
    budget = budget or study.config.budget
    began = time.perf_counter()
    forecast = _warm_up(study, folder, watch)
    sweep = [folder.cell_unit(study, cell) for kind in study.kinds for cell in study.sweep(kind)]
    pace = Pace(folder, forecast, watch, time.perf_counter() - began)
    pace.plan([*sweep, *_after_sweep(study, folder, lambda kind: _likely_point(study, folder, kind))])
    pace.announce(budget, confirm)
    choices = {}
    for kind in study.kinds:
        for cell in study.sweep(kind):
            pace.run(folder.cell_unit(study, cell))
        choice = choices[kind] = choose(study, folder, kind)
        for key in choice.edges:
            watch("warn", {"text": edge_warning(choice, key)})
    rest = [*_after_sweep(study, folder, lambda kind: choices[kind].point)]
    pace.plan([*sweep, *rest])
    for unit in rest:
        pace.run(unit)
    pace.conclude()
    return write_study(folder.path)


def choose(study: Study, folder: StudyFolder, kind: Kind) -> Choice:
    """The kind's point by the validation scores of its sweep's runs after their last rounds. InputError if one is
    still to be run."""
    scores: dict[Cell, float | None] = {}
    for cell in study.sweep(kind):
        run = RunFolder(folder.run(cell))
        if (run.path / "failed.json").is_file():
            scores[cell] = None
        elif (result := run.result()) is None:
            raise InputError(f"{run.path}: must hold a finished run of the sweep, got none; run the study to its end")
        else:
            scores[cell] = score_of(result["validation"], study.metric(kind.dataset, result), run.path)
    return study.choose(kind, scores)


def score_of(scores: Mapping[str, Any], metric: str, where: Path) -> float | None:
    if metric not in scores:
        raise InputError(
            f"metric: must be a score of the dataset's task, {', '.join(scores)}, got {metric} for {where}"
        )
    if scores[metric] is not None and not 0 <= scores[metric] <= 1:
        raise InputError(f"metric: must be a share, higher is better, got {metric} {scores[metric]:g} for {where}")
    return scores[metric]


def edge_warning(choice: Choice, key: str) -> str:
    value = dict(choice.point)[key]
    return f"{choice.kind}: the best {key}, {value:g}, is at the edge of those tried; widen its sweep to be fair to it"


def _claim(folder: StudyFolder, study: Study) -> None:
    path = folder.path
    if path.exists() and not folder.study_file.is_file() and any(not p.name.startswith(".") for p in path.iterdir()):
        raise InputError(f"{path}: must be empty or hold a study, got other files; choose another --output")
    try:
        write_atomic(folder.study_file, study.dump())
    except OSError as error:
        raise InputError(f"{path}: must be a folder that can be written, got {error}") from None


def _warm_up(study: Study, folder: StudyFolder, watch: Watch) -> Forecast:
    forecast = Forecast(folder.path)
    for kind in study.kinds:
        if kind not in forecast:
            cells = study.sweep(kind) or study.grid(kind, study.points(kind)[0])
            units = [unit for cell in cells if not (unit := folder.cell_unit(study, cell)).finished]
            watch("warm-up", {"name": str(kind)})
            forecast.measure(kind, [(unit.config, unit.folder) for unit in units], watch)
    return forecast


def _likely_point(study: Study, folder: StudyFolder, kind: Kind) -> Point:
    """The one chosen, or while a sweep is not finished its first: all take as long."""
    finished = all(folder.cell_unit(study, cell).finished for cell in study.sweep(kind))
    return choose(study, folder, kind).point if finished else study.points(kind)[0]


def _after_sweep(study: Study, folder: StudyFolder, point: Callable[[Kind], Point]) -> Iterable[Unit]:
    for kind in study.kinds:
        cells = study.grid(kind, point(kind))
        for name, alpha in study.baselines(kind):
            yield folder.baseline_unit(study, name, next(cell for cell in cells if cell.alpha == alpha))
        for cell in cells:
            yield folder.cell_unit(study, cell)


class Pace:
    """Runs units, and knows how much is left."""

    def __init__(self, folder: StudyFolder, forecast: Forecast, watch: Watch, warmup: float):
        self.folder, self.forecast, self.watch, self.warmup = folder, forecast, watch, warmup
        self.spent = self.spent_predicted = 0.0

    def plan(self, units: Sequence[Unit]) -> None:
        """What is to be run; equal cells are one."""
        self.total = len({unit.folder for unit in units})
        self.left = {unit.folder: self._seconds(unit) for unit in units if not unit.finished}

    def _seconds(self, unit: Unit) -> float:
        if unit.kind not in self.forecast:
            return 0.0
        cost = self.forecast[unit.kind]
        if unit.baseline:
            return cost.baseline(unit.baseline, unit.config)
        done = len(RunFolder(unit.folder).metrics()) - 1
        return cost.run(unit.config, max(done, 0))

    def announce(self, budget: float | None, confirm: Callable[[str], bool] | None) -> None:
        """Says how long the rest will take, and stops what would take too long."""
        predicted = sum(self.left.values())
        facts = {"units": len(self.left), "of": self.total, "predicted": predicted, "warmup": self.warmup}
        self.watch("plan", facts)
        if budget is not None and predicted + self.warmup > 60 * budget:
            text = f"the study is predicted to take {duration(predicted + self.warmup)}, the budget is {budget:g} min"
            if confirm is None or not confirm(f"{text}. Run it?"):
                raise InputError(f"--budget: {text}; raise it, or take away seeds, alphas, rates or rounds")
        self.began = time.perf_counter()
        self.idle = not self.left
        self._record(self.folder.sessions(), facts | {"took": None})

    def run(self, unit: Unit) -> None:
        """Runs the unit unless it is finished already."""
        if unit.finished:
            return
        position = self.total - len(self.left) + 1
        self.watch("unit", {"name": unit.name, "position": position, "of": self.total, "left": self.seconds_left})
        started = time.perf_counter()
        error = None
        try:
            with measured_peak(unit.folder):
                if unit.baseline:
                    run_baseline(unit.baseline, unit.config, unit.folder, self.watch)
                else:
                    simulation.run(unit.config, unit.folder, watch=self.watch)
        except RunError as failure:
            error = str(failure)
            RunFolder(unit.folder).write_json("failed.json", {"error": error})
        took = time.perf_counter() - started
        expected = self.left.pop(unit.folder, self._seconds(unit))
        self.spent, self.spent_predicted = self.spent + took, self.spent_predicted + expected
        facts = {"name": unit.name, "seconds": took, "left": self.seconds_left, "error": error}
        self.watch("unit-done", facts | {"position": position, "of": self.total})

    @property
    def seconds_left(self) -> float:
        """What is left of the prediction, at the pace of what has been run."""
        pace = self.spent / self.spent_predicted if self.spent_predicted > 0 else 1.0
        return pace * sum(self.left.values())

    def conclude(self) -> None:
        *earlier, session = self.folder.sessions() or [{}]
        self._record(earlier, session | {"took": time.perf_counter() - self.began})

    def _record(self, earlier: list[dict[str, Any]], session: dict[str, Any]) -> None:
        """Keeps what this session predicted and took, unless it had nothing to run."""
        if not self.idle:
            write_atomic(self.folder.sessions_file, to_json([*earlier, session]) + "\n")
