import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels import dropped
from federa_kernels.dropped import add_dropped, pack_mask, unpack_mask

NAMES = ("y", "x", "lora_A", "lora_B")


def make(M=5, N=9, K=13, R=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((M, N), (M, K), (R, K), (N, R))
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]


def definition(y, x, lora_A, lora_B, scaling, p):
    return y + scaling * (torch.nn.functional.dropout(x, p) @ lora_A.T) @ lora_B.T


def run(function, tensors, dy, mask=(True,) * 4, p=0.4):
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]
    torch.manual_seed(0)
    out = function(*leaves, 0.75, p)
    if any(mask):
        out.backward(dy)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@given(M=st.integers(0, 9), K=st.integers(1, 40), p=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_bits_come_back(M, K, p, seed):
    mask = torch.rand(M, K, generator=torch.Generator().manual_seed(seed)) > p
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (M, math.ceil(K / 8))
    assert torch.equal(unpack_mask(packed, K), mask)


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=4)), ids=lambda m: "".join("01"[b] for b in m)
)
def test_every_mask_matches_autograd_of_dropout(mask):
    tensors = make()
    dy = torch.randn(5, 9, dtype=torch.float64)
    for got, want in zip(run(add_dropped, tensors, dy, mask), run(definition, tensors, dy, mask), strict=True):
        assert got is want is None or torch.allclose(got, want, rtol=1e-12)  # float64, summed in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_plain_torch(dtype):
    tensors = make(63, 128, 96, 8, dtype)
    dy = torch.randn(63, 128).to(dtype)
    exact = run(definition, [t.double() for t in tensors], dy.double())
    for got, theirs, true in zip(run(add_dropped, tensors, dy), run(definition, tensors, dy), exact, strict=True):
        assert got.dtype == theirs.dtype
        error, bound = ((value.double() - true).norm() for value in (got, theirs))
        assert error <= 2 * bound + 4 * torch.finfo(dtype).eps * true.norm()


def test_gradcheck():
    y, x, lora_A, lora_B = (t.requires_grad_() for t in make())
    mask = torch.rand(5, 13) > 0.3
    inputs = (y, x, mask, lora_A, lora_B, 0.6)
    assert torch.autograd.gradcheck(dropped._AddDropped.apply, inputs)


@pytest.mark.parametrize(
    ("needed", "kept"),
    [
        ("x lora_A lora_B", {(50, 13): torch.float32, (50, 2): torch.uint8, (50, 3): torch.float32}),
        ("x", {(50, 2): torch.uint8}),
        ("lora_B", {(50, 3): torch.float32}),
        ("y", {}),
    ],
)
def test_keeps_x_as_it_came_a_bit_an_entry_and_h(needed, kept):
    tensors = make(M=50, dtype=torch.float32)
    leaves = [t.requires_grad_(name in needed.split()) for t, name in zip(tensors, NAMES, strict=True)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_dropped(*leaves, 1.0, 0.5)
    assert {tuple(t.shape): t.dtype for t in saved if t.shape[0] == 50} == kept
    assert all(t.data_ptr() == leaves[1].data_ptr() for t in saved if t.shape == (50, 13))


def test_autocast_around_backward_changes_nothing():
    tensors, dy = make(dtype=torch.float32), torch.randn(5, 9)
    plain = run(add_dropped, tensors, dy)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(run(add_dropped, tensors, dy), plain, strict=True):
            assert torch.equal(got, want)
