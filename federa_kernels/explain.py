"""Which implementation each linear layer of a model runs on, and why."""

import torch
from torch import Tensor, nn

from .frozen import PackedLinear
from .linear import FeDeRALinear
from .lora_linear import path_for


def explain(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Name of each FeDeRALinear, accelerated peft layer and frozen nn.Linear -> the path it takes where it is, and why.

    dtype  of the rows it is given; default: autocast's where that is on, else float32 (or the weight's own half)
    """
    paths, inner = {}, set()
    for name, layer in model.named_modules():
        if id(layer) in inner:
            continue
        if isinstance(layer, FeDeRALinear):
            paths[name] = path_for(layer.residual, layer.rank, _rows(layer.residual, layer.lora_A, dtype))
        elif type(layer).__qualname__ == "AcceleratedLinear":  # peft's; it need not be installed
            base, rank = layer.base_layer, max(layer.r.values(), default=0)
            paths[name] = path_for(base.weight, rank, _rows(base.weight, base.weight, dtype))
            inner.add(id(base))
        elif isinstance(layer, PackedLinear) and not layer.weight.requires_grad:
            paths[name] = path_for(layer.weight, 0, _rows(layer.weight, layer.weight, dtype))
        elif type(layer) is nn.Linear and not layer.weight.requires_grad:
            paths[name] = "PyTorch: not packed; pack_frozen(model) would"
    return paths


def _rows(weight: Tensor, adapter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    device = weight.device.type
    if dtype is None and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype or adapter.dtype
