"""Layers that methods beside FeDeRALinear put into a model: sparse starts, square cores and bottlenecks."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from federa.errors import InputError
from federa.randomness import Purpose, generator
from federa_kernels import FeDeRALinear

# By family: the output layers of attention, then of feed-forward.
ATTENTION = ("attention.output.dense", "attention.out_lin", "attn.c_proj", "self_attn.o_proj", "self_attn.out_proj")
FEED_FORWARD = ("output.dense", "ffn.lin2", "mlp.c_proj", "mlp.down_proj", "fc2")


class SparseStart(FeDeRALinear):
    """A FeDeRALinear whose frozen weight changes in a fixed random share of its entries (SLoRA, arXiv 2308.06522).

        y = x (residual + D)^T + s (x A^T) B^T + b,     D zero but at `index`, where it is `sparse`

    sparse  (nnz,)  trained in stage 1, zero afterwards        index  (nnz,)  int64, into the flattened (N, K)
    """

    sparse: nn.Parameter
    index: Tensor
    _looked: tuple[int, bool] = (-1, False)

    def forward(self, x: Tensor) -> Tensor:
        if not ((self.sparse.requires_grad and self.training) or self.changed):
            return super().forward(x)
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.residual + self.dense(), self.bias) + self.scaling * low_rank

    def dense(self) -> Tensor:
        """D (N, K)."""
        flat = self.sparse.new_zeros(self.residual.numel()).index_add(0, self.index, self.sparse)
        return flat.view_as(self.residual)

    @property
    def changed(self) -> bool:
        """Whether D is not zero; looked at once for every write."""
        if self._looked[0] != self.sparse._version:
            self._looked = (self.sparse._version, bool(self.sparse.any()))
        return self._looked[1]

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        dense = self.dense()
        return FeDeRALinear.weight.fget(self) + (dense.t() if self.fan_in_fan_out else dense)


class Core(nn.Module):
    """lora_A seen through a square matrix that trains, C A (Fed-SB, arXiv 2502.15436)."""

    def __init__(self, rank: int):
        super().__init__()
        self.core = nn.Parameter(torch.eye(rank))

    def forward(self, lora_A: Tensor) -> Tensor:
        return self.core @ lora_A


class Bottleneck(nn.Module):
    """f(x) + up(gelu(down(f(x)))), up zero at the start (arXiv 1902.00751). layer: f, of width N; m: the bottleneck."""

    def __init__(self, layer: nn.Module, width: int, m: int, rng: torch.Generator | None = None):
        super().__init__()
        self.layer = layer
        self.bottleneck = nn.ModuleDict({"down": nn.Linear(width, m), "up": nn.Linear(m, width)})
        with torch.no_grad():
            for name, parameter in self.bottleneck.named_parameters():
                parameter.zero_()
                if name == "down.weight":
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.bottleneck["up"](F.gelu(self.bottleneck["down"](y)))


def add_sparse_starts(layers: dict[str, FeDeRALinear], density: float, seed: int) -> None:
    """The same entries on every machine: functions of the seed and a layer's place."""
    for place, layer in enumerate(layers.values()):
        count = max(1, round(density * layer.residual.numel()))
        rng = generator(seed, Purpose.ADAPTER, step=1 + place)
        chosen = np.sort(rng.choice(layer.residual.numel(), count, replace=False))
        layer.__class__ = SparseStart
        layer.register_parameter("sparse", nn.Parameter(torch.zeros(count, dtype=layer.residual.dtype)))
        layer.register_buffer("index", torch.from_numpy(chosen), persistent=False)


def add_cores(layers: dict[str, FeDeRALinear]) -> None:
    for layer in layers.values():
        parametrize.register_parametrization(layer, "lora_A", Core(layer.rank))


def add_bottlenecks(model: nn.Module, backbone: str, variant: str, m: int, rng: torch.Generator) -> list[str]:
    """Puts a Bottleneck around the layers that `variant` (houlsby, pfeiffer) names; InputError where there are none."""

    def ends(name: str, suffixes: tuple[str, ...]) -> bool:
        return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)

    chosen = [
        name
        for name, module in model.named_modules()
        if name.startswith(backbone + ".")
        and "pooler" not in name.split(".")
        and isinstance(getattr(module, "weight", None), Tensor)
        and (variant == "houlsby" if ends(name, ATTENTION) else ends(name, FEED_FORWARD))
    ]
    if not chosen:
        known = ", ".join((*ATTENTION, *FEED_FORWARD))
        raise InputError(f"method.name: adapter must know where a block ends ({known}), got none such in this model")
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        width = layer.nf if hasattr(layer, "nf") else layer.out_features  # Conv1D's name for it
        setattr(model.get_submodule(parent), leaf, Bottleneck(layer, width, m, rng))
    return chosen
