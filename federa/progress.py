"""What a person watching a run sees: bars on a terminal, a few lines elsewhere, the result table at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from federa.cohort import why_alone
from federa.data import Corpus
from federa.experiment import Experiment
from federa.folder import RunFolder
from federa.metrics import METRICS, Judged
from federa.partition import Partition
from federa.records import read_run
from federa.report import ResultRow, results_table


class RunProgress:
    """Watches a run: `with RunProgress(console) as watch: run(..., watch=watch)`."""

    def __init__(self, console: Console):
        self.console = console
        self.label = ""
        self.metric = METRICS["classification"].main
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[scores]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.rounds = self.bars.add_task("rounds", total=None, scores="", visible=False)
        self.clients = self.bars.add_task("clients", total=None, scores="", visible=False)

    def __enter__(self) -> "RunProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        getattr(self, f"_{event}", lambda facts: None)(facts)

    def _ready(self, facts: dict[str, Any]) -> None:
        experiment, state = facts["experiment"], facts["state"]
        rounds = experiment.config.server.rounds
        self.metric = experiment.task.metric
        if not self.label:
            self._introduce(experiment, facts["cohort"])
        self.bars.reset(self.rounds, total=rounds, completed=state.round, scores="", visible=True)
        self.bars.update(self.rounds, description=f"{self.label} rounds".strip())
        self.bars.reset(self.clients, total=experiment.clients_per_round, visible=True)

    def _introduce(self, experiment: Experiment, cohort: int) -> None:
        learner, corpus = experiment.learner, experiment.corpus
        sizes = f"{len(experiment.train)} training examples, {len(experiment.validation)} validation"
        trained = sum(parameter.numel() for parameter in learner.trainable.values())
        a_round = f"{experiment.clients_per_round} a round"
        self._say(f"model    {experiment.source.origin}")
        self._say(f"data     {corpus.source}: {sizes}, {len(experiment.test)} test")
        self._say(f"clients  {len(experiment.clients)}, {a_round}; {experiment.partition.convention}")
        self._say(f"method   {experiment.config.method.name}, {trained:,} trainable parameters on {learner.device}")
        alone = why_alone(learner, experiment.config) if experiment.config.run.cohort != 1 else None
        together = f"{cohort} clients in one batch" if cohort > 1 else "one client after another"
        self._say(f"cohort   {together}" + (f": {alone}" if alone else ""))

    def _client(self, facts: dict[str, Any]) -> None:
        self.bars.update(self.clients, total=facts["of"], completed=facts["position"], visible=True)

    def _round(self, record: dict[str, Any]) -> None:
        scores = "" if record["train_loss"] is None else f"loss {record['train_loss']:.3f}"
        if record["validation"] is not None:
            scores += f"  validation {self.metric.noun} {record['validation'][self.metric.key]:.3f}"
        self.bars.update(self.rounds, completed=record["round"], scores=scores.strip())
        for item in record["rejected"]:
            self._say(f"round {record['round']}: client {item['client']} was rejected, {item['why']}")

    def _baseline(self, facts: dict[str, Any]) -> None:
        self.label = facts["name"]
        self.bars.remove_task(self.rounds)
        self.rounds = self.bars.add_task(self.label, total=None, scores="")
        self.bars.update(self.clients, visible=False)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def summary(self, folder: Path) -> None:
        """The result beside its yardsticks, and where everything lies."""
        self.bars.stop()
        self.table(results_table(folder), METRICS[read_run(folder).config.task.name])
        place = RunFolder(folder)
        self._say(f"report   {place.path / 'report.html'}")
        if place.adapter.is_dir():
            self._say(f"adapter  {place.adapter} (peft.PeftModel.from_pretrained loads it)")

    def table(self, rows: Sequence[ResultRow], judged: Judged) -> None:
        """The rows in the order given."""
        self.bars.stop()
        table = Table("", f"test {judged.main.noun}", judged.second.noun, "")
        for row in rows:
            second = "" if row.second is None else f"{row.second:.3f}"
            main = f"{row.score:.1%}" if judged.main.share else f"{row.score:,.2f}"
            table.add_row(Text(row.name), main, second, Text(row.note))
        self.console.print(table)


def partition_table(corpus: Corpus, partition: Partition, counts: np.ndarray) -> Table:
    """Clients by size and labels; the middle of a long list is left out."""
    table = Table("client", "examples", "labels", "effective labels", "largest", title=Text(partition.convention))
    shown = range(len(counts)) if len(counts) <= 40 else [*range(20), None, *range(len(counts) - 19, len(counts))]
    for client in shown:
        if client is None:
            table.add_row("...", "", "", "", "")
            continue
        row = counts[client]
        share = row[row > 0] / row.sum()
        effective = float(np.exp(-(share * np.log(share)).sum()))
        name = partition.names[client] if partition.names else str(client)
        largest = f"{corpus.strata[row.argmax()]} {row.max() / row.sum():.0%}"
        table.add_row(Text(name), str(row.sum()), str((row > 0).sum()), f"{effective:.1f}", Text(largest))
    return table
