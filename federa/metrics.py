"""By what a task is judged: the metric that chooses rounds, a second one beside it, and how people read them."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """A score: its key in records, its title, and whether it is a share of 1 (more is better) or a number (less is)."""

    key: str
    title: str
    share: bool = True

    @property
    def noun(self) -> str:
        """The title inside a sentence."""
        return self.title if self.title == "F1" else self.title[0].lower() + self.title[1:]

    def better(self, new: float | None, old: float | None) -> bool:
        """Whether `new` is a better score than `old`; NaN and None are better than nothing."""
        if new is None or math.isnan(new):
            return False
        return old is None or (new > old if self.share else new < old)

    def show(self, value: float, digits: int = 1) -> str:
        return f"{100 * value:.{digits}f}\xa0%" if self.share else f"{value:,.2f}"

    def value(self, scores: object) -> float | None:
        """This metric in a mapping or an object of scores; None where it is missing."""
        return scores.get(self.key) if isinstance(scores, Mapping) else getattr(scores, self.key, None)


class Judged(NamedTuple):
    main: Metric
    second: Metric


_LABELS = Judged(Metric("accuracy", "Accuracy"), Metric("macro_f1", "Macro F1"))
METRICS: Mapping[str, Judged] = {
    "classification": _LABELS,
    "pair-classification": _LABELS,
    "entity-classification": _LABELS,
    "token-classification": Judged(Metric("entity_f1", "Entity F1"), Metric("accuracy", "Word accuracy")),
    "question-answering": Judged(Metric("f1", "F1"), Metric("exact_match", "Exact match")),
    "causal-lm": Judged(Metric("perplexity", "Perplexity", share=False), Metric("accuracy", "Token accuracy")),
}
