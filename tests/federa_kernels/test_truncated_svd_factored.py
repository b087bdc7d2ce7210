import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from federa_kernels import factored_svd, svd_memory_needed, truncated_svd


def clients(N, K, ranks, drift, seed=0, dtype=torch.float32):
    """Pairs that differ by `drift` of a common one; unrelated where drift is None."""
    g = torch.Generator().manual_seed(seed)
    widest = max(ranks)
    B, A = torch.randn(N, widest, generator=g) / N**0.5, torch.randn(widest, K, generator=g) / K**0.5
    pairs = []
    for rank in ranks:
        noise = torch.randn(N, rank, generator=g) / N**0.5, torch.randn(rank, K, generator=g) / K**0.5
        if drift is not None:
            noise = B[:, :rank] + drift * noise[0], A[:rank] + drift * noise[1]
        pairs.append(tuple(factor.to(dtype) for factor in noise))
    return pairs


def assert_promises(found, pairs, weights, rank, tol=1e-6):
    M = sum(float(w) * (B.double() @ A.double()) for w, (B, A) in zip(weights, pairs, strict=True))
    U, S, Vh = (t.double() for t in found[:3])
    scale = torch.linalg.matrix_norm(M) or 1
    energy = torch.linalg.svdvals(M / scale).square()
    identity = torch.eye(rank, dtype=torch.float64)
    assert (U.T @ U - identity).abs().max() <= 2e-6
    assert (Vh @ Vh.T - identity).abs().max() <= 2e-6
    captured = energy.sum() - ((M - (U * S) @ Vh) / scale).square().sum()
    assert captured >= energy[:rank].sum() * (1 - tol) - 1e-12
    assert (S[:-1] >= S[1:]).all() and (S >= 0).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    assert found.certified and 0 <= found.residual < 1e-3


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.3, 3.0, None])
@pytest.mark.parametrize(("N", "K"), [(300, 200), (180, 320)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_as_good_as_the_svd_of_the_product(N, K, drift, dtype):
    pairs = clients(N, K, [8] * 12, drift, dtype=dtype)
    weights = [(i + 1) / 78 for i in range(12)]
    found = factored_svd(pairs, weights, 8)
    assert found.U.dtype == torch.promote_types(dtype, torch.float32)
    assert_promises(found, pairs, weights, 8)
    assert_promises(factored_svd(pairs, torch.tensor(weights), 8, found), pairs, weights, 8)
    assert_promises(factored_svd(pairs, weights, 8, found.Vh[:3]), pairs, weights, 8)


@st.composite
def cases(draw):
    N, K = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    ranks = draw(st.lists(st.integers(1, 8), min_size=1, max_size=30))
    drift = draw(st.sampled_from([0.0, 0.01, 1.0, None]))
    pairs = clients(N, K, ranks, drift, draw(st.integers(0, 2**31)))
    scale = 10.0 ** draw(st.integers(-15, 15))
    weights = draw(st.lists(st.sampled_from([0.0, -0.5, 1e-6, 0.3, 1.0]), min_size=len(ranks), max_size=len(ranks)))
    return [(B * scale, A) for B, A in pairs], weights, draw(st.integers(1, min(N, K)))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_any_pairs(case):
    assert_promises(factored_svd(*case), *case)


def test_clients_that_cancel():
    ((B, A),) = clients(200, 150, [8], None)
    pairs = [(B, A)] * 20 + [(-B, A + 1e-3 * clients(200, 150, [8], None, 1)[0][1])] * 20
    assert_promises(factored_svd(pairs, [0.05] * 40, 8), pairs, [0.05] * 40, 8)
    cancelled = factored_svd([(B, A), (-B, A)] * 10, [1.0] * 20, 8)
    assert (cancelled.S < 1e-5).all()


def test_same_bits_twice():
    pairs = clients(300, 200, [8] * 12, 0.3)
    assert all(map(torch.equal, factored_svd(pairs, [1 / 12] * 12, 8), factored_svd(pairs, [1 / 12] * 12, 8)))


def test_as_truncated_svd_of_the_product():
    pairs = clients(120, 100, [4] * 20, 0.1)
    product = sum(B @ A for B, A in pairs) / 20
    found, expected = factored_svd(pairs, [1 / 20] * 20, 4), truncated_svd(product, 4)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, (expected.U * expected.S) @ expected.Vh,
                               atol=1e-3, rtol=0)  # fmt: skip


@pytest.mark.parametrize(("drift", "upto"), [(0.01, "iteration"), (None, "gram"), ("cancel", "qr")])
def test_memory_stays_below_what_was_predicted(drift, upto):
    N, K, ranks, rank = 1500, 1000, [16] * 24, 16
    pairs = clients(N, K, ranks, 0.01 if drift == "cancel" else drift)
    if drift == "cancel":
        pairs[12:] = [(-lora_B, lora_A) for lora_B, lora_A in pairs[:12]]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        factored_svd(pairs, [1 / 24] * 24, rank)
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    predicted = svd_memory_needed(N, K, ranks, rank, upto=upto)
    assert 0.2 * predicted < peak <= predicted <= svd_memory_needed(N, K, ranks, rank)


GOOD = (torch.ones(6, 2), torch.ones(2, 5))


@pytest.mark.parametrize(
    ("pairs", "weights", "rank", "exception", "message"),
    [
        ([], [], 1, ValueError, "pairs must not be empty, got no pair"),
        ([GOOD], [1.0, 2.0], 1, ValueError, "weights must have one entry for each of 1 pairs, got 2"),
        ([GOOD], [1.0], 6, ValueError, r"rank must be between 1 and 5 for a \(6, 5\) matrix, got 6"),
        ([GOOD, (torch.ones(7, 2), torch.ones(2, 5))], [1.0] * 2, 1, ValueError, "lora_B 1 must have shape .*"),
        ([GOOD, (torch.ones(6, 2), torch.ones(3, 5))], [1.0] * 2, 1, ValueError, "lora_A 1 must have shape .*"),
        ([(torch.ones(6, 2).long(), GOOD[1])], [1.0], 1, TypeError, "lora_B 0 must be float32, .*"),
        ([GOOD, (GOOD[0], GOOD[1] * torch.nan)], [1.0] * 2, 1, ValueError,
         "lora_A 1 must be finite, got 10 NaN or infinite entries"),
        ([GOOD, GOOD], [1.0, float("inf")], 1, ValueError, "weight 1 must be finite, got inf"),
    ],
)  # fmt: skip
def test_errors_name_what_is_allowed(pairs, weights, rank, exception, message):
    with pytest.raises(exception, match=f"^factored_svd: {message}$"):
        factored_svd(pairs, weights, rank)
