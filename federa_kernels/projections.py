"""Projections that read the same x, computed in one call: query, key and value, gate and up."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .frozen import FrozenWeight
from .linear import FeDeRALinear
from .lora_linear import lora_linear_shared

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj")
# Modules whose forward gives the children named here one and the same tensor, in this order. Told by name:
# transformers need not be installed, nor be imported for this.
_ONE_INPUT = {
    f"transformers.models.{path}": children
    for path, children in {
        "bert.modeling_bert.BertSelfAttention": ("query", "key", "value"),
        "roberta.modeling_roberta.RobertaSelfAttention": ("query", "key", "value"),
        "xlm_roberta.modeling_xlm_roberta.XLMRobertaSelfAttention": ("query", "key", "value"),
        "deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": ("query_proj", "key_proj", "value_proj"),
        "llama.modeling_llama.LlamaAttention": _QKV,
        "llama.modeling_llama.LlamaMLP": _MLP,
        "qwen2.modeling_qwen2.Qwen2Attention": _QKV,
        "qwen2.modeling_qwen2.Qwen2MLP": _MLP,
        "qwen3.modeling_qwen3.Qwen3Attention": _QKV,
        "qwen3.modeling_qwen3.Qwen3MLP": _MLP,
    }.items()
}


class _Call:
    """One call of the module that holds the projections: the first one computes all, and the others find theirs.

    An output is handed over once, to the layer whose parameters it came from, for the very tensor it came from, which
    nobody has written to since, in the same grad and autocast mode. Whoever calls otherwise computes for itself.
    """

    def __init__(self, layers: list["SharedFeDeRALinear"]):
        self.layers = layers
        self.found: tuple[Tensor, tuple, dict[int, Tensor]] | None = None

    def output(self, layer: "SharedFeDeRALinear", x: Tensor) -> Tensor | None:
        found, mode = self.found, _mode(x)
        if found is None:
            ys = lora_linear_shared(x, [each.projection() for each in self.layers])
            outputs = {id(each): y for each, y in zip(self.layers, ys, strict=True)}
            # In one assignment: threads that call the model at once may share this object.
            found = self.found = (x, mode, outputs)
        known_x, known_mode, outputs = found
        return outputs.pop(id(layer), None) if x is known_x and mode == known_mode else None


def _mode(x: Tensor) -> tuple:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    unversioned = torch.compiler.is_compiling() or x.is_inference()
    return 0 if unversioned else x._version, torch.is_grad_enabled(), autocast


class SharedFeDeRALinear(FeDeRALinear):
    """A FeDeRALinear that may find its output computed by one that read the same x; see `fuse_projections`."""

    _call: _Call | None = None

    def projection(self) -> tuple[Tensor | FrozenWeight, Tensor, Tensor, float, Tensor | None]:
        return self.frozen, self.lora_A, self.lora_B, self.scaling, self.bias

    def forward(self, x: Tensor) -> Tensor:
        call = self._call
        y = None if call is None else call.output(self, x)
        return super().forward(x) if y is None else y


def _joins(layer: object) -> bool:
    """Whether others may compute for this layer: not where something stands between the call and its forward."""
    if type(layer) is not SharedFeDeRALinear:
        return False
    return not (layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer))


class _Sharing:
    """The hooks of a module with such children: nothing but their names outlives a call, an exception included."""

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)

    def begin(self, module: nn.Module, args: Any) -> None:
        children: list[Any] = [getattr(module, name, None) for name in self.names]
        layers = [layer for layer in children if _joins(layer)]
        call = _Call(layers) if len(layers) > 1 else None
        for layer in layers:
            layer._call = call

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        for name in self.names:
            layer = getattr(module, name, None)
            if type(layer) is SharedFeDeRALinear:
                layer._call = None


@dataclass
class FuseReport:
    """What `fuse_projections` did: per module the projections that share, and why a module or layer does not."""

    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused the projections of {len(self.fused)} modules"]
        lines += [f"  {name}  {', '.join(children)}" for name, children in self.fused.items()]
        lines += [f"skipped {len(self.skipped)}"] if self.skipped else []
        lines += [f"  {name}  {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def fuse_projections(model: nn.Module) -> FuseReport:
    """Let FeDeRALinear layers that read the same x compute in one `lora_linear_shared`.

    Query, key and value, and gate and up, of BERT, RoBERTa, XLM-RoBERTa, DeBERTa-v2 and -v3, Llama, Qwen2 and Qwen3 in
    transformers; anything else stays as it is, and so do layers of other classes beside them: without an adapter there
    is no h to share. Parameters, state_dict and the layers' own hooks stay as they are. A layer that is replaced,
    merged, wrapped, or called with another tensor computes for itself from then on, or that once.

    Works by two hooks on each such module and by the class of its layers, which becomes SharedFeDeRALinear.
    """
    report = FuseReport()
    for name, module in model.named_modules():
        layers = {n: child for n, child in module.named_children() if type(child) in (FeDeRALinear, SharedFeDeRALinear)}
        kind = type(module)
        expected = _ONE_INPUT.get(f"{kind.__module__}.{kind.__qualname__}")
        if expected is None:
            if len(layers) > len({layer.in_features for layer in layers.values()}):
                report.skipped[name] = f"is a {kind.__name__}, not known to give its projections one input"
            continue
        shared = tuple(child for child in expected if child in layers)
        if len(shared) < 2:
            if shared:
                report.skipped[name] = f"has no other FeDeRALinear beside {shared[0]}"
            continue
        others = {child: type(getattr(module, child)).__name__ for child in expected if child not in layers}
        report.skipped |= {f"{name}.{child}": f"is a {other}" for child, other in others.items()}
        _fuse(module, [layers[child] for child in shared], expected)
        report.fused[name] = shared
    return report


def _fuse(module: nn.Module, layers: list[FeDeRALinear], names: Iterable[str]) -> None:
    for layer in layers:
        layer.__class__ = SharedFeDeRALinear
    hooks = module._forward_pre_hooks.values()
    if not any(isinstance(getattr(hook, "__self__", None), _Sharing) for hook in hooks):
        sharing = _Sharing(names)
        module.register_forward_pre_hook(sharing.begin)
        module.register_forward_hook(sharing.end, always_call=True)
