"""Sequence classification: the loss that clients minimise and the scores of a model on examples."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from federa.data import Examples
from federa.models import backbone_of, mean_pool


def losses(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of every example of a batch, (E,) in fp32: its sum over the example's units (`Examples.units`)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.float(), batch["labels"], reduction="none")


@dataclass(frozen=True)
class Predictions:
    """What a model says of some examples: labels (E,) int64 predicted and true, and their cross entropies (E,)."""

    predicted: np.ndarray
    labels: np.ndarray
    losses: np.ndarray


def predict(model, examples: Examples, batch_size: int, device: torch.device) -> Predictions:
    """Predictions in the order of `examples`, computed in length-sorted batches in inference mode."""
    predicted = np.empty(len(examples), np.int64)
    losses = np.empty(len(examples), np.float64)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for indices, batch in _longest_first(examples, batch_size, device):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
                predicted[indices] = logits.argmax(-1).cpu().numpy()
                losses[indices] = F.cross_entropy(logits, batch["labels"], reduction="none").cpu().numpy()
    finally:
        model.train(training)
    return Predictions(predicted, examples.labels, losses)


def score(predictions: Predictions) -> dict[str, float]:
    """{"loss", "accuracy", "macro_f1"}; macro-F1 is the mean over the labels that occur, true or predicted."""
    from sklearn.metrics import f1_score

    return {
        "loss": float(predictions.losses.mean()),
        "accuracy": float((predictions.predicted == predictions.labels).mean()),
        "macro_f1": float(f1_score(predictions.labels, predictions.predicted, average="macro", zero_division=0)),
    }


def client_scores(predictions: Predictions, indices: list[np.ndarray]) -> dict[str, float]:
    """Accuracy of the worst client and the mean over clients, each on its own test examples (clients with none out)."""
    correct = predictions.predicted == predictions.labels
    accuracies = [float(correct[own].mean()) for own in indices if len(own)]
    return {"worst_client": min(accuracies), "mean_client": float(np.mean(accuracies))}


def mean_features(model, examples: Examples, batch_size: int, device: torch.device) -> np.ndarray:
    """Mean over the tokens of the backbone's last hidden state, (E, K) float32, in the order of `examples`."""
    _, backbone = backbone_of(model)
    backbone.eval()
    features = np.empty((len(examples), backbone.config.hidden_size), np.float32)
    with torch.inference_mode():
        for indices, batch in _longest_first(examples, batch_size, device):
            hidden = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            features[indices] = mean_pool(hidden, batch["attention_mask"]).float().cpu().numpy()
    return features


def _longest_first(
    examples: Examples, batch_size: int, device: torch.device
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """(indices, batch) of all examples in batches of like length; the first shows at once whether memory suffices."""
    order = np.argsort(-examples.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}
