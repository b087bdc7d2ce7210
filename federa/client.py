"""One client's local training."""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from federa.config import ClientConfig, Config
from federa.data import Examples, length_grouped_batches
from federa.dropout import step_keys
from federa.methods import Learner
from federa.randomness import Purpose, generator


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back: everything it trained, how much data stood behind it, and whether it stayed finite."""

    client: int
    examples: int
    steps: int
    tensors: Mapping[str, torch.Tensor]
    metrics: Mapping[str, float]
    finite: bool = True
    problem: str | None = None  # why there is no usable update: a site that did not answer


def train_client(
    learner: Learner,
    examples: Examples,
    indices: np.ndarray,
    client: int,
    round: int,
    start: Mapping[str, torch.Tensor],
    config: Config,
    correction: Mapping[str, torch.Tensor] | None = None,
) -> ClientUpdate:
    """Trains the global tensors `start` on examples[indices] for one round (counted from 1) and returns the result.

    The optimiser starts fresh, its rate follows the schedule over all rounds. Minimises the mean cross entropy of each
    step's units (one an example in classification) plus, with proximal_mu, FedProx's mu/2 ||w - start||^2
    (arXiv 1812.06127). `correction` (SCAFFOLD) is added to every gradient after clipping. What trains in this round,
    and is sent back, is `learner.open(round)`.
    """
    learner.load(learner.start_of(start, client))
    learner.model.train()
    trained = learner.open(round)
    total = local_steps(len(indices), config.client)
    optimizer = LocalOptimizer(trained, learner.head, config, round, total, correction)
    losses: list[torch.Tensor] = []
    seen = 0
    for step, batches in enumerate(micro_batches(examples, indices, client, round, config, total)):
        losses += _accumulate_gradients(learner, examples, batches, step_keys(config, round, [client], step))
        seen += _units(examples, batches)
        optimizer.step()
    mean_loss = sum(torch.stack(losses).tolist()) / seen  # read once, so that no step waits for its device
    tensors = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
    return ClientUpdate(client, len(indices), total, tensors, {"loss": mean_loss}, math.isfinite(mean_loss))


class LocalOptimizer:
    """One client's optimiser in one round of `total` steps, begun afresh from the parameters as they are.

    A step adds FedProx's mu (w - start) to the gradients, clips their norm, adds the correction, takes the rate that
    the schedule over all rounds has come to, updates and clears the gradients.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        head: Set[str],
        config: Config,
        round: int,
        total: int,
        correction: Mapping[str, torch.Tensor] | None = None,
    ):
        client = self._client = config.client
        self._parameters = list(parameters.values())
        self._shifts = [] if correction is None else [correction[n].to(p.device) for n, p in parameters.items()]
        self._anchor = [p.detach().clone() for p in self._parameters] if client.proximal_mu > 0 else []
        body = [p for name, p in parameters.items() if name not in head]
        tip = [p for name, p in parameters.items() if name in head]
        head_lr = client.lr if client.head_lr is None else client.head_lr
        groups = [{"params": body, "lr": client.lr}] * bool(body) + [{"params": tip, "lr": head_lr}] * bool(tip)
        if client.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=client.momentum, weight_decay=client.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, betas=client.betas, weight_decay=client.weight_decay, fused=True)
        self._optimizer, self._base_rates = optimizer, [group["lr"] for group in optimizer.param_groups]
        self._taken, self._progress = 0, lambda step: (round - 1 + (step + 0.5) / total) / config.server.rounds

    def step(self) -> None:
        factor = rate_factor(self._client, self._progress(self._taken))
        for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor
        for parameter, origin in zip(self._parameters, self._anchor, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=self._client.proximal_mu)
        if self._client.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._client.clip_norm)
        for parameter, shift in zip(self._parameters, self._shifts, strict=False):
            parameter.grad = shift.clone() if parameter.grad is None else parameter.grad.add_(shift)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._taken += 1


def _accumulate_gradients(
    learner: Learner, examples: Examples, batches: list[np.ndarray], keys: Sequence[int]
) -> list[torch.Tensor]:
    """Gradients of the mean loss over the units of all `batches`; returns the sum of each one's losses."""
    units, sums = _units(examples, batches), []
    for number, indices in enumerate(batches):
        batch = examples.batch_on(learner.device, indices)
        with learner.dropout.counting(keys, number, [len(indices)], examples.lengths[indices]):
            loss = learner.task.losses(learner.model, batch).sum()
        (loss / units).backward()
        sums.append(loss.detach())
    return sums


def _units(examples: Examples, batches: list[np.ndarray]) -> int:
    return sum(int(examples.units[indices].sum()) for indices in batches)


def local_steps(size: int, config: ClientConfig) -> int:
    """Optimiser steps of a client with `size` examples in one round."""
    if config.steps is not None:
        return config.steps
    batches = math.ceil(size / config.batch_size)
    return config.epochs * math.ceil(batches / config.accumulate)


def rate_factor(config: ClientConfig, progress: float) -> float:
    """What the learning rates are multiplied by after `progress` in [0, 1) of all rounds: warm-up, then schedule."""
    if progress < config.warmup:
        return progress / config.warmup
    done = (progress - config.warmup) / (1 - config.warmup)
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def rate_sums(config: ClientConfig, round: int, rounds: int, steps: int) -> tuple[float, float]:
    """Sums over a round's steps of the body's and the head's learning rates."""
    factors = math.fsum(rate_factor(config, (round - 1 + (step + 0.5) / steps) / rounds) for step in range(steps))
    return config.lr * factors, (config.lr if config.head_lr is None else config.head_lr) * factors


def micro_batches(
    examples: Examples, indices: np.ndarray, client: int, round: int, config: Config, total: int
) -> Iterator[list[np.ndarray]]:
    """`total` optimiser steps of up to `accumulate` batches each; epoch e of a round has its own stream (step=e)."""
    done, epoch = 0, 0
    while done < total:
        rng = generator(config.seed, Purpose.BATCHES, round=round, client=client, step=epoch)
        batches = length_grouped_batches(examples.lengths, indices, config.client.batch_size, rng)
        for first in range(0, len(batches), config.client.accumulate):
            if done == total:
                return
            yield batches[first : first + config.client.accumulate]
            done += 1
        epoch += 1
