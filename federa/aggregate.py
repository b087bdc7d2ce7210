"""Pure functions from client updates to the next global tensors."""

import math
from collections.abc import Mapping

import torch

from federa.client import ClientUpdate
from federa.config import ServerConfig

Tensors = Mapping[str, torch.Tensor]


def problem_of(update: ClientUpdate, template: Tensors) -> str | None:
    """Why an update must not be averaged (names, shapes, dtypes, NaN or Inf, no examples), or None if it may."""
    if update.problem is not None:
        return update.problem
    if type(update.examples) is not int or not 1 <= update.examples < 2**31:
        return f"examples must be an integer from 1 to 2**31 - 1, got {update.examples!r}"
    for name, tensor in update.tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"{name} must be a tensor, got {type(tensor).__name__}"
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return f"{name} must be dense and hold data, got {tensor.layout} on {tensor.device}"
    if (problem := mismatch(update.tensors, template)) is not None:
        return problem
    for name, tensor in update.tensors.items():
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or Inf"
    loss = update.metrics.get("loss")
    if not isinstance(loss, float):
        return f"the training loss must be a number, got {loss!r}"
    return None if update.finite and math.isfinite(loss) else "the training loss was NaN or Inf"


def mismatch(tensors: dict[str, torch.Tensor], template: dict[str, torch.Tensor]) -> str | None:
    """None if `tensors` has the names, shapes and dtypes of `template`, else the first difference in words."""
    if missing := sorted(template.keys() - tensors.keys()):
        return f"{missing[0]} is missing"
    if unknown := sorted(tensors.keys() - template.keys()):
        return f"{unknown[0]} is not a trainable tensor of this run"
    for name, expected in template.items():
        got = tensors[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{name} must be {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}"
    return None


class WeightedMean:
    """FedAvg: sum_c n_c x_c / sum_c n_c, as a running sum in float64; memory does not grow with clients.

    Add updates in client-id order: the result is then the same bits wherever they come from.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = 0

    def add(self, tensors: Tensors, weight: int) -> None:
        """Adds one client's tensors with its number of examples. Raises ValueError for a weight below 1."""
        if weight < 1:
            raise ValueError(f"WeightedMean: weight must be a positive number of examples, got {weight}")
        for name, tensor in tensors.items():
            if name in self._sums:
                self._sums[name].add_(tensor.double(), alpha=weight)
            else:
                self._sums[name] = tensor.double() * weight
        self._weight += weight

    def result(self, like: Tensors) -> dict[str, torch.Tensor]:
        """The mean, in the dtypes of `like`."""
        return {name: (total / self._weight).to(like[name].dtype) for name, total in self._sums.items()}


def server_step(
    config: ServerConfig, current: Tensors, mean: Tensors, memory: Tensors
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(next global tensors, next optimiser memory) from the clients' mean, with delta = mean - current.

    fedavg:  w + lr delta (lr = 1: the mean itself, bit for bit)
    fedavgm: v <- momentum v + delta; w + lr v                                    (arXiv 1909.06335)
    fedadam: m <- b1 m + (1 - b1) delta; v <- b2 v + (1 - b2) delta^2; w + lr m / (sqrt(v) + tau)  (arXiv 2003.00295)
    """
    if config.optimizer == "fedavg" and config.lr == 1.0:
        return dict(mean), {}
    following: dict[str, torch.Tensor] = {}
    updated: dict[str, torch.Tensor] = {}
    for name, value in current.items():
        delta = mean[name] - value
        if config.optimizer == "fedavg":
            step = delta
        elif config.optimizer == "fedavgm":
            step = delta + config.momentum * memory.get(f"v.{name}", torch.zeros_like(delta))
            updated[f"v.{name}"] = step
        else:
            first, second = config.betas
            m = first * memory.get(f"m.{name}", torch.zeros_like(delta)) + (1 - first) * delta
            v = second * memory.get(f"v.{name}", torch.full_like(delta, config.tau**2)) + (1 - second) * delta**2
            updated[f"m.{name}"], updated[f"v.{name}"] = m, v
            step = m / (v.sqrt() + config.tau)
        following[name] = value + config.lr * step
    return following, updated


def update_norm(current: Tensors, following: Tensors) -> float:
    """Euclidean norm of the whole change of the global tensors."""
    squares = [float((following[name].double() - value.double()).square().sum()) for name, value in current.items()]
    return math.fsum(squares) ** 0.5  # exact, so the tensors' order, which a resumed run may change, is no matter
