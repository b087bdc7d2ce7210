"""Saves and restores everything a round depends on. Randomness is counter-based, so a round number stands for it."""

import hashlib
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from federa.aggregate import mismatch
from federa.errors import InputError
from federa.folder import RunFolder, free_folder, publish_folder, to_json

FORMAT = 2
FACTS = ("round", "moves", "releases", "bytes_total", "seconds", "best")


@dataclass
class State:
    """A run after `round` rounds.

    tensors: the global trainable tensors. server: the server optimiser's tensors. base: the frozen weights of adapted
    layers where the aggregation moves them, all of them, as they are now. variates: client -> its SCAFFOLD tensors.
    seen: client -> the last round it was sampled in, before which it had the one-off broadcast. moves: for every round
    the rank of each frozen weight's move. releases: attempts at rounds that privacy has paid for. bytes_total: sent so
    far, both ways. seconds: spent so far. best: the round with the best validation score so far and its scores.
    previous: tensors and base one round earlier, which the next round's change of direction is measured by.
    """

    round: int
    tensors: dict[str, torch.Tensor]
    server: dict[str, torch.Tensor] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    variates: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    moves: list[dict[str, int]] = field(default_factory=list)
    releases: int = 0
    bytes_total: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    previous: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(folder: RunFolder, state: State, digest: str, keep: int = 2) -> None:
    """Writes checkpoints/round-NNNNN atomically; keeps the newest `keep` and the best round's."""
    path = folder.checkpoints / f"round-{state.round:05d}"
    temporary = free_folder(path)
    previous = {name: tensor.clone() for name, tensor in state.previous.items()}  # shared where a round changed nothing
    groups = {"global": state.tensors, "server": state.server, "base": state.base, "previous": previous}
    groups |= {f"client-{client}": tensors for client, tensors in state.variates.items()}
    tensors = {f"{group}/{name}": t.cpu().contiguous() for group, ts in groups.items() for name, t in ts.items()}
    save_file(tensors, temporary / "state.safetensors")
    facts = {name: getattr(state, name) for name in FACTS}
    facts |= {"seen": sorted(state.seen.items()), "format": FORMAT, "config": digest}
    facts["sha256"] = _digest(facts, temporary / "state.safetensors")
    (temporary / "state.json").write_text(to_json(facts) + "\n")
    publish_folder(temporary, path)
    best = state.best["round"] if state.best else None
    for old in checkpoint_rounds(folder)[:-keep]:
        if old != best:
            shutil.rmtree(folder.checkpoints / f"round-{old:05d}")


def checkpoint_rounds(folder: RunFolder) -> list[int]:
    """Rounds that have a checkpoint, oldest first."""
    paths = folder.checkpoints.glob("round-*") if folder.checkpoints.is_dir() else ()
    return sorted(int(path.name[6:]) for path in paths if re.fullmatch(r"round-[0-9]{5,10}", path.name))


def load_checkpoint(folder: RunFolder, round: int, digest: str, template: dict[str, torch.Tensor]) -> State:
    """The state after `round`. `template` has the names, shapes and dtypes that the run's tensors must have.

    Raises InputError when a file is missing, corrupt, or from another configuration.
    """
    path = folder.checkpoints / f"round-{round:05d}"
    facts = folder.read_json(path / "state.json")
    hint = "delete that folder to resume from the checkpoint before it"
    try:
        if facts["format"] != FORMAT:
            raise InputError(f"{path}: must be a checkpoint of format {FORMAT}, got {facts['format']!r:.60}")
        if facts["config"] != digest:
            raise InputError(f"{path}: is a checkpoint of another configuration or other factors than this run's")
        if facts.pop("sha256") != _digest(facts, path / "state.safetensors") or facts["round"] != round:
            raise InputError(f"{path}: is corrupt (its SHA-256 is not the recorded one); {hint}")
        groups: dict[str, dict[str, torch.Tensor]] = {"global": {}, "server": {}, "base": {}, "previous": {}}
        for key, tensor in load((path / "state.safetensors").read_bytes()).items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = tensor
        state = State(
            tensors=groups.pop("global"),
            server=groups.pop("server"),
            base=groups.pop("base"),
            previous=groups.pop("previous"),
            variates={int(group.removeprefix("client-")): tensors for group, tensors in groups.items()},
            seen=dict(facts["seen"]),
            **{name: facts[name] for name in FACTS},
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: is corrupt ({error!r}); {hint}") from None
    if (problem := mismatch(state.tensors, template)) is not None:
        raise InputError(f"{path}: does not fit the run: {problem}")
    return state


def _digest(facts: dict[str, Any], tensors: Path) -> str:
    """SHA-256 over a checkpoint's facts and the file of its tensors."""
    with open(tensors, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(to_json(facts).encode())).hexdigest()


def newest_checkpoint(folder: RunFolder, digest: str, template: dict[str, torch.Tensor]) -> State | None:
    """The newest saved state, or None if no round has been saved. Raises InputError as `load_checkpoint` does."""
    rounds = checkpoint_rounds(folder)
    return load_checkpoint(folder, rounds[-1], digest, template) if rounds else None


def clear_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders that a killed process left behind."""
    for pattern in (".*.tmp", "checkpoints/.*.tmp", ".*.old", "checkpoints/.*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
