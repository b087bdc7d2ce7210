"""A study's file -> its cells: the run configurations of the grid, and of the sweep that comes before it."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from federa import strict_yaml
from federa.baselines import misfit
from federa.config import Config, Count, Positive, Section, anchored, load_config, read_values
from federa.errors import InputError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)]  # becomes a folder
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Alphas = Annotated[list[Positive], Field(min_length=1)]
Rates = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)]
Over = dict[str, Rates]  # dotted key of a run's configuration -> the values to try
Baseline = Literal["pooled", "local", "head-only", "linear-probe"]
ONLY = "base"  # the name of the model where a study names none
Point = tuple[tuple[str, float], ...]  # a value for every swept key


class Entry(BaseModel):
    """A name's own keys, and any section of a run's configuration to change the base by."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, validate_default=True)

    @property
    def sections(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelEntry(Entry):
    architecture: dict[str, Any] | None = None  # of --dry-run: model_type and whatever AutoConfig takes


class DatasetEntry(Entry):
    metric: str | None = None  # a score in 0..1 of its task, higher is better: macro_f1, ...; None: the task's own
    target: Annotated[float, Field(gt=0, le=1)] | None = None  # on validation; None: the study's
    alphas: Alphas | None = None  # None: the study's
    methods: Annotated[list[Name], Field(min_length=1)] | None = None  # None: all
    baselines: list[Baseline] | None = None  # None: the study's


class MethodEntry(Entry):
    sweep: Over | None = None  # None: the study's sweep.over


class Sweep(Section):
    """The values tried for every method on every dataset; the mean validation score over alphas and seeds decides."""

    over: Over = Field(default_factory=dict)
    alphas: Alphas | None = None  # None: the middle one of the dataset's
    seeds: Seeds | None = None  # None: the first one of the grid
    rounds: Count | None = None  # None: as many as the grid's runs


class StudyConfig(Section):
    """A base run, what varies, and what is asked of it."""

    base: dict[str, Any] = Field(default_factory=dict)
    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)] = Field(default_factory=lambda: {ONLY: ModelEntry()})
    datasets: Annotated[dict[Name, DatasetEntry], Field(min_length=1)]
    methods: Annotated[dict[Name, MethodEntry], Field(min_length=1)]  # the first is what the others are compared with
    alphas: Alphas
    seeds: Seeds
    sweep: Sweep = Sweep()
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    # of the first method and seed; those that no alpha changes at the first alone
    baselines: list[Baseline] = Field(default_factory=lambda: ["pooled", "local"])
    budget: Positive | None = None  # minutes that the study may be predicted to take

    @model_validator(mode="after")
    def _cross_checks(self):
        for name, dataset in self.datasets.items():
            if unknown := [method for method in dataset.methods or () if method not in self.methods]:
                raise ValueError(f"datasets.{name}.methods must be among {', '.join(self.methods)}, got {unknown[0]}")
        lists = {"seeds": self.seeds, "alphas": self.alphas, "sweep.seeds": self.sweep.seeds}
        lists |= {f"datasets.{name}.alphas": dataset.alphas for name, dataset in self.datasets.items()}
        overs = {"sweep.over": self.sweep.over}
        overs |= {f"methods.{name}.sweep": method.sweep for name, method in self.methods.items()}
        for where, over in overs.items():
            for key, values in (over or {}).items():
                lists[f"{where}.{key}"] = values
                if sorted(values) != values:
                    raise ValueError(f"{where}.{key} must rise, got {values}")
        for where, values in lists.items():
            if values and len({*values}) < len(values):
                raise ValueError(f"{where} must hold distinct values, got {values}")
        return self


class Kind(NamedTuple):
    """What shares a learning rate."""

    model: str
    dataset: str
    method: str

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True)
class Cell:
    """One run of the grid or the sweep; its name is its folder's, so that equal cells are one run."""

    kind: Kind
    alpha: float
    seed: int
    point: Point
    rounds: int | None = None  # of a shortened sweep

    @property
    def name(self) -> str:
        facts = [f"alpha={self.alpha:.10g}", f"seed={self.seed}", *(f"{key}={rate:.10g}" for key, rate in self.point)]
        facts += [f"rounds={self.rounds}"] * (self.rounds is not None)
        return f"{self.kind}/{','.join(facts)}"


class Choice(NamedTuple):
    """The point a kind got: every point tried with its mean validation score (None: a run failed), and the swept keys
    whose chosen value is the lowest or highest tried."""

    kind: Kind
    point: Point
    tried: list[tuple[Point, float | None]]
    edges: list[str]


@dataclass(frozen=True)
class Study:
    """A validated study: every cell's configuration is known to be sound."""

    config: StudyConfig

    @property
    def kinds(self) -> list[Kind]:
        config = self.config
        return [
            Kind(model, name, method)
            for model in config.models
            for name, dataset in config.datasets.items()
            for method in config.methods
            if dataset.methods is None or method in dataset.methods
        ]

    def alphas(self, kind: Kind) -> list[float]:
        return self.config.datasets[kind.dataset].alphas or self.config.alphas

    def target(self, dataset: str) -> float | None:
        own = self.config.datasets[dataset].target
        return self.config.target if own is None else own

    def metric(self, dataset: str, result: Mapping[str, Any]) -> str:
        """What a finished run is judged by: the dataset's metric, else the one that its result names."""
        return self.config.datasets[dataset].metric or result.get("metric", "accuracy")

    def over(self, kind: Kind) -> Over:
        own = self.config.methods[kind.method].sweep
        return self.config.sweep.over if own is None else own

    def points(self, kind: Kind) -> list[Point]:
        over = self.over(kind)
        return [tuple(zip(over, values, strict=True)) for values in itertools.product(*over.values())]

    def sweep(self, kind: Kind) -> list[Cell]:
        """The cells that choose a kind's point: none where there is one point only."""
        points, settings = self.points(kind), self.config.sweep
        if len(points) == 1:
            return []
        alphas = self.alphas(kind)
        alphas = settings.alphas or [alphas[(len(alphas) - 1) // 2]]
        seeds = settings.seeds or self.config.seeds[:1]
        return [Cell(kind, a, s, point, settings.rounds) for point in points for a in alphas for s in seeds]

    def grid(self, kind: Kind, point: Point) -> list[Cell]:
        return [Cell(kind, alpha, seed, point) for alpha in self.alphas(kind) for seed in self.config.seeds]

    def baselines(self, kind: Kind) -> list[tuple[str, float]]:
        """(name, alpha) of the yardsticks of a kind's model and dataset: of the dataset's first method alone."""
        first = next(one for one in self.kinds if one[:2] == kind[:2])
        if kind != first:
            return []
        own = self.config.datasets[kind.dataset].baselines
        names = self.config.baselines if own is None else own
        alphas = self.alphas(kind)
        return [(name, alpha) for name in names for alpha in (alphas if depends_on_alpha(name) else alphas[:1])]

    def run_config(self, cell: Cell) -> Config:
        """The cell's run: base, model, dataset, method, then the cell's own values."""
        config = self.config
        entries = (config.models[cell.kind.model], config.datasets[cell.kind.dataset], config.methods[cell.kind.method])
        values: dict[str, Any] = {}
        for layer in (config.base, *(entry.sections for entry in entries)):
            values = laid_over(values, layer)
        values = laid_over(values, {"seed": cell.seed, "partition": {"alpha": cell.alpha}})
        for key, value in cell.point:
            values = laid_over(values, _nested(key.split("."), value))
        if cell.rounds is not None:
            values = laid_over(values, {"server": {"rounds": cell.rounds}})
        try:
            resolved = anchored(load_config(values))
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from None
        if resolved.data.validation == 0:
            raise InputError(
                f"{cell.name}: data.validation must be above 0 in a study, got 0; rates and rounds to the target are "
                "chosen on it"
            )
        return resolved

    def possible_cells(self) -> Iterator[Cell]:
        """Every cell of the sweep, and of the grid at every point that the sweep may choose."""
        for kind in self.kinds:
            yield from self.sweep(kind)
            for point in self.points(kind):
                yield from self.grid(kind, point)

    def choose(self, kind: Kind, scores: Mapping[Cell, float | None]) -> Choice:
        """The point with the highest mean validation score; of equal ones the lowest rates. `scores` are the sweep's,
        None for a run that failed: its point cannot win."""
        by_point: dict[Point, list[float | None]] = {point: [] for point in self.points(kind)}
        for cell in self.sweep(kind):
            by_point[cell.point].append(scores[cell])
        tried = [(point, _mean(values)) for point, values in by_point.items()]
        if len(tried) == 1:
            return Choice(kind, tried[0][0], [], [])
        sound = [(point, score) for point, score in tried if score is not None]
        if not sound:
            raise InputError(f"{kind}: every run of its sweep failed; lower the rates of sweep.over")
        point = max(sound, key=lambda pair: pair[1])[0]
        over = self.over(kind)
        edges = [key for key, value in point if len(over[key]) > 1 and value in (over[key][0], over[key][-1])]
        return Choice(kind, point, tried, edges)

    def dump(self) -> str:
        return strict_yaml.render(self.config.model_dump(mode="json"))


def load_study(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Study:
    """A study from a YAML file or mapping, with "datasets.name.data.path=FOLDER" overrides on top. InputError names
    the key, or the first cell whose run could not be configured."""
    try:
        study = Study(StudyConfig.model_validate(read_values(source, overrides)))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].replace("Input should", "must")
        if not message.startswith("Value error, "):
            message = f"{'.'.join(map(str, first['loc'])) or 'it'}: {message}, got {str(first['input'])[:60]}"
        raise InputError(f"study: {message.removeprefix('Value error, ')}") from None
    for cell in study.possible_cells():
        study.run_config(cell)
    for kind in study.kinds:
        config = study.run_config(study.grid(kind, study.points(kind)[0])[0])
        for name, _ in study.baselines(kind):
            if (problem := misfit(name, config)) is not None:
                raise InputError(
                    f"datasets.{kind.dataset}.baselines: {name} {problem} and cannot serve task.name "
                    f"{config.task.name}; leave it out"
                )
    return study


def point_text(point: Point) -> str:
    """A point in words: "client.lr 0.001"."""
    return ", ".join(f"{key} {value:g}" for key, value in point) or "as configured"


def depends_on_alpha(baseline: str) -> bool:
    """Whether a baseline hears of who holds what."""
    return baseline in ("local", "head-only")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if values and len(known) == len(values) else None


def laid_over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over it, mapping by mapping."""
    result = dict(values)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = laid_over(result[key], value) if both else value
    return result


def _nested(keys: Sequence[str], value: Any) -> Any:
    return {keys[0]: _nested(keys[1:], value)} if keys else value
