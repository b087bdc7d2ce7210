"""What a person watching a study sees: a bar over its runs with the time left, and one line a finished run."""

from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from federa.page import duration
from federa.study.runner import TOLERANCE


class StudyProgress:
    """Watches a study: `with StudyProgress(console) as watch: run_study(..., watch=watch)`."""

    def __init__(self, console: Console):
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.units = self.bars.add_task("runs", total=None, left="", visible=False)
        self.rounds = self.bars.add_task("rounds", total=None, left="", visible=False)

    def __enter__(self) -> "StudyProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        getattr(self, f"_{event.replace('-', '_')}", lambda facts: None)(facts)

    def confirm(self, question: str) -> bool:
        self.bars.stop()
        answer = typer.confirm(f"{question[0].upper()}{question[1:]}")
        self.bars.start()
        return answer

    def _warm_up(self, facts: dict[str, Any]) -> None:
        self._say(f"warm-up  {facts['name']}")

    def _build(self, facts: dict[str, Any]) -> None:
        done = {"total": facts["of"], "completed": facts["position"]}
        self.bars.update(self.units, description="cells built", visible=True, **done)
        if facts["position"] == facts["of"]:
            self._say(f"built    {facts['of']} cells")

    def _plan(self, facts: dict[str, Any]) -> None:
        done = facts["of"] - facts["units"]
        read = f", {done} are finished and only read" if done else ""
        self._say(f"plan     {facts['of']} runs and yardsticks{read}")
        if facts["units"]:
            error = f"+-{TOLERANCE:.0%}, if the machine stays as busy as now"
            self._say(f"time     predicted {duration(facts['predicted'])} ({error})")
        self.bars.update(self.units, total=facts["of"], completed=done, visible=True)

    def _unit(self, facts: dict[str, Any]) -> None:
        left = f"about {duration(facts['left'])} left"
        self.bars.update(self.units, description="runs", completed=facts["position"] - 1, left=left)

    def _unit_done(self, facts: dict[str, Any]) -> None:
        place = f"{facts['position']}/{facts['of']}"
        end = f"failed: {facts['error']}" if facts["error"] else duration(facts["seconds"])
        self._say(f"{place:8s} {facts['name']}  {end}  about {duration(facts['left'])} left")
        self.bars.update(self.units, completed=facts["position"], left=f"about {duration(facts['left'])} left")
        self.bars.update(self.rounds, visible=False)

    def _ready(self, facts: dict[str, Any]) -> None:
        total, done = facts["experiment"].config.server.rounds, facts["state"].round
        self.bars.update(self.rounds, description="rounds", total=total, completed=done, visible=True, left="")

    def _round(self, record: dict[str, Any]) -> None:
        self.bars.update(self.rounds, completed=record["round"])

    def _warn(self, facts: dict[str, Any]) -> None:
        self._say(f"warning  {facts['text']}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
