"""FeDeRA's layer, and how a weight splits into its residual and its low-rank pair."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_float, check_rank, check_shape, failure
from .bands import Progress, check_band, starting_factors
from .frozen import FrozenWeight, PackedLinear
from .lora_linear import lora_linear


class LoraInit(NamedTuple):
    """Where training of one layer starts: W = residual + s lora_B lora_A, up to `rounding`.

    lora_A    (R,K)  float32, contiguous
    lora_B    (N,R)  float32, contiguous
    residual  (N,K)  W - s lora_B lora_A, rounded to its dtype
    rounding  max |W - (residual + s lora_B lora_A)|, computed in float64
    """

    lora_A: Tensor
    lora_B: Tensor
    residual: Tensor
    rounding: float


@torch.no_grad()
def derive_residual(
    weight: Tensor, lora_A0: Tensor, lora_B0: Tensor, scaling: float, dtype: torch.dtype | None = None
) -> Tensor:
    """What stays frozen of a weight whose low-rank part is trained: `W - s * (B0 @ A0)`.

    Computed in float64 and rounded once to `dtype` (default: the weight's), out of reach of autocast and TF32, so that
    machines with different BLAS libraries agree but for rare last bits.

    weight   (N,K)  any float dtype
    lora_A0  (R,K)
    lora_B0  (N,R)
    """
    residual = _float64(weight) - scaling * (_float64(lora_B0) @ _float64(lora_A0))
    return residual.to(dtype or weight.dtype).to(weight.device).contiguous()


def _float64(tensor: Tensor) -> Tensor:
    """In float64, on the CPU for a device that has no such numbers (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _effective(residual: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return _float64(residual) + scaling * (_float64(lora_B) @ _float64(lora_A))


@torch.no_grad()
def split(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, residual_dtype: torch.dtype | None
) -> LoraInit:
    residual = derive_residual(weight, lora_A, lora_B, scaling, residual_dtype)
    rounding = (_float64(weight) - _effective(residual, lora_A, lora_B, scaling)).abs().max().item()
    return LoraInit(lora_A, lora_B, residual, rounding)


def fingerprint(weight: Tensor, lora_A0: Tensor, lora_B0: Tensor, scaling: float) -> str:
    """SHA-256, in hex, over shapes, dtypes and bytes of W (N,K), A0 (R,K) and B0 (N,R), and s as float64."""
    digest = hashlib.sha256()
    for tensor in (weight, lora_A0, lora_B0, torch.tensor([scaling], dtype=torch.float64)):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def lora_init(
    weights: Iterable[Tensor],
    rank: int,
    scaling: float,
    band: str = "principal",
    residual_dtype: torch.dtype | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> list[LoraInit]:
    """Starting factors and residual of each weight, in the order given.

        principal   U S V^T = W:  B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r^T      (FeDeRA, arXiv 2404.18848)
        minor       the same of the R smallest of the min(N,K) singular values         (MiLoRA, arXiv 2406.09044)
        orthogonal  Q T = W, T_ii >= 0:  B = Q_r,  A = T_r / s                         (OLoRA, arXiv 2406.01775)
        zero        B = 0,  A uniform within 1 / sqrt(K), drawn from `generator`       (LoRA, arXiv 2106.09685)

    weights         (N,K) each, any float dtype; float64 is factored in float64
    rank            R, from 1 to the smallest min(N,K)
    scaling         s > 0
    residual_dtype  default: each weight's own
    progress        called with (weights factored, weights in all) as it goes; by default a line on stderr that counts,
                    for models of 500 million weights or more on a terminal

    Raises ValueError for an unknown band, rank, scaling, shape, entries that are not finite, or a missing generator;
    TypeError for dtypes.
    """
    weights = list(weights)
    check_band("lora_init", band)
    if not scaling > 0:
        raise ValueError(failure("lora_init", "scaling", "be above 0", scaling))
    for index, weight in enumerate(weights):
        check_shape("lora_init", f"weight {index}", weight, N=None, K=None)
        check_float("lora_init", f"weight {index}", weight)
        check_rank("lora_init", rank, tuple(weight.shape))
    factors = starting_factors(weights, rank, scaling, band, generator, progress)
    return [split(W, A0, B0, scaling, residual_dtype) for W, (A0, B0) in zip(weights, factors, strict=True)]


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D, told by its name: transformers need not be installed, nor be imported for this."""
    return (type(layer).__module__, type(layer).__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def weight_of(layer: nn.Module) -> Tensor:
    """(N,K), a view."""
    weight = layer.get_parameter("weight").detach()
    return weight.t() if is_conv1d(layer) else weight


def scaling_of(alpha: float | None, rank: int) -> float:
    alpha = rank if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(failure("FeDeRALinear", "alpha", "be above 0", alpha))
    return alpha / rank


def _check_layer(layer: nn.Module) -> None:
    if type(layer) not in (nn.Linear, PackedLinear) and not is_conv1d(layer):
        raise TypeError(failure("FeDeRALinear", "linear", "be nn.Linear or transformers' Conv1D", type(layer).__name__))


class FeDeRALinear(nn.Module):
    """A linear layer whose weight is a frozen residual plus a trained low-rank pair, both from one decomposition.

        y = x (W - s B0 A0)^T + s (x A^T) B^T + b,      A = A0, B = B0 at the start

    residual  (N,K)  frozen, W - s B0 A0
    lora_A    (R,K)  float32, trained             lora_A0  (R,K)  float32, frozen, where lora_A started
    lora_B    (N,R)  float32, trained             lora_B0  (N,R)  float32, frozen, where lora_B started
    bias      (N,)   frozen, or None
    rounding  max |W - (residual + s B0 A0)|, measured when W was split

    The residual of `init` is taken over, everything else copied. On CPUs with tile units the first call packs the
    residual (see FrozenWeight for the memory); `explain` tells which path a layer takes.

    `load_state_dict` also takes the checkpoint of an original model: its `weight` is split anew, and training starts
    over. Method: FeDeRA, arXiv 2404.18848.
    """

    residual: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter
    lora_B0: nn.Parameter
    bias: nn.Parameter | None
    _weight_like: Tensor

    def __init__(self, linear: Any, init: LoraInit, alpha: float | None = None, band: str = "principal"):
        super().__init__()
        _check_layer(linear)
        self.rank = init.lora_A.shape[0]
        self.out_features, self.in_features = init.residual.shape
        self.alpha = self.rank if alpha is None else alpha
        self.scaling = scaling_of(alpha, self.rank)
        self.band = band
        self.rounding = init.rounding
        self.replaced_class = nn.Linear if type(linear) is PackedLinear else type(linear)
        self.fan_in_fan_out = is_conv1d(linear)

        def copied(tensor: Tensor, trained: bool = False) -> nn.Parameter:
            return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=trained)

        self.residual = nn.Parameter(init.residual, requires_grad=False)
        self.lora_A = copied(init.lora_A, trained=True)
        self.lora_B = copied(init.lora_B, trained=True)
        self.lora_A0 = copied(init.lora_A)
        self.lora_B0 = copied(init.lora_B)
        self.bias = None if linear.bias is None else copied(linear.bias)
        # Empty, but .to() moves it: the dtype and device that a merged weight has.
        self.register_buffer("_weight_like", linear.weight.new_empty(0), persistent=False)
        self.train(linear.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        band: str = "principal",
        residual_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> "FeDeRALinear":
        """Split the weight of an nn.Linear or Conv1D; raises what `lora_init` raises, TypeError for another class."""
        _check_layer(linear)
        check_rank("FeDeRALinear", rank, tuple(weight_of(linear).shape))
        (init,) = lora_init(
            [weight_of(linear)], rank, scaling_of(alpha, rank), band, residual_dtype, generator=generator
        )
        return cls(linear, init, alpha, band)

    @classmethod
    def from_factors(
        cls,
        linear: nn.Module,
        lora_A0: Tensor,
        lora_B0: Tensor,
        alpha: float | None = None,
        *,
        residual_dtype: torch.dtype | None = None,
    ) -> "FeDeRALinear":
        """The layer of one who received A0 (R,K) and B0 (N,R): derives the residual, never factors.

        The band is "zero" where B0 is, "principal" otherwise. Raises ValueError for shapes, TypeError for the class.
        """
        _check_layer(linear)
        weight = weight_of(linear)
        N, K = weight.shape
        check_shape("FeDeRALinear", "lora_A0", lora_A0, R=None, K=K)
        check_shape("FeDeRALinear", "lora_B0", lora_B0, N=N, R=lora_A0.shape[0])
        check_rank("FeDeRALinear", lora_A0.shape[0], (N, K))
        lora_A0, lora_B0 = (t.detach().to(weight.device, torch.float32) for t in (lora_A0, lora_B0))
        init = split(weight, lora_A0, lora_B0, scaling_of(alpha, lora_A0.shape[0]), residual_dtype)
        return cls(linear, init, alpha, "principal" if lora_B0.any() else "zero")

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.frozen, self.lora_A, self.lora_B, self.scaling, self.bias)

    @property
    def frozen(self) -> FrozenWeight | Tensor:
        """The residual with its packed forms, or alone where it was swapped under the layer (torch.func)."""
        return self._frozen if self._frozen.weight is self.residual else self.residual

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """The effective weight residual + s B A, computed anew in float64 at each read, detached.

        In the layout of the replaced layer, (N,K) or Conv1D's (K,N), and in its dtype.
        """
        weight = _effective(self.residual, self.lora_A, self.lora_B, self.scaling)
        weight = weight.to(self._weight_like.dtype).to(self._weight_like.device)
        return weight.t().contiguous() if self.fan_in_fan_out else weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "FeDeRALinear: weight must not be assigned, it is residual + scaling * lora_B @ lora_A; "
                "load a checkpoint that holds it, or build the layer anew with from_linear"
            )
        super().__setattr__(name, value)
        if name == "residual":
            self._frozen = FrozenWeight(value)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._frozen = FrozenWeight(self.residual)
        return self

    def merge(self) -> nn.Module:
        """An ordinary layer of the class it replaced, with the effective weight, all of it trainable."""
        with torch.device("meta"):
            if self.fan_in_fan_out:
                layer = self.replaced_class(self.out_features, self.in_features)
            else:
                layer = self.replaced_class(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    @torch.no_grad()
    def delta(self) -> tuple[Tensor, Tensor]:
        """What training added, s (B A - B0 A0), as one LoRA pair of rank 2R and the same scaling, for the original W.

            s [B, -B0] [A; A0]      lora_A (2R,K), lora_B (N,2R)

        In PEFT's terms: r = 2 rank, lora_alpha = 2 alpha.
        """
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], dim=1)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        if prefix + "weight" in state_dict:
            try:
                state_dict = self._split_original(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._frozen = FrozenWeight(self.residual)  # a compiled graph must not go on with the old forms

    def _split_original(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The entries of an original layer, turned into this layer's."""
        both = [key for key in ("residual", "lora_A", "lora_B", "lora_A0", "lora_B0") if prefix + key in state_dict]
        if both:
            raise ValueError(failure("FeDeRALinear", f"{prefix}weight", "come alone", f"also {', '.join(both)}"))
        state_dict = dict(state_dict)
        weight = state_dict.pop(prefix + "weight")
        if self.fan_in_fan_out:
            check_shape("FeDeRALinear", f"{prefix}weight", weight, K=self.in_features, N=self.out_features)
            weight = weight.t()
        else:
            check_shape("FeDeRALinear", f"{prefix}weight", weight, N=self.out_features, K=self.in_features)
        weight = weight.to(self._weight_like)
        if self.band == "zero":
            init = split(weight, self.lora_A0, torch.zeros_like(self.lora_B0), self.scaling, self.residual.dtype)
        else:
            (init,) = lora_init([weight], self.rank, self.scaling, self.band, self.residual.dtype)
        self.rounding = init.rounding
        entries = {"residual": init.residual, "lora_A0": init.lora_A, "lora_B0": init.lora_B}
        entries |= {"lora_A": init.lora_A.clone(), "lora_B": init.lora_B.clone()}
        return state_dict | {prefix + key: tensor for key, tensor in entries.items()}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, alpha={self.alpha}, band={self.band}, replaced={self.replaced_class.__name__}"
        )
