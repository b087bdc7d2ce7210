import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels import truncated_svd
from federa_kernels.truncated_svd.reference import canonical_signs

SHAPES = [(40, 24, 5), (24, 40, 24), (33, 7, 1), (1, 9, 1), (9, 1, 1), (1, 1, 1)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def random_matrix(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_valid(found, A, rank):
    """Orthonormal, descending, canonical, and as much energy captured as any rank-R matrix can."""
    U, S, Vh, residual, matvecs, certified = found
    eps = torch.finfo(U.dtype).eps
    exact = torch.linalg.svdvals(A.double())
    identity = torch.eye(rank, dtype=torch.float64)
    tolerance = 8 * eps * max(A.shape)
    assert (U.shape, S.shape, Vh.shape) == ((A.shape[0], rank), (rank,), (rank, A.shape[1]))
    assert all(t.is_contiguous() for t in (U, S, Vh))
    assert (U.double().T @ U.double() - identity).abs().max() <= tolerance
    assert (Vh.double() @ Vh.double().T - identity).abs().max() <= tolerance
    assert (S[:-1] >= S[1:]).all() and (S >= 0).all()
    assert (S.double() - exact[:rank]).abs().max() <= tolerance * exact[0]
    rest = (A.double() - (U.double() * S.double()) @ Vh.double()).norm()
    assert rest <= exact[rank:].norm() + tolerance * exact.norm()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    assert residual.dtype == torch.float64 and 0 <= residual <= tolerance
    assert matvecs == 0 and certified


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "K", "rank"), SHAPES)
def test_invariants(N, K, rank, dtype):
    A = random_matrix(N, K, dtype=dtype)
    found = truncated_svd(A, rank)
    assert found.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_valid(found, A, rank)


@pytest.mark.parametrize(("N", "K"), [(12, 8), (8, 12), (1, 5), (5, 1)])
def test_zero_and_rank_deficient_matrices_keep_orthonormal_factors(N, K):
    rank = min(N, K)
    assert_valid(truncated_svd(torch.zeros(N, K), rank), torch.zeros(N, K), rank)
    low = random_matrix(N, 1) @ random_matrix(1, K, seed=1)
    assert_valid(truncated_svd(low, rank), low, rank)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_extreme_scales_are_measured_without_overflow(scale):
    A = random_matrix(12, 8) * scale
    assert_valid(truncated_svd(A, 3), A, 3)


@given(
    N=st.integers(1, 12), K=st.integers(1, 12), data=st.data(), exponent=st.integers(-6, 6), seed=st.integers(0, 2**31)
)
@settings(max_examples=100, deadline=None)
def test_any_matrix(N, K, data, exponent, seed):
    rank = data.draw(st.integers(1, min(N, K)))
    A = random_matrix(N, K, seed=seed) * 10.0**exponent
    found = truncated_svd(A, rank)
    assert_valid(found, A, rank)
    negated = truncated_svd(-A, rank)
    torch.testing.assert_close(negated.S, found.S)


def test_the_first_of_equally_large_entries_is_made_positive():
    U = torch.tensor([[-0.5, 0.5], [0.5, -0.5], [0.1, -0.5]])
    flipped, Vh = canonical_signs(U, torch.ones(2, 3))
    assert flipped[:, 0].tolist() == pytest.approx([0.5, -0.5, -0.1])
    assert flipped[:, 1].tolist() == pytest.approx([0.5, -0.5, -0.5])
    assert Vh[:, 0].tolist() == [-1, 1]


def test_a_flipped_basis_leads_to_the_same_factors():
    A = random_matrix(20, 12, dtype=torch.float64)
    found = truncated_svd(A, 4)
    mirrored = truncated_svd(-A, 4)
    torch.testing.assert_close(mirrored.U, found.U)
    torch.testing.assert_close(mirrored.Vh, -found.Vh)


@pytest.mark.parametrize(("N", "K"), [(33, 7), (64, 64), (5, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_alone_batched_or_listed_the_bits_are_the_same(N, K, dtype):
    batch = random_matrix(5, N, K, dtype=dtype)
    batched = truncated_svd(batch, 4)
    listed = truncated_svd([*batch], 4)
    assert batched.U.shape == (5, N, 4) and batched.residual.shape == (5,)
    for index, matrix in enumerate(batch):
        alone = truncated_svd(matrix.clone(), 4)
        for one, of_batch, of_list in zip(alone, batched, listed[index], strict=True):
            assert torch.equal(one, of_batch[index]) and torch.equal(one, of_list)


def test_a_list_keeps_its_order_over_mixed_shapes():
    shapes = [(8, 6), (6, 8), (8, 6), (7, 7)]
    matrices = [random_matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, truncated_svd(matrices, 3), strict=True):
        assert_valid(found, matrix, 3)
    assert truncated_svd([], 3) == []


def test_non_contiguous_and_trained_matrices():
    A = random_matrix(12, 8)
    transposed = torch.nn.Parameter(A.T.contiguous().T)
    for one, other in zip(truncated_svd(A, 3), truncated_svd(transposed, 3), strict=True):
        assert torch.equal(one, other) and not other.requires_grad


@pytest.mark.parametrize(
    ("matrices", "rank", "exception", "message"),
    [
        (torch.zeros(4, 6), 0, ValueError, r"rank must be between 1 and 4 for a \(4, 6\) matrix, got 0"),
        (torch.zeros(2, 4, 6), 5, ValueError, r"rank must be between 1 and 4 for a \(4, 6\) matrix, got 5"),
        ([torch.zeros(9, 9), torch.zeros(4, 6)], 5, ValueError, r"rank must be between 1 and 4 .* got 5"),
        (torch.zeros(4, 6), 2.0, TypeError, r"rank must be an int, got float"),
        (torch.zeros(4), 1, ValueError, r"matrices must have shape \(N, K\) or \(G, N, K\) with G > 0, got \(4,\)"),
        (torch.zeros(0, 4, 6), 1, ValueError, r"matrices must have shape .* got \(0, 4, 6\)"),
        ([torch.zeros(2, 4, 6)], 1, ValueError, r"matrix 0 must have shape \(N, K\), got \(2, 4, 6\)"),
        (torch.zeros(4, 6, dtype=torch.int32), 1, TypeError, r"matrix 0 must be float32, .*, got torch.int32"),
        ([torch.zeros(4, 6), [[1.0]]], 1, TypeError, r"matrix 1 must be a tensor, got list"),
    ],
)
def test_errors_name_what_is_allowed(matrices, rank, exception, message):
    with pytest.raises(exception, match=f"^truncated_svd: {message}$"):
        truncated_svd(matrices, rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_matrix_that_is_not_finite_is_named(bad):
    batch = torch.zeros(3, 4, 6)
    batch[2, 1, 1] = bad
    for matrices in (batch, [*batch]):
        with pytest.raises(
            ValueError, match=r"^truncated_svd: matrix 2 must be finite, got 1 NaN or infinite entries$"
        ):
            truncated_svd(matrices, 2)


def test_unknown_options_are_not_taken():
    with pytest.raises(TypeError, match="unexpected keyword"):
        truncated_svd(torch.zeros(4, 6), 2, seed=3)
