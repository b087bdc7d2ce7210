"""The emulator that runs CUDA kernels on the CPU: its instructions against the PTX ISA's layouts, written out here, and
the mistakes that it must catch."""

import ctypes

import pytest
import torch

from .emulated import ORDERS, Emulated, build

LANES = range(32)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(build(tmp_path_factory.mktemp("emulator"), "tests/emulator/checks.cu"))


@pytest.fixture(autouse=True, params=ORDERS, ids=lambda seed: f"order{seed}")
def order(request, emulated):
    emulated.order(request.param)
    return request.param


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_entries(emulated, transposed):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    got = torch.empty(32, 4, 2, dtype=torch.int16)
    emulated("check_load_matrices", at(matrices), at(got), transposed)
    for lane in LANES:
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            assert got[lane, i].tolist() == matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mma_adds_the_product_of_fragments(emulated, dtype):
    """Fragments by the ISA's formulas for a_i, b_i and c_i, "mma.m16n8k16 with floating point type"."""
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=draw) for shape in [(16, 16), (16, 8), (16, 8)])
    a, b = a.to(dtype), b.to(dtype)
    a_of, b_of, c_of = (torch.empty(32, n, dtype=t) for n, t in [(8, dtype), (4, dtype), (4, torch.float32)])

    def place_of_c(lane, i):
        return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)

    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            a_of[lane, i] = a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            b_of[lane, i] = b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            c_of[lane, i] = c[place_of_c(lane, i)]
    emulated("check_multiply_add", dtype == torch.float16, at(a_of), at(b_of), at(c_of))
    got = torch.empty(16, 8)
    for lane in LANES:
        for i in range(4):
            got[place_of_c(lane, i)] = c_of[lane, i]
    torch.testing.assert_close(got, c + a.float() @ b.float())


def test_shuffles_and_votes(emulated):
    numbers = torch.arange(64, dtype=torch.int32) * 7 % 61
    got = torch.empty(7, 64, dtype=torch.int32)
    emulated("check_shuffles", at(numbers), at(got))
    for warp in range(2):
        own = numbers[32 * warp : 32 * warp + 32].tolist()
        xor, down, first, up, vote, some, none = got[:, 32 * warp : 32 * warp + 32].tolist()
        assert xor == [own[lane ^ 5] for lane in LANES]
        assert down == [own[lane + 3 if lane < 29 else lane] for lane in LANES]
        assert first == [own[7]] * 32
        assert up == [own[lane - 2 if lane % 8 >= 2 else lane] for lane in LANES]
        assert {bits % 2**32 for bits in vote} == {sum(1 << lane for lane in LANES if own[lane] % 3 == 0)}
        assert all(some) and not any(none)


def reverse(emulated, barrier):
    numbers, got = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)), torch.empty(3, 96)
    emulated("check_reverse", at(numbers), at(got), barrier)
    return numbers.flip(1), got


def test_threads_meet_at_a_barrier(emulated):
    want, got = reverse(emulated, barrier=True)
    assert torch.equal(got, want)


def test_a_missing_barrier_reads_nan(emulated):
    """Also in the second block: static shared memory is NaN before each."""
    want, got = reverse(emulated, barrier=False)
    assert got.isnan().any(1).all()
    assert torch.equal(got[~got.isnan()], want[~got.isnan()])


def test_a_race_gives_another_result_in_another_order(emulated, order):
    early = reverse(emulated, barrier=False)[1]
    emulated.order(-1 if order == 0 else 0)
    assert not torch.equal(early.isnan(), reverse(emulated, barrier=False)[1].isnan())


@pytest.mark.parametrize(
    ("groups", "wait", "there"), [(2, True, True), (1, True, False), (2, False, False)], ids=["waited", "late", "never"]
)
@pytest.mark.parametrize("short_by", [0, 4, 16])
def test_a_copy_is_there_once_waited_for(emulated, groups, wait, there, short_by):
    numbers, got = torch.randn(32, 4, generator=torch.Generator().manual_seed(2)), torch.empty(32, 4)
    emulated("check_copy", at(numbers), at(got), groups, short_by, wait)
    if there:
        numbers[:, 4 - short_by // 4 :] = 0
        assert torch.equal(got, numbers)
    else:
        assert got.isnan().all()


def following(emulated, mistake=0):
    """What three kernels make, each of the one before."""
    numbers = torch.full((4, 192), torch.nan)
    numbers[0] = torch.arange(192.0)
    emulated("check_following", at(numbers), mistake)
    return numbers


def test_a_kernel_that_follows_finds_what_the_one_ahead_wrote(emulated):
    before = emulated.launches()
    numbers = following(emulated)
    assert torch.equal(numbers, torch.arange(192.0) + torch.arange(4.0)[:, None])
    assert emulated.launches() == before + 3


def test_what_a_kernel_does_before_it_waits_comes_too_early(emulated):
    """In its first block: others may begin later."""
    read_early, written_early = following(emulated, 1), following(emulated, 2)
    assert read_early[3].isnan().sum() == 64 and read_early[:3].isfinite().all()
    assert (written_early[2] == -1).sum() == 128 and (written_early[3] == 0).sum() == 128
    with pytest.raises(RuntimeError, match="a thread of a kernel that follows another has not waited for it"):
        following(emulated, 3)
    assert following(emulated).isfinite().all()


@pytest.mark.parametrize(
    ("which", "error"),
    [
        *enumerate(
            (
                "divergence: 40 of 64 threads are at the barrier, 24 have ended",
                "divergence: a warp operation waits for lane 3, which has ended",
                "divergence: lanes of a warp wait at different operations",
                "ldmatrix: address must be a multiple of 16 bytes",
                "launch: invalid configuration",
                "launch: invalid configuration",
                "divergence: a warp operation waits for lane",
            )
        )
    ],
)
def test_mistakes_are_named(emulated, which, error):
    with pytest.raises(RuntimeError, match=error):
        emulated("check_failure", which, at(torch.zeros(32, dtype=torch.int32)))
    want, got = reverse(emulated, barrier=True)  # and the next launch is as good as the first
    assert torch.equal(got, want)


def test_bfloat16_rounds_as_torch(emulated):
    bits = torch.randint(0, 2**16, (5000,), generator=torch.Generator().manual_seed(3), dtype=torch.int32) << 16
    ties = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    numbers = (bits[:, None] | ties).view(torch.float32).flatten()
    numbers = numbers[~numbers.isnan()].contiguous()
    got = torch.empty_like(numbers)
    emulated.library.round_bfloat16(at(numbers), at(got), ctypes.c_long(len(numbers)))
    assert torch.equal(got, numbers.bfloat16().float())
