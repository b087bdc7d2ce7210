"""The kernels of the batched truncated SVD, run on the CPU by the emulator, against float64; and the path that GPUs
take, over these kernels and over torch in their place."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels import TruncatedSVD
from federa_kernels.truncated_svd import batched, cuda, reference

from .emulated import ORDERS, Emulated, build
from .test_truncated_svd_properties import KINDS, assert_promises, matrix_of


class Module:
    """The functions of federa_kernels._C that `cuda` calls, over the emulator."""

    def __init__(self, emulated):
        self.emulated = emulated
        emulated.library.cholesky_qr_work_size.restype = ctypes.c_long

    def cholesky_qr_work(self, *sizes):
        return self.emulated.library.cholesky_qr_work_size(*map(ctypes.c_long, sizes))

    def cholesky_qr(self, wide, *arguments):
        self.emulated("run_cholesky_qr", wide, *map(ctypes.c_long, arguments[:-1]))

    def symmetric_eigenpairs(self, *arguments):
        self.emulated("run_symmetric_eigenpairs", *map(ctypes.c_long, arguments[:-1]))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncated_svd")
    return Emulated(build(folder, "tests/emulator/truncated_svd.cu", "csrc/cuda/truncated_svd.cu"))


@pytest.fixture
def kernels(emulated, monkeypatch):
    """CPU tensors go to the kernels."""
    monkeypatch.setattr(cuda, "_module", lambda panel: Module(emulated))
    monkeypatch.setattr(cuda, "_stream", lambda tensor: 0)
    emulated.order(0)
    return emulated


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormalised(Y, noise=None):
    Q = torch.full_like(Y, torch.nan)
    noise = normal(*Y.shape[1:], seed=9, dtype=Y.dtype) if noise is None else noise
    return Q, cuda.orthonormalise(Y, noise, Q)


def excess(Q):
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1])).abs().max())


PANELS = [(3, 70, 5), (1, 300, 24), (2, 33, 33), (1, 9, 1), (1, 130, 93)]


@pytest.mark.parametrize(("G", "K", "b"), PANELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_panel_is_q_times_r(kernels, G, K, b, dtype):
    Y = normal(G, K, b, dtype=dtype) @ torch.diag(torch.logspace(0, -4, b)).to(dtype)
    eps = torch.finfo(dtype).eps
    Q, R = orthonormalised(Y)
    assert torch.equal(R, R.triu()) and (R.diagonal(dim1=-2, dim2=-1) > 0).all()
    norm = torch.linalg.matrix_norm(Y.double())
    assert (torch.linalg.matrix_norm(Q.double() @ R - Y.double()) <= 8 * eps * b**0.5 * norm).all()
    again, _ = orthonormalised(Q)
    floor = 1e-14  # is added to the diagonal of the Gram matrix, relative
    assert excess(again) <= 8 * eps + 2 * floor


def test_columns_of_nothing_become_noise(kernels):
    Y = normal(2, 60, 6, dtype=torch.float32)
    Y[0, :, 3], Y[0, :, 5], Y[1] = Y[0, :, 1], 0, 0
    noise = normal(60, 6, seed=9, dtype=torch.float32)
    Q, R = orthonormalised(Y, noise)
    dead = torch.tensor([[0, 0, 0, 1, 0, 1], [1] * 6], dtype=torch.bool)
    assert torch.equal(R.diagonal(dim1=-2, dim2=-1) == 0, dead)
    assert torch.equal(Q[0][:, dead[0]], noise[:, dead[0]]) and torch.equal(Q[1], noise)
    assert excess(Q[0][:, ~dead[0]]) <= 1e-6
    assert (R[dead] == 0).all()


def test_a_panel_within_a_basis_and_in_place(kernels):
    basis = torch.full((2, 50, 12), torch.nan)
    Y, noise = normal(2, 50, 4, dtype=torch.float32), normal(50, 4, seed=9, dtype=torch.float32)
    Q, _ = orthonormalised(Y, noise)
    cuda.orthonormalise(Y, noise, basis[..., 4:8])
    assert torch.equal(basis[..., 4:8], Q) and basis[..., :4].isnan().all() and basis[..., 8:].isnan().all()
    cuda.orthonormalise(basis[..., 4:8], noise, basis[..., 4:8])
    assert excess(basis[..., 4:8]) <= 1e-6
    shared = cuda.orthonormalise(Y[:1].expand(2, -1, -1), noise, basis[..., :4])
    assert torch.equal(shared[0], shared[1]) and torch.equal(basis[0, :, :4], Q[0])


def spectra(n):
    yield "normal", normal(n)
    yield "zero", torch.zeros(n)
    yield "equal", torch.ones(n)
    yield "clustered", 1 + 1e-9 * normal(n) + (torch.arange(n) % 3)
    yield "graded", torch.logspace(0, -12, n, dtype=torch.float64)
    yield "huge", 1e250 * normal(n)
    yield "tiny", 1e-250 * normal(n)


@pytest.mark.parametrize("n", [1, 2, 3, 24, 33, 98])
def test_eigenpairs_are_those_of_lapack(kernels, n):
    names, values = zip(*spectra(n), strict=True)
    Q = torch.linalg.qr(normal(len(names), n, n))[0]
    H = (Q * torch.stack(values)[:, None].double()) @ Q.mT
    found, vectors = cuda.eigenpairs(H)
    H = (H + H.mT) / 2
    exact = torch.linalg.eigvalsh(H).flip(-1)
    scale = exact.abs().amax(-1).clamp(min=1e-300)
    assert (found[:, :-1] >= found[:, 1:]).all()
    assert excess(vectors) <= 1e-15 * (n + 10)
    for name, one, other, unit, A, V in zip(names, found, exact, scale, H, vectors, strict=True):
        assert ((one - other).abs() <= 1e-15 * (n + 10) * unit).all(), name
        assert ((A @ V - V * one).abs() <= 1e-15 * (n + 10) * unit).all(), name


def test_the_order_of_threads_changes_no_bit_nor_does_the_batch(kernels):
    Y, H = normal(3, 60, 10, dtype=torch.float32), normal(3, 11, 11)
    results = []
    for order in ORDERS:
        kernels.order(order)
        results.append([*orthonormalised(Y), *cuda.eigenpairs(H)])
    alone = [*orthonormalised(Y[1:2]), *cuda.eigenpairs(H[1:2])]
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
    for one, batch in zip(alone, results[0], strict=True):
        assert torch.equal(one[0], batch[1])


def test_what_fits_no_shared_memory_is_refused(kernels):
    with pytest.raises(RuntimeError, match="sizes out of range"):
        cuda.eigenpairs(normal(1, 137, 137))
    with pytest.raises(RuntimeError, match="sizes out of range"):
        orthonormalised(normal(1, 200, 137))


# The path that GPUs take.


@pytest.fixture
def batches(monkeypatch):
    """CPU tensors take it too."""
    monkeypatch.setattr(batched, "takes", lambda A, rank: min(A.shape) >= 16 * (rank + batched.OVERSAMPLING))


@st.composite
def batches_of_matrices(draw):
    rank = draw(st.integers(1, 6))
    K = draw(st.integers(16 * (rank + 8), 16 * (rank + 8) + 40))
    N = K + draw(st.integers(0, 80))
    several = [
        matrix_of(draw(st.sampled_from(KINDS)), N, K, draw(st.floats(0, 1)), draw(st.integers(0, 2**31)))
        * 10.0 ** draw(st.sampled_from((0, 0, -30, -11, 11, 30)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return torch.stack(several).to(draw(st.sampled_from((torch.float32, torch.bfloat16)))), rank


def check_the_certificate(case):
    """What is certified keeps every promise; everything else is left to others."""
    A, rank = case
    for matrix, found in zip(A, batched.factor([*A], rank, 1e-6), strict=True):
        if found is not None:
            assert_promises(TruncatedSVD(*found), matrix, rank)
            measured = reference.residual(matrix.double(), *found[:3])
            assert abs(float(measured - found[3])) <= 1e-6


test_certified_means_found = settings(max_examples=40, deadline=None)(
    given(batches_of_matrices())(check_the_certificate)
)
test_certified_means_found_often = pytest.mark.exhaustive(
    settings(max_examples=3000, deadline=None)(given(batches_of_matrices())(check_the_certificate))
)
