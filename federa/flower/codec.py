"""Round states and client updates as parcels. On the wire tensors are named GROUP/NAME in one safetensors run of bytes.

wire "float32": tensors as they are, so that a run over sites gives the bits of the simulator's.
wire "bfloat16": half the bytes. The state is rounded on its way down; what comes back is each tensor's change, rounded,
which the server adds to its own unrounded state: rounding errors do not pile up over rounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from federa.checkpoint import State
from federa.client import ClientUpdate

Tensors = Mapping[str, torch.Tensor]

# What of a State goes to the sites; the rest is the server's own: its optimiser, its books, all clients' variates.
SENT = ("round", "tensors", "base")


def pack_state(state: State, wire: str) -> tuple[dict[str, Any], bytes]:
    """(facts, bytes) of what a site needs of the state before a round."""
    facts, groups = _split(state, SENT)
    if wire == "bfloat16":
        groups["tensors"] = {name: _halved(tensor) for name, tensor in groups["tensors"].items()}
    return facts, _join(groups)


def unpack_state(facts: Mapping[str, Any], content: bytes, template: Tensors) -> State:
    """The state, its tensors in the dtypes of `template`. Raises ValueError for other content."""
    groups = _parse(content)
    tensors = {n: t.to(template[n].dtype) if n in template else t for n, t in groups.pop("tensors", {}).items()}
    return _build(State, facts, {**groups, "tensors": tensors})


def pack_correction(correction: Tensors) -> bytes:
    """What one client adds to its gradients (SCAFFOLD), always as it is."""
    return _join({"correction": correction})


def unpack_correction(content: bytes) -> dict[str, torch.Tensor]:
    return _parse(content)["correction"]


def pack_update(update: ClientUpdate, start: Tensors, wire: str) -> tuple[dict[str, Any], bytes]:
    """(facts, bytes) of an update that started from `start`, the tensors that the site was sent."""
    facts, groups = _split(update, [item.name for item in fields(update)])
    if wire == "bfloat16":
        groups["tensors"] = {
            name: _halved(tensor - start[name]) if tensor.is_floating_point() else tensor
            for name, tensor in groups["tensors"].items()
        }
    return facts, _join(groups)


def unpack_update(facts: Any, content: bytes, current: Tensors, wire: str) -> ClientUpdate:
    """The update, in the terms of the server's own state `current`. Raises ValueError for malformed content; whether
    the tensors fit the run is `federa.aggregate.problem_of`'s to say."""
    groups = _parse(content)
    if not isinstance(facts, Mapping):
        raise ValueError(f"update: must be a mapping of facts, got {type(facts).__name__}")
    metrics = facts.get("metrics")
    if not isinstance(metrics, Mapping) or not all(type(value) in (int, float) for value in metrics.values()):
        raise ValueError("update: metrics must be numbers by name")
    if type(facts.get("steps")) is not int or type(facts.get("finite")) is not bool:
        raise ValueError("update: steps must be an integer and finite true or false")
    tensors = groups.pop("tensors", {})
    if wire == "bfloat16":
        tensors = {name: _grown(name, tensor, current.get(name)) for name, tensor in tensors.items()}
    return _build(ClientUpdate, facts, {**groups, "tensors": tensors})


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _grown(name: str, change: torch.Tensor, current: torch.Tensor | None) -> torch.Tensor:
    """current + change, or the change itself where it does not fit, which is then rejected by name."""
    if current is None or change.shape != current.shape or not current.is_floating_point():
        return change
    if change.dtype != torch.bfloat16:
        raise ValueError(f"{name} must be torch.bfloat16 on the wire, got {change.dtype}")
    return current + change.to(current.dtype)


def _split(record: Any, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Some fields of a dataclass as facts and groups of tensors: a field that maps names to tensors is a group."""
    facts, groups = {}, {}
    for name in names:
        value = getattr(record, name)
        if isinstance(value, Mapping) and value and all(isinstance(t, torch.Tensor) for t in value.values()):
            groups[name] = dict(value)
        else:
            facts[name] = dict(value) if isinstance(value, Mapping) else value
    return facts, groups


def _build(kind: type, facts: Mapping[str, Any], groups: Mapping[str, Tensors]) -> Any:
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in {**facts, **groups}.items() if name in names})


def _join(groups: Mapping[str, Tensors]) -> bytes:
    return save({f"{group}/{name}": t.contiguous() for group, tensors in groups.items() for name, t in tensors.items()})


def _parse(content: bytes) -> dict[str, dict[str, torch.Tensor]]:
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"payload: must be safetensors, got {str(error)[:120]}") from None
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, {})[own] = tensor
    return groups
