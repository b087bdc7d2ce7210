"""What must hold whether or not this machine has packed forms, and what they must not change where it has."""

import copy
import io
import pickle
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from federa_kernels import (
    FrozenWeight,
    Segments,
    load_extension,
    lora_linear,
    lora_linear_clients,
    lora_linear_shared,
)
from federa_kernels.lora_linear import cpu

from . import against_float64 as cases
from .against_float64 import DTYPES, Draw, assert_as_good_as_torch, run

KINDS = {
    "fp32": (torch.float32,) * 2,
    "fp32-bf16-weight": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16,) * 2,
}
ADAPTERS_AND_X = (True, False, True, True, True)
pytestmark = pytest.mark.usefixtures("poisoned")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def make(M=37, N=65, K=96, R=8, rows=torch.float32, weight=torch.float32, seed=0):
    draw = Draw(seed)
    tensors = [draw(M, K, dtype=rows), draw.of_width(N, K, dtype=weight), draw.of_width(R, K, dtype=torch.float32)]
    return [*tensors, draw.of_width(N, R, dtype=torch.float32), draw(N, dtype=rows)], draw(M, N, dtype=rows)


def through(frozen):
    return lambda s, x, weight, lora_A, lora_B, bias: lora_linear(x, frozen, lora_A, lora_B, s, bias)


def results(frozen, tensors, dy):
    return run(through(frozen), 0.5, tensors, dy, ADAPTERS_AND_X)


def assert_fresh(frozen, tensors, dy):
    """What comes out belongs to the weight as it is now."""
    tensors = [tensors[0], frozen.weight.detach(), *tensors[2:]]
    assert_as_good_as_torch(through(frozen), cases.plain, 0.5, tensors, dy, ADAPTERS_AND_X)
    fresh = results(FrozenWeight(frozen.weight.detach().clone()), tensors, dy)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(results(frozen, tensors, dy), fresh, strict=True))


def packed_bytes_of(N, K, dtype):
    """Bytes of the form for x W^T and of both, as FrozenWeight's docstring has them."""

    def up(size, to):
        return -(-size // to) * to

    if cpu.engine() == "amx":
        one = {torch.float32: 6, torch.bfloat16: 2}[dtype] * up(N, 32) * up(K, 32)
        return one, 2 * one
    to = {"avx512": 16, "avx2": 8}.get(cpu.engine(), 1)
    return dtype.itemsize * up(N, to) * K, dtype.itemsize * (up(N, to) * K + up(K, to) * N)


@pytest.mark.parametrize(("rows", "weight"), KINDS.values(), ids=KINDS)
def test_packed_forms_are_made_where_the_machine_has_them_and_only_when_used(rows, weight):
    tensors, dy = make(rows=rows, weight=weight)
    frozen, has = FrozenWeight(tensors[1]), cpu.packs(rows, tensors[1])
    one, both = packed_bytes_of(65, 96, weight) if has else (0, 0)
    assert frozen.packed_bytes() == 0
    with torch.no_grad():
        lora_linear(tensors[0], frozen, *tensors[2:4], 0.5)
    assert frozen.packed_bytes() == one
    run(through(frozen), 0.5, tensors, dy, (False, False, True, True, False))
    assert frozen.packed_bytes() == one
    results(frozen, tensors, dy)
    assert frozen.packed_bytes() == both
    frozen.drop()
    assert frozen.packed_bytes() == 0
    assert_fresh(frozen, tensors, dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_dtypes_without_a_packed_form_are_right_without_one(dtype):
    tensors, dy = make(rows=dtype, weight=dtype)
    frozen = FrozenWeight(tensors[1])
    assert_fresh(frozen, tensors, dy)
    assert frozen.packed_bytes() == 0
    assert not cpu.packs(dtype, tensors[1])


def test_a_weight_on_another_device_is_not_packed():
    assert not cpu.packs(torch.float32, torch.empty(64, 64, device="meta"))
    frozen = FrozenWeight(torch.empty(64, 64, device="meta"))
    meta = [torch.empty(shape, device="meta") for shape in ((5, 64), (4, 64), (64, 4))]
    assert lora_linear(meta[0], frozen, *meta[1:], 1.0).shape == (5, 64)
    assert frozen.packed_bytes() == 0


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (32, 32), (33, 31), (257, 100)], ids=str)
def test_memory_is_what_the_docstring_says(shape):
    frozen = FrozenWeight(torch.randn(shape))
    frozen.forms(torch.float32, backward=True)
    _, both = packed_bytes_of(*shape, torch.float32)
    assert frozen.packed_bytes() == (both if cpu.packs(torch.float32, frozen.weight) else 0)


@pytest.mark.parametrize(("rows", "weight"), KINDS.values(), ids=KINDS)
def test_packed_forms_are_never_copied_pickled_or_saved(rows, weight):
    tensors, dy = make(rows=rows, weight=weight)
    layer = nn.Module()
    layer.weight = nn.Parameter(tensors[1], requires_grad=False)
    layer.frozen = frozen = FrozenWeight(layer.weight)
    size = len(pickle.dumps(frozen))
    want = results(frozen, tensors, dy)
    assert len(pickle.dumps(frozen)) == size
    assert layer.state_dict().keys() == {"weight"}
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), copy.deepcopy(layer).frozen, loaded.frozen):
        assert twin.packed_bytes() == 0
        assert twin.weight.data_ptr() != frozen.weight.data_ptr()
        assert twin.weight.dtype == weight
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(results(twin, tensors, dy), want, strict=True))
    assert frozen.packed_bytes() == (packed_bytes_of(65, 96, weight)[1] if cpu.packs(rows, tensors[1]) else 0)


def test_what_two_layers_share_stays_shared_in_a_copy():
    layers = nn.ModuleList([nn.Module(), nn.Module()])
    shared = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    for layer in layers:
        layer.weight = shared
    layers[0].frozen = layers[1].frozen = FrozenWeight(shared)
    twins = copy.deepcopy(layers)
    assert twins[0].frozen is twins[1].frozen
    assert twins[0].frozen.weight is twins[1].weight is not shared


CHANGES = {
    "copy_": lambda p: p.copy_(torch.randn_like(p)),
    "mul_": lambda p: p.mul_(2),
    "one-entry": lambda p: p[3, 4].add_(1),
    "through-a-view": lambda p: p.view(-1)[5:9].zero_(),
    "new-data": lambda p: setattr(p, "data", torch.randn_like(p)),
    "set_": lambda p: p.set_(torch.randn_like(p)),
    "to-bf16": lambda p: setattr(p, "data", p.data.bfloat16()),
    "round-trip": lambda p: setattr(p, "data", p.data.bfloat16().float()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_weight_that_was_written_to_is_packed_again(change):
    tensors, dy = make()
    frozen = FrozenWeight(nn.Parameter(tensors[1].clone(), requires_grad=False))
    before = results(frozen, tensors, dy)
    with torch.no_grad():
        change(frozen.weight)
    assert_fresh(frozen, tensors, dy)
    assert not torch.equal(results(frozen, tensors, dy)[0], before[0])


def test_a_layer_that_was_moved_there_and_back_is_packed_again():
    """`layer.bfloat16().float()`, where a new tensor may come to lie where an old one lay."""
    tensors, dy = make()
    layer = nn.Module()
    layer.weight = nn.Parameter(tensors[1].clone(), requires_grad=False)
    frozen = FrozenWeight(layer.weight)
    for _ in range(10):
        results(frozen, tensors, dy)
        layer.bfloat16().float()
        layer.weight.data.mul_(1.5)  # before its first use there
        assert_fresh(frozen, tensors, dy)


def test_load_state_dict_is_seen():
    tensors, dy = make()
    layer = nn.Linear(96, 65, bias=False).requires_grad_(False)
    frozen = FrozenWeight(layer.weight)
    results(frozen, tensors, dy)
    layer.load_state_dict({"weight": tensors[1]})
    assert torch.equal(frozen.weight, tensors[1])
    assert_fresh(frozen, tensors, dy)


@pytest.mark.parametrize("inside", [True, False], ids=["written-inside", "written-before"])
def test_inference_mode(inside):
    tensors, _ = make()
    with torch.inference_mode():
        weight = tensors[1].clone()
        frozen = FrozenWeight(weight)
        lora_linear(tensors[0], frozen, *tensors[2:4], 0.5)
        weight.copy_(tensors[1].flip(0))
        if inside:
            y = lora_linear(tensors[0], frozen, *tensors[2:4], 0.5)
    if not inside:
        y = lora_linear(tensors[0], frozen, *tensors[2:4], 0.5)
    torch.testing.assert_close(y, lora_linear(tensors[0], tensors[1].flip(0), *tensors[2:4], 0.5))


def test_an_inference_result_equals_a_training_result():
    tensors, dy = make()
    frozen = FrozenWeight(tensors[1])
    with torch.inference_mode():
        y = lora_linear(tensors[0], frozen, *tensors[2:4], 0.5, tensors[4])
    assert torch.equal(y, results(frozen, tensors, dy)[0])


@pytest.mark.parametrize("form", ["single", "clients", "shared"])
def test_no_gradient_ever_reaches_a_frozen_weight(form):
    (x, weight, lora_A, lora_B, bias), _ = make()
    weight = nn.Parameter(weight)
    frozen = FrozenWeight(weight)
    x, lora_A, lora_B = (t.requires_grad_() for t in (x, lora_A, lora_B))
    if form == "single":
        y = lora_linear(x, frozen, lora_A, lora_B, 1.0, bias)
    elif form == "clients":
        y = lora_linear_clients(x, frozen, lora_A[None], lora_B[None], Segments.from_sizes([37]), bias)
    else:
        (y,) = lora_linear_shared(x, [(frozen, lora_A, lora_B, 1.0, bias)])
    y.sum().backward()
    assert weight.grad is None
    assert all(t.grad is not None for t in (x, lora_A, lora_B))


def test_two_layers_may_share_one():
    tensors, dy = make()
    others, _ = make(seed=1)
    frozen = FrozenWeight(tensors[1])
    first = results(frozen, tensors, dy)
    held = frozen.packed_bytes()
    results(frozen, others, dy)
    assert frozen.packed_bytes() == held
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(results(frozen, tensors, dy), first, strict=True))


def test_rows_of_both_dtypes_may_share_one():
    tensors, dy = make(weight=torch.bfloat16)
    half = [tensors[0].bfloat16(), *tensors[1:]]
    frozen = FrozenWeight(tensors[1])
    for each, gradient in ((tensors, dy), (half, dy.bfloat16()), (tensors, dy)):
        assert_fresh(frozen, each, gradient)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.sampled_from([1, 15, 31, 32, 33, 97]), cases.widths, cases.widths, cases.ranks),
    kind=st.sampled_from(list(KINDS.values())),
    clients=st.integers(1, 4),
)
def test_any_number_of_threads_gives_the_same_bits(sizes, kind, clients):
    M, N, K, R = sizes
    (x, weight, lora_A, lora_B, bias), dy = make(M, N, K, R, *kind)
    cuts = [M // clients] * (clients - 1)
    segments = Segments.from_sizes([*cuts, M - sum(cuts)])
    frozen = FrozenWeight(weight)

    def function(_, x, weight, lora_A, lora_B, bias):
        stacked = (t[None].expand(clients, -1, -1) for t in (lora_A, lora_B))
        y = lora_linear_clients(x, frozen, *stacked, segments, bias)
        return [y, *lora_linear_shared(x, [(frozen, lora_A, lora_B, 0.5, bias)] * 2)]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            frozen.drop()
            found.append(run(function, None, [x, None, lora_A, lora_B, bias], [dy] * 3))
    finally:
        torch.set_num_threads(before)
    if cpu.packs(kind[0], weight):  # torch's own products may differ
        for again in found[1:]:
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    assert all(t is None or t.isfinite().all() for again in found for t in again)


def test_many_python_threads_at_once_give_the_same_bits():
    tensors, dy = make(M=64)
    frozen = FrozenWeight(tensors[1])
    want = results(FrozenWeight(tensors[1]), tensors, dy)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: results(frozen, tensors, dy), range(64)):
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(32768, 40, 64, 16), (40, 64, 14336, 16), (40, 14336, 64, 16)], ids=str)
@pytest.mark.parametrize(("rows", "weight"), KINDS.values(), ids=KINDS)
def test_long_sums(rows, weight, shape):
    tensors, dy = make(*shape, rows, weight)
    assert_fresh(FrozenWeight(tensors[1]), tensors, dy)


def test_torchs_own_products_between_calls_disturb_nothing():
    """Both set up the processor's tile units, each in its way."""
    tensors, dy = make(M=64, rows=torch.bfloat16, weight=torch.bfloat16)
    frozen, x, weight = FrozenWeight(tensors[1]), tensors[0], tensors[1]
    ours, theirs = results(frozen, tensors, dy), x @ weight.T
    for _ in range(5):
        again, product = results(frozen, tensors, dy), x @ weight.T
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, ours, strict=True))
        assert torch.equal(product, theirs)


@pytest.mark.parametrize("exponent", [-80, 100], ids=lambda e: f"2^{e}")
@pytest.mark.parametrize(("rows", "weight"), KINDS.values(), ids=KINDS)
def test_the_scale_of_the_numbers_does_not_matter(rows, weight, exponent):
    (x, W, lora_A, lora_B, bias), dy = make(rows=rows, weight=weight)
    factor, down = 2.0**exponent, 2.0 ** (exponent // -8)
    tensors, frozen = [x * factor, W, lora_A, lora_B, bias * factor], FrozenWeight(W)
    assert_fresh(frozen, tensors, dy * down)
    want = results(frozen, [x, W, lora_A, lora_B, bias], dy)
    got = results(frozen, tensors, dy * down)
    factors = (factor, down, None, factor * down, factor * down, down)
    for a, b, scaled in zip(got, want, factors, strict=True):
        assert a is b is None or torch.equal(a, b * scaled)


NOT_FINITE = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "nan-of-ones": None}


@pytest.mark.parametrize(("rows", "weight"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("place", ["x", "weight", "lora_A", "lora_B", "bias", "dy"])
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_what_is_not_finite_shows_and_leaves_no_trace(value, place, rows, weight):
    tensors, dy = make(rows=rows, weight=weight)
    tensors[2].abs_(), tensors[3].abs_()
    before = results(FrozenWeight(tensors[1]), tensors, dy)
    ill = {name: t.clone() for name, t in zip((*cases.NAMES, "dy"), (*tensors, dy), strict=True)}
    spot = tuple(n // 2 for n in ill[place].shape)
    if value is None:
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[ill[place].dtype]
        ill[place].view(bits)[spot] = torch.iinfo(bits).max
    else:
        ill[place][spot] = value
    *others, ill_dy = ill.values()
    got = results(FrozenWeight(others[1]), others, ill_dy)
    exact = run(cases.plain, 0.5, [t.double() for t in others], ill_dy.double(), ADAPTERS_AND_X)
    assert any(true is not None and not true.isfinite().all() for true in exact)
    for ours, true in zip(got, exact, strict=True):
        assert true is None or not ours[~true.isfinite()].isfinite().any()
    after = results(FrozenWeight(tensors[1]), tensors, dy)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [None, *DTYPES.values()], ids=["as-given", *DTYPES])
def test_casts_once_and_keeps_a_weight_of_its_dtype(dtype):
    weight = torch.randn(6, 5)
    frozen = FrozenWeight(weight, dtype=dtype)
    assert frozen.shape == (6, 5)
    assert torch.equal(frozen.weight, weight.to(dtype or torch.float32))
    assert (frozen.weight is weight) == (dtype in (None, torch.float32))


@pytest.mark.parametrize(
    ("weight", "exception", "message"),
    [
        (torch.zeros(3), ValueError, r"weight must have shape \(N, K\), got \(3,\)"),
        (torch.zeros(2, 3, 4), ValueError, r"weight must have shape \(N, K\), got \(2, 3, 4\)"),
        (torch.zeros(3, 4).int(), TypeError, r"weight must be float32, bfloat16, float16 or float64, got torch.int32"),
    ],
    ids=["1d", "3d", "int"],
)
def test_errors(weight, exception, message):
    with pytest.raises(exception, match=f"^FrozenWeight: {message}$"):
        FrozenWeight(weight)


@pytest.mark.parametrize(("rows", "weight"), KINDS.values(), ids=KINDS)
def test_opcheck_with_packed_forms(rows, weight):
    (x, W, A, B, bias), dy = make(7, 40, 33, 3, rows, weight)
    if not cpu.packs(rows, W):
        pytest.skip(cpu.why_not(rows, W))
    forward, backward = FrozenWeight(W).forms(rows, backward=True)
    ops, needs = torch.ops.federa, list(ADAPTERS_AND_X)
    segments = Segments.from_sizes([3, 0, 4], ranks=[3, 2, 1])
    cuts = (segments.offsets, segments.scalings, segments.ranks)
    stacked = A.expand(3, -1, -1), B.expand(3, -1, -1), bias
    _, h = ops.lora_linear_fwd(x, W, forward, A, B, bias, 0.5)
    opcheck(ops.lora_linear_fwd.default, (x, W, forward, A, B, bias, 0.5))
    opcheck(ops.lora_linear_bwd.default, (dy, x, h, W, backward, A, B, bias, 0.5, needs))
    opcheck(ops.lora_linear_clients_fwd.default, (x, W, forward, *stacked, *cuts))
    opcheck(ops.lora_linear_clients_bwd.default, (dy, x, h, W, backward, *stacked, *cuts, needs))
    lists = [W, W], [A, A], [B, B], [bias, None], [0.5, 2.0]
    opcheck(ops.lora_linear_shared_fwd.default, (x, lists[0], [forward] * 2, *lists[1:]))
    both = (*needs, False, True, True, False)
    arguments = ([dy, dy], x, torch.cat([h, h], 1), lists[0], [backward] * 2, *lists[1:], list(both))
    opcheck(ops.lora_linear_shared_bwd.default, arguments)


@needs_compiler
def test_a_compiled_call_sees_a_weight_that_was_written_to():
    tensors, dy = make()
    frozen = FrozenWeight(tensors[1])
    results(frozen, tensors, dy)
    compiled = torch.compile(through(frozen), fullgraph=True, dynamic=True)
    for change in (lambda w: w, lambda w: w.mul_(-3), lambda w: w.copy_(w.flip(0))):
        change(frozen.weight)
        got = run(compiled, 0.5, tensors, dy, ADAPTERS_AND_X)
        want = results(FrozenWeight(frozen.weight.clone()), tensors, dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def bits(weight):
    return weight.contiguous().view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


def assert_released(frozen, weight, dtype=torch.float32):
    assert frozen.released == cpu.packs(dtype, weight)
    assert frozen.weight.dtype == weight.dtype and torch.equal(bits(frozen.weight), bits(weight))


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["N-K", "K-N"])
@pytest.mark.parametrize("shape", [(65, 96), (1, 1), (31, 33), (48, 769)], ids=str)
@pytest.mark.parametrize(("rows", "dtype"), KINDS.values(), ids=KINDS)
def test_a_released_weight_is_gone_and_comes_back_to_the_bit(rows, dtype, shape, fan_in_fan_out):
    tensors, dy = make(N=shape[0], K=shape[1], rows=rows, weight=dtype)
    weight = tensors[1]
    weight.view(-1)[::7] = -0.0
    want = results(FrozenWeight(weight.clone()), tensors, dy)
    given = (weight.t() if fan_in_fan_out else weight).clone(memory_format=torch.contiguous_format)
    alive = weakref.ref(given)
    frozen = FrozenWeight(given, fan_in_fan_out=fan_in_fan_out, release_canonical=True)
    del given
    for _ in range(2):
        got = results(frozen, tensors, dy)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert_released(frozen, weight, rows)
    assert (alive() is None) == frozen.released
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert twin.release_canonical and twin.packed_bytes() == 0 and torch.equal(bits(twin.weight), bits(weight))
        assert torch.equal(results(twin, tensors, dy)[0], want[0])
    frozen.drop()
    assert not frozen.released and frozen.packed_bytes() == 0 and torch.equal(bits(frozen.weight), bits(weight))


@pytest.mark.parametrize("value", [torch.inf, 1e-39, 3.4e38], ids=str)
def test_a_weight_that_cannot_be_unpacked_stays(value):
    tensors, dy = make()
    tensors[1][3, 4] = value
    frozen = FrozenWeight(tensors[1].clone(), release_canonical=True)
    results(frozen, tensors, dy)
    assert torch.equal(bits(frozen.weight), bits(tensors[1]))
    if cpu.engine() == "amx":
        assert not frozen.released


def test_a_released_weight_serves_what_has_no_kernel():
    """Ranks, dtypes and engines that take the reference, and clients and shared inputs that do not."""
    tensors, dy = make()
    x, weight, lora_A, lora_B, bias = tensors
    frozen = FrozenWeight(weight.clone(), release_canonical=True)
    results(frozen, tensors, dy)
    plain = FrozenWeight(weight.clone())
    many = [x, weight, torch.randn(130, 96), torch.randn(65, 130), bias]
    doubles = [t if t is weight else t.double() for t in tensors]
    for case, grad in ((many, dy), (doubles, dy.double()), ([x[:0], *tensors[1:]], dy[:0])):
        for a, b in zip(results(frozen, case, grad), results(plain, case, grad), strict=True):
            assert a is b is None or torch.equal(a, b)
        assert_released(frozen, weight)
    segments = Segments.from_sizes([30, 7])
    clients = [lora_linear_clients(x, f, lora_A[None].repeat(2, 1, 1), lora_B[None].repeat(2, 1, 1), segments, bias)
               for f in (frozen, plain)]  # fmt: skip
    assert torch.equal(*clients)
    for other in (plain, weight):
        both = [lora_linear_shared(x, [(f, lora_A, lora_B, 0.5, bias), (other, lora_A, lora_B, 1.0, None)])
                for f in (frozen, plain)]  # fmt: skip
        assert all(map(torch.equal, *both))
    before = cpu.engine()
    try:
        for name in [*(load_extension().engines() if load_extension() else []), "none"]:
            cpu.use_engine(name)
            assert torch.equal(bits(frozen.weight), bits(weight))
            same = zip(results(frozen, tensors, dy), results(plain, tensors, dy), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in same)
            assert_released(frozen, weight)
    finally:
        if load_extension():
            cpu.use_engine(before)


def test_a_weight_written_to_while_a_thread_packs_it_is_packed_again(monkeypatch):
    """Its old form, coming late, must not take the new one's place."""
    tensors, dy = make()
    if not cpu.packs(torch.float32, tensors[1]):
        pytest.skip("this machine has no packed forms")
    frozen, packing, packed = FrozenWeight(tensors[1].clone()), Event(), Event()
    pack = cpu.pack

    def slowly(weight, transposed):
        form = pack(weight, transposed)
        if not packing.is_set():
            packing.set()
            packed.wait(0.3)  # in vain where the other thread waits for this one
        return form

    monkeypatch.setattr(cpu, "pack", slowly)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(frozen.forms, torch.float32, False)
        packing.wait()
        frozen.weight.mul_(-2)
        frozen.forms(torch.float32, False)
        packed.set()
        other.result()
    assert_fresh(frozen, tensors, dy)


def test_threads_that_release_one_weight_at_once():
    tensors, dy = make()
    want = results(FrozenWeight(tensors[1].clone()), tensors, dy)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            frozen = FrozenWeight(tensors[1].clone(), release_canonical=True)
            for got in pool.map(lambda _, frozen=frozen: (results(frozen, tensors, dy), frozen.weight), range(16)):
                assert torch.equal(got[0][0], want[0]) and torch.equal(got[0][1], want[1])
                assert torch.equal(bits(got[1]), bits(tensors[1]))
