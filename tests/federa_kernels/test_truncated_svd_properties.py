"""Any spectrum, shape, scale, dtype and method, against float64 LAPACK by invariants, never by sign."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels import TruncatedSVD, truncated_svd
from federa_kernels.truncated_svd import cpu

SCALES = {torch.float32: 30, torch.float64: 30, torch.bfloat16: 30, torch.float16: 3}
METHODS = ("auto", "full", "gram", "krylov")


def spectrum(kind: str, n: int, parameter: float) -> torch.Tensor:
    """(n,) descending, float64; parameter from 0 to 1."""
    i = torch.arange(n, dtype=torch.float64)
    match kind:
        case "flat":
            s = torch.ones_like(i)
        case "geometric":
            s = (0.3 + 0.69 * parameter) ** i
        case "power":
            s = (i + 1) ** -(0.1 + parameter)
        case "clustered":  # groups of 5, as wide as 1e-8 to 1
            s = (i // 5 + 1) ** -0.5 * (1 - 10 ** (-8 * parameter) * (i % 5) / 50)
        case "spiked":
            s = torch.where(i < 3, 10.0 - i, 0.1 / (i + 1))
        case "deficient":
            s = (i + 1) ** -0.5 * (i < 1 + parameter * n / 2)
        case "zero":
            s = torch.zeros_like(i)
    return s.sort(descending=True)[0]


KINDS = ("flat", "geometric", "power", "clustered", "spiked", "deficient", "zero")


def matrix_of(kind: str, N: int, K: int, parameter: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    n = min(N, K)
    left, right = (torch.linalg.qr(torch.randn(rows, n, generator=g, dtype=torch.float64))[0] for rows in (N, K))
    return (left * spectrum(kind, n, parameter)) @ right.T


def assert_promises(found, A, rank, tol=1e-6):
    """What the docstring promises of a stored matrix A (N,K)."""
    U, S, Vh = (t.double() for t in found[:3])
    double = A.dtype == torch.float64
    A = A.double()
    A = A / (A.abs().max() or 1)  # squares of 1e-30 and 1e30 are out of range
    S = S / (torch.linalg.matrix_norm(found.U.double() * S) or 1) * torch.linalg.matrix_norm(U.T @ A)
    energy = torch.linalg.svdvals(A).square()
    optimum = energy[:rank].sum()
    identity = torch.eye(rank, dtype=torch.float64)
    assert (U.T @ U - identity).abs().max() <= (1e-12 if double else 2e-6)
    assert (Vh @ Vh.T - identity).abs().max() <= (1e-12 if double else 2e-6)
    captured = energy.sum() - (A - (U * S) @ Vh).square().sum()
    assert captured >= optimum * (1 - tol)
    assert (S.square() - energy[:rank]).abs().max() <= 2 * tol * optimum
    assert (S[:-1] >= S[1:]).all() and (S >= 0).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    assert 0 <= found.residual < 2e-3 and found.certified


@st.composite
def cases(draw):
    N, K = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(sorted(SCALES, key=str)))
    A = matrix_of(draw(st.sampled_from(KINDS)), N, K, draw(st.floats(0, 1)), draw(st.integers(0, 2**31)))
    A = (A * 10.0 ** draw(st.integers(-SCALES[dtype], SCALES[dtype]))).to(dtype)
    return A, draw(st.integers(1, min(N, K))), draw(st.sampled_from(METHODS))


def check(case):
    A, rank, method = case
    assert_promises(truncated_svd(A, rank, method=method), A, rank)


test_any_matrix = settings(max_examples=900, deadline=None)(given(cases())(check))
test_many_matrices = pytest.mark.exhaustive(settings(max_examples=20_000, deadline=None)(given(cases())(check)))


@given(st.lists(cases(), min_size=1, max_size=5), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_mixed_lists_give_the_bits_of_each_alone(several, rank):
    matrices = [A for A, *_ in several if min(A.shape) >= rank]
    for A, found in zip(matrices, truncated_svd(matrices, rank), strict=True):
        assert all(map(torch.equal, found, truncated_svd(A.clone(), rank)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(300, 200), (150, 260), (330, 129), (70, 300)])  # long ones by their Gram matrix
def test_krylov_on_larger_matrices(N, K, kind):
    for seed in range(3):
        A = matrix_of(kind, N, K, seed / 3, seed).float()
        assert_promises(truncated_svd(A, 8, method="krylov"), A, 8)
        assert_promises(truncated_svd(A, 8, method="krylov", verify=True), A, 8)


@pytest.mark.gpu
def test_on_a_gpu():
    for dtype in (torch.float32, torch.bfloat16):
        several = [matrix_of(kind, 800, 500, 0.5, seed).to(dtype) for seed, kind in enumerate(KINDS)]
        for A, found in zip(several, truncated_svd([A.cuda() for A in several], 16), strict=True):
            assert_promises(TruncatedSVD(*(t.cpu() for t in found)), A, 16)


@pytest.mark.parametrize("copies", [2, 5, 17, 40])
@pytest.mark.parametrize("width", [0, 1e-7, 1e-4, 1e-2])
def test_more_equal_values_than_a_block_has_columns_are_all_found(copies, width):
    s = 0.5 * torch.arange(1, 201, dtype=torch.float64) ** -0.5
    s[:copies] = 1 - width * torch.arange(copies) / copies
    A = ((matrix_of("flat", 240, 200, 0, 1)) * s @ matrix_of("flat", 200, 200, 0, 2)).float()
    assert_promises(truncated_svd(A, 24, method="krylov"), A, 24)


def test_a_product_that_does_not_depend_on_the_method():
    A = matrix_of("power", 300, 200, 0.1, 0).float()
    products = []
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            U, S, Vh, *_ = truncated_svd(A, 8, method=method, reproducible=True)
        assert U.dtype == torch.float32
        products.append((U * S) @ Vh)
    for product in products:
        assert torch.linalg.matrix_norm(product - products[0]) <= 1e-4 * torch.linalg.matrix_norm(product)


@st.composite
def long_cases(draw):
    short, times = draw(st.integers(64, 200)), draw(st.integers(2, 5))
    N, K = draw(st.permutations((short, short * times + draw(st.integers(0, 40)))))
    A = matrix_of(draw(st.sampled_from(KINDS)), N, K, draw(st.floats(0, 1)), draw(st.integers(0, 2**31)))
    return (A * 10.0 ** draw(st.integers(-30, 30))).float(), draw(st.integers(1, short // 5)), "krylov"


test_any_long_matrix = settings(max_examples=100, deadline=None)(given(long_cases())(check))
test_many_long_matrices = pytest.mark.exhaustive(
    settings(max_examples=5_000, deadline=None)(given(long_cases())(check))
)


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
def test_compiled_bits_are_the_same_whatever_the_threads():
    several = [matrix_of(kind, 120, 90, 0.5, seed).float() for seed, kind in enumerate(KINDS * 2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = truncated_svd(several, 4)
        torch.set_num_threads(2)
        found = truncated_svd(several, 4)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other)) or not one.matvecs  # direct methods are BLAS's


@pytest.mark.parametrize("method", METHODS)
def test_a_tie_at_the_rank_is_reported(method):
    A = matrix_of("flat", 60, 60, 0, 0)
    with pytest.warns(UserWarning, match="matrix 0 has no unique product of rank 8: its singular values 8 and 9"):
        truncated_svd(A, 8, method=method, reproducible=True)


def test_precision_settings_of_the_process_do_not_reach_it():
    A = matrix_of("power", 300, 200, 0.3, 0).float()
    expected = truncated_svd(A, 4)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = truncated_svd(A, 4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "method must be one of auto, full, gram, krylov, got 'qr'"),
        ({"tol": 0}, "tol must be between 0 and 1, got 0"),
        ({"tol": float("nan")}, "tol must be between 0 and 1, got nan"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^truncated_svd: {message}$"):
        truncated_svd(torch.zeros(4, 6), 2, **options)
