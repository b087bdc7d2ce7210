"""SCAFFOLD's control variates (arXiv 1910.06378, option II), worked out by the server from what clients send anyway."""

from collections.abc import Mapping

import torch

from federa.checkpoint import State
from federa.client import ClientUpdate, rate_sums
from federa.config import ClientConfig

Tensors = dict[str, torch.Tensor]


def correction(state: State, client: int) -> Tensors | None:
    """c - c_i, which a client adds to its gradients; None while no variate is known."""
    server = {name.removeprefix("c."): tensor for name, tensor in state.server.items() if name.startswith("c.")}
    if not server:
        return None
    own = state.variates.get(client, {})
    return {name: tensor - own[name] if name in own else tensor for name, tensor in server.items()}


def new_variate(
    state: State, update: ClientUpdate, config: ClientConfig, round: int, rounds: int, head: frozenset[str]
) -> Tensors:
    """c_i - c + (x - y_i) / sum of the rates of its steps: the mean of its gradients as it used them, uncorrected."""
    body_rate, head_rate = rate_sums(config, round, rounds, update.steps)
    change = correction(state, update.client) or {}
    variate = {}
    for name, trained in update.tensors.items():
        rate = head_rate if name in head else body_rate
        gradient = (state.tensors[name] - trained) / rate if rate else torch.zeros_like(trained)
        variate[name] = gradient - change[name] if name in change else gradient
    return variate


def advance(state: State, fresh: Mapping[int, Tensors], clients: int) -> tuple[Tensors, dict[int, Tensors]]:
    """(server tensors, clients' variates) after a round: c gets sum over its clients of (new c_i - c_i) / `clients`."""
    server = dict(state.server)
    for client, variate in fresh.items():
        old = state.variates.get(client, {})
        for name, tensor in variate.items():
            step = (tensor - old[name] if name in old else tensor) / clients
            server[f"c.{name}"] = server[f"c.{name}"] + step if f"c.{name}" in server else step
    return server, state.variates | dict(fresh)
