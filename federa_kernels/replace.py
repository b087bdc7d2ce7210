"""How FeDeRA's layer enters a model: which layers, and all of them or none."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_rank, check_shape, failure
from .bands import Progress, check_band, starting_factors
from .frozen import PackedLinear
from .linear import FeDeRALinear, is_conv1d, scaling_of, split, weight_of


class Replaced(NamedTuple):
    shape: tuple[int, int]
    rounding: float


@dataclass
class ReplaceReport:
    """What `replace_linears` did: per layer name its (N,K) and rounding, and why a selected layer was left alone."""

    replaced: dict[str, Replaced] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = max((layer.rounding for layer in self.replaced.values()), default=0.0)
        lines = [f"replaced {len(self.replaced)} linear layers, rounding at most {worst:.1e}"]
        lines += [f"  {name}  {N} x {K}  {rounding:.1e}" for name, ((N, K), rounding) in self.replaced.items()]
        lines += [f"skipped {len(self.skipped)}"] if self.skipped else []
        lines += [f"  {name}  {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _matcher(modules: str | Iterable[str], argument: str) -> Callable[[str], object]:
    if isinstance(modules, str):
        try:
            return re.compile(modules).fullmatch
        except re.error as error:
            actual = f"{modules!r}: {error}"
            raise ValueError(failure("replace_linears", argument, "be a valid regular expression", actual)) from None
    suffixes = list(modules)
    return lambda name: any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _linears(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All linear layers of a model by name, and for those that must not be replaced the reason."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    # A transformers model names its backbone; what lies outside is the task's head.
    pretrained: Any = model if hasattr(model, "base_model_prefix") else None
    backbone = {id(module) for module in (pretrained.base_model if pretrained else model).modules()}
    output = pretrained.get_output_embeddings() if pretrained else None

    def reason(name: str, layer: nn.Module) -> str | None:
        if id(layer) not in backbone or layer is output or (pretrained and "pooler" in name.split(".")):
            return "belongs to the task head"
        if isinstance(layer, FeDeRALinear):
            return "is a FeDeRALinear already"
        if type(layer) not in (nn.Linear, PackedLinear) and not is_conv1d(layer):
            return f"is a {type(layer).__name__}, not nn.Linear itself"
        if "weight" not in layer._parameters:
            return "computes its weight from other parameters"
        others = [other for other in owners[id(layer.weight)] if other != name]
        return f"shares its weight with {', '.join(others)}" if others else None

    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | FeDeRALinear) or is_conv1d(m)}
    reasons = {name: reason(name, layer) for name, layer in linears.items()}
    return linears, {name: why for name, why in reasons.items() if why}


def _select(model: nn.Module, target_modules, exclude_modules) -> tuple[dict[str, nn.Module], dict[str, str]]:
    linears, reasons = _linears(model)
    targeted = (lambda name: True) if target_modules == "all-linear" else _matcher(target_modules, "target_modules")
    excluded = _matcher(exclude_modules, "exclude_modules")
    names = [name for name in linears if targeted(name)]
    reasons |= {name: "is excluded" for name in names if excluded(name)}
    skipped = {name: reasons[name] for name in names if name in reasons}
    chosen = {name: linears[name] for name in names if name not in skipped}
    if not chosen:
        free = [name for name in linears if name not in reasons]
        kinds = list(dict.fromkeys(n if n.rpartition(".")[2].isdigit() else n.rpartition(".")[2] for n in free))
        exist = ", ".join(kinds[:20]) + (f" and {len(kinds) - 20} more" if len(kinds) > 20 else "")
        actual = f"{target_modules!r}" + "".join(f"; {name} {why}" for name, why in list(skipped.items())[:3])
        expectation = f"match a linear layer that can be replaced ({exist or 'the model has none'})"
        raise ValueError(failure("replace_linears", "target_modules", expectation, actual))
    return chosen, skipped


def _check_factors(chosen: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> None:
    missing, unknown = sorted(chosen.keys() - factors.keys()), sorted(factors.keys() - chosen.keys())
    if missing or unknown:
        difference = (("missing", missing), ("unknown", unknown))
        actual = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in difference if names)
        raise ValueError(failure("replace_linears", "factors", "name exactly the selected layers", actual))
    for name, layer in chosen.items():
        N, K = weight_of(layer).shape
        lora_A0, lora_B0 = factors[name]
        check_shape("replace_linears", f"lora_A0 of {name}", lora_A0, R=rank, K=K)
        check_shape("replace_linears", f"lora_B0 of {name}", lora_B0, N=N, R=rank)


def replace_linears(
    model: nn.Module,
    target_modules: str | Iterable[str] = "all-linear",
    rank: int = 8,
    alpha: float | None = None,
    *,
    band: str = "principal",
    residual_dtype: torch.dtype | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    generator: torch.Generator | None = None,
    exclude_modules: str | Iterable[str] = (),
    progress: Progress | None = None,
) -> ReplaceReport:
    """Put a FeDeRALinear in the place of the selected nn.Linear and Conv1D layers; freezes nothing else.

    target_modules   name suffixes, or one regular expression for the whole name, or "all-linear", as PEFT selects
    exclude_modules  name suffixes or one regular expression
    rank, alpha      s = alpha / rank; alpha defaults to rank
    factors          name -> (A0 (R,K), B0 (N,R)) received from elsewhere: residuals are derived, nothing is factored
    band, progress   see `lora_init`

    Memory at the peak: the model, all factors, and what one chunk of weights takes to factor or one layer to split.
    Of a transformers model the task head, poolers and output embeddings stay as they are. Raises ValueError before the
    model is touched: nothing matches, a rank above min(N,K), a weight that is not finite, factors that do not fit the
    selection, and what `lora_init` raises.
    """
    target_modules, exclude_modules = (m if isinstance(m, str) else list(m) for m in (target_modules, exclude_modules))
    check_band("replace_linears", band)
    chosen, skipped = _select(model, target_modules, exclude_modules)
    for name, layer in chosen.items():
        check_rank("replace_linears", rank, tuple(weight_of(layer).shape), f"rank for {name}")
        # The norm first: 4 ms for 4096x4096, where isfinite takes 150.
        if not torch.linalg.vector_norm(weight_of(layer)).isfinite() and not weight_of(layer).isfinite().all():
            raise ValueError(failure("replace_linears", f"{name}.weight", "be finite", "NaN or infinite entries"))
    scaling = scaling_of(alpha, rank)
    if factors is None:
        weights = [weight_of(layer) for layer in chosen.values()]
        pairs = list(starting_factors(weights, rank, scaling, band, generator, progress))
        del weights
    else:
        _check_factors(chosen, factors, rank)
    replaced = {}
    for index, name in enumerate(list(chosen)):
        layer = chosen.pop(name)  # so that its weight goes before the next residual comes
        if factors is None:
            init = split(weight_of(layer), *pairs[index], scaling, residual_dtype)
            ours = FeDeRALinear(layer, init, alpha, band)
        else:
            ours = FeDeRALinear.from_factors(layer, *factors[name], alpha, residual_dtype=residual_dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ours)
        replaced[name] = Replaced((ours.out_features, ours.in_features), ours.rounding)
        del layer
    return ReplaceReport(replaced, skipped)
