"""What `explain` says is what the layers do."""

import pytest
import torch
from torch import nn

from federa_kernels import explain, pack_frozen, replace_linears
from federa_kernels.lora_linear.cpu import packs


def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)).requires_grad_(False)
    replace_linears(layers, ["0"], 2)
    layers[2].requires_grad_(True)
    return layers


def test_every_frozen_layer_has_a_path_and_those_that_train_have_none():
    layers = model()
    assert list(explain(layers)) == ["0", "1"]
    assert explain(layers)["1"] == "PyTorch: not packed; pack_frozen(model) would"
    assert pack_frozen(layers) == (["1"] if explain(layers, torch.float32)["0"].startswith("C++") else [])


def test_a_path_without_kernels_says_why():
    assert "torch.float64 rows" in explain(model(), torch.float64)["0"]


def test_the_autocast_dtype_is_what_rows_have():
    layers = model()
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(layers) == explain(layers, torch.bfloat16)


@pytest.mark.skipif(not packs(torch.float32, torch.ones(1, 1)), reason="no packed forms on this processor")
def test_packed_layers_compute_what_nn_linear_does_and_stay_nn_linears():
    layers, x = nn.Sequential(nn.Linear(40, 33)).requires_grad_(False), torch.randn(3, 5, 40, requires_grad=True)
    expected = layers(x.double().float())
    assert pack_frozen(layers) == ["0"] and isinstance(layers[0], nn.Linear)
    (gradient,) = torch.autograd.grad(layers(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(nn.functional.linear(x, layers[0].weight, layers[0].bias).square().sum(), x)
    torch.testing.assert_close(layers(x), expected)
    torch.testing.assert_close(gradient, wanted)
    layers.load_state_dict({"0.weight": torch.zeros(33, 40), "0.bias": torch.ones(33)})
    assert torch.equal(layers(x), torch.ones(3, 5, 33))
