"""What went wrong in other projects' kernels of this kind, by the numbers of the list, around the products: 10 and 11
compilation and tracing, 12 weights swapped under a layer, 13 a quantised base, 15 stale packed forms, 17 reads from the
device.
"""

import contextlib
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from federa_kernels import FeDeRALinear, FrozenWeight, Segments, lora_linear, lora_linear_clients, lora_linear_shared

from .against_float64 import Draw, plain

forms = pytest.mark.parametrize("form", ["single", "clients", "shared"])
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


class Counted:
    """A torch.compile backend that runs the graph as it is and counts how many there were."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@forms
@pytest.mark.parametrize("frozen", [False, True], ids=["tensor", "frozen"])
def test_10_no_recompilation_per_number_of_rows_or_cut(form, frozen):
    draw, counted = Draw(0), Counted()
    weight, *adapter = (draw.of_width(*shape, dtype=torch.float32) for shape in ((64, 96), (8, 96), (64, 8)))
    held = FrozenWeight(weight) if frozen else weight

    def function(x, lora_A, lora_B, segments):
        if form == "single":
            return lora_linear(x, held, lora_A, lora_B, 0.5)
        if form == "shared":
            return lora_linear_shared(x, [(held, lora_A, lora_B, 0.5, None)] * 2)[0]
        return lora_linear_clients(x, held, lora_A[None].expand(2, -1, -1), lora_B[None].expand(2, -1, -1), segments)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counted, fullgraph=True, dynamic=True)
    for sizes in ([4, 5], [7, 3], [12, 0], [31, 33], [2, 2]):
        arguments = draw(sum(sizes), 96, dtype=torch.float32), *adapter, Segments.from_sizes(sizes, scalings=0.5)
        y = function(*arguments)
        torch.testing.assert_close(compiled(*arguments), y)
    assert counted.graphs == 1


def layer_of(seed=0, N=64, K=96, R=8):
    torch.manual_seed(seed)
    layer = FeDeRALinear.from_linear(nn.Linear(K, N), R)
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    return layer


@needs_compiler
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_11_compile_with_autocast_and_checkpointing(warm):
    layer, x = layer_of(), torch.randn(3, 5, 96)
    if warm:
        layer(x)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(layer, x.sin(), use_reentrant=False).float().cos()

    compiled, found = torch.compile(function, fullgraph=True, dynamic=True), []
    for f in (compiled, function):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = f(given)
        y.sum().backward()
        found.append((y, given.grad, layer.lora_A.grad, layer.lora_B.grad))
    for got, want in zip(*found, strict=True):  # two paths of bfloat16, each with its own rounding
        assert (got - want).norm() <= 2 * torch.finfo(torch.bfloat16).eps * want.norm()


def test_11_a_frozen_weight_under_fake_tensors_ends_no_process():
    """Memory estimators and tracers run models so; in a process of its own, which dies where it reads their memory."""
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from federa_kernels import FrozenWeight, lora_linear
with FakeTensorMode():
    x = torch.empty(5, 64, requires_grad=True)
    y = lora_linear(x, FrozenWeight(torch.empty(96, 64)), torch.empty(4, 64), torch.empty(96, 4), 1.0)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((5, 96), (5, 64))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_compiler
def test_11_exports():
    layer, x = layer_of(), torch.randn(5, 96)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("M", min=2)},))
    for rows in (x, torch.randn(9, 96)):
        torch.testing.assert_close(program.module()(rows), layer(rows))


def test_12_weights_are_read_when_the_layer_is_called():
    layer, other, x = layer_of(), layer_of(1), torch.randn(5, 96)
    layer(x), other(x)
    swapped = {name: p.detach() for name, p in other.named_parameters()}
    want, before = other(x), layer(x)
    torch.testing.assert_close(torch.func.functional_call(layer, swapped, (x,)), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), before)
    for name in ("residual", "lora_A", "lora_B", "bias"):
        setattr(layer, name, nn.Parameter(swapped[name].clone(), requires_grad=False))
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("name", ["residual", "lora_A", "lora_B"])
def test_12_a_parametrised_weight_is_what_counts(name):
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    layer, x = layer_of(), torch.randn(5, 96)
    layer(x)
    parts = {n: getattr(layer, n).detach() * (2 if n == name else 1) for n in ("residual", "lora_A", "lora_B", "bias")}
    nn.utils.parametrize.register_parametrization(layer, name, Double())
    want = plain(layer.scaling, x, *parts.values())
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_12_meta_device():
    layer = layer_of().to("meta")
    x = torch.empty(2, 5, 96, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, y.device.type, x.grad.shape) == ((2, 5, 64), "meta", x.shape)
    real = layer_of(1)
    layer.to_empty(device="cpu")
    layer.load_state_dict(real.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), real(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_13_a_quantised_base_is_refused_by_name(dtype):
    weight, message = torch.zeros(8, 6, dtype=dtype), f"weight must be float32, .* or float64, got {dtype}"
    with pytest.raises(TypeError, match=message):
        lora_linear(torch.zeros(3, 6), weight, torch.zeros(2, 6), torch.zeros(8, 2), 1.0)
    with pytest.raises(TypeError, match=message):
        FrozenWeight(weight)


def moved_there_and_back(layer):
    layer.bfloat16()
    layer.float()


def one_optimizer_step(layer):
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 96)).square().sum().backward()
    optimizer.step()
    layer.residual.requires_grad_(False)


CHANGES = {
    "load_state_dict": lambda layer: layer.load_state_dict(layer_of(1).state_dict()),
    "load_state_dict-assign": lambda layer: layer.load_state_dict(layer_of(1).state_dict(), assign=True),
    "original-checkpoint": lambda layer: layer.load_state_dict(nn.Linear(96, 64).state_dict()),
    "optimizer-step": one_optimizer_step,
    "adapter-swap": lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A.detach().neg())),
    "residual-swap": lambda layer: setattr(layer, "residual", nn.Parameter(-layer.residual, requires_grad=False)),
    "residual-data-swap": lambda layer: setattr(layer.residual, "data", -layer.residual.data),
    "there-and-back": moved_there_and_back,
    "to-bf16": lambda layer: layer.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_15_no_stale_packed_form(change):
    layer, x = layer_of(), torch.randn(40, 96)
    layer(x.requires_grad_()).sum().backward()
    before = layer(x)
    change(layer)
    x = x.detach().to(layer.residual.dtype)
    exact = linear(x.double(), layer.weight.double(), layer.bias.double())
    y = layer(x)
    assert (y - exact).norm() <= (0.02 if x.dtype == torch.bfloat16 else 1e-4) * exact.norm()
    assert not torch.equal(y.float(), before)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    assert (dx - layer.weight.double().sum(0)).norm() <= (0.02 if x.dtype == torch.bfloat16 else 1e-4) * dx.norm()


@pytest.mark.parametrize("device", ["cuda", "meta"])
@forms
def test_17_nothing_is_read_from_the_device(form, device):
    """Fake and meta tensors have no numbers: a call that asked for one would fail."""
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext(), torch.no_grad():
        shapes = [(37, 96), (64, 96), (8, 96), (64, 8), (64,)]
        x, weight, lora_A, lora_B, bias = (torch.empty(shape, device=device) for shape in shapes)
        if form == "single":
            y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias)
        elif form == "shared":
            y = lora_linear_shared(x, [(weight, lora_A, lora_B, 0.5, bias)] * 2)[1]
        else:
            segments = Segments.from_sizes([30, 7], scalings=0.5, ranks=[8, 4], device=device)
            stacked = lora_A.expand(2, -1, -1), lora_B.expand(2, -1, -1)
            y = lora_linear_clients(x, weight, *stacked, segments, bias)
        assert (y.shape, y.device.type) == ((37, 64), device)
