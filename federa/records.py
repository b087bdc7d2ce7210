"""What a finished or unfinished run has left in its folder, read back and validated."""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from federa.catalogue import METHODS
from federa.config import Config
from federa.errors import InputError
from federa.folder import RunFolder
from federa.metrics import METRICS, Metric


class Scores(BaseModel):
    """Whatever a task's metrics are; `read_run` wants the main one."""

    loss: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    entity_f1: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    exact_match: float | None = None
    perplexity: float | None = None
    worst_client: float | None = None
    mean_client: float | None = None


class Traffic(BaseModel):
    up_per_client: float = 0
    down_per_client: float = 0
    up: float = 0
    down: float = 0
    broadcast: float = 0  # what clients new to the run download once
    total: float = 0  # cumulative, both directions and broadcasts


class Privacy(BaseModel):
    epsilon: float
    delta: float
    releases: int


class Rejection(BaseModel):
    client: int
    why: str


class Round(BaseModel):
    round: int
    sampled: list[int] = []
    completed: list[int] = []
    dropped: list[int] = []
    late: list[int] = []
    rejected: list[Rejection] = []
    examples: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    update_norm: float | None = None
    drift: float | None = None  # how far averaged factors are off the mean of the products
    validation: Scores | None = None
    test: Scores | None = None
    bytes: Traffic | None = None
    privacy: Privacy | None = None
    seconds: dict[str, float | None] | None = None


class Best(BaseModel):
    round: int
    validation: Scores | None = None
    test: Scores | None = None


class Result(BaseModel):
    rounds: int
    metric: str = "accuracy"  # the score that chose the best round
    test: Scores | None = None
    validation: Scores | None = None
    best: Best | None = None
    trainable_parameters: int
    total_parameters: int
    seconds: float
    bytes_total: float
    model: str
    source: str


class Partition(BaseModel):
    scheme: str
    convention: str
    label_names: list[str] = Field(min_length=1)
    counts: list[list[int]] = Field(min_length=1)
    names: list[str] | None = None

    @model_validator(mode="after")
    def _shapes(self):
        if any(len(row) != len(self.label_names) or min(row) < 0 for row in self.counts):
            raise ValueError(f"counts must hold {len(self.label_names)} numbers >= 0 for every client")
        if self.names is not None and len(self.names) != len(self.counts):
            raise ValueError(f"names must name {len(self.counts)} clients, got {len(self.names)}")
        return self


class Yardstick(Scores):
    name: str
    note: str = ""


class Run(NamedTuple):
    path: Path
    config: Config
    environment: dict[str, Any]
    partition: Partition | None
    rounds: list[Round]
    result: Result | None
    yardsticks: list[Yardstick]

    @property
    def method(self) -> str:
        return METHODS[self.config.method.name].title

    @property
    def metric(self) -> Metric:
        """The score that the run is judged by."""
        return METRICS[self.config.task.name].main

    @property
    def second(self) -> Metric:
        """The score that is shown beside it."""
        return METRICS[self.config.task.name].second

    @property
    def done(self) -> int:
        return self.rounds[-1].round if self.rounds else self.result.rounds if self.result else 0

    @property
    def clients(self) -> int:
        return len(self.partition.counts) if self.partition else self.config.partition.clients

    @property
    def source(self) -> str:
        data = self.config.data
        return self.result.source if self.result else data.path or data.name

    @property
    def seconds(self) -> float:
        if self.result:
            return self.result.seconds
        return sum(value or 0 for row in self.rounds for value in (row.seconds or {}).values())

    @property
    def bytes_total(self) -> float:
        return (
            self.result.bytes_total
            if self.result
            else max((row.bytes.total for row in self.rounds if row.bytes), default=0)
        )

    @property
    def bytes_per_client(self) -> tuple[float, float] | None:
        """Up and down in the last round that sent any."""
        sent = [(row.bytes.up_per_client, row.bytes.down_per_client) for row in self.rounds if row.bytes]
        return next((pair for pair in reversed(sent) if any(pair)), None)

    def last(self, split: str) -> tuple[int, Scores] | None:
        """Round and scores of the last evaluation on "validation" or "test"."""
        if self.result and (scores := getattr(self.result, split)):
            return self.result.rounds, scores
        scored = [(row.round, getattr(row, split)) for row in self.rounds if getattr(row, split)]
        return scored[-1] if scored else None

    def curve(self, split: str, key: str | None = None) -> tuple[list[int], list[float]]:
        """Rounds and scores; the main metric's also from the final evaluation."""
        points = {
            row.round: getattr(getattr(row, split), key or self.metric.key)
            for row in self.rounds
            if getattr(row, split)
        }
        if key is None and (last := self.last(split)):
            points.setdefault(last[0], self.metric.value(last[1]))
        points = {x: y for x, y in sorted(points.items()) if y is not None}
        return list(points), list(points.values())


def read_run(folder: str | Path) -> Run:
    """A run's files, validated. InputError names the file that is missing or corrupt."""
    files = RunFolder.open(folder)
    try:
        config = files.config()
    except InputError as error:
        raise InputError(f"{files.config_file}: {error}") from None

    metric = METRICS[config.task.name].main

    def read(name: str, kind: Any, default: Any) -> Any:
        file = files.path / name
        if not file.is_file():
            return default
        value = _validate(kind, file, files.read_json(file))
        _require(metric, value, file)
        return value

    rounds = {}
    for line, record in enumerate(files.metrics(), 1):
        where = f"{files.metrics_file}: line {line}"
        row = _validate(Round, where, record)
        _require(metric, row, where)
        rounds[row.round] = row
    return Run(
        path=files.path,
        config=config,
        environment=read("environment.json", dict[str, Any], {}),
        partition=read("partition.json", Partition, None),
        rounds=[rounds[key] for key in sorted(rounds)],
        result=read("result.json", Result, None),
        yardsticks=read("yardsticks.json", list[Yardstick], []),
    )


def _require(metric: Metric, value: Any, where: str | Path, key: str = "") -> None:
    """Raises InputError for scores, however deep inside `value`, without the metric that the run is judged by. One that
    is no share may have been too large to write down."""
    if isinstance(value, Scores) and metric.share and metric.value(value) is None:
        raise InputError(f"{where}: {key}{metric.key}: Field required, got none")
    parts = enumerate(value) if isinstance(value, list) else value if isinstance(value, BaseModel) else ()
    for name, part in parts:
        _require(metric, part, where, f"{key}{name}.")


def _validate(kind: Any, where: str | Path, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        raise InputError(f"{where}: {key}: {message}, got {str(first['input'])[:60]!r}") from None
