"""What went wrong in other projects' kernels of this kind, by the numbers of the list, in the products themselves:
01 overflow, 02 dtypes, 03 gradients' strides, 04 aliasing, 06 rank, 07 shapes, 08 determinism, 09 unwritten memory,
14 scale, 16 rounding. What surrounds a call is in test_pitfalls_around.py; 05, dropout, is with who applies it.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from federa_kernels import FeDeRALinear, FrozenWeight, Segments, lora_linear, lora_linear_clients, lora_linear_shared
from federa_kernels.lora_linear import cpu

from . import against_float64 as cases
from .against_float64 import DTYPES, Draw, assert_as_good_as_torch, plain, run

ADAPTERS_AND_X = (True, False, True, True, True)
forms = pytest.mark.parametrize("form", ["single", "clients", "shared"])
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["tensor", "frozen"])


def make(M=37, N=64, K=96, R=8, dtype=torch.float32, adapters=torch.float32, seed=0):
    draw = Draw(seed)
    tensors = [draw(M, K, dtype=dtype), draw.of_width(N, K, dtype=dtype), draw.of_width(R, K, dtype=adapters)]
    return [*tensors, draw.of_width(N, R, dtype=adapters), draw(N, dtype=dtype)], draw(M, N, dtype=dtype)


def function_of(form, frozen=False):
    """The three public functions under one signature: (scaling, x, weight, lora_A, lora_B, bias) -> y."""

    def call(scaling, x, weight, lora_A, lora_B, bias):
        weight = FrozenWeight(weight) if frozen else weight
        if form == "single":
            return lora_linear(x, weight, lora_A, lora_B, scaling, bias)
        if form == "shared":
            return lora_linear_shared(x, [(weight, lora_A, lora_B, scaling, bias)] * 2)[1]
        half = x.shape[0] // 2
        segments = Segments.from_sizes([half, x.shape[0] - half], scalings=scaling)
        return lora_linear_clients(x, weight, lora_A.expand(2, -1, -1), lora_B.expand(2, -1, -1), segments, bias)

    return call


def same(first, second):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@forms
def test_01_int32_overflow_in_sizes(form):
    M, N, K, R = 150_000, 14_336, 64, 4
    with FakeTensorMode():
        shapes = [(M, K), (N, K), (R, K), (N, R), (N,)]
        leaves = [torch.empty(shape, requires_grad=True) for shape in shapes]
        y = function_of(form)(1.0, *leaves)
        assert y.numel() == M * N > 2**31
        y.backward(torch.empty(M, N))
        assert [leaf.grad.shape for leaf in leaves] == [torch.Size(shape) for shape in shapes]


@forms
@frozen_or_not
def test_01_int32_overflow_in_strides(form, frozen):
    """Rows of x, of dy and of the weight 2^31 entries apart; of that memory a page each is ever touched."""

    def apart(tensor):
        room = torch.from_numpy(np.empty(2**31 + tensor.shape[1], np.float32))
        return room.as_strided(tensor.shape, (2**31, 1)).copy_(tensor)

    (x, weight, lora_A, lora_B, bias), dy = make(M=2, N=2)
    far = [apart(x), apart(weight), lora_A, lora_B, bias]
    got = run(function_of(form, frozen), 0.5, far, apart(dy), ADAPTERS_AND_X)
    want = run(plain, 0.5, [x, weight, lora_A, lora_B, bias], dy, ADAPTERS_AND_X)
    for a, b in zip(got, want, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@forms
@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"], ids=["plain", "autocast-bf16", "autocast-fp16"])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_02_dtype_mixes(form, x_dtype, autocast):
    """Every dtype of weight and of adapters, and frozen ones, beside this x: y comes as F.linear gives it, gradients
    in the dtype of what they belong to."""
    compute = DTYPES[x_dtype if autocast is None or x_dtype == "fp64" else autocast]

    def definition(scaling, x, *others):
        return plain(scaling, x if x.dtype == torch.float64 else x.to(compute), *others)

    for weight, adapters, frozen in itertools.product(DTYPES.values(), DTYPES.values(), (False, True)):
        tensors, dy = make(7, 8, 6, 2, DTYPES[x_dtype], adapters)
        tensors[1] = tensors[1].to(weight)
        function = function_of(form, frozen)

        def ours(*arguments, function=function):
            with torch.autocast("cpu", DTYPES[autocast or "bf16"], enabled=autocast is not None):
                return function(*arguments)

        assert_as_good_as_torch(ours, definition, 0.75, tensors, dy.to(compute), (True, not frozen, True, True, True))


@forms
@frozen_or_not
def test_03_non_contiguous_gradients(form, frozen):
    function, mask = function_of(form, frozen), (True, not frozen, True, True, True)
    tensors, dy = make()
    for layout in ("transposed", "every other", "columns", "offset", "one row", "one number"):
        given = cases.laid(dy, layout)
        assert_as_good_as_torch(function, plain, 0.75, tensors, given, mask)
        got, want = run(function, 0.75, tensors, given, mask), run(function, 0.75, tensors, given.contiguous(), mask)
        for a, b in zip(got, want, strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4), layout


@frozen_or_not
@pytest.mark.parametrize("form", ["single", "shared"])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 1), (0,), (2, 0), (4, 1, 3, 2)], ids=str)
def test_03_any_number_of_dimensions_and_the_heads_transposed(shape, form, frozen):
    (_, *others), _ = make(dtype=torch.float64, adapters=torch.float64)
    draw, function, mask = Draw(1), function_of(form, frozen), (True, not frozen, True, True, True)

    def heads(f):
        def call(*arguments):
            y = f(*arguments)
            return y.unflatten(-1, (4, 16)).transpose(0, -2).exp()

        return call

    tensors, dy = [draw(*shape, 96), *others], heads(lambda t: t)(draw(*shape, 64))
    for a, b in zip(
        run(heads(function), 0.75, tensors, dy, mask), run(heads(plain), 0.75, tensors, dy, mask), strict=True
    ):
        assert a is b is None or torch.allclose(a, b)


@forms
@frozen_or_not
def test_04_inplace_reuse_of_x_by_another_branch(form, frozen):
    function, mask = function_of(form, frozen), (True, not frozen, True, True, True)
    tensors, dy = make(N=96)

    def branches(f):
        return lambda s, x, *others: f(s, x, *others) + x * x + f(s, x, *others)

    assert_as_good_as_torch(branches(function), branches(plain), 0.75, tensors, dy, mask)


@forms
@frozen_or_not
def test_04_backward_twice(form, frozen):
    tensors, dy = make()
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, ADAPTERS_AND_X, strict=True)]
    y, before = function_of(form, frozen)(0.75, *leaves), [t.detach().clone() for t in (*tensors, dy)]
    wanted = [leaf for leaf, need in zip(leaves, ADAPTERS_AND_X, strict=True) if need]
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    assert same(torch.autograd.grad(y, wanted, dy), first)
    assert same((*tensors, dy), before)


@forms
@frozen_or_not
def test_04_y_modified_in_place(form, frozen):
    """As a residual connection, an activation or a mask does."""
    function, mask = function_of(form, frozen), (True, not frozen, True, True, True)
    tensors, dy = make()

    def then(f, step):
        return lambda *arguments: step(f(*arguments))

    def masked(y):
        y[3:5] = 0
        return y

    for step in (lambda y: y.add_(1).mul_(2), torch.relu_, masked, lambda y: y.view(-1).sin_().view(37, 64)):
        found = (run(then(f, step), 0.75, tensors, dy, mask) for f in (function, plain))
        for got, want in zip(*found, strict=True):
            assert got is want is None or torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@forms
def test_04_x_modified_in_place_is_an_error_and_not_a_wrong_gradient(form):
    tensors, dy = make()
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, (False, False, True, False, False), strict=True)]
    y = function_of(form, frozen=True)(0.75, *leaves)
    leaves[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_06_every_rank(dtype, frozen):
    mask = (True, not frozen, True, True, True)
    for R in (*range(131), 144, 200):
        tensors, dy = make(5, 33, 40, R, dtype)
        assert_as_good_as_torch(function_of("single", frozen), plain, 0.75, tensors, dy, mask)


@frozen_or_not
def test_06_ranks_of_one_batch_may_be_far_apart(frozen):
    ranks, sizes, draw = [128, 1, 8, 20, 127], [7, 33, 1, 0, 30], Draw(0)
    x, weight, A, B = draw(71, 48), draw.of_width(40, 48), draw.of_width(5, 128, 48), draw.of_width(5, 40, 128)
    x, weight, A, B = (t.float() for t in (x, weight, A, B))
    for c, rank in enumerate(ranks):
        A[c, rank:], B[c, :, rank:] = torch.nan, torch.nan
    y = lora_linear_clients(
        x, FrozenWeight(weight) if frozen else weight, A, B, Segments.from_sizes(sizes, ranks=ranks)
    )
    each = [plain(1.0, rows, weight, A[c, :r], B[c, :, :r], None) for c, (rows, r) in enumerate(zip(x.split(sizes), ranks, strict=True))]  # fmt: skip  # noqa: E501
    torch.testing.assert_close(y, torch.cat(each), rtol=1e-4, atol=1e-4)


SHAPES = {
    "K500": (9, 64, 500, 8),
    "N3424": (5, 3424, 32, 8),
    "K3424": (5, 32, 3424, 8),
    "primes": (31, 61, 127, 7),
    "rows-beyond-a-grid": (70_000, 2, 3, 1),
    "no-row": (0, 33, 31, 5),
    "one-of-each": (1, 1, 1, 1),
}


@forms
@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_07_shapes(shape, dtype, form, frozen):
    tensors, dy = make(*shape, dtype)
    mask = (True, not frozen, True, True, True)
    assert_as_good_as_torch(function_of(form, frozen), plain, 0.75, tensors, dy, mask)


def test_07_groups_without_rows_have_zero_gradients():
    draw, sizes = Draw(0), [0, 5, 0, 0, 28, 0]
    tensors = [draw(33, 40), draw.of_width(24, 40), draw(6, 4, 40), draw(6, 24, 4), draw(6, 24)]
    tensors = [t.float() for t in tensors]

    def function(_, x, weight, lora_A, lora_B, bias):
        return lora_linear_clients(x, FrozenWeight(weight), lora_A, lora_B, Segments.from_sizes(sizes), bias)

    _, _, _, *grads = run(function, None, tensors, draw(33, 24).float(), ADAPTERS_AND_X)
    for grad in grads:
        assert [bool(own.any()) for own in grad] == [size > 0 for size in sizes]


@forms
@frozen_or_not
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_08_determinism(dtype, form, frozen):
    tensors, dy = make(97, 130, 200, 12, dtype)
    function, mask = function_of(form, frozen), (True, not frozen, True, True, True)
    first = run(function, 0.75, tensors, dy, mask)
    assert all(same(run(function, 0.75, tensors, dy, mask), first) for _ in range(19))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_08_a_row_does_not_depend_on_its_neighbours_where_weights_are_packed(dtype):
    tensors, dy = make(97, 130, 200, 12, dtype)
    if not cpu.packs(dtype, tensors[1]):
        pytest.skip(cpu.why_not(dtype, tensors[1]))
    function = function_of("single", frozen=True)
    y, dx, *_ = run(function, 0.75, tensors, dy, ADAPTERS_AND_X)
    for rows in (slice(0, 1), slice(96, 97), slice(5, 38), slice(64, 97)):
        part = run(function, 0.75, [tensors[0][rows], *tensors[1:]], dy[rows], ADAPTERS_AND_X)
        assert same(part[:2], (y[rows], dx[rows]))


@pytest.mark.usefixtures("poisoned")
def test_09_uninitialised_output():
    assert torch.empty(5).isnan().all() and torch.ones(2).new_empty(3, 4).isnan().all()
    for frozen, dtype, sizes in itertools.product(
        (False, True), (torch.float32, torch.bfloat16), ([0, 3, 30], [33, 0, 0], [1, 31, 1], [0, 0, 0])
    ):
        M = sum(sizes)
        (x, weight, *_, bias), dy = make(M, 33, 31, dtype=dtype)
        A, B = Draw(1)(3, 20, 31, dtype=torch.float32), Draw(2)(3, 33, 20, dtype=torch.float32)

        def function(_, x, weight, A, B, bias, sizes=sizes, frozen=frozen):
            weight, segments = FrozenWeight(weight) if frozen else weight, Segments.from_sizes(sizes, ranks=[20, 1, 3])
            y = lora_linear_clients(x, weight, A, B, segments, bias)
            return [
                y,
                *lora_linear_shared(x, [(weight, A[0], B[0], 1.0, bias), (weight, A[1, :0], B[1, :, :0], 1.0, None)]),
            ]

        found = run(function, None, [x, weight, A, B, bias], [dy] * 3, ADAPTERS_AND_X)
        assert all(t is None or t.isfinite().all() for t in found)


@forms
@frozen_or_not
@pytest.mark.parametrize("scaling", [-2.0, 0.0, 1 / 3, 8 / 3**0.5, 1e-3, 100, 3], ids=lambda s: f"{s:.3g}")
def test_14_scale(scaling, form, frozen):
    for dtype in (torch.float32, torch.bfloat16):
        tensors, dy = make(dtype=dtype)
        mask = (True, not frozen, True, True, True)
        definition = plain
        if form == "clients":  # who hold scalings in float32

            def definition(s, *others):
                return plain(torch.tensor(s, dtype=torch.float32).item(), *others)

        assert_as_good_as_torch(function_of(form, frozen), definition, scaling, tensors, dy, mask)


@forms
@frozen_or_not
def test_14_scale_is_not_rounded_to_the_dtype_of_the_rows(form, frozen):
    """1 + 3/512 in bfloat16 is 1 + 4/512; the low-rank part over many entries keeps the one it was given."""
    scaling = 1 + 3 / 512
    tensors, dy = make(256, 256, 32, 8, torch.bfloat16)
    tensors[1], tensors[4] = torch.zeros_like(tensors[1]), torch.zeros_like(tensors[4])
    function = function_of(form, frozen)
    exact = run(plain, scaling, [t.double() for t in tensors], dy.double(), ADAPTERS_AND_X)
    for got, true in zip(run(function, scaling, tensors, dy, ADAPTERS_AND_X), exact, strict=True):
        if true is not None:
            gain = (got.double() * true).sum() / (true * true).sum()
            assert abs(gain - 1) < 6e-4


def test_14_scale_changed_between_forward_and_backward():
    layer, x = FeDeRALinear.from_linear(nn.Linear(96, 64), 8), torch.randn(5, 96)
    layer(x).sum().backward()
    want, layer.lora_A.grad = layer.lora_A.grad, None
    y = layer(x)
    layer.scaling *= 3
    y.sum().backward()
    assert torch.equal(layer.lora_A.grad, want)


def test_14_scalings_of_a_batch_changed_before_the_backward_are_an_error():
    (x, weight, lora_A, lora_B, _), dy = make()
    segments = Segments.from_sizes([30, 7], scalings=0.5)
    lora_A = lora_A.expand(2, -1, -1).requires_grad_()
    y = lora_linear_clients(x, FrozenWeight(weight), lora_A, lora_B.expand(2, -1, -1), segments)
    segments.scalings.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_16_the_low_rank_part_is_not_rounded_before_it_is_added():
    """PEFT rounds h, s B h and the sum to bfloat16; here only what comes out is rounded, and h where it is kept."""
    tensors, _ = make(256, 256, 256, 16, torch.bfloat16)
    tensors[3] = tensors[3] * 4
    x, weight, lora_A, lora_B, bias = tensors
    lora_A, lora_B = lora_A.bfloat16(), lora_B.bfloat16()
    exact = plain(1 / 3, *(t.double() for t in (x, weight, lora_A, lora_B, bias)))
    theirs = linear(x, weight, bias) + linear(linear(x, lora_A), lora_B) * (1 / 3)
    for frozen in (False, True):
        ours = function_of("single", frozen)(1 / 3, x, weight, lora_A, lora_B, bias)
        assert (ours - exact).norm() <= (theirs - exact).norm()
