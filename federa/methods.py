"""How a backbone is made trainable: which tensors train, how they start and what the server broadcasts once."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from federa.adapters import SparseStart, add_bottlenecks, add_cores, add_sparse_starts
from federa.catalogue import FACTORS, METHODS, Method
from federa.config import MethodConfig
from federa.dropout import Counters, count_dropout
from federa.errors import InputError
from federa.folder import write_atomic
from federa.models import backbone_of, is_head
from federa.randomness import Purpose, torch_seed
from federa.tasks import CLASSIFICATION, Task
from federa_kernels import FeDeRALinear, factored_svd, fingerprint, pack_frozen, replace_linears, truncated_svd


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
class Pair:
    """One adapted layer: the names of its factors and of its frozen weight, its scaling and its shape (N, K)."""

    lora_A: str
    lora_B: str
    residual: str
    scaling: float
    shape: tuple[int, int]


@dataclass(frozen=True)
class Learner:
    """One backbone in memory, made trainable; every client trains through it in turn.

    trainable: name -> Parameter of all that the global state holds, in the model's order; `open` tells which of them
    train in a round. head: the names among them that use the head's rate. dropout: what the model's masks hang on.
    """

    model: nn.Module
    trainable: Mapping[str, nn.Parameter]
    head: frozenset[str]
    broadcast: Broadcast
    device: torch.device
    config: MethodConfig
    seed: int
    dropout: Counters
    task: Task = CLASSIFICATION

    @property
    def method(self) -> Method:
        return METHODS[self.config.name]

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable tensors on the CPU, where they are sent, averaged and saved."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trainable.items()}

    def load(self, tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor] | None = None) -> None:
        """Copies `tensors` into the trainable parameters and `base` (`State.base`) into the frozen weights."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[name])
            for name, tensor in (base or {}).items():
                frozen = self.model.get_parameter(name)
                if not torch.equal(frozen, tensor.to(frozen.device)):  # writing would make its packed forms anew
                    frozen.copy_(tensor)

    def base(self) -> dict[str, torch.Tensor]:
        """A copy of the frozen weights of the adapted layers, (N, K) each, on the CPU."""
        return {
            p.residual: self.model.get_parameter(p.residual).detach().to("cpu", copy=True) for p in self.pairs.values()
        }

    @property
    def pairs(self) -> dict[str, Pair]:
        """The adapted layers by name."""
        return {
            name: Pair(
                *(f"{name}.{leaf}" for leaf in (*FACTORS, "residual")),
                layer.scaling,
                (layer.out_features, layer.in_features),
            )
            for name, layer in adapted_layers(self.model).items()
        }

    def names_in(self, round: int) -> list[str]:
        """Names of the tensors that train in a round, counted from 1, and come back from every client."""
        return [n for n in self.trainable if n in self.head or self.method.trains(n, round, self.config)]

    def open(self, round: int) -> dict[str, nn.Parameter]:
        """Name -> Parameter of what trains in a round, with requires_grad set there and nowhere else."""
        names = set(self.names_in(round))
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name in names)
        return {name: parameter for name, parameter in self.trainable.items() if name in names}

    def rank_of(self, client: int) -> int:
        ranks = self.config.client_ranks
        return self.config.rank if ranks is None else ranks[client % len(ranks)]

    def start_of(self, tensors: Mapping[str, torch.Tensor], client: int) -> Mapping[str, torch.Tensor]:
        """What a client begins a round from: with mixed ranks the rows of A and columns of B above its own are zero.

        They stay so: the gradient of each is a product with the other.
        """
        rank = self.rank_of(client)
        if rank == self.config.rank:
            return tensors
        start = dict(tensors)
        for pair in self.pairs.values():
            start[pair.lora_A] = tensors[pair.lora_A].clone().index_fill_(0, torch.arange(rank, self.config.rank), 0)
            start[pair.lora_B] = tensors[pair.lora_B].clone().index_fill_(1, torch.arange(rank, self.config.rank), 0)
        return start

    def bytes_of(self, name: str, client: int) -> int:
        """What a tensor of the global state costs to send to or from a client of its rank."""
        nbytes = self.trainable[name].nbytes
        factor = name.rpartition(".")[2] in FACTORS and name not in self.head
        return nbytes // self.config.rank * self.rank_of(client) if factor else nbytes

    def restart(self, round: int) -> dict[str, torch.Tensor]:
        """The factors that begin anew after a round: where they started, with lora's A drawn again."""
        rng = torch.Generator().manual_seed(torch_seed(self.seed, Purpose.ADAPTER, round=round))
        tensors = {}
        for name, (A0, B0) in self.broadcast.factors.items():
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = A0.cpu().clone(), B0.cpu().clone()
            if METHODS[self.config.name].band == "zero":
                nn.init.kaiming_uniform_(tensors[f"{name}.lora_A"], a=math.sqrt(5), generator=rng)
        return tensors

    @torch.no_grad()
    def renew(self, tensors: dict[str, torch.Tensor], round: int) -> dict[str, torch.Tensor]:
        """What the server makes of the mean of a round, beyond averaging.

        fedsvd: B A = U S V^T, B = U S, A = V^T, after every round (arXiv 2505.12805).
        slora: B = U_R sqrt(S_R / s), A = sqrt(S_R / s) V_R^T of the sparse change D = U S V^T after the last round of
        stage 1, D = 0; where D is zero the factors stay at their start (arXiv 2308.06522).
        """
        name, following = self.config.name, dict(tensors)
        if name == "fedsvd":
            for pair in self.pairs.values():
                B, A = tensors[pair.lora_B], tensors[pair.lora_A]
                found = factored_svd([(B.double(), A.double())], [1.0], self.config.rank)
                following[pair.lora_B] = (found.U * found.S).to(B.dtype)
                following[pair.lora_A] = found.Vh.to(A.dtype)
        elif name == "slora" and round == self.config.sparse_rounds:
            for layer, pair in self.pairs.items():
                module = self.model.get_submodule(layer)
                assert isinstance(module, SparseStart)
                sparse = tensors[f"{layer}.sparse"]
                flat = torch.zeros(math.prod(pair.shape), dtype=torch.float64)
                dense = flat.index_add(0, module.index.cpu(), sparse.double()).view(pair.shape)
                if not dense.any():
                    continue
                found = truncated_svd(dense, self.config.rank)
                root = (found.S / pair.scaling).sqrt()
                following[pair.lora_B] = (found.U * root).to(sparse.dtype)
                following[pair.lora_A] = (root[:, None] * found.Vh).to(sparse.dtype)
                following[f"{layer}.sparse"] = torch.zeros_like(sparse)
        return following


def make_trainable(
    model: nn.Module, config: MethodConfig, seed: int, device: torch.device, broadcast: Broadcast | None = None
) -> Learner:
    """Freezes the model, adapts its linear layers as config.name says and opens the head for training.

    What starts where is told by METHODS. With a `broadcast` its factors are attached instead of computed and every
    fingerprint is checked: InputError names a layer whose weight, factors or scaling are not the server's, or a model
    that the method has no place in.
    """
    from federa.packing import pack_encoder  # needs transformers, which the model brings along

    method = METHODS[config.name]
    model.requires_grad_(False)
    base = _backbone_digest(model)
    computed = Broadcast({}, {}, base)
    if method.band is not None:
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
    if config.name == "slora":
        add_sparse_starts(adapted_layers(model), config.density, seed)
    elif config.name == "fed-sb":
        add_cores(adapted_layers(model))
    elif config.name == "adapter":
        rng = torch.Generator().manual_seed(torch_seed(seed, Purpose.ADAPTER))
        add_bottlenecks(model, backbone_of(model)[0], config.adapter, config.bottleneck, rng)
    model.requires_grad_(False)
    model.to(device)
    head = {name for name, _ in model.named_parameters() if is_head(model, name)}
    names = (method.carried(model, config) | head) - _unused_parameters(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if name in names}
    dropout = count_dropout(model, device)
    learner = Learner(model, trainable, frozenset(head & names), computed, device, config, seed, dropout)
    learner.open(1)
    pack_frozen(model)  # the frozen layers that carry no adapter, as fast as those that do
    pack_encoder(model)
    return learner


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
            band=config.band if config.name == "federa" else METHODS[config.name].band,
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
