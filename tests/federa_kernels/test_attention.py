import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from federa_kernels import load_extension, packed_attention
from federa_kernels.attention import _at_once

NAMES = ("out", "dq", "dk", "dv")


DTYPES = (torch.bfloat16, torch.float32)


def make(lengths, H=2, D=32, dtype=torch.bfloat16, seed=0, size=1.0, queries=None):
    """q, k, v and dout."""
    g = torch.Generator().manual_seed(seed)
    asked = sum(lengths if queries is None else queries)
    rows = (asked, sum(lengths), sum(lengths), asked)
    return [(size * torch.randn(count, H, D, generator=g)).to(dtype) for count in rows]


def parts_of(query, key, value, lengths, queries):
    asked = lengths if queries is None else queries
    return zip(query.split(asked), key.split(lengths), value.split(lengths), strict=True)


def definition(query, key, value, lengths, scaling, queries=None):
    outputs = []
    for q, k, v in parts_of(query, key, value, lengths, queries):
        p = torch.softmax(scaling * torch.einsum("qhd,khd->hqk", q, k), -1)
        outputs.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(outputs)


def plain(query, key, value, lengths, scaling, queries=None):
    """PyTorch's in the same dtype."""
    outputs = []
    for part in parts_of(query, key, value, lengths, queries):
        q, k, v = (rows.transpose(0, 1)[None] for rows in part)
        outputs.append(scaled_dot_product_attention(q, k, v, scale=scaling)[0].transpose(0, 1))
    return torch.cat(outputs)


def packed(query, key, value, lengths, scaling, queries=None):
    return packed_attention(query, key, value, lengths, scaling, queries=queries)


def at_once(query, key, value, lengths, scaling, queries=None, dropout=0.0):
    """What a GPU runs, here by PyTorch's own attention of nested tensors for the CPU."""
    return _at_once(query, key, value, lengths, lengths if queries is None else queries, scaling, dropout)


def packed_with_dropout(query, key, value, lengths, scaling, dropout=0.0):
    return packed_attention(query, key, value, lengths, scaling, dropout)


def run(function, tensors, lengths, scaling, dtype=None, queries=None):
    *inputs, d_out = (tensor.to(dtype or tensor.dtype) for tensor in tensors)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves, lengths, scaling, queries=queries)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors(found, exact):
    return [float((f.double() - e).norm() / e.norm().clamp(min=1e-30)) for f, e in zip(found, exact, strict=True)]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
    own=st.booleans(),
    H=st.integers(1, 3),
    D=st.sampled_from((32, 64, 24)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_near_float64_as_pytorch_is(sizes, own, H, D, dtype, seed):
    """own: every token asks; else any number of queries."""
    lengths = [length for length, _ in sizes]
    queries = None if own else [count if length else 0 for length, count in sizes]
    assume(sum(lengths if own else queries))
    tensors, scaling = make(lengths, H, D, dtype, seed, queries=queries), D**-0.5
    exact = run(definition, tensors, lengths, scaling, torch.float64, queries)
    expected = errors(run(plain, tensors, lengths, scaling, queries=queries), exact)
    rounding = 4 * torch.finfo(torch.float32).eps * max(float(e.norm()) for e in exact)  # of sums that cancel
    found = run(packed, tensors, lengths, scaling, queries=queries)
    for name, own, want, theirs in zip(NAMES, found, exact, expected, strict=True):
        assert own.dtype == dtype
        allowed = max(2 * theirs, torch.finfo(dtype).eps) * float(want.norm()) + rounding
        assert float((own.double() - want).norm()) <= allowed, name


@pytest.mark.parametrize("size", [1.0, 3.0])  # of scores: flat and steep distributions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64])
def test_error_is_pytorchs_on_long_examples(D, dtype, size):
    lengths = [300, 128, 1, 77]
    tensors = make(lengths, 3, D, dtype, size=size)
    exact = run(definition, tensors, lengths, 0.2, torch.float64)
    for found, allowed in zip(
        errors(run(packed, tensors, lengths, 0.2), exact),
        errors(run(plain, tensors, lengths, 0.2), exact),
        strict=True,
    ):
        assert found <= 1.5 * allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_in_any_company_and_on_any_threads(dtype):
    lengths = [33, 5, 64, 100]
    tensors = make(lengths, 4, dtype=dtype)
    together = run(packed, tensors, lengths, None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one, other in zip(run(packed, tensors, lengths, None), together, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
    alone = [run(packed, part, [len(part[0])], None) for part in zip(*(t.split(lengths) for t in tensors), strict=True)]
    for index, whole in enumerate(together):
        assert torch.equal(torch.cat([part[index] for part in alone]), whole)
    firsts = torch.tensor([0, 33, 38, 102])  # fewer queries change no other's result
    few = packed_attention(tensors[0][firsts], *tensors[1:3], lengths, queries=[1] * 4)
    assert torch.equal(few, together[0][firsts])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_one_projection_and_expanded_gradients(dtype):
    lengths, H, D = [40, 9], 2, 32
    fused = torch.randn(49, 3 * H * D, generator=torch.Generator().manual_seed(1)).to(dtype)
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


@pytest.mark.parametrize("queries", [None, [1, 0, 0, 40]], ids=["own", "some"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_is_written(dtype, queries):
    lengths = [1, 31, 0, 50]
    tensors = make(lengths, dtype=dtype, queries=queries)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        found = run(packed, tensors, lengths, None, queries=queries)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(bool(tensor.isfinite().all()) for tensor in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_pick_one_key(dtype):
    lengths = [48]
    query, key, value, d_out = make(lengths, 1, dtype=dtype, size=30.0)
    out, *gradients = run(packed, (query, key, value, d_out), lengths, 1.0)
    winners = torch.einsum("qhd,khd->hqk", query.double(), key.double()).argmax(-1)[0]
    bits = 3 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0  # p, p v and one over the sum are rounded
    assert torch.allclose(out[:, 0], value[winners, 0], rtol=bits, atol=0)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_give_the_mean(dtype):
    query, key = torch.zeros(2, 3, 1, 32, dtype=dtype)
    value = torch.arange(3.0).to(dtype)[:, None, None].expand(3, 1, 32)
    found = packed_attention(query, key, value, [3])
    assert torch.allclose(found.float(), torch.ones(3, 1, 32), rtol=torch.finfo(dtype).eps)


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
        ({"query": torch.zeros(7, 64)}, r"query must have shape \(Q, H, D\), got \(7, 64\)"),
        ({"queries": [3, 3]}, r"queries must be one for each of lengths, .* sum to Q = 7, got \[3, 3\]"),
        ({"queries": [7]}, "queries must be one for each of lengths"),
        ({"lengths": [7, 0], "queries": [6, 1]}, "0 where that is 0"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {name: torch.zeros(7, 2, 32) for name in ("query", "key", "value")} | {"lengths": [3, 4]} | change
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5),
    own=st.booleans(),
    H=st.integers(1, 3),
    D=st.sampled_from((8, 24)),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_all_lengths_at_once(sizes, own, H, D, dtype, seed):
    """The way of a GPU; fewer and more queries than tokens."""
    lengths = [length for length, _ in sizes]
    queries = None if own else [count for _, count in sizes]
    check_at_once(at_once, lengths, queries, H, D, dtype, seed)


def check_at_once(function, lengths, queries, H, D, dtype, seed, device="cpu"):
    tensors, scaling = make(lengths, H, D, dtype, seed, queries=queries), D**-0.5
    exact = run(definition, tensors, lengths, scaling, torch.float64, queries)
    there = [tensor.to(device) for tensor in tensors]
    expected, found = (
        [tensor.cpu() for tensor in run(one, there, lengths, scaling, queries=queries)] for one in (plain, function)
    )
    # of sums that cancel
    rounding = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(float(e.norm()) for e in exact)
    for name, own, want, theirs in zip(NAMES, found, exact, errors(expected, exact), strict=True):
        assert own.dtype == dtype
        allowed = max(2 * theirs, torch.finfo(dtype).eps) * float(want.norm()) + rounding
        assert float((own.double() - want).norm()) <= allowed, name


def check_dropout(function, lengths, device="cpu", dtype=torch.float32):
    """With the identity for values the result is the probabilities, p / (1 - rate) or nothing, and dv is theirs."""
    rate, H, D = 0.4, 2, 32
    query, key, _, d_out = (tensor.to(device) for tensor in make(lengths, H, D, dtype))
    value = torch.cat([torch.eye(length, D) for length in lengths])[:, None].repeat(1, H, 1).to(device, dtype)
    value.requires_grad_()
    whole = function(query, key, value, lengths, 0.3).detach()
    torch.manual_seed(0)
    dropped = function(query, key, value, lengths, 0.3, dropout=rate)
    kept = dropped.detach() != 0
    share = float(kept.sum() / (whole != 0).sum())
    assert abs(share - (1 - rate)) < 0.05
    bits = 8 * torch.finfo(dtype).eps
    assert torch.allclose(dropped.detach()[kept], whole[kept] / (1 - rate), rtol=bits)
    dropped.backward(d_out)
    probabilities, begin = dropped.detach().double(), 0
    for length in lengths:
        rows = slice(begin, begin := begin + length)
        wanted = torch.einsum("qhk,qhd->khd", probabilities[rows][..., :length], d_out[rows].double())
        assert torch.allclose(
            value.grad[rows].double(), wanted, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=bits
        )


@pytest.mark.parametrize("queries", [None, [1, 1, 1], [2, 0, 3]], ids=["own", "firsts", "none of one"])
def test_the_way_of_a_gpu_and_evaluation_on_it(monkeypatch, queries):
    lengths = [4, 7, 2]
    tensors = make(lengths, dtype=torch.float32, queries=queries)
    wanted = run(definition, tensors, lengths, 0.3, torch.float64, queries)
    monkeypatch.setattr("federa_kernels.attention.GPUS", ("cpu",))
    with torch.inference_mode():
        assert torch.allclose(packed(*tensors[:3], lengths, 0.3, queries).double(), wanted[0], atol=1e-6)
    for own, want in zip(run(packed, tensors, lengths, 0.3, queries=queries), wanted, strict=True):
        assert torch.allclose(own.double(), want, atol=1e-5)  # float32


def test_dropout_at_once():
    check_dropout(at_once, [32, 30, 32, 7, 32])


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [None, [1, 1, 1, 1], [5, 60, 2, 1]], ids=["own", "firsts", "some"])
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype, D, queries):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    lengths = [33, 5, 128, 64]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        check_at_once(packed, lengths, queries, 3, D, dtype, 0, "cuda")
        check_dropout(packed_with_dropout, [32, 30, 32, 7, 32], "cuda", dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
