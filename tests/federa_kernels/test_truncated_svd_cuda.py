"""The kernels of the batched truncated SVD, run on the CPU by the emulator, against float64; and the path that GPUs
take, over these kernels and over torch in their place."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from federa_kernels import TruncatedSVD, truncated_svd
from federa_kernels.truncated_svd import batched, cuda, krylov, reference

from .emulated import ORDERS, Emulated, assert_within_bounds, build
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
    return Emulated(build(folder, "tests/emulator/truncated_svd.cpp", "csrc/cuda/truncated_svd.cu"))


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
    R = Y.new_full((len(Y), Y.shape[2], Y.shape[2]), torch.nan, dtype=torch.float64)
    cuda.orthonormalise(Y, noise, Q, R)
    return Q, R


def excess(Q):
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1])).abs().max())


PANELS = [(3, 70, 5), (1, 300, 24), (2, 33, 33), (1, 9, 1), (1, 130, 85), (1, 130, 93)]


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
    Q, R = orthonormalised(Y, noise)
    factors = torch.full((2, 3, 4, 4), torch.nan, dtype=torch.float64)
    cuda.orthonormalise(Y, noise, basis[..., 4:8], factors[:, 1])
    assert torch.equal(basis[..., 4:8], Q) and torch.equal(factors[:, 1], R)
    assert basis[..., :4].isnan().all() and basis[..., 8:].isnan().all() and factors[:, ::2].isnan().all()
    cuda.orthonormalise(basis[..., 4:8], noise, basis[..., 4:8], factors[:, 0])
    assert excess(basis[..., 4:8]) <= 1e-6
    cuda.orthonormalise(Y[:1].expand(2, -1, -1), noise, basis[..., :4], factors[:, 2])
    assert torch.equal(basis[0, :, :4], Q[0]) and torch.equal(basis[1, :, :4], Q[0])


def spectra(n):
    yield "normal", normal(n)
    yield "zero", torch.zeros(n)
    yield "equal", torch.ones(n)
    yield "clustered", 1 + 1e-9 * normal(n) + (torch.arange(n) % 3)
    yield "graded", torch.logspace(0, -12, n, dtype=torch.float64)
    yield "huge", 1e250 * normal(n)
    yield "tiny", 1e-250 * normal(n)


@pytest.mark.parametrize("n", [1, 2, 3, 24, 33, 75])
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", range(1, cuda.WIDEST + 1))
def test_every_width(kernels, n):
    kernels.order(n % 3 - 1)
    for dtype in (torch.float32, torch.float64):
        Y = normal(1, n + 40 if n % 2 else 290, n, seed=n, dtype=dtype)
        Q, R = orthonormalised(Y)
        torch.testing.assert_close(Q.double() @ R, Y.double(), atol=1e3 * torch.finfo(dtype).eps, rtol=0)
        torch.testing.assert_close(R, krylov._orthonormalise(Y)[1], atol=1e-8, rtol=1e-8)
    H = normal(1, n, n, seed=n)
    values, vectors = cuda.eigenpairs(H)
    H = (H + H.mT) / 2
    # both solvers' backward errors: float64's rounding times the size and the norm, which is of the order of its root
    torch.testing.assert_close(values, torch.linalg.eigvalsh(H).flip(-1), atol=1e-14 * (n + 10), rtol=0)
    torch.testing.assert_close(H @ vectors, vectors * values[:, None], atol=1e-14 * (n + 10), rtol=0)


def test_what_fits_no_shared_memory_is_refused(kernels):
    with pytest.raises(RuntimeError, match="sizes out of range"):
        cuda.eigenpairs(normal(1, 137, 137))
    with pytest.raises(RuntimeError, match="sizes out of range"):
        orthonormalised(normal(1, 200, 137))


@pytest.mark.exhaustive
def test_nothing_reads_or_writes_beyond_an_end(tmp_path):
    assert_within_bounds(tmp_path, "csrc/cuda/truncated_svd.cu", "tests/emulator/truncated_svd_bounds.cpp")


# The path that GPUs take.


@pytest.fixture
def batches(monkeypatch):
    """CPU tensors take it too."""
    monkeypatch.setattr(batched, "takes", lambda A, rank: min(A.shape) >= 4 * (rank + batched.OVERSAMPLING))


@st.composite
def batches_of_matrices(draw):
    rank = draw(st.integers(1, 6))
    b = rank + batched.OVERSAMPLING
    K = draw(st.one_of(st.integers(4 * b, 15 * b), st.integers(16 * b, 19 * b)))  # without and with a Krylov space
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


def weights(G, N, K, seed=0):
    return torch.stack([matrix_of("power", N, K, 0.1, seed + g).float() for g in range(G)])


def test_the_kernels_find_what_torch_finds(emulated, monkeypatch):
    A = weights(2, 170, 144)
    by_torch = batched.factor([*A], 1, 1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_module", lambda panel: Module(emulated))
        patch.setattr(cuda, "_stream", lambda tensor: 0)
        by_kernels = batched.factor([*A], 1, 1e-6)
    for matrix, one, other in zip(A, by_kernels, by_torch, strict=True):
        assert_promises(TruncatedSVD(*one), matrix, 1)
        for mine, theirs in zip(one[:3], other[:3], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


class Recorded(TorchDispatchMode):
    """The operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def test_launches_depend_on_shapes_alone(kernels):
    runs = []
    for A in (weights(1, 160, 144), torch.zeros(3, 160, 144), matrix_of("deficient", 160, 144, 0, 0).bfloat16()[None]):
        noise = batched.random_rows(144, 9, A.device)
        before = kernels.launches()
        with Recorded() as recorded:
            batched.leading_fixed(A, noise[:144].expand(len(A), -1, -1), noise, 1, 4)
        runs.append((kernels.launches() - before, recorded.names))
    (launches, names), zeros, (same, _) = runs
    assert zeros == (launches, names) and same == launches  # 16-bit matrices only have other products
    assert launches == 3 * 2 * (4 + 5 + 1) + 5 + 2  # Cholesky-QR in steps, turns and at the end; eigenproblems


class OneDevice(TorchDispatchMode):
    """Refuses tensors of any other device: on a GPU each would be a copy, which waits or cannot be captured."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        tensors = [value for value in (*arguments, *(options or {}).values()) if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("R", "steps"), [(16, 12), (128, 0)])
def test_nothing_is_read_back(monkeypatch, R, steps, dtype):
    """Tensors without values go all the way: whoever asked for one would raise."""
    calls = []

    class Stub:
        def cholesky_qr_work(self, *sizes):
            return 1

        def __getattr__(self, name):
            return lambda *arguments: calls.append(name)

    monkeypatch.setattr(cuda, "_module", lambda panel: Stub())
    monkeypatch.setattr(cuda, "_stream", lambda tensor: 0)
    A, b = torch.empty(3, 800, 768, dtype=dtype, device="meta"), R + batched.OVERSAMPLING
    noise = torch.empty(960, b, device="meta")
    with OneDevice():
        found = batched.leading_fixed(A, noise[:768].expand(3, -1, -1), noise, R, steps)
        batched.leading_fixed(A.mT.contiguous().mT, found.V, noise, R, steps)
    assert [tuple(t.shape) for t in found] == [(3, 800, R), (3, R), (3, 768, b), (3,), (3,)]
    assert [t.dtype for t in found] == [torch.float32] * 3 + [torch.float64] * 2
    assert set(calls) == {"cholesky_qr", "symmetric_eigenpairs"}


def test_a_place_in_the_batch_changes_no_bit():
    A = weights(3, 170, 144)
    noise = batched.random_rows(144, 9, A.device)
    found, turned = (
        batched.leading_fixed(batch, noise[:144].expand(3, -1, -1), noise, 1, 4) for batch in (A, A[[2, 0, 1]])
    )
    for one, other in zip(found, turned, strict=True):
        assert torch.equal(one[[2, 0, 1]], other)


def test_a_second_run_goes_on_from_the_first(batches):
    A = [matrix_of("geometric", 200, 180, 1.0, 5).float(), *weights(1, 200, 180)]  # values 1 % apart
    slow, fast = truncated_svd(A, 2)
    assert slow.matvecs == 2 * fast.matvecs > 0
    for matrix, found in zip(A, (slow, fast), strict=True):
        assert_promises(found, matrix, 2)


def test_what_batches_cannot_certify_is_factored_by_others(batches, monkeypatch):
    torn = matrix_of("deficient", 180, 170, 0.02, 0)  # of rank 3
    A = [*weights(2, 180, 170), *weights(2, 170, 180), torch.zeros(180, 170), torn.float(), 1e-30 * torn.float(),
         weights(1, 180, 170)[0].bfloat16(), 1e30 * weights(1, 180, 170)[0], weights(1, 20, 10)[0]]  # fmt: skip
    sizes = []
    factor = batched.factor
    monkeypatch.setattr(batched, "factor", lambda some, *options: sizes.append(len(some)) or factor(some, *options))
    for options in ({}, {"verify": True}, {"method": "krylov"}):
        for matrix, found in zip(A, truncated_svd(A, 2, **options), strict=True):
            assert_promises(found, matrix, 2)
            assert found.U.dtype == torch.float32 and all(t.is_contiguous() for t in found)
    assert sizes == [8, 1] * 3  # all but the small one; transposed ones in one batch with the others
    assert all(found.matvecs > 0 for found in truncated_svd(A[:4], 2))
    sizes.clear()
    truncated_svd(A[:2], 2, method="gram")
    truncated_svd(A[:2], 2, reproducible=True)
    assert not sizes


def test_the_matrix_that_is_not_finite_is_named(batches):
    A = weights(3, 180, 170)
    A[1, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^truncated_svd: matrix 1 must be finite, got 1 NaN or infinite entries$"):
        truncated_svd(A, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_split_products_are_as_good_as_float32(dtype):
    """svd.md: two parts as good as float32; three are float32."""
    A, X = (1e-3 * normal(2, 300, 200)).to(dtype), torch.linalg.qr(normal(2, 200, 16))[0].float()
    times = batched.Products(A, torch.linalg.vector_norm(A.float(), dim=(1, 2)))
    exact = A.double() @ X.double()
    for parts, allowed in ((1, 3e-3), (2, 1e-5), (3, 5e-7)):
        error = times(X, parts=parts).double() / times.scale.double() - exact
        assert allowed / 100 < torch.linalg.vector_norm(error) / torch.linalg.vector_norm(exact) < allowed


# On a GPU.


@pytest.fixture
def gpu_weights():
    def several(G, N, K, dtype=torch.float32):
        return weights(G, N, K).to("cuda", dtype)

    return several


@pytest.mark.gpu
def test_the_kernels_are_those_of_the_emulator(emulated):
    if cuda._module(torch.empty(1, 1, 1, device="cuda")) is None:
        pytest.skip("built without the CUDA half")
    Y, H, noise = normal(3, 300, 24, dtype=torch.float32), normal(3, 24, 24), normal(300, 24, dtype=torch.float32)
    Q, R = torch.empty_like(Y).cuda(), Y.new_empty(3, 24, 24, dtype=torch.float64).cuda()
    cuda.orthonormalise(Y.cuda(), noise.cuda(), Q, R)
    values, vectors = cuda.eigenpairs(H.cuda())
    again, factors = torch.empty_like(Q), torch.empty_like(R)
    cuda.orthonormalise(Q, noise.cuda(), again, factors)
    assert excess(again.cpu()) <= 1e-6
    assert torch.linalg.matrix_norm(Q.double() @ R - Y.cuda().double()).max() <= 1e-5
    H = (H + H.mT) / 2
    torch.testing.assert_close(values.cpu(), torch.linalg.eigvalsh(H).flip(-1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(H @ vectors.cpu(), vectors.cpu() * values.cpu()[:, None], atol=1e-12, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_batch_on_a_gpu(gpu_weights, dtype):
    A = [*gpu_weights(3, 800, 500, dtype), *gpu_weights(2, 500, 800, dtype), torch.zeros(800, 500).cuda().to(dtype)]
    for matrix, found in zip(A, truncated_svd(A, 16), strict=True):
        assert_promises(TruncatedSVD(*(t.cpu() for t in found)), matrix.cpu(), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_replayed_graph_gives_the_bits_of_a_call(gpu_weights, dtype):
    A, noise = gpu_weights(4, 800, 500, dtype), batched.random_rows(500, 24, torch.device("cuda"))
    if cuda._module(noise) is None:
        pytest.skip("built without the CUDA half: torch's eigh waits for the device")
    start = noise[:500].expand(4, -1, -1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        batched.leading_fixed(A, start, noise, 16, 10)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = batched.leading_fixed(A, start, noise, 16, 10)
    A.copy_(A.flip(0).roll(3, 1))
    graph.replay()
    called = batched.leading_fixed(A, start, noise, 16, 10)
    assert all(map(torch.equal, replayed, called)) and (called.lost <= 1e-6).all()


@pytest.mark.gpu
def test_a_place_in_the_batch_changes_no_bit_on_a_gpu(gpu_weights):
    A, order = gpu_weights(4, 800, 500), [2, 0, 3, 1]
    found, turned = truncated_svd(A, 16), truncated_svd(A[order], 16)
    again = truncated_svd(A, 16)
    for one, other, same in zip(found, turned, again, strict=True):
        assert torch.equal(one[order], other) and torch.equal(one, same)
