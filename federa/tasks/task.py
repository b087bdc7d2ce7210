"""What all tasks share: prediction in length-sorted batches, scores by client, features for k-means."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from federa.columns import Rows, Table, encode_labels
from federa.config import DataConfig, TaskConfig
from federa.data import Examples, Texts, tokenise
from federa.errors import InputError
from federa.metrics import METRICS, Metric
from federa.models import backbone_of, mean_pool

Batch = Mapping[str, Any]  # tensors, and on a device `lengths`


@dataclass(frozen=True)
class Predictions:
    """What a model says of the rows of a source: predicted and true (n,), cross entropies (n,), summed over units (n,).

    Ids (int64) of whole texts, lists of tags of sentences, answers of questions, counts of right tokens of texts.
    """

    predicted: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    units: np.ndarray | None = None  # None: one each

    def take(self, indices: np.ndarray) -> "Predictions":
        units = None if self.units is None else self.units[indices]
        return Predictions(self.predicted[indices], self.labels[indices], self.losses[indices], units)

    @property
    def loss(self) -> float:
        """Mean over the units."""
        return float(self.losses.mean() if self.units is None else self.losses.sum() / self.units.sum())


@dataclass(frozen=True)
class Task(ABC):
    """One kind of prediction, which a subclass defines."""

    config: TaskConfig = field(default_factory=TaskConfig)

    name: ClassVar[str]
    auto_class: ClassVar[str]  # of transformers
    peft_type: ClassVar[str | None]
    unlabelled: ClassVar[str | None] = None  # what a row is, for tasks whose rows have no one label each

    @property
    def metric(self) -> Metric:
        """The score that chooses rounds."""
        return METRICS[self.name].main

    # What each task defines

    @abstractmethod
    def read(self, table: Table, config: DataConfig) -> Rows:
        """The columns of a split, validated."""

    @abstractmethod
    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        """Rows as tokens, and what is asked of them."""

    @abstractmethod
    def losses(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross entropies (E,) in fp32 of a batch's examples, each summed over its units (`Examples.units`)."""

    @abstractmethod
    def judge(self, model: Any, batch: Batch, examples: Examples) -> tuple[torch.Tensor, Sequence[Any]]:
        """The losses (E,) of a batch's examples and what the model says of each."""

    @abstractmethod
    def score(self, predictions: Predictions) -> dict[str, float]:
        """{"loss", the task's metrics}."""

    # What they share

    def encode(self, train: Rows, test: Rows, names: list[str] | None) -> tuple[Texts, Texts, list[str]]:
        """Train and test rows with labels as ids, and the names of the ids (`names` come from labels.json)."""
        return encode_labels(train, test, names)

    def prepare(self, tokenizer: Any) -> Any:
        """The tokenizer as the task uses and exports it."""
        return tokenizer

    def predict(self, model: Any, examples: Examples, batch_size: int, device: torch.device) -> Predictions:
        """Predictions in the order of the source's rows, computed in length-sorted batches in inference mode."""
        said: list[Any] = [None] * len(examples)
        losses = np.empty(len(examples), np.float64)
        with _evaluating(model):
            for indices, batch in longest_first(examples, batch_size, device):
                loss, found = self.judge(model, batch, examples.take(indices))
                losses[indices] = loss.cpu().numpy()
                for index, what in zip(indices, found, strict=True):
                    said[index] = what
        return self.gather(examples, said, losses)

    def gather(self, examples: Examples, said: list[Any], losses: np.ndarray) -> Predictions:
        """What was said of examples, as predictions of their rows; here every row is one example."""
        truth = objects([examples.truth[row] for row in examples.rows])
        return Predictions(objects(said), truth, losses, examples.units)

    def client_scores(self, predictions: Predictions, indices: Sequence[np.ndarray]) -> dict[str, float]:
        """The metric of the worst client and the mean over clients, each on its own test rows (those with none out)."""
        values = [self.value(predictions.take(own)) for own in indices if len(own)]
        return {
            "worst_client": min(values) if self.metric.share else max(values),
            "mean_client": float(np.mean(values)),
        }

    def value(self, predictions: Predictions) -> float:
        """The metric alone."""
        return self.score(predictions)[self.metric.key]


def objects(values: Sequence[Any]) -> np.ndarray:
    """(n,) of any Python objects, lists among them."""
    array = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):  # all at once, lists of one length would become a table
        array[index] = value
    return array


def inputs_of(model: Any, batch: Batch) -> dict[str, Any]:
    """What a model takes of a batch: segment ids only where it has embeddings for two segments, lengths where it packs
    tokens."""
    from federa.packing import is_packed  # needs transformers, which the model brings along

    names = ["input_ids", "attention_mask"]
    if "lengths" in batch and is_packed(model):
        names.append("lengths")
    if "token_type_ids" in batch and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return {name: batch[name] for name in names}


def separator(tokenizer: Any) -> str:
    """What a first text ends in before a second one, for tokenizers that put no token between the two."""
    marks = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    return "" if marks else "\n"


def check_fast(tokenizer: Any, task: str) -> None:
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise InputError(
            f"model.name: must have a fast tokenizer for task.name {task}, got {name}; it gives no offsets"
        )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def text_features(model: Any, texts: Texts, tokenizer: Any, config: DataConfig, batch_size: int, device) -> np.ndarray:
    """`mean_features` of each row as one text, whatever the task makes of it: k-means clusters these."""
    return mean_features(model, tokenise(texts, tokenizer, config.max_length, config.cache), batch_size, device)


def mean_features(model: Any, examples: Examples, batch_size: int, device: torch.device) -> np.ndarray:
    """Mean over the tokens of the backbone's last hidden state, (E, K) float32, in the order of `examples`."""
    _, backbone = backbone_of(model)
    backbone.eval()
    features = np.empty((len(examples), backbone.config.hidden_size), np.float32)
    with torch.inference_mode():
        for indices, batch in longest_first(examples, batch_size, device):
            hidden = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            features[indices] = mean_pool(hidden, batch["attention_mask"]).float().cpu().numpy()
    return features


def longest_first(
    examples: Examples, batch_size: int, device: torch.device
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """(indices, batch) of all examples in batches of like length; the first shows at once whether memory suffices."""
    order = np.argsort(-examples.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, examples.batch_on(device, indices)
