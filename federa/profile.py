"""Where a round's time goes: a trace of its first round, and the operators that took most of it."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from federa.rounds import Watch

ROWS = 15


class RoundProfile:
    """Watches a run beside `watch` and profiles its first round into the file `trace` (open it in ui.perfetto.dev)."""

    def __init__(self, watch: Watch, trace: Path, console: Console):
        self._watch, self._trace, self._console = watch, trace, console
        cuda = [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._running = False

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        if event == "round" and self._running:
            self._profile.__exit__(None, None, None)
            self._running = False
            self._tell(facts)
        self._watch(event, facts)
        if event == "ready":
            self._profile.__enter__()
            self._running = True

    def _tell(self, record: dict[str, Any]) -> None:
        seconds = record["seconds"]
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {value:.2f} s ({value / total:.0%})" for name, value in seconds.items())
        self._console.print(f"profile  round {record['round']}: {parts}", highlight=False)
        cuda = torch.cuda.is_available()

        def own(operator: Any) -> float:
            return operator.self_device_time_total if cuda else operator.self_cpu_time_total

        operators = sorted(self._profile.key_averages(), key=own, reverse=True)
        everything = sum(map(own, operators)) or 1.0
        table = Table("operator", "share", "calls", "ms")
        for operator in operators[:ROWS]:
            name = operator.key if len(operator.key) <= 60 else operator.key[:57] + "..."
            table.add_row(name, f"{own(operator) / everything:.1%}", str(operator.count), f"{own(operator) / 1e3:.0f}")
        self._console.print(table)
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._trace))
        self._console.print(f"trace    {self._trace}", soft_wrap=True, highlight=False)
