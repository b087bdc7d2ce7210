import copy
import hashlib
import math
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from federa_kernels import FeDeRALinear, derive_residual, fingerprint, lora_init, truncated_svd

KEYS = {"residual", "lora_A", "lora_B", "lora_A0", "lora_B0"}
KINDS = ["linear", "linear-no-bias", "conv1d"]


def original(kind="linear", N=24, K=40, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    if kind == "conv1d":
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    return nn.Linear(K, N, bias=kind == "linear", dtype=dtype)


def in_rows(layer, weight):
    return weight.T if type(layer).__name__ == "Conv1D" or getattr(layer, "fan_in_fan_out", False) else weight


def trained(layer, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter += 0.1 * torch.randn(parameter.shape, generator=g).to(parameter)
    return layer


def built(layer, rank=4, **options):
    return FeDeRALinear.from_linear(layer, rank, **options)


@pytest.mark.parametrize("alpha", [None, 1, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_split_gives_the_weight_back(kind, alpha):
    layer = original(kind)
    ours = built(layer, alpha=alpha)
    W = in_rows(layer, layer.weight.detach()).double()
    back = ours.residual.double() + ours.scaling * ours.lora_B.double() @ ours.lora_A.double()
    assert ours.scaling == (alpha or 4) / 4
    assert (W - back).abs().max() <= 1e-6 * W.abs().max()
    assert ours.rounding == (W - back).abs().max()
    x = torch.randn(3, 5, 40)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.weight, layer.weight.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_residual_is_off_by_its_own_last_bit(kind):
    layer = original(kind)
    ours = built(layer, residual_dtype=torch.bfloat16)
    W = in_rows(layer, layer.weight.detach()).double()
    low = ours.lora_B.double() @ ours.lora_A.double()
    assert ours.residual.dtype == torch.bfloat16
    assert ((W - ours.residual.double() - low).abs() <= 2**-8 * (W - low).abs()).all()
    assert 0 < ours.rounding <= 2**-8 * (W - low).abs().max()
    assert ours.weight.dtype == torch.float32


def test_factors_are_the_principal_ones():
    W = original().weight.detach()
    (init,) = lora_init([W], 4, 2.0)
    U, S, Vh, *_ = truncated_svd(W, 4)
    torch.testing.assert_close(init.lora_A, (S / 2).sqrt()[:, None] * Vh)
    torch.testing.assert_close(init.lora_B, U * (S / 2).sqrt())
    torch.testing.assert_close(2 * init.lora_B @ init.lora_A, (U * S) @ Vh)
    assert torch.equal(init.residual, derive_residual(W, init.lora_A, init.lora_B, 2.0))
    spectrum = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(torch.linalg.svdvals(init.residual.double())[:20], spectrum[4:], rtol=1e-4, atol=1e-5)
    assert all(t.is_contiguous() for t in (init.lora_A, init.lora_B, init.residual))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_factors_are_float32_and_the_residual_keeps_the_weights_dtype(dtype):
    W = original(dtype=dtype).weight.detach()
    (init,) = lora_init([W], 4, 1.0)
    assert init.lora_A.dtype == init.lora_B.dtype == torch.float32
    assert init.residual.dtype == dtype
    assert init.rounding <= torch.finfo(dtype).eps * W.double().abs().max()


def test_autocast_does_not_reach_the_split():
    W = original().weight.detach()
    (plain,) = lora_init([W], 4, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        (init,) = lora_init([W], 4, 1.0)
        assert truncated_svd(W, 4).residual < 1e-5
    for a, b in zip(init, plain, strict=True):
        assert a == b if isinstance(a, float) else torch.equal(a, b)


def test_zero_band_is_lora():
    W, g = original().weight.detach(), torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    first, second = lora_init([W, W], 4, 1.0, "zero", generator=g)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.residual, W)
    assert first.rounding == 0
    assert not first.lora_B.any()
    assert not torch.equal(first.lora_A, second.lora_A)
    assert 0.9 / math.sqrt(40) < first.lora_A.abs().max() <= 1 / math.sqrt(40)
    (again, _) = lora_init([W, W], 4, 1.0, "zero", generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.lora_A, first.lora_A)


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"band": "middle"}, ValueError, r"band must be one of principal, minor, orthogonal, zero, got 'middle'"),
        ({"scaling": 0.0}, ValueError, r"scaling must be above 0, got 0.0"),
        ({"scaling": float("nan")}, ValueError, r"scaling must be above 0, got nan"),
        ({"band": "zero"}, ValueError, r'generator must be a torch.Generator for band "zero", got None'),
        ({"rank": 25}, ValueError, r"rank must be between 1 and 24 for a \(24, 40\) matrix, got 25"),
        ({"weights": [torch.zeros(3)]}, ValueError, r"weight 0 must have shape \(N, K\), got \(3,\)"),
        ({"weights": [torch.zeros(3, 3).int()]}, TypeError, r"weight 0 must be float32, .*, got torch.int32"),
    ],
)
def test_lora_init_errors(options, exception, message):
    arguments = {"weights": [torch.zeros(24, 40)], "rank": 2, "scaling": 1.0} | options
    with pytest.raises(exception, match=f"^lora_init: {message}$"):
        lora_init(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fingerprint_sees_every_part(dtype):
    W, A, B = torch.randn(6, 5).to(dtype), torch.randn(2, 5), torch.randn(6, 2)
    mark = fingerprint(W, A, B, 1.0)
    assert len(bytes.fromhex(mark)) == 32
    assert mark == fingerprint(W.T.contiguous().T.clone(), nn.Parameter(A), B.clone(), 1)
    nudged = W.clone()
    nudged[3, 3] *= 1 + torch.finfo(dtype).eps
    others = [(nudged, A, B, 1.0), (W, A + 1, B, 1.0), (W, A, -B, 1.0), (W, A, B, math.nextafter(1.0, 2.0))]
    others += [(W.reshape(5, 6), A, B, 1.0), (W, A.double(), B, 1.0)]
    assert len({mark, *(fingerprint(*other) for other in others)}) == 7


def test_fingerprint_is_pinned():
    parts = [("(1, 2)", [1.0, 2.0]), ("(1, 2)", [3.0, 4.0]), ("(1, 1)", [5.0])]
    stream = b"".join(f"torch.float32 {s}\n".encode() + struct.pack(f"<{len(v)}f", *v) for s, v in parts)
    stream += b"torch.float64 (1,)\n" + struct.pack("<d", 0.5)
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])]
    assert fingerprint(*tensors, 0.5) == hashlib.sha256(stream).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_and_what_is_stored(kind):
    layer = original(kind)
    ours = built(layer)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert set(ours.state_dict()) == KEYS | ({"bias"} if layer.bias is not None else set())
    assert (ours.in_features, ours.out_features, ours.rank, ours.alpha, ours.band) == (40, 24, 4, 4, "principal")
    assert ours.fan_in_fan_out == (kind == "conv1d")
    parameters = [*ours.parameters(), *layer.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    ours(torch.randn(2, 40)).sum().backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert "rank=4" in repr(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_received_factors_give_the_same_layer(kind):
    layer = original(kind)
    ours = built(layer, alpha=8)
    received = FeDeRALinear.from_factors(layer, ours.lora_A0, ours.lora_B0, 8)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, received.state_dict()[key]), key
    assert (received.band, received.rounding, received.scaling) == (ours.band, ours.rounding, ours.scaling)
    assert FeDeRALinear.from_factors(layer, ours.lora_A0, torch.zeros(24, 4)).band == "zero"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merge_is_the_replaced_class_with_the_effective_weight(kind, dtype):
    layer = original(kind, dtype=dtype).eval()
    state = torch.get_rng_state()
    ours = trained(built(layer))
    merged = ours.merge()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(merged) is type(layer)
    assert merged.weight.dtype == dtype
    assert merged.weight.shape == layer.weight.shape
    assert not merged.training
    assert torch.equal(merged.weight, ours.weight)
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: p.requires_grad for n, p in layer.named_parameters()
    }
    x = torch.randn(7, 40).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(merged(x), ours(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_on_the_original_weight_is_the_trained_layer(kind):
    layer = original(kind)
    ours = trained(built(layer, alpha=6))
    lora_A, lora_B = ours.delta()
    assert (lora_A.shape, lora_B.shape) == ((8, 40), (24, 8))
    moved = in_rows(layer, layer.weight.detach()) + ours.scaling * lora_B @ lora_A
    torch.testing.assert_close(in_rows(ours, ours.weight), moved, rtol=1e-5, atol=1e-5)


def test_weight_cannot_be_assigned():
    ours = built(original())
    for value in (torch.zeros(24, 40), nn.Parameter(torch.zeros(24, 40))):
        with pytest.raises(AttributeError, match="^FeDeRALinear: weight must not be assigned"):
            ours.weight = value
    assert not ours.weight.requires_grad
    assert "weight" not in ours.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_into_a_layer_of_another_weight(kind):
    ours = trained(built(original(kind)))
    other = built(original(kind, seed=9))
    other.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(other(x), ours(x))
    assert all(torch.equal(a, b) for a, b in zip(other.delta(), ours.delta(), strict=True))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_original_checkpoint_is_split_anew(kind, assign):
    model = nn.Sequential(trained(built(original(kind), alpha=8)))
    new = original(kind, seed=9)
    model.load_state_dict({f"0.{key}": tensor for key, tensor in new.state_dict().items()}, assign=assign)
    want = built(new, alpha=8)
    for key, tensor in want.state_dict().items():
        assert torch.equal(model[0].state_dict()[key], tensor), key
    assert model[0].rounding == want.rounding
    assert model[0].lora_A.requires_grad
    assert model[0].lora_A.data_ptr() != model[0].lora_A0.data_ptr()


def test_an_original_checkpoint_under_the_zero_band():
    ours = trained(built(original(), band="zero", generator=torch.Generator().manual_seed(0)))
    start, new = ours.lora_A0.clone(), original(seed=9)
    ours.load_state_dict(new.state_dict())
    assert torch.equal(ours.residual, new.weight)
    assert torch.equal(ours.lora_A, start)
    assert torch.equal(ours.lora_A0, start)
    assert not ours.lora_B.any()
    assert not ours.lora_B0.any()


def test_checkpoints_that_do_not_fit_are_refused_by_name():
    model = nn.Sequential(built(original()))
    before = copy.deepcopy(model.state_dict())
    both = before | {"0.weight": torch.zeros(24, 40)}
    with pytest.raises(RuntimeError, match=r"0\.weight must come alone, got also residual, lora_A"):
        model.load_state_dict(both)
    with pytest.raises(RuntimeError, match=r"0\.weight must have shape \(N, K\) with N=24, K=40, got \(40, 24\)"):
        model.load_state_dict({"0.weight": torch.zeros(40, 24), "0.bias": torch.zeros(24)})
    with pytest.raises(RuntimeError, match="must be finite"):
        model.load_state_dict({"0.weight": torch.full((24, 40), torch.nan), "0.bias": torch.zeros(24)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        model.load_state_dict({"0.weight": original(seed=3).weight})
    model.load_state_dict(before)


@pytest.mark.parametrize(
    ("build", "exception", "message"),
    [
        (lambda: built(nn.Bilinear(2, 3, 4)), TypeError, r"linear must be nn.Linear or .*, got Bilinear"),
        (lambda: built(original(), alpha=-1), ValueError, r"alpha must be above 0, got -1"),
        (lambda: built(original(), rank=25), ValueError, r"rank must be between 1 and 24 for .*, got 25"),
        (
            lambda: FeDeRALinear.from_factors(original(), torch.zeros(4, 24), torch.zeros(40, 4)),
            ValueError,
            r"lora_A0 must have shape \(R, K\) with K=40, got \(4, 24\)",
        ),
        (
            lambda: FeDeRALinear.from_factors(original(), torch.zeros(4, 40), torch.zeros(24, 3)),
            ValueError,
            r"lora_B0 must have shape \(N, R\) with N=24, R=4, got \(24, 3\)",
        ),
    ],
    ids=["class", "alpha", "rank", "A0", "B0"],
)
def test_errors(build, exception, message):
    with pytest.raises(exception, match=f"^FeDeRALinear: {message}$"):
        build()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_independent_and_equal(kind):
    ours, x = trained(built(original(kind))), torch.randn(3, 40)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), ours(x))
        assert torch.equal(twin.merge().weight, ours.merge().weight)
        assert {n for n, p in twin.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}


def test_to_moves_everything_with_the_merged_dtype():
    ours = built(original()).to(torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.weight.dtype == ours.merge().weight.dtype == torch.bfloat16
    assert ours(torch.randn(3, 40).bfloat16()).dtype == torch.bfloat16
    assert ours.to("meta").weight.device.type == "meta"


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, other = trained(built(original("conv1d"))), built(original("conv1d", seed=9))
    safetensors.save_model(ours, tmp_path / "layer.safetensors")
    safetensors.load_model(other, tmp_path / "layer.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), ours.parameters(), strict=True))


def test_autocast_and_checkpointing():
    ours, x = built(original()), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(ours, x, use_reentrant=False)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert ours.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), original()(x), rtol=3e-2, atol=3e-2)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiles():
    ours, x = trained(built(original())), torch.randn(3, 40)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    y = compiled(x)
    torch.testing.assert_close(y, ours(x))
    y.sum().backward()
    grad, ours.lora_A.grad = ours.lora_A.grad, None
    ours(x).sum().backward()
    torch.testing.assert_close(grad, ours.lora_A.grad)


def test_import_starts_nothing():
    program = """
import sys, threading
import torch
threads, touched = threading.active_count(), []
sys.addaudithook(lambda event, _: touched.append(event) if event.startswith(("socket.", "subprocess.")) else None)
import federa_kernels
assert not torch.cuda.is_initialized()
assert threading.active_count() == threads
assert not touched, touched
assert not {"transformers", "triton", "peft"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
