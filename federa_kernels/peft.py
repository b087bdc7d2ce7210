"""`lora_linear` under the LoRA layers of a peft model."""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import failure
from .dropped import add_dropped
from .frozen import FrozenWeight, PackedLinear
from .linear import is_conv1d
from .lora_linear import lora_linear


def _lora_module() -> Any:
    try:
        from peft.tuners import lora
    except ImportError as error:
        message = failure("accelerate_peft", "peft", "be importable (pip install 'peft>=0.18')", error)
        raise RuntimeError(message) from None
    return lora


@functools.cache
def _accelerated_class() -> Any:
    class AcceleratedLinear(_lora_module().Linear):  # type: ignore[misc]
        """peft's lora.Linear that computes through lora_linear while its state is the simple one."""

        _frozen: FrozenWeight

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            simple = _simple(self, x, args, kwargs)
            return super().forward(x, *args, **kwargs) if simple is None else _forward(self, *simple, x)

        # These three write to the weight's data, past the version that FrozenWeight goes by.
        def merge(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().merge(*args, **kwargs)
            finally:
                _drop_forms(self)

        def unmerge(self) -> None:
            super().unmerge()
            _drop_forms(self)

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            super().update_layer(*args, **kwargs)
            _drop_forms(self)

    AcceleratedLinear.__qualname__ = "AcceleratedLinear"
    return AcceleratedLinear


def __getattr__(name: str) -> Any:
    """AcceleratedLinear for pickle; made at first use, since peft need not be installed, nor be imported for this."""
    if name == "AcceleratedLinear":
        return _accelerated_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _drop_forms(layer: Any) -> None:
    for holder in (layer, layer.base_layer):
        if isinstance(frozen := vars(holder).get("_frozen"), FrozenWeight):
            frozen.drop()


class _Parts(NamedTuple):
    """The modules of a LoRA layer that one adapter needs."""

    base: Any
    lora_A: Any
    lora_B: Any
    dropout: Any


def _parts(layer: Any, adapter: str) -> _Parts:
    return _Parts(layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter])


def _obstacle(layer: Any, adapter: str, parts: _Parts) -> str | None:
    """Why lora_linear cannot stand in for this layer under this adapter."""
    base, lora_A, lora_B, dropout = parts
    if adapter in layer.lora_variant:
        return type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
    if type(base) is not nn.Linear and type(base) is not PackedLinear and not is_conv1d(base):
        return f"a {type(base).__name__} base"
    weight = base.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"a base weight of {type(weight).__name__}, {weight.dtype}"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"factors of {type(lora_A).__name__} and {type(lora_B).__name__}"
    if lora_B.bias is not None:
        return "lora_bias"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"a {type(dropout).__name__} for dropout"
    return "fan_in_fan_out" if layer.fan_in_fan_out != is_conv1d(base) else None


def _is_watched(module: nn.Module) -> bool:
    """Whether something waits for this module to be called, or stands before its forward."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def _simple(layer: Any, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[str, _Parts] | None:
    """The one adapter to compute with and its parts, or None where peft's own forward has to."""
    if args or any(value is not None for value in kwargs.values()) or layer.disable_adapters or layer.merged:
        return None
    known = layer.lora_A
    active = [adapter for adapter in layer.active_adapters if adapter in known]
    if len(active) != 1 or not layer.cast_input_dtype_enabled:
        return None
    parts = _parts(layer, active[0])
    if _obstacle(layer, active[0], parts) or any(map(_is_watched, parts)) or getattr(parts.dropout, "p", 0.0) == 1.0:
        return None
    # Where dtypes do not fit, torch has an error to raise.
    fits = x.dtype == parts.base.weight.dtype or torch.is_autocast_enabled(x.device.type)
    return (active[0], parts) if fits else None


def _forward(layer: Any, adapter: str, parts: _Parts, x: Tensor) -> Tensor:
    base, lora_A, lora_B, dropout = parts
    A, B, bias, scaling = lora_A.weight, lora_B.weight, base.bias, layer.scaling[adapter]
    weight = _weight(layer, base.weight)
    if type(dropout) is nn.Identity or not dropout.training or dropout.p == 0.0:
        return lora_linear(x, weight, A, B, scaling, bias)
    y = lora_linear(x, weight, A.detach()[:0], B.detach()[:, :0], 0.0, bias)
    return add_dropped(y, x, A, B, scaling, dropout.p)


def _weight(layer: Any, weight: Tensor) -> Tensor | FrozenWeight:
    """Of a Conv1D the weight lies as (K,N)."""
    if weight.requires_grad:
        return weight.t() if layer.fan_in_fan_out else weight
    if layer._frozen.source is not weight:
        layer._frozen = FrozenWeight(weight, fan_in_fan_out=layer.fan_in_fan_out)
    return layer._frozen


@dataclass
class AccelerateReport:
    """What `accelerate_peft` did: per layer its (N,K), and why a LoRA layer computes as before."""

    accelerated: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"accelerated {len(self.accelerated)} LoRA layers"]
        lines += [f"  {name}  {N} x {K}" for name, (N, K) in self.accelerated.items()]
        lines += [f"skipped {len(self.skipped)}"] if self.skipped else []
        lines += [f"  {name}  {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def accelerate_peft(model: nn.Module) -> AccelerateReport:
    """Compute the LoRA layers of a peft model through `lora_linear`.

        y = x W^T + b + s ((x * m / (1 - p)) A^T) B^T        m: dropout's mask in training mode, else 1 and p = 0

    For lora.Linear on nn.Linear and transformers' Conv1D. Parameters, state_dict and `save_pretrained` stay as they
    are. A layer whose state is not the simple one (no or several active adapters, merged, `adapter_names` given,
    hooks on its parts) computes by peft's own forward for as long. Of dropout it keeps the mask, a bit an entry,
    drawn from torch's generator; on the CPU the draws are nn.Dropout's. Products are those of `lora_linear`: in the
    dtype of x or of autocast, while peft without autocast would run float32 adapters beside a half base in float32.

    LoRA on embeddings and convolutions is left alone. Raises ValueError, with the model untouched, for layers it cannot
    honour (DoRA and other variants, lora_bias, quantised bases) and for a model without LoRA layers;
    RuntimeError where peft is not installed. `restore_peft` takes it back.
    """
    lora = _lora_module()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}
    report, chosen, obstacles = AccelerateReport(), {}, {}
    for name, layer in layers.items():
        if type(layer) in (lora.Linear, _accelerated_class()):
            chosen[name] = layer
            for adapter in layer.lora_A:
                if why := _obstacle(layer, adapter, _parts(layer, adapter)):
                    obstacles[name] = why
        elif type(layer) is lora.Embedding or type(layer).__name__.startswith("Conv"):
            report.skipped[name] = f"is a lora.{type(layer).__name__}"
        else:
            obstacles[name] = f"a lora.{type(layer).__name__}"
    if obstacles or not chosen:
        expectation = "have LoRA on nn.Linear or Conv1D, and none that lora_linear does not compute"
        raise ValueError(failure("accelerate_peft", "model", expectation, _listed(obstacles) or "no such LoRA"))
    for name, layer in chosen.items():
        layer._frozen = FrozenWeight(layer.base_layer.weight, fan_in_fan_out=layer.fan_in_fan_out)
        layer.__class__ = _accelerated_class()
        report.accelerated[name] = tuple(layer._frozen.shape)
    return report


def _listed(obstacles: dict[str, str]) -> str:
    """`DoRA in a, b, c and 9 more; lora_bias in d`"""
    by_reason: dict[str, list[str]] = {}
    for name, why in obstacles.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(
        f"{why} in {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for why, names in by_reason.items()
    )


def restore_peft(model: nn.Module) -> int:
    """Give the layers that `accelerate_peft` took back to peft; how many there were."""
    lora = _lora_module()
    layers = [module for module in model.modules() if type(module) is _accelerated_class()]
    for layer in layers:
        layer.__class__ = lora.Linear
        del layer._frozen
    return len(layers)
