import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from federa_kernels import FrozenWeight, lora_linear, lora_linear_shared

from . import against_float64 as cases
from .against_float64 import DTYPES, Draw, assert_as_good_as_torch, run

# (N, R, bias) of each projection
GROUPS = {
    "one": [(40, 8, True)],
    "qkv": [(32, 8, True)] * 3,
    "grouped-query": [(64, 16, False), (16, 8, False), (16, 8, False)],
    "gate-up": [(65, 8, False), (65, 8, False)],
    "unlike": [(7, 3, True), (33, 16, False), (1, 1, True), (64, 12, False)],
    "some-frozen": [(32, 8, True), (32, 0, True), (48, 4, False)],
    "all-frozen": [(32, 0, True), (16, 0, False)],
}
SCALINGS = [0.75, -1.5, 2.0, 0.5]
pytestmark = pytest.mark.usefixtures("poisoned")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def fours(flat):
    """(weight, lora_A, lora_B, bias) of each projection."""
    return list(zip(*[iter(flat)] * 4, strict=True))


def projections(scalings, flat):
    return [(weight, A, B, s, bias) for s, (weight, A, B, bias) in zip(scalings, fours(flat), strict=True)]


def ours(scalings, x, *flat):
    return lora_linear_shared(x, projections(scalings, flat))


def frozen(scalings, x, *flat):
    held = [(FrozenWeight(weight), *others) for weight, *others in projections(scalings, flat)]
    return lora_linear_shared(x, held)


def plain(scalings, x, *flat):
    return [cases.plain(s, x, *four) for s, four in zip(scalings, fours(flat), strict=True)]


def apart(scalings, x, *flat):
    return [lora_linear(x, *projection) for projection in projections(scalings, flat)]


def make(group, M=21, K=24, dtype=torch.float64, seed=0):
    """[x, then weight, lora_A, lora_B, bias of each]; dys; scalings."""
    draw, tensors, dys = Draw(seed), [], []
    for N, R, bias in group:
        tensors += [
            draw.of_width(N, K, dtype=dtype),
            draw.of_width(R, K, dtype=dtype),
            draw.of_width(N, R, dtype=dtype),
        ]
        tensors += [draw(N, dtype=dtype) if bias else None]
        dys += [draw(M, N, dtype=dtype)]
    return [draw(M, K, dtype=dtype), *tensors], dys, SCALINGS[: len(group)]


def mask_of(tensors, weights=False):
    return [t is not None and (weights or place % 4 != 1) for place, t in enumerate(tensors)]


@pytest.mark.parametrize("M", [0, 1, 63], ids=lambda M: f"M{M}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_forward_and_gradients_are_as_good_as_plain_torch(group, dtype, M):
    tensors, dys, scalings = make(group, M, dtype=dtype)
    assert_as_good_as_torch(ours, plain, scalings, tensors, dys)
    assert_as_good_as_torch(frozen, plain, scalings, tensors, dys, mask_of(tensors))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_same_as_separate_calls(group):
    tensors, dys, scalings = make(group)
    for got, want in zip(run(ours, scalings, tensors, dys), run(apart, scalings, tensors, dys), strict=True):
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64, other order
    tensors, dys, scalings = make(group, dtype=torch.float32)
    assert_as_good_as_torch(ours, apart, scalings, tensors, dys)


def test_dx_is_the_sum_over_projections():
    group = GROUPS["unlike"]
    tensors, dys, scalings = make(group)
    dx = run(ours, scalings, tensors, dys)[len(group)]
    each = [
        run(lambda s, *t: lora_linear(*t[:4], s, t[4]), s, [tensors[0], *four], dy)[1]
        for s, four, dy in zip(scalings, fours(tensors[1:]), dys, strict=True)
    ]
    torch.testing.assert_close(dx, torch.stack(each).sum(0))


ANYTHING = {
    "group": st.lists(st.tuples(cases.widths, cases.ranks, st.booleans(), cases.weights), min_size=1, max_size=4),
    "size": st.tuples(cases.rows, cases.widths),
    "leading": st.sampled_from(["M", "M", "2M", "none"]),
    "rows": cases.x_and_dy,
    "layouts": st.tuples(*[cases.layouts] * 2),
    "dtype": cases.dtypes,
    "half": st.tuples(st.booleans(), st.booleans()),
    "mask": st.lists(st.booleans(), min_size=17, max_size=17),
    "scalings": st.lists(cases.scalings, min_size=4, max_size=4),
    "seed": st.integers(0, 2**31),
}


def check(group, size, leading, rows, layouts, dtype, half, mask, scalings, seed):
    (M, K), draw = size, Draw(seed)
    shape = {"M": (M,), "2M": (2, M), "none": ()}[leading]
    factor_dtype = torch.float32 if half[1] else dtype
    tensors, dys, kept = [draw(*shape, K, dtype=dtype, layout=rows[0])], [], [mask[0]]
    for p, (N, R, bias, weight) in enumerate(group):
        weight_dtype = torch.bfloat16 if weight == "frozen bf16" or half[0] else dtype
        tensors += [
            draw.of_width(N, K, dtype=weight_dtype, layout=layouts[0]),
            draw.of_width(R, K, dtype=factor_dtype, layout=layouts[1]),
            draw.of_width(N, R, dtype=factor_dtype),
            draw(N, dtype=dtype) if bias else None,
        ]
        own = mask[1 + 4 * p : 5 + 4 * p]
        kept += [own[0] and weight == "tensor", own[1], own[2], own[3] and bias]
        dys.append(draw(*shape, N, dtype=dtype, layout=rows[1]))

    def call(scalings, x, *flat):
        held = projections(scalings, flat)
        kinds = [weight for *_, weight in group]
        pairs = zip(kinds, held, strict=True)
        return lora_linear_shared(x, [(W if kind == "tensor" else FrozenWeight(W), *o) for kind, (W, *o) in pairs])

    assert_as_good_as_torch(call, plain, scalings[: len(group)], tensors, dys, kept)


test_anything_is_as_good_as_plain_torch = settings(max_examples=400, deadline=None)(given(**ANYTHING)(check))
test_ten_times_anything = pytest.mark.exhaustive(settings(max_examples=4000, deadline=None)(given(**ANYTHING)(check)))


def test_every_mask_gives_the_gradients_of_the_full_one():
    tensors, dys, scalings = make([(4, 2, True), (3, 1, True)], 5, 6)
    full = run(ours, scalings, tensors, dys)
    for mask in itertools.product([False, True], repeat=9):
        masked = run(ours, scalings, tensors, dys, mask)
        for need, got, want in zip((True, True, *mask), masked, full, strict=True):
            assert torch.equal(got, want) if need else got is None, mask


def test_an_output_that_the_loss_does_not_use_adds_nothing():
    tensors, dys, scalings = make([(4, 2, True), (3, 1, True)], 5, 6)
    got = run(lambda *t: ours(*t)[:1], scalings, tensors, dys[:1])
    want = run(ours, scalings, tensors, [dys[0], torch.zeros_like(dys[1])])
    for a, b in zip(got[1:], want[2:], strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    tensors, _, scalings = make([(4, 2, True), (3, 1, False), (2, 0, True)], 5, 6)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: tuple(ours(scalings, *t)), leaves)


def kept_shapes(mask, M=50):
    tensors, _, scalings = make([(4, 2, False), (3, 1, False)], M, 6)
    leaves = [t if t is None else t.requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ours(scalings, *leaves)
    return [shape for shape in shapes if M in shape]


def test_x_is_kept_once_for_all_projections():
    nothing, adapters = [False] * 4, [False, True, True, False]
    assert kept_shapes([True, *adapters, *adapters]) == [(50, 6), (50, 3)]
    assert kept_shapes([True, *nothing, *nothing]) == []


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(dtype, permuted):
    (x, *flat), dys, scalings = make([(8, 3, True), (5, 2, False)], 7, 6, dtype)
    if permuted:
        x, *dys = (t.mT.contiguous().mT for t in (x, *dys))
        flat = [t.mT.contiguous().mT if t is not None and t.dim() == 2 else t for t in flat]
    weights, As, Bs, biases = map(list, zip(*fours(flat), strict=True))
    lists = (weights, [None, None], [A.float() for A in As], Bs, biases, scalings)
    *_, h = torch.ops.federa.lora_linear_shared_fwd(x, *lists)
    opcheck(torch.ops.federa.lora_linear_shared_fwd.default, (x, *lists))
    backward = torch.ops.federa.lora_linear_shared_bwd.default
    opcheck(backward, (dys, x, h, *lists, [True] * 8 + [False]))
    opcheck(backward, (dys, None, h, *lists, [True, *[False, False, True, False] * 2]))


@needs_compiler
def test_compiles_into_one_dynamic_graph():
    group = GROUPS["some-frozen"]

    def function(*t):
        return [y.tanh() for y in ours(*t)]

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for M in (5, 12):
        tensors, dys, scalings = make(group, M, dtype=torch.float32)
        got, want = (run(f, scalings, tensors, dys, mask_of(tensors)) for f in (compiled, function))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant):
    tensors, dys, scalings = make(GROUPS["qkv"], dtype=torch.float32)
    got = run(lambda *t: checkpoint(lambda *u: tuple(ours(*u)), *t, use_reentrant=reentrant), scalings, tensors, dys)
    assert all(torch.equal(a, b) for a, b in zip(got, run(ours, scalings, tensors, dys), strict=True))


def test_autocast_is_as_good_as_autocast_torch():
    tensors, dys, scalings = make(GROUPS["qkv"], 64, 96, torch.float32)
    exact = run(plain, scalings, [t.double() for t in tensors], [dy.double() for dy in dys])
    with torch.autocast("cpu", torch.bfloat16):
        got, theirs = (run(f, scalings, tensors, [dy.bfloat16() for dy in dys]) for f in (ours, plain))
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [torch.float32] * 13
    for a, b, true in zip(got, theirs, exact, strict=True):
        floor = 4 * torch.finfo(torch.bfloat16).eps * true.norm()
        assert (a.double() - true).norm() <= 2 * (b.double() - true).norm() + floor


@pytest.mark.parametrize(
    ("place", "new", "exception", "message"),
    [
        (0, torch.zeros(9, 7), ValueError, r"x must have shape \(\.\.\., K\) with K=6, got \(9, 7\)"),
        (5, torch.zeros(3), ValueError, r"weight must have shape \(N, K\), got \(3,\)"),
        (5, torch.zeros(3, 5), ValueError, r"x must have shape \(\.\.\., K\) with K=5, got \(9, 6\)"),
        (6, torch.zeros(1, 5), ValueError, r"lora_A must have shape \(R, K\) with K=6, got \(1, 5\)"),
        (7, torch.zeros(3, 2), ValueError, r"lora_B must have shape \(N, R\) with N=3, R=1, got \(3, 2\)"),
        (8, torch.zeros(4), ValueError, r"bias must have shape \(N,\) with N=3, got \(4,\)"),
        (7, torch.zeros(3, 1).int(), TypeError, r"lora_B must be float32, .*, got torch.int32"),
        (6, torch.zeros(1, 6, device="meta"), ValueError, r"lora_A must be on cpu, got meta"),
    ],
)
def test_errors_come_before_any_launch_and_name_the_argument(place, new, exception, message, monkeypatch):
    tensors, _, scalings = make([(4, 2, True), (3, 1, True)], 9, 6, torch.float32)
    tensors[place] = new
    monkeypatch.setattr(torch.ops.federa, "lora_linear_shared_fwd", lambda *_: pytest.fail("launched"))
    with pytest.raises(exception, match=f"^lora_linear_shared: {message}$"):
        ours(scalings, *tensors)


def test_no_projection_is_an_error():
    with pytest.raises(ValueError, match="^lora_linear_shared: projections must hold at least one, got 0$"):
        lora_linear_shared(torch.zeros(2, 3), [])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_twenty_times_the_same_bits(dtype):
    tensors, dys, scalings = make(GROUPS["unlike"], 63, 96, dtype)
    first = run(frozen, scalings, tensors, dys, mask_of(tensors))
    for _ in range(19):
        again = run(frozen, scalings, tensors, dys, mask_of(tensors))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, first, strict=True))
