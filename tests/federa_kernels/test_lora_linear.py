import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from federa_kernels import FrozenWeight, Segments, lora_linear
from federa_kernels.lora_linear import op

from . import against_float64 as cases
from .against_float64 import DTYPES, NAMES, Draw, assert_as_good_as_torch, plain, run

SHAPES = [(63, 128, 96, 8), (17, 33, 7, 1), (1, 1, 1, 1), (130, 64, 257, 16), (0, 16, 24, 4), (33, 65, 31, 0)]
CASES = [
    pytest.param(shape, dtype, id="M{}-N{}-K{}-R{}".format(*shape) + f"-{name}")
    for shape in SHAPES
    for name, dtype in DTYPES.items()
]
SCALING = 0.75
pytestmark = pytest.mark.usefixtures("poisoned")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def make(M, N, K, R, dtype=torch.float64, adapter_dtype=None, seed=0):
    """x, weight, lora_A, lora_B, bias; dy."""
    draw, other = Draw(seed), adapter_dtype or dtype
    factors = [draw.of_width(R, K, dtype=other), draw.of_width(N, R, dtype=other)]
    tensors = [draw(M, K, dtype=dtype), draw.of_width(N, K, dtype=dtype), *factors, draw(N, dtype=dtype)]
    return tensors, draw(M, N, dtype=dtype)


def ours(scaling, *tensors):
    return lora_linear(*tensors[:4], scaling, *tensors[4:])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_gradients_are_as_good_as_plain_torch(shape, dtype):
    assert_as_good_as_torch(ours, plain, SCALING, *make(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_float32_adapters_beside_a_half_weight_get_float32_gradients(dtype):
    tensors, dy = make(63, 128, 96, 8, dtype, adapter_dtype=torch.float32)
    assert_as_good_as_torch(ours, plain, SCALING, tensors, dy)
    assert [g.dtype for g in run(ours, SCALING, tensors, dy)[1:]] == [t.dtype for t in tensors]


def test_half_weight_under_float32_rows_computes_in_float32():
    (x, weight, lora_A, lora_B, bias), dy = make(5, 8, 6, 2, torch.float32)
    tensors = [x, weight.bfloat16(), lora_A, lora_B, bias]
    assert_as_good_as_torch(ours, plain, SCALING, tensors, dy)
    assert ours(SCALING, *tensors).dtype == torch.float32


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(leading):
    (_, weight, lora_A, lora_B, bias), _ = make(1, 8, 6, 2)
    x, dy = torch.randn(*leading, 6).double(), torch.randn(*leading, 8).double()
    tensors = [x, weight, lora_A, lora_B, bias]
    for got, want in zip(run(ours, SCALING, tensors, dy), run(plain, SCALING, tensors, dy), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=5)), ids=lambda m: "".join("01"[b] for b in m)
)
def test_every_mask_gives_the_gradients_of_the_full_one(mask):
    tensors, dy = make(9, 8, 6, 2)
    full = run(ours, SCALING, tensors, dy)
    masked = run(ours, SCALING, tensors, dy, mask)
    assert torch.equal(masked[0], full[0])
    for need, got, want in zip(mask, masked[1:], full[1:], strict=True):
        assert torch.equal(got, want) if need else got is None


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck(with_bias):
    tensors, _ = make(4, 5, 6, 2)
    leaves = [t.requires_grad_() for t in tensors[: 4 + with_bias]]
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t[:4], SCALING, *t[4:]), leaves)


ANYTHING = {
    "sizes": st.tuples(cases.rows, cases.widths, cases.widths, cases.ranks),
    "leading": st.sampled_from(["M", "M", "M", "M1", "2M", "M12", "none"]),
    "rows": cases.x_and_dy,
    "layouts": cases.of_layer,
    "dtype": cases.dtypes,
    "half": st.tuples(st.booleans(), st.booleans()),
    "weight": cases.weights,
    "mask": st.tuples(*[st.booleans()] * 5),
    "scaling": cases.scalings,
    "seed": st.integers(0, 2**31),
}


def check(sizes, leading, rows, layouts, dtype, half, weight, mask, scaling, seed):
    (M, N, K, R), draw = sizes, Draw(seed)
    shape = {"M": (M,), "M1": (M, 1), "2M": (2, M), "M12": (M, 1, 2), "none": ()}[leading]
    weight_dtype = torch.bfloat16 if weight == "frozen bf16" or half[0] else dtype
    adapter_dtype = torch.float32 if half[1] else dtype
    tensors = [
        draw(*shape, K, dtype=dtype, layout=rows[0]),
        draw.of_width(N, K, dtype=weight_dtype, layout=layouts[0]),
        draw.of_width(R, K, dtype=adapter_dtype, layout=layouts[1]),
        draw.of_width(N, R, dtype=adapter_dtype, layout=layouts[2]),
        draw(N, dtype=dtype, layout=layouts[3]),
    ]
    wrap = FrozenWeight if weight.startswith("frozen") else lambda W: W
    mask = [mask[0], mask[1] and weight == "tensor", *mask[2:]]
    assert_as_good_as_torch(
        lambda s, x, W, *others: ours(s, x, wrap(W), *others),
        plain,
        scaling,
        tensors,
        draw(*shape, N, dtype=dtype, layout=rows[1]),
        mask,
    )


test_anything_is_as_good_as_plain_torch = settings(max_examples=1000, deadline=None)(given(**ANYTHING)(check))
test_ten_times_anything = pytest.mark.exhaustive(settings(max_examples=10_000, deadline=None)(given(**ANYTHING)(check)))


def saved_shapes(mask):
    tensors, _ = make(50, 8, 6, 2)
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ours(SCALING, *leaves)
    return [shape for shape in shapes if 50 in shape]


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ((True, False, True, True, False), [(50, 6), (50, 2)]),
        ((True, False, False, True, False), [(50, 2)]),
        ((True, False, True, False, False), [(50, 6)]),
        ((True, False, False, False, True), []),
        ((False,) * 5, []),
    ],
    ids=["A-and-B", "B", "A", "x-and-bias", "none"],
)
def test_only_x_and_h_are_kept_and_only_where_needed(mask, kept):
    assert saved_shapes(mask) == kept


@pytest.mark.parametrize("need_x", [False, True])
def test_a_weight_that_no_gradient_reads_is_not_cast(monkeypatch, need_x):
    casts, cast = [], op._cast
    monkeypatch.setattr(op, "_cast", lambda dtype, tensors: casts.append(list(tensors)) or cast(dtype, tensors))
    dy, x, h = (torch.randn(5, width, dtype=torch.float64) for width in (6, 7, 3))
    weight, lora_A, lora_B = torch.randn(6, 7), torch.randn(3, 7), torch.randn(6, 3)
    segments, needs = Segments.from_sizes([2, 3]), [need_x, False, True, True, False]
    on_device = (segments.offsets, segments.scalings, segments.ranks)
    stacked = (lora_A.expand(2, 3, 7), lora_B.expand(2, 6, 3))
    ops = torch.ops.federa
    ops.lora_linear_bwd(dy, x, h, weight, None, lora_A, lora_B, None, 0.5, needs)
    ops.lora_linear_clients_bwd(dy, x, h, weight, None, *stacked, None, *on_device, needs)
    ops.lora_linear_shared_bwd([dy], x, h, [weight], [None], [lora_A], [lora_B], [None], [0.5], needs)
    of_weights = [t for tensors in casts for t in tensors if t is not None and t.shape == weight.shape]
    assert len(of_weights) == 3 * need_x


def test_non_contiguous_and_expanded_inputs():
    (_, weight, lora_A, lora_B, bias), _ = make(1, 8, 6, 2)
    permuted = [weight.T.contiguous().T, lora_A.T.contiguous().T, lora_B.T.contiguous().T, bias[:1].expand(8)]
    for x in (torch.randn(6, 5, 4).double().permute(2, 1, 0), torch.randn(1, 5, 6).double().expand(4, 5, 6)):
        for dy in (torch.randn(8, 5, 4).double().permute(2, 1, 0), torch.ones(()).double().expand(4, 5, 8)):
            tensors = [x, *permuted]
            for got, want in zip(run(ours, SCALING, tensors, dy), run(plain, SCALING, tensors, dy), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(permuted, dtype):
    (x, *rest), dy = make(5, 8, 6, 2, dtype, adapter_dtype=torch.float32)
    if permuted:
        x, dy = x.T.contiguous().T, dy.T.contiguous().T
        rest = [t.T.contiguous().T if t.dim() == 2 else t for t in rest]
    rest = [rest[0], None, *rest[1:]]
    _, h = torch.ops.federa.lora_linear_fwd(x, *rest, SCALING)
    opcheck(torch.ops.federa.lora_linear_fwd.default, (x, *rest, SCALING))
    opcheck(torch.ops.federa.lora_linear_fwd.default, (x, *rest[:4], None, SCALING))
    opcheck(torch.ops.federa.lora_linear_bwd.default, (dy, x, h, *rest, SCALING, [True] * 5))
    opcheck(
        torch.ops.federa.lora_linear_bwd.default,
        (dy, None, h, *rest[:4], None, SCALING, [True, False, False, True, False]),
    )


@needs_compiler
def test_compiles_into_one_dynamic_graph():
    def function(*t):
        return ours(*t).tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    mask = (True, False, True, True, False)
    for M in (5, 12):
        tensors, dy = make(M, 8, 6, 2, torch.float32)
        got, wanted = run(compiled, SCALING, tensors, dy, mask), run(function, SCALING, tensors, dy, mask)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant):
    tensors, dy = make(9, 8, 6, 2, torch.float32)
    got = run(lambda *t: checkpoint(ours, *t, use_reentrant=reentrant), SCALING, tensors, dy)
    for a, b in zip(got, run(ours, SCALING, tensors, dy), strict=True):
        assert torch.equal(a, b)


def test_autocast_is_as_good_as_autocast_torch():
    tensors, dy = make(63, 128, 96, 8, torch.float32)
    exact = run(plain, SCALING, [t.double() for t in tensors], dy.double())

    def linears(scaling, x, weight, lora_A, lora_B, bias):
        linear = torch.nn.functional.linear
        return linear(x, weight, bias) + scaling * linear(linear(x, lora_A), lora_B)

    with torch.autocast("cpu", torch.bfloat16):
        got, theirs = (run(f, SCALING, tensors, dy.bfloat16()) for f in (ours, linears))
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    for a, b, true in zip(got, theirs, exact, strict=True):
        floor = 4 * torch.finfo(torch.bfloat16).eps * true.norm()
        assert (a.double() - true).norm() <= 2 * (b.double() - true).norm() + floor


def test_autocast_around_backward_changes_nothing_and_float64_stays():
    tensors, dy = make(9, 8, 6, 2, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = ours(SCALING, *leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(dy)
        assert ours(SCALING, *(t.double() for t in tensors)).dtype == torch.float64
    for leaf, want in zip(leaves, run(ours, SCALING, tensors, dy)[1:], strict=True):
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"lora_A": (2, 5)}, ValueError, r"lora_A must have shape \(R, K\) with K=6, got \(2, 5\)"),
        ({"lora_B": (8, 3)}, ValueError, r"lora_B must have shape \(N, R\) with N=8, R=2, got \(8, 3\)"),
        ({"x": (9, 7)}, ValueError, r"x must have shape \(\.\.\., K\) with K=6, got \(9, 7\)"),
        ({"x": ()}, ValueError, r"x must have shape \(\.\.\., K\) with K=6, got \(\)"),
        ({"weight": (8,)}, ValueError, r"weight must have shape \(N, K\), got \(8,\)"),
        ({"bias": (1,)}, ValueError, r"bias must have shape \(N,\) with N=8, got \(1,\)"),
        ({"x": torch.int64}, TypeError, r"x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"lora_A": torch.int8}, TypeError, r"lora_A must be float32, .*, got torch.int8"),
        ({"lora_B": "meta"}, ValueError, r"lora_B must be on cpu, got meta"),
    ],
)
def test_errors_name_the_argument(change, exception, message):
    tensors, _ = make(9, 8, 6, 2)
    (argument, new) = next(iter(change.items()))
    index = NAMES.index(argument)
    tensors[index] = torch.zeros(new) if isinstance(new, tuple) else tensors[index].to(new)
    with pytest.raises(exception, match=f"^lora_linear: {message}$"):
        ours(SCALING, *tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_twice_the_same_bits(dtype):
    tensors, dy = make(63, 128, 96, 8, dtype)
    for a, b in zip(run(ours, SCALING, tensors, dy), run(ours, SCALING, tensors, dy), strict=True):
        assert torch.equal(a, b)
