import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from federa_kernels import load_extension, packed_attention

NAMES = ("out", "dq", "dk", "dv")


def make(lengths, H=2, D=32, dtype=torch.bfloat16, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(sum(lengths), H, D, generator=g)).to(dtype) for _ in range(4)]


def definition(query, key, value, lengths, scaling):
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        p = torch.softmax(scaling * torch.einsum("qhd,khd->hqk", q, k), -1)
        outputs.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(outputs)


def plain(query, key, value, lengths, scaling):
    """PyTorch's in the same dtype."""
    outputs = []
    for part in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (rows.transpose(0, 1)[None] for rows in part)
        outputs.append(scaled_dot_product_attention(q, k, v, scale=scaling)[0].transpose(0, 1))
    return torch.cat(outputs)


def run(function, tensors, lengths, scaling, dtype=None):
    *inputs, d_out = (tensor.to(dtype or tensor.dtype) for tensor in tensors)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves, lengths, scaling)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors(found, exact):
    return [float((f.double() - e).norm() / e.norm().clamp(min=1e-30)) for f, e in zip(found, exact, strict=True)]


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(sum),
    H=st.integers(1, 3),
    D=st.sampled_from((32, 64, 24)),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_near_float64_as_pytorch_is(lengths, H, D, dtype, seed):
    tensors, scaling = make(lengths, H, D, dtype, seed), D**-0.5
    exact = run(definition, tensors, lengths, scaling, torch.float64)
    expected = errors(run(plain, tensors, lengths, scaling), exact)
    rounding = 4 * torch.finfo(torch.float32).eps * max(float(e.norm()) for e in exact)  # of sums that cancel
    found = run(packed_attention, tensors, lengths, scaling)
    for name, own, want, theirs in zip(NAMES, found, exact, expected, strict=True):
        assert own.dtype == dtype
        allowed = max(2 * theirs, torch.finfo(dtype).eps) * float(want.norm()) + rounding
        assert float((own.double() - want).norm()) <= allowed, name


@pytest.mark.parametrize("D", [32, 64])
def test_error_is_pytorchs_on_long_examples(D):
    lengths = [300, 128, 1, 77]
    tensors = make(lengths, 3, D)
    exact = run(definition, tensors, lengths, 0.2, torch.float64)
    for found, allowed in zip(
        errors(run(packed_attention, tensors, lengths, 0.2), exact),
        errors(run(plain, tensors, lengths, 0.2), exact),
        strict=True,
    ):
        assert found <= 1.5 * allowed


def test_bits_in_any_company_and_on_any_threads():
    lengths = [33, 5, 64, 100]
    tensors = make(lengths, 4)
    together = run(packed_attention, tensors, lengths, None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one, other in zip(run(packed_attention, tensors, lengths, None), together, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
    alone = [
        run(packed_attention, part, [len(part[0])], None)
        for part in zip(*(t.split(lengths) for t in tensors), strict=True)
    ]
    for index, whole in enumerate(together):
        assert torch.equal(torch.cat([part[index] for part in alone]), whole)


def test_strides_of_one_projection_and_expanded_gradients():
    lengths, H, D = [40, 9], 2, 32
    fused = torch.randn(49, 3 * H * D, generator=torch.Generator().manual_seed(1)).bfloat16()
    views = [part.unflatten(1, (H, D)) for part in fused.split(H * D, 1)]
    leaves = [view.requires_grad_() for view in views]
    packed_attention(*leaves, lengths).sum().backward()
    copies = [view.detach().clone().requires_grad_() for view in views]
    out = packed_attention(*copies, lengths)
    out.backward(torch.ones_like(out))
    for leaf, copy in zip(leaves, copies, strict=True):
        assert torch.equal(leaf.grad, copy.grad)
    turned = [view.detach().transpose(1, 2).contiguous().transpose(1, 2) for view in views]  # heads of stride 1
    assert torch.equal(packed_attention(*turned, lengths), out)


def test_every_entry_is_written():
    lengths = [1, 31, 0, 50]
    tensors = make(lengths)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        found = run(packed_attention, tensors, lengths, None)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_huge_scores_pick_one_key():
    lengths = [48]
    query, key, value, d_out = make(lengths, 1, size=30.0)
    out, *gradients = run(packed_attention, (query, key, value, d_out), lengths, 1.0)
    winners = torch.einsum("qhd,khd->hqk", query.double(), key.double()).argmax(-1)[0]
    assert torch.equal(out[:, 0], value[winners, 0])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_equal_scores_give_the_mean():
    query, key = torch.zeros(2, 3, 1, 32, dtype=torch.bfloat16)
    value = torch.arange(3.0).bfloat16()[:, None, None].expand(3, 1, 32)
    assert torch.equal(packed_attention(query, key, value, [3]), torch.ones(3, 1, 32, dtype=torch.bfloat16))


def test_the_kernel_takes_what_it_says():
    extension = load_extension()
    if extension is None:
        pytest.skip("federa_kernels._C is not built")
    tiles = extension.has_tiles()
    assert [extension.attention_available(D) for D in (16, 32, 64, 128)] == [False, tiles, tiles, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [4, 4]}, r"lengths must be at least 0 and sum to M = 7, got \[4, 4\]"),
        ({"lengths": [8, -1]}, "lengths must be at least 0"),
        ({"key": torch.zeros(6, 2, 32)}, r"key must have shape \(M, H, D\) with M=7, H=2, D=32, got \(6, 2, 32\)"),
        ({"query": torch.zeros(7, 64)}, r"query must have shape \(M, H, D\), got \(7, 64\)"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {name: torch.zeros(7, 2, 32) for name in ("query", "key", "value")} | {"lengths": [3, 4]} | change
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)
