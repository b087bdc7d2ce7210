import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from federa_kernels import FrozenWeight, Segments, lora_linear, lora_linear_clients

from . import against_float64 as cases
from .against_float64 import DTYPES, Draw, assert_as_good_as_torch, run

# Popularity patterns after Punica (arXiv 2310.18547), and what kernels stumble over.
CUTS = {
    "one": [37],
    "equal": [16] * 4,
    "uniform": [5, 31, 12, 20, 9],
    "zipf": [64, 32, 21, 16, 13, 11, 9, 8],
    "skewed": [1, 63],
    "single-rows": [1] * 9,
    "some-empty": [0, 7, 0, 0, 33, 0],
    "all-empty": [0, 0, 0],
    "on-the-tile": [32, 64, 32],
    "off-the-tile": [31, 33, 65],
}
RANKS = [16, 8, 1, 12, 5]
pytestmark = pytest.mark.usefixtures("poisoned")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def plain(sizes, ranks):
    """The definition, client by client, as a function of (scalings, x, weight, lora_A, lora_B, bias)."""

    def definition(scalings, x, weight, lora_A, lora_B, bias):
        ys = []
        for c, rows in enumerate(x.split(list(sizes))):
            R = lora_A.shape[1] if ranks is None else ranks[c]
            own = bias if bias is None or bias.dim() == 1 else bias[c]
            ys.append(cases.plain(scalings[c], rows, weight, lora_A[c, :R], lora_B[c, :, :R], own))
        return torch.cat(ys)

    return definition


def ours(sizes, ranks):
    def call(scalings, x, weight, lora_A, lora_B, bias):
        segments = Segments.from_sizes(sizes, scalings=scalings, ranks=ranks)
        return lora_linear_clients(x, weight, lora_A, lora_B, segments, bias)

    return call


def make(sizes, N=40, K=24, R=16, dtype=torch.float64, bias="own", ranks=None, seed=0):
    """x, weight, lora_A, lora_B, bias; dy. Beyond a client's rank both factors are NaN."""
    draw, C, M = Draw(seed), len(sizes), sum(sizes)
    lora_A, lora_B = draw.of_width(C, R, K, dtype=dtype), draw.of_width(C, N, R, dtype=dtype)
    for c, rank in enumerate(ranks or []):
        lora_A[c, rank:], lora_B[c, :, rank:] = torch.nan, torch.nan
    bias = {"own": draw(C, N, dtype=dtype), "shared": draw(N, dtype=dtype), "none": None}[bias]
    x, weight = draw(M, K, dtype=dtype), draw.of_width(N, K, dtype=dtype)
    return [x, weight, lora_A, lora_B, bias], draw(M, N, dtype=dtype)


def scalings_of(sizes):
    return list(itertools.islice(itertools.cycle([0.75, -1.5, 0.0, 2.0]), len(sizes)))


def ranks_of(sizes):
    return list(itertools.islice(itertools.cycle(RANKS), len(sizes)))


def as_frozen(function):
    return lambda s, x, weight, *others: function(s, x, FrozenWeight(weight), *others)


@pytest.mark.parametrize("bias", ["own", "shared", "none"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_forward_and_gradients_are_as_good_as_plain_torch(sizes, dtype, bias):
    tensors, dy = make(sizes, dtype=dtype, bias=bias)
    assert_as_good_as_torch(ours(sizes, None), plain(sizes, None), scalings_of(sizes), tensors, dy)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["tensor", "frozen"])
def test_nothing_beyond_a_clients_rank_is_read_and_its_gradient_is_zero(sizes, dtype, frozen):
    ranks = ranks_of(sizes)
    tensors, dy = make(sizes, dtype=dtype, ranks=ranks)
    function, mask = (as_frozen if frozen else lambda f: f)(ours(sizes, ranks)), [True, not frozen, True, True, True]
    assert_as_good_as_torch(function, plain(sizes, ranks), scalings_of(sizes), tensors, dy, mask)
    *_, dA, dB, _ = run(function, scalings_of(sizes), tensors, dy, mask)
    for c, rank in enumerate(ranks):
        assert not dA[c, rank:].count_nonzero() and not dB[c, :, rank:].count_nonzero()


ANYTHING = {
    "sizes": st.lists(st.one_of(st.integers(0, 5), st.sampled_from(cases.EDGES[:9])), min_size=1, max_size=6),
    "shape": st.tuples(cases.widths, cases.widths, cases.ranks),
    "ragged": st.booleans(),
    "rows": cases.x_and_dy,
    "layouts": cases.of_layer,
    "dtype": cases.dtypes,
    "half": st.tuples(st.booleans(), st.booleans()),
    "weight": cases.weights,
    "bias": st.sampled_from(["own", "shared", "none"]),
    "mask": st.tuples(*[st.booleans()] * 5),
    "data": st.data(),
    "seed": st.integers(0, 2**31),
}


def check(sizes, shape, ragged, rows, layouts, dtype, half, weight, bias, mask, data, seed):
    (N, K, R), C, M, draw = shape, len(sizes), sum(sizes), Draw(seed)
    scalings = data.draw(st.lists(cases.scalings.map(lambda s: round(s * 8) / 8), min_size=C, max_size=C))
    ranks = data.draw(st.lists(st.integers(1, R), min_size=C, max_size=C)) if ragged and R > 0 else None
    weight_dtype = torch.bfloat16 if weight == "frozen bf16" or half[0] else dtype
    adapter_dtype = torch.float32 if half[1] else dtype
    tensors = [
        draw(M, K, dtype=dtype, layout=rows[0]),
        draw.of_width(N, K, dtype=weight_dtype, layout=layouts[0]),
        draw.of_width(C, R, K, dtype=adapter_dtype, layout=layouts[1]),
        draw.of_width(C, N, R, dtype=adapter_dtype, layout=layouts[2]),
        {"own": draw(C, N, dtype=dtype, layout=layouts[3]), "shared": draw(N, dtype=dtype), "none": None}[bias],
    ]
    function = as_frozen(ours(sizes, ranks)) if weight.startswith("frozen") else ours(sizes, ranks)
    mask = [mask[0], mask[1] and weight == "tensor", *mask[2:4], mask[4] and bias != "none"]
    dy = draw(M, N, dtype=dtype, layout=rows[1])
    assert_as_good_as_torch(function, plain(sizes, ranks), scalings, tensors, dy, mask)


test_anything_is_as_good_as_plain_torch = settings(max_examples=600, deadline=None)(given(**ANYTHING)(check))
test_ten_times_anything = pytest.mark.exhaustive(settings(max_examples=6000, deadline=None)(given(**ANYTHING)(check)))


def alone(sizes, ranks):
    """Each client through `lora_linear` by itself."""

    def call(scalings, x, weight, lora_A, lora_B, bias):
        ys = []
        for c, rows in enumerate(x.split(list(sizes))):
            R = ranks[c] if ranks else lora_A.shape[1]
            own = bias[c] if bias is not None and bias.dim() == 2 else bias
            ys.append(lora_linear(rows, weight, lora_A[c, :R], lora_B[c, :, :R], scalings[c], own))
        return torch.cat(ys)

    return call


@pytest.mark.parametrize("bias", ["own", "shared", "none"])
@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_each_client_gets_what_it_would_get_alone(sizes, bias):
    ranks, s = ranks_of(sizes), scalings_of(sizes)
    tensors, dy = make(sizes, bias=bias, ranks=ranks)
    for got, want in zip(
        run(ours(sizes, ranks), s, tensors, dy), run(alone(sizes, ranks), s, tensors, dy), strict=True
    ):
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64, other order
    tensors, dy = make(sizes, bias=bias, ranks=ranks, dtype=torch.float32)
    assert_as_good_as_torch(ours(sizes, ranks), alone(sizes, ranks), s, tensors, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["tensor", "frozen"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_client_that_diverges_leaves_the_others_as_they_were(value, frozen, dtype):
    sizes, s = [31, 5, 33], [1.0, 1.0, 1.0]
    (x, weight, lora_A, lora_B, bias), dy = make(sizes, N=64, K=96, R=8, dtype=dtype)
    function, mask = (as_frozen if frozen else lambda f: f)(ours(sizes, None)), (True, False, True, True, True)
    want = run(function, s, [x, weight, lora_A, lora_B, bias], dy, mask)
    rows = slice(31, 36)
    ill = [t.clone() for t in (x, lora_A, lora_B, bias, dy)]
    for tensor, place in zip(ill, (rows, 1, 1, 1, rows), strict=True):
        tensor[place] = value
    x, lora_A, lora_B, bias, dy = ill
    got = run(function, s, [x, weight, lora_A, lora_B, bias], dy, mask)
    others = torch.arange(69).sub(33).abs().gt(2)
    assert not got[0][rows].isfinite().any()
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[others], b[others])
    for a, b in zip(got[3:], want[3:], strict=True):
        assert torch.equal(a[::2], b[::2])


MASKS = list(itertools.product([False, True], repeat=5))


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: "".join("01"[b] for b in m))
@pytest.mark.parametrize("bias", ["own", "shared"])
def test_every_mask_gives_the_gradients_of_the_full_one(mask, bias):
    sizes, ranks = [3, 0, 5], [2, 1, 3]
    tensors, dy = make(sizes, 8, 6, 3, bias=bias, ranks=ranks)
    full, masked = (run(ours(sizes, ranks), [1.0, 2.0, -1.0], tensors, dy, m) for m in ((True,) * 5, mask))
    assert torch.equal(masked[0], full[0])
    for need, got, want in zip(mask, masked[1:], full[1:], strict=True):
        assert torch.equal(got, want) if need else got is None


@pytest.mark.parametrize("bias", ["own", "shared", "none"])
def test_gradcheck(bias):
    sizes, ranks = [3, 0, 4], [2, 1, 3]
    tensors, _ = make(sizes, 5, 6, 3, bias=bias)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: ours(sizes, ranks)([0.5, 2.0, -1.0], *t), leaves)


def test_the_gradient_of_each_clients_bias_is_the_sum_of_its_rows():
    sizes = [3, 0, 5]
    tensors, dy = make(sizes)
    *_, db = run(ours(sizes, None), [1.0] * 3, tensors, dy)
    torch.testing.assert_close(db, torch.stack([rows.sum(0) for rows in dy.split(sizes)]))
    assert not db[1].any()


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ((True, False, True, True, True), [(50, 6), (50, 2)]),
        ((True, False, False, True, False), [(50, 2)]),
        ((True, False, False, False, True), []),
    ],
    ids=["A-and-B", "B", "x-and-bias"],
)
def test_only_x_and_h_are_kept_and_only_where_needed(mask, kept):
    tensors, _ = make([20, 30], 8, 6, 2)
    leaves, shapes = [t.requires_grad_(need) for t, need in zip(tensors, mask, strict=True)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ours([20, 30], None)([1.0, 1.0], *leaves)
    assert [shape for shape in shapes if 50 in shape] == kept


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("bias", ["own", "shared", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(dtype, bias, permuted):
    sizes = [3, 0, 4]
    (x, weight, lora_A, lora_B, bias), dy = make(sizes, 8, 6, 3, dtype=dtype, bias=bias)
    x, weight, dy, lora_A = (t.mT.contiguous().mT if permuted else t for t in (x, weight, dy, lora_A.float()))
    segments = Segments.from_sizes(sizes, ranks=[1, 2, 3])
    tensors = (weight, None, lora_A, lora_B, bias, segments.offsets, segments.scalings, segments.ranks)
    _, h = torch.ops.federa.lora_linear_clients_fwd(x, *tensors)
    opcheck(torch.ops.federa.lora_linear_clients_fwd.default, (x, *tensors))
    backward = torch.ops.federa.lora_linear_clients_bwd.default
    opcheck(backward, (dy, x, h, *tensors, [True] * 4 + [bias is not None]))
    opcheck(backward, (dy, None, h, *tensors, [True, False, False, True, False]))


@needs_compiler
@pytest.mark.parametrize("frozen", [False, True], ids=["tensor", "frozen"])
def test_compiles_into_one_dynamic_graph(frozen):
    weight = make([1])[0][1].float()
    held = FrozenWeight(weight) if frozen else weight

    def function(segments, x, lora_A, lora_B, bias):
        return lora_linear_clients(x, held, lora_A, lora_B, segments, bias).tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for sizes in ([5, 3], [9, 2], [0, 12]):
        (x, _, *others), dy = make(sizes, dtype=torch.float32)
        batch = Segments.from_sizes(sizes, scalings=[0.5, 2.0], ranks=[16, 7])
        got, want = (run(f, batch, [x, *others], dy) for f in (compiled, function))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant):
    sizes, s = [3, 0, 6], [1.0, 2.0, 3.0]
    tensors, dy = make(sizes, dtype=torch.float32)
    function = ours(sizes, None)
    got = run(lambda *t: checkpoint(function, *t, use_reentrant=reentrant), s, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, run(function, s, tensors, dy), strict=True))


def test_autocast_is_as_good_as_autocast_torch():
    sizes = CUTS["zipf"]
    ranks, s = ranks_of(sizes), scalings_of(sizes)
    tensors, dy = make(sizes, N=128, K=96, dtype=torch.float32, ranks=ranks)
    exact = run(plain(sizes, ranks), s, [t.double() for t in tensors], dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, theirs = (run(f(sizes, ranks), s, tensors, dy.bfloat16()) for f in (ours, plain))
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    for a, b, true in zip(got, theirs, exact, strict=True):
        floor = 4 * torch.finfo(torch.bfloat16).eps * true.norm()
        assert (a.double() - true).norm() <= 2 * (b.double() - true).norm() + floor


def segments(**change):
    return Segments.from_sizes(**{"sizes": [4, 5], "ranks": [2, 2]} | change)


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.zeros(9, 7)}, ValueError, r"x must have shape \(M, K\) with K=6, got \(9, 7\)"),
        ({"x": torch.zeros(3, 3, 6)}, ValueError, r"x must have shape \(M, K\) with K=6, got \(3, 3, 6\)"),
        ({"x": torch.zeros(8, 6)}, ValueError, r"x must have the 9 rows of segments, got 8"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must have shape \(N, K\), got \(8,\)"),
        ({"lora_A": torch.zeros(2, 6)}, ValueError, r"lora_A must have shape \(C, R, K\) with C=2, K=6, got \(2, 6\)"),
        ({"lora_A": torch.zeros(3, 2, 6)}, ValueError, r"lora_A must have .* with C=2, K=6, got \(3, 2, 6\)"),
        ({"lora_B": torch.zeros(2, 8, 3)}, ValueError, r"lora_B must have .* with C=2, N=8, R=2, got \(2, 8, 3\)"),
        ({"bias": torch.zeros(3, 8)}, ValueError, r"bias must have shape \(C, N\) with C=2, N=8, got \(3, 8\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(N,\) with N=8, got \(7,\)"),
        ({"bias": torch.zeros(())}, ValueError, r"bias must have shape \(N,\) with N=8, got \(\)"),
        ({"segments": segments(ranks=[2, 3])}, ValueError, r"segments must have ranks up to R=2, got 3"),
        ({"segments": segments(sizes=[4, 5, 0], ranks=None)}, ValueError, r"lora_A must have .* with C=3, K=6, got .*"),
        ({"segments": segments(device="meta")}, ValueError, r"segments must be on cpu, got meta"),
        ({"lora_B": torch.zeros(2, 8, 2, device="meta")}, ValueError, r"lora_B must be on cpu, got meta"),
        ({"x": torch.zeros(9, 6).int()}, TypeError, r"x must be float32, .*, got torch.int32"),
        ({"bias": torch.zeros(8).bool()}, TypeError, r"bias must be float32, .*, got torch.bool"),
    ],
)
def test_errors_come_before_any_launch_and_name_the_argument(change, exception, message, monkeypatch):
    shapes = {"x": (9, 6), "weight": (8, 6), "lora_A": (2, 2, 6), "lora_B": (2, 8, 2), "bias": (2, 8)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"segments": segments()} | change
    monkeypatch.setattr(torch.ops.federa, "lora_linear_clients_fwd", lambda *_: pytest.fail("launched"))
    with pytest.raises(exception, match=f"^lora_linear_clients: {message}$"):
        lora_linear_clients(**arguments)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_twenty_times_the_same_bits(dtype):
    sizes = CUTS["zipf"]
    ranks, s = ranks_of(sizes), scalings_of(sizes)
    tensors, dy = make(sizes, dtype=dtype, ranks=ranks)
    function, mask = as_frozen(ours(sizes, ranks)), (True, False, True, True, True)
    first = run(function, s, tensors, dy, mask)
    for _ in range(19):
        again = run(function, s, tensors, dy, mask)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, first, strict=True))
