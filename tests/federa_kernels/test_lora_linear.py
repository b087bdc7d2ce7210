import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from federa_kernels import lora_linear

SHAPES = [(63, 128, 96, 8), (17, 33, 7, 1), (1, 1, 1, 1), (130, 64, 257, 16), (0, 16, 24, 4)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CASES = [
    pytest.param(shape, dtype, id="M{}-N{}-K{}-R{}".format(*shape) + f"-{name}")
    for shape in SHAPES
    for name, dtype in DTYPES.items()
]
SCALING = 0.75
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def make(M, N, K, R, dtype=torch.float64, adapter_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) / K**0.5 for s in sizes.values()]
    dtypes = [dtype, dtype, adapter_dtype or dtype, adapter_dtype or dtype, dtype]
    return [t.to(d) for t, d in zip(tensors, dtypes, strict=True)], torch.randn(M, N, generator=g).to(dtype)


def ours(x, weight, lora_A, lora_B, bias):
    return lora_linear(x, weight, lora_A, lora_B, SCALING, bias)


def plain(x, weight, lora_A, lora_B, bias):
    weight, lora_A, lora_B, bias = (t.to(x.dtype) for t in (weight, lora_A, lora_B, bias))
    return x @ weight.T + SCALING * (x @ lora_A.T) @ lora_B.T + bias


def run(function, tensors, dy, mask=(True,) * 5):
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]
    y = function(*leaves)
    if any(mask):
        y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item() if exact.norm() > 0 else value.double().norm().item()


def assert_as_good_as_torch(tensors, dy):
    exact = run(plain, [t.double() for t in tensors], dy.double())
    for name, got, theirs, true in zip(
        ("y", *NAMES), run(ours, tensors, dy), run(plain, tensors, dy), exact, strict=True
    ):
        assert got.dtype == theirs.dtype and got.shape == theirs.shape
        bound = 2 * error(theirs, true) + 4 * torch.finfo(tensors[0].dtype).eps
        assert error(got, true) <= bound, name


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_gradients_are_as_good_as_plain_torch(shape, dtype):
    assert_as_good_as_torch(*make(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_float32_adapters_beside_a_half_weight_get_float32_gradients(dtype):
    tensors, dy = make(63, 128, 96, 8, dtype, adapter_dtype=torch.float32)
    assert_as_good_as_torch(tensors, dy)
    assert [g.dtype for g in run(ours, tensors, dy)[1:]] == [t.dtype for t in tensors]


def test_half_weight_under_float32_rows_computes_in_float32():
    (x, weight, lora_A, lora_B, bias), dy = make(5, 8, 6, 2, torch.float32)
    tensors = [x, weight.bfloat16(), lora_A, lora_B, bias]
    assert_as_good_as_torch(tensors, dy)
    assert ours(*tensors).dtype == torch.float32


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(leading):
    (_, weight, lora_A, lora_B, bias), _ = make(1, 8, 6, 2)
    x, dy = torch.randn(*leading, 6).double(), torch.randn(*leading, 8).double()
    tensors = [x, weight, lora_A, lora_B, bias]
    for got, want in zip(run(ours, tensors, dy), run(plain, tensors, dy), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=5)), ids=lambda m: "".join("01"[b] for b in m)
)
def test_every_mask_gives_the_gradients_of_the_full_one(mask):
    tensors, dy = make(9, 8, 6, 2)
    full = run(ours, tensors, dy)
    masked = run(ours, tensors, dy, mask)
    assert torch.equal(masked[0], full[0])
    for need, got, want in zip(mask, masked[1:], full[1:], strict=True):
        assert torch.equal(got, want) if need else got is None


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck(with_bias):
    tensors, _ = make(4, 5, 6, 2)
    leaves = [t.requires_grad_() for t in tensors[: 4 + with_bias]]
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t[:4], SCALING, *t[4:]), leaves)


@given(
    M=st.integers(0, 9),
    N=st.integers(1, 9),
    K=st.integers(1, 9),
    R=st.integers(1, 9),
    mask=st.tuples(*[st.booleans()] * 5),
    scaling=st.floats(0.01, 100),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_any_sizes_and_any_mask_match_autograd(M, N, K, R, mask, scaling, seed):
    tensors, dy = make(M, N, K, R, seed=seed)

    def definition(x, weight, lora_A, lora_B, bias):
        return x @ (weight + scaling * lora_B @ lora_A).T + bias

    got = run(lambda *t: lora_linear(*t[:4], scaling, t[4]), tensors, dy, mask)
    for a, b in zip(got, run(definition, tensors, dy, mask), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-9 * scaling)


def saved_shapes(mask):
    tensors, _ = make(50, 8, 6, 2)
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ours(*leaves)
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


def test_non_contiguous_and_expanded_inputs():
    (_, weight, lora_A, lora_B, bias), _ = make(1, 8, 6, 2)
    permuted = [weight.T.contiguous().T, lora_A.T.contiguous().T, lora_B.T.contiguous().T, bias[:1].expand(8)]
    for x in (torch.randn(6, 5, 4).double().permute(2, 1, 0), torch.randn(1, 5, 6).double().expand(4, 5, 6)):
        for dy in (torch.randn(8, 5, 4).double().permute(2, 1, 0), torch.ones(()).double().expand(4, 5, 8)):
            tensors = [x, *permuted]
            for got, want in zip(run(ours, tensors, dy), run(plain, tensors, dy), strict=True):
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
    compiled = torch.compile(lambda *t: ours(*t).tanh(), fullgraph=True, dynamic=True)
    mask = (True, False, True, True, False)
    for M in (5, 12):
        tensors, dy = make(M, 8, 6, 2, torch.float32)
        for got, want in zip(
            run(compiled, tensors, dy, mask), run(lambda *t: ours(*t).tanh(), tensors, dy, mask), strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant):
    tensors, dy = make(9, 8, 6, 2, torch.float32)
    got = run(lambda *t: checkpoint(ours, *t, use_reentrant=reentrant), tensors, dy)
    for a, b in zip(got, run(ours, tensors, dy), strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_their_own():
    tensors, dy = make(63, 128, 96, 8, torch.float32)

    def autocast(function):
        def call(*t):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*t)

        return call

    def linears(x, weight, lora_A, lora_B, bias):
        linear = torch.nn.functional.linear
        return linear(x, weight, bias) + SCALING * linear(linear(x, lora_A), lora_B)

    exact = run(plain, [t.double() for t in tensors], dy.double())
    got, theirs = run(autocast(ours), tensors, dy.bfloat16()), run(autocast(linears), tensors, dy.bfloat16())
    assert got[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got[1:])
    for a, b, true in zip(got, theirs, exact, strict=True):
        assert error(a, true) <= 2 * error(b, true) + 4 * torch.finfo(torch.bfloat16).eps


def test_autocast_around_backward_changes_nothing_and_float64_stays():
    tensors, dy = make(9, 8, 6, 2, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = ours(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(dy)
        assert ours(*(t.double() for t in tensors)).dtype == torch.float64
    for leaf, want in zip(leaves, run(ours, tensors, dy)[1:], strict=True):
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
        ours(*tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_twice_the_same_bits(dtype):
    tensors, dy = make(63, 128, 96, 8, dtype)
    for a, b in zip(run(ours, tensors, dy), run(ours, tensors, dy), strict=True):
        assert torch.equal(a, b)
