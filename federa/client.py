"""One client's local training."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from federa.config import ClientConfig, Config
from federa.data import Examples, length_grouped_batches
from federa.methods import Learner
from federa.randomness import Purpose, generator, torch_seed
from federa.tasks import losses


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
) -> ClientUpdate:
    """Trains the global tensors `start` on examples[indices] for one round (counted from 1) and returns the result.

    The optimiser starts fresh, its rate follows the schedule over all rounds. Minimises the mean cross entropy of each
    step's units (one an example in classification) plus, with proximal_mu, FedProx's mu/2 ||w - start||^2
    (arXiv 1812.06127).
    """
    learner.load(start)
    learner.model.train()
    parameters = list(learner.trainable.values())
    mu = config.client.proximal_mu
    anchor = [parameter.detach().clone() for parameter in parameters] if mu > 0 else []
    optimizer = _optimizer(learner, config.client)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    total = local_steps(len(indices), config.client)
    loss, seen = 0.0, 0
    with _dropout_streams(learner, config) as seed_dropout:
        for step, batches in enumerate(_steps(examples, indices, client, round, config, total)):
            factor = rate_factor(config.client, (round - 1 + (step + 0.5) / total) / config.server.rounds)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            seed_dropout(round=round, client=client, step=step)
            optimizer.zero_grad(set_to_none=True)
            loss += _accumulate_gradients(learner, examples, batches)
            seen += _units(examples, batches)
            for parameter, origin in zip(parameters, anchor, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - origin, alpha=mu)
            if config.client.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.client.clip_norm)
            optimizer.step()
    mean_loss = loss / seen
    return ClientUpdate(client, len(indices), total, learner.state(), {"loss": mean_loss}, math.isfinite(mean_loss))


def _accumulate_gradients(learner: Learner, examples: Examples, batches: list[np.ndarray]) -> float:
    """Gradients of the mean loss over the units of all `batches`; returns the sum of their losses."""
    units, total = _units(examples, batches), 0.0
    for indices in batches:
        batch = {name: tensor.to(learner.device) for name, tensor in examples.batch(indices).items()}
        loss = losses(learner.model, batch).sum()
        (loss / units).backward()
        total += loss.item()
    return total


def _units(examples: Examples, batches: list[np.ndarray]) -> int:
    return sum(int(examples.units[indices].sum()) for indices in batches)


@contextmanager
def _dropout_streams(learner: Learner, config: Config) -> Iterator[Callable[..., None]]:
    """Torch's dropout knows only the global generator: seeds it by (round, client, step), and puts it back after."""
    if config.model.dropout == 0:
        yield lambda **stream: None
        return
    devices = [learner.device] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield lambda **stream: torch.manual_seed(torch_seed(config.seed, Purpose.DROPOUT, **stream))


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


def _steps(
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


def _optimizer(learner: Learner, config: ClientConfig) -> torch.optim.Optimizer:
    body = [p for name, p in learner.trainable.items() if name not in learner.head]
    head = [p for name, p in learner.trainable.items() if name in learner.head]
    head_lr = config.lr if config.head_lr is None else config.head_lr
    groups = [{"params": body, "lr": config.lr}] * bool(body) + [{"params": head, "lr": head_lr}] * bool(head)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)
