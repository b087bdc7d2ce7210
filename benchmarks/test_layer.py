"""The short suite, `make bench`: nn.Linear frozen, FeDeRALinear and peft's LoRA on MiniLM's widths, one step each.

Frozen: forward and the gradient of x. The others: the gradients of A and B too. fp32, 512 rows, one CPU thread.
"""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from federa_kernels import FeDeRALinear

ROWS, RANK = 512, 8


def frozen(linear: nn.Linear) -> nn.Module:
    return linear.requires_grad_(False)


def federa(linear: nn.Linear) -> nn.Module:
    return FeDeRALinear.from_linear(linear, RANK)


def peft(linear: nn.Linear) -> nn.Module:
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    return inject_adapter_in_model(settings, nn.Sequential(linear))


@pytest.mark.parametrize("provider", [frozen, federa, peft], ids=lambda provider: provider.__name__)
@pytest.mark.parametrize(("K", "N"), [(384, 384), (384, 1536), (1536, 384)], ids=lambda size: str(size))
def test_step(benchmark, provider, K, N):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(K, N)
    x = torch.randn(ROWS, K, generator=generator, requires_grad=True)
    dy = torch.randn(ROWS, N, generator=generator)
    with torch.no_grad():
        expected = linear(x)
    layer = provider(linear)
    assert torch.allclose(layer(x), expected, atol=1e-4)

    def step():
        layer(x).backward(dy)

    benchmark.group = f"{K}x{N}"
    benchmark(step)
