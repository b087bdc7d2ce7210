"""The emulator's Hopper: layouts of the PTX ISA, written out here, and the mistakes that it must catch."""

import ctypes

import pytest
import torch

from .emulated import ORDERS, Emulated, build

SIDE, ROOM = 64, 64 * 1024
MISTAKES = ("none", "no fence", "no wait", "no commit", "overwritten")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(build(tmp_path_factory.mktemp("hopper"), "tests/emulator/hopper_checks.cu"))


@pytest.fixture(autouse=True, params=ORDERS, ids=lambda seed: f"order{seed}")
def order(request, emulated):
    emulated.order(request.param)
    return request.param


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def numbers(*shape, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def swizzled(block):
    """The 128-byte swizzle: chunk c of 16 bytes of row r lies at chunk c xor r mod 8."""
    chunks = block.view(SIDE, 8, 8)
    return torch.stack([chunks[r, [c ^ (r % 8) for c in range(8)]] for r in range(SIDE)]).view(SIDE, SIDE)


def block_of(matrix, row, column):
    block = matrix.new_zeros(SIDE, SIDE)
    inside = matrix[row : row + SIDE, column : column + SIDE]
    block[: inside.shape[0], : inside.shape[1]] = inside
    return block


@pytest.mark.parametrize("place", [(0, 0), (64, 64), (128, 0)], ids=str)
def test_a_block_is_loaded_into_every_block_of_the_cluster(emulated, place):
    matrix, out = numbers(100, 88), torch.empty(2, SIDE, SIDE, dtype=torch.float16)
    emulated("check_load", at(matrix), 100, 80, 88, *place, at(out), 2, True)
    want = swizzled(block_of(matrix[:, :80], *place))
    assert torch.equal(out[0], want) and torch.equal(out[1], want)


def test_a_block_that_nobody_waited_for_is_not_there(emulated):
    matrix, out = numbers(64, 64), torch.zeros(1, SIDE, SIDE, dtype=torch.float16)
    emulated("check_load", at(matrix), 64, 64, 64, 0, 0, at(out), 1, False)
    assert out.isnan().all()


def test_a_block_is_stored_within_the_matrix(emulated):
    matrix, block = torch.zeros(100, 88, dtype=torch.float16), numbers(SIDE, SIDE)
    lies = swizzled(block)
    emulated("check_store", at(matrix), 100, 80, 88, 64, 64, at(lies), True, True)
    assert torch.equal(matrix[64:, 64:80], block[:36, :16])
    matrix[64:, 64:80] = 0
    assert not matrix.any()


@pytest.mark.parametrize(
    ("fence", "wait", "error"),
    [(False, True, "a thread that wrote came without fence.proxy.async"), (True, False, "a thread ended before what")],
)
def test_a_store_must_be_fenced_and_waited_for(emulated, fence, wait, error):
    matrix = torch.zeros(64, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=error):
        emulated("check_store", at(matrix), 64, 64, 64, 0, 0, at(matrix), fence, wait)


def place_along_depth(i, k, stride):
    """Of entry k of row i: 8 rows of 128 bytes, in the swizzle; `stride` on the next 8."""
    return i // 8 * stride + i % 8 * 128 + ((k // 8) ^ (i % 8)) * 16 + k % 8 * 2


def place_along_columns(n, k, leading, stride):
    """Column n, depth k: 8 depths of 64 columns, in the swizzle; `stride` to the next 8, `leading` to the next 64."""
    return n // 64 * leading + k // 8 * stride + k % 8 * 128 + ((n % 64 // 8) ^ (k % 8)) * 16 + n % 8 * 2


def multiply(emulated, columns, transposed, dtype, mistake=0):
    """Sums (64, columns) of a (64, 16) and b (16, columns) + 1, and what they must be."""
    a, b = numbers(64, 16, dtype=dtype), numbers(16, columns, dtype=dtype)
    leading, stride, b_at = (4096, 1024, 8192) if transposed else (0, 1024, 8192)
    memory = torch.full((ROOM // 2,), torch.nan, dtype=dtype)
    for i in range(64):
        for k in range(16):
            memory[place_along_depth(i, k, 1024) // 2] = a[i, k]
    for n in range(columns):
        for k in range(16):
            place = place_along_columns(n, k, leading, stride) if transposed else place_along_depth(n, k, stride)
            memory[(b_at + place) // 2] = b[k, n]
    out = torch.zeros(128, columns // 2)
    half = dtype == torch.float16
    emulated("check_multiply", half, transposed, columns, at(memory), b_at, leading, stride, at(out), mistake)
    got = torch.empty(64, columns)
    for thread in range(128):
        warp, lane = thread // 32, thread % 32
        for i in range(columns // 2):  # "wgmma.mma_async.m64nNk16", fragments of D
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            got[row, 8 * (i // 4) + lane % 4 * 2 + i % 2] = out[thread, i]
    return got, a.float() @ b.float() + 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("columns", "dtype"), [(128, torch.bfloat16), (256, torch.float16)])
def test_wgmma_reads_operands_as_their_descriptors_say(emulated, columns, transposed, dtype):
    torch.testing.assert_close(*multiply(emulated, columns, transposed, dtype))


@pytest.mark.parametrize("mistake", ["no wait", "overwritten"])
def test_products_happen_late(emulated, mistake):
    got, want = multiply(emulated, 128, False, torch.float16, MISTAKES.index(mistake))
    assert got.isnan().all() if mistake == "no wait" else not torch.allclose(got, want)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [("no fence", "the sums need wgmma.fence first"), ("no commit", "waited before the commit")],
)
def test_products_need_a_fence_and_a_commit(emulated, mistake, error):
    with pytest.raises(RuntimeError, match=error):
        multiply(emulated, 128, False, torch.float16, MISTAKES.index(mistake))


@pytest.mark.parametrize(
    ("which", "error"),
    list(
        enumerate(
            [
                "more arrivals than its phase counts",
                "deadlock: 64 of 64 threads wait for what does not come",
                "cluster: the block has ended",
                "mbarrier: not initialised",
                "the block must begin on 1024 bytes",
                *["tensor map: CUDA error 1"] * 3,
                "threads wrote to the block without fence.proxy.async",
            ]
        )
    ),
)
def test_mistakes_are_named(emulated, which, error):
    with pytest.raises(RuntimeError, match=error):
        emulated("check_mistake", which, at(torch.zeros(64, dtype=torch.float16)))


def test_threads_may_write_between_copies_behind_a_fence(emulated):
    emulated("check_mistake", 9, at(torch.zeros(64, dtype=torch.float16)))
