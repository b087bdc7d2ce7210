"""How long a study will take, from a few measured rounds of every kind of cell; those rounds are kept, not wasted."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from federa import simulation
from federa.checkpoint import State
from federa.client import local_steps
from federa.config import Config, changed
from federa.errors import InputError, RunError
from federa.experiment import build
from federa.folder import RunFolder, to_json, write_atomic
from federa.rounds import Watch, evaluate_round
from federa.study.grid import Kind

ROUNDS = 2  # measured; the first one warms up
TESTS = 1.5  # passes over the test set: after the last round, and often after the best one


@dataclass(frozen=True)
class Cost:
    """Seconds of one kind of cell: to build it, a local step, a round's aggregation, a pass over the validation and the
    test split, the report; `steps` is the local steps of a mean round, `train_passes` a pass over the training data
    in passes over the validation split."""

    build: float
    step: float
    steps: float
    aggregate: float
    validation: float
    test: float
    train_passes: float
    report: float

    def run(self, config: Config, done: int = 0) -> float:
        """Seconds of a run after its first `done` rounds."""
        rounds, evaluation = config.server.rounds, config.evaluation
        left = range(done + 1, rounds + 1)
        seconds = self.build + self.report + TESTS * self.test + len(left) * (self.steps * self.step + self.aggregate)
        seconds += self.validation * sum(r % evaluation.every == 0 or r == rounds for r in left)
        if evaluation.test_every is not None:
            seconds += self.test * sum(r % evaluation.test_every == 0 or r == rounds for r in left)
        return seconds

    def baseline(self, name: str, config: Config) -> float:
        training = config.server.rounds * self.steps * self.step
        if name == "head-only":
            return self.run(config)
        if name == "linear-probe":
            return self.build + self.validation * (self.train_passes + 1) + self.test + 5
        return self.build + self.report + self.validation + TESTS * self.test + training


class Forecast:
    """The costs of a study's kinds, kept in its folder."""

    def __init__(self, folder: Path):
        self.warm: set[tuple[str, str]] = set()  # models and data that this process has built before
        self.file = folder / "warmup.json"
        self.costs: dict[str, Cost] = {}
        if self.file.is_file():
            names = [field.name for field in fields(Cost)]
            for kind, facts in RunFolder(folder).read_json(self.file).items():
                if not isinstance(facts, dict) or set(facts) != {*names}:
                    raise InputError(f"{self.file}: must hold {', '.join(names)} of every kind, got another; delete it")
                self.costs[kind] = Cost(**facts)

    def __getitem__(self, kind: Kind) -> Cost:
        return self.costs[str(kind)]

    def __contains__(self, kind: Kind) -> bool:
        return str(kind) in self.costs

    def measure(self, kind: Kind, runs: Sequence[tuple[Config, Path]], watch: Watch) -> None:
        """Trains the first rounds of the first of `runs` that has any left, and keeps what they took."""
        first = runs and kind[:2] not in self.warm
        if first:
            self.warm.add(kind[:2])
            experiment = build(runs[0][0])  # untimed, as the next line: libraries load, the cache of tokens fills
            evaluate_round(experiment, State(0, experiment.learner.state()))
        for config, path in runs:
            if (cost := _measure(config, path, watch, twice=bool(first))) is not None:
                self.costs[str(kind)] = cost
                content = {name: asdict(one) for name, one in self.costs.items()}
                write_atomic(self.file, to_json(content) + "\n")
                return


class _Measured(Exception):
    """Enough rounds are timed."""


def _measure(config: Config, path: Path, watch: Watch, twice: bool) -> Cost | None:
    """None for a run that had no round left, or fails. `twice` times the second of two reports."""
    facts: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    started = time.perf_counter()

    def listen(event: str, told: dict[str, Any]) -> None:
        watch(event, told)
        if event == "ready":
            facts["build"] = time.perf_counter() - started
            facts.update(_sizes(told["experiment"], told["state"]))
        elif event == "round":
            records.append(told)
            if len(records) == ROUNDS:
                raise _Measured

    with suppress(_Measured, RunError):
        simulation.run(config, path, watch=listen)
    if not records:
        return None
    seconds = records[-1]["seconds"]
    step, aggregate = seconds["train"] / max(1, records[-1]["steps"]), seconds["aggregate"]
    report = [_report_seconds(path) for _ in range(1 + twice)][-1]
    return Cost(**facts, step=step, aggregate=aggregate, report=report)


def _sizes(experiment, state) -> dict[str, float]:
    """What a run's data say, and one timed pass over its validation split: what a round 0 does."""
    started = time.perf_counter()
    only_validation = replace(experiment, config=changed(experiment.config, evaluation={"test_every": None}))
    evaluate_round(only_validation, replace(state, round=0))
    validation = time.perf_counter() - started
    steps = np.mean([local_steps(len(own), experiment.config.client) for own in experiment.clients])
    passes = {part: len(getattr(experiment, part)) / len(experiment.validation) for part in ("test", "train")}
    return {
        "steps": float(steps) * experiment.clients_per_round,
        "validation": validation,
        "test": validation * passes["test"],
        "train_passes": passes["train"],
    }


def _report_seconds(path: Path) -> float:
    from federa.report import write_report

    started = time.perf_counter()
    write_report(path)
    return time.perf_counter() - started
