"""How a backbone is made trainable: which tensors train, how they start and what the server broadcasts once."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from federa.config import MethodConfig
from federa.errors import InputError
from federa.folder import write_atomic
from federa.models import is_head
from federa.randomness import Purpose, torch_seed
from federa_kernels import FeDeRALinear, fingerprint, pack_frozen, replace_linears


@dataclass(frozen=True)
class Broadcast:
    """What every client receives once: the initial factors of each adapted layer and the hash that pins its residual.

    factors: layer name -> (lora_A0 (R, K), lora_B0 (N, R)), fp32. fingerprints: layer name -> SHA-256 of W, A0, B0, s.
    base: SHA-256 of the whole pretrained backbone.
    Clients derive W - s B0 A0 themselves and never factor: singular vectors of two machines may differ in sign.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    fingerprints: Mapping[str, str]
    base: str = ""

    @property
    def bytes(self) -> int:
        return sum(A0.nbytes + B0.nbytes for A0, B0 in self.factors.values())

    def save(self, path: Path) -> None:
        tensors = {}
        for name, (A0, B0) in self.factors.items():
            tensors[f"{name}.lora_A0"], tensors[f"{name}.lora_B0"] = A0.contiguous(), B0.contiguous()
        hashes = json.dumps({"base": self.base, "fingerprints": dict(self.fingerprints)})
        write_atomic(path, save(tensors, metadata={"hashes": hashes}))  # one entry: safetensors orders them at random

    @classmethod
    def load(cls, path: Path) -> "Broadcast":
        """Raises InputError when the file is missing or corrupt."""
        try:
            with safe_open(path, framework="pt") as file:
                hashes = json.loads(file.metadata()["hashes"])
                fingerprints, base = hashes["fingerprints"], str(hashes["base"])
                if {f"{name}.lora_{factor}0" for name in dict(fingerprints) for factor in "AB"} != set(file.keys()):
                    raise ValueError("other tensors than it has fingerprints for")
                factors = {
                    name: (file.get_tensor(f"{name}.lora_A0"), file.get_tensor(f"{name}.lora_B0"))
                    for name in fingerprints
                }
        except Exception as error:  # safetensors, json and torch have no common error
            raise InputError(f"{path}: must hold the initial factors of a run, got {error!r}") from None
        return cls(factors, fingerprints, base)


@dataclass(frozen=True)
class Learner:
    """One backbone in memory, made trainable; every client trains through it in turn.

    trainable: parameter name -> Parameter, in the model's order; head: the names among them that use the head's rate.
    """

    model: nn.Module
    trainable: Mapping[str, nn.Parameter]
    head: frozenset[str]
    broadcast: Broadcast
    device: torch.device

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable tensors on the CPU, where they are sent, averaged and saved."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trainable.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies `tensors` into the trainable parameters."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[name])


def make_trainable(
    model: nn.Module, config: MethodConfig, seed: int, device: torch.device, broadcast: Broadcast | None = None
) -> Learner:
    """Freezes the model, adapts its linear layers as config.name says and opens the head for training.

    federa: factors of the truncated SVD of each weight; lora: B0 = 0 and A0 Kaiming-uniform; head-only: no adapters;
    full: everything trains. With a `broadcast` its factors are attached instead of computed and every fingerprint
    is checked: InputError names a layer whose weight, factors or scaling are not the server's.
    """
    model.requires_grad_(False)
    base = _backbone_digest(model)
    computed = Broadcast({}, {}, base)
    if config.name in ("federa", "lora"):
        computed = replace(computed, **_attach_adapters(model, config, seed, broadcast))
    if broadcast is not None:
        for name, expected in broadcast.fingerprints.items():
            if computed.fingerprints.get(name) != expected:
                raise InputError(
                    f"{name}: the hash of its weight, factors and scaling must be the server's "
                    f"{str(expected)[:12]}..., got {str(computed.fingerprints.get(name))[:12]}...; "
                    "is this the same base model?"
                )
        if broadcast.base != base:
            raise InputError(
                f"model.name: must be the base model that the run began with, of hash {broadcast.base[:12]}..., "
                f"got {base[:12]}..."
            )
    if config.name == "full":
        model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if is_head(model, name):
            parameter.requires_grad_(True)
    model.to(device)
    pack_frozen(model)  # the frozen layers that carry no adapter, as fast as those that do
    unused = _unused_parameters(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in unused}
    head = frozenset(name for name in trainable if is_head(model, name))
    return Learner(model, trainable, head, computed, device)


def _backbone_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all of a model but its head."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not is_head(model, name):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attach_adapters(model, config: MethodConfig, seed: int, broadcast: Broadcast | None) -> dict[str, Mapping]:
    weights = {name: m.weight for name, m in model.named_modules() if getattr(m, "weight", None) is not None}
    generator = torch.Generator().manual_seed(torch_seed(seed, Purpose.ADAPTER))
    unused = _unused_parameters(model)
    outside = {
        name.rpartition(".")[0] for name, _ in model.named_parameters() if is_head(model, name) or name in unused
    }
    try:
        report = replace_linears(
            model,
            config.target_modules,
            config.rank,
            config.alpha,
            band="principal" if config.name == "federa" else "zero",
            residual_dtype=getattr(torch, config.residual_dtype),
            factors=None if broadcast is None else broadcast.factors,
            generator=generator,
            exclude_modules=outside,
        )
    except (TypeError, ValueError) as error:
        problem = str(error).removeprefix("replace_linears: ")
        if broadcast is not None:
            raise InputError(f"the initial factors must fit this model and method.rank, got: {problem}") from None
        section = "method." if problem.startswith(("rank ", "target_modules ")) else "model.name: "
        raise InputError(section + problem) from None
    layers = {name: model.get_submodule(name) for name in report.replaced}
    factors = {name: (layer.lora_A0.detach(), layer.lora_B0.detach()) for name, layer in layers.items()}
    fingerprints = {name: fingerprint(weights[name], *factors[name], layers[name].scaling) for name in layers}
    return {"factors": factors, "fingerprints": fingerprints}


def _unused_parameters(model) -> set[str]:
    """Poolers that a mean-pooling classifier carries along but never reads."""
    return {name for name, _ in model.named_parameters() if "pooler" in name.split(".") and not is_head(model, name)}


def adapted_layers(model: nn.Module) -> dict[str, FeDeRALinear]:
    """The FeDeRALinear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeDeRALinear)}
