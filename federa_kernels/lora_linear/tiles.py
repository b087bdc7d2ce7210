"""How the GPU kernels cut a problem into tiles: a pure function of sizes, dtype and GPU generation.

Chosen so that nothing spills (`python -m benchmarks compile_check`); not timed.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """One program's share: BM rows, BN columns, BK of the summed dimension a step; warps, pipeline stages. kernels:
    which have it, Triton's or those in CUDA C++ ("mma", "sm90")."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    kernels: str = "triton"


@dataclass(frozen=True)
class Tiles:
    """The kernels around one product (M,K) x (N,K)^T with a rank-R adapter.

    gemm        y, or dx with N and K exchanged
    down        h = x A^T; no BN, all of R at once
    grad        the passes over dy and x that give dh, dB and dA; BN columns of dy or x, no BK
    splits      how many programs share the K of one tile of h
    one_pass    dh and dB from one pass over dy. Beyond rank 32 its parts of dh would weigh more than a second pass, and
                on Ampere, whose tensor cores take both operands from registers, it spills
    chunk       rows after which a pass over dy or x starts a new partial gradient
    on_the_fly  h inside the product, where it has few columns: one launch and one read of x less
    """

    gemm: Tile
    down: Tile
    grad: Tile
    splits: int
    one_pass: bool
    chunk: int
    on_the_fly: bool


# Generation -> tiles from the largest to the smallest; the first that gives every multiprocessor a program is taken.
GEMM = {
    80: (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    90: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    100: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4)),
}
SAFE_GEMM = (Tile(64, 64, 32, 4, 3),)
FLOAT32_GEMM = (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2))  # no tensor cores, operands in registers
FLOAT32_DOWN, FLOAT32_GRAD = Tile(32, 0, 32, 4, 2), Tile(32, 32, 0, 4, 2)
# Those that csrc/cuda/lora_linear_mma.cu has, for every GPU from sm_80 on.
MMA_GEMM = (Tile(128, 128, 32, 4, 4, "mma"), Tile(64, 64, 32, 4, 4, "mma"))
MMA_DOWN = Tile(64, 0, 64, 4, 4, "mma")
MMA_GRAD, MMA_WIDE_GRAD = Tile(64, 256, 0, 4, 2, "mma"), Tile(64, 128, 0, 4, 2, "mma")
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
GENERATIONS = {80: 80, 90: 90, 100: 100, 103: 100}  # others, consumer GPUs among them, have less shared memory


def gemm_tiles(R: int, dtype: torch.dtype, arch: int, clients: bool) -> tuple[Tile, ...]:
    """The tiles that a product may get, from the largest to the smallest."""
    generation = GENERATIONS.get(arch)
    if dtype == torch.float32:
        return FLOAT32_GEMM
    found = GEMM.get(generation, SAFE_GEMM)
    spills = R > 32 or (clients and generation == 100)  # from the largest
    return found[1:] if spills and len(found) > 1 else found


def pick_tiles(M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int, clients: bool = False) -> Tiles:
    """Tiles for (M,K) x (N,K)^T with rank R on compute capability `arch` (90 for 9.0); any value gets a safe choice."""
    generation = GENERATIONS.get(arch)
    full, wide = dtype == torch.float32, R > 32
    programs = MULTIPROCESSORS.get(generation, 64)
    candidates = gemm_tiles(R, dtype, arch, clients)
    gemm = next((t for t in candidates if _tiles(M, t.BM) * _tiles(N, t.BN) >= programs), candidates[-1])
    down = FLOAT32_DOWN if full else Tile(64, 0, 64 if generation else 32, 8 if wide else 4, 4)
    slab = 256 if generation == 90 and not wide else 128
    grad = FLOAT32_GRAD if full else Tile(64, slab, 0, 8, 3)
    splits, chunk = _parts(M, N, K, programs, down, grad)
    one_pass = not full and not wide and generation in (90, 100)
    on_the_fly = not full and R <= 16 and N * K <= 2**20
    return Tiles(gemm, down, grad, splits, one_pass, chunk, on_the_fly)


def pick_mma_tiles(M: int, N: int, K: int, R: int, arch: int) -> Tiles:
    """The same for the kernels in CUDA C++, which take bfloat16 and float16."""
    programs, wide = MULTIPROCESSORS.get(GENERATIONS.get(arch), 64), R > 32
    large, small = MMA_GEMM
    gemm = large if _tiles(M, large.BM) * _tiles(N, large.BN) >= programs else small
    grad = MMA_WIDE_GRAD if wide else MMA_GRAD
    splits, chunk = _parts(M, N, K, programs, MMA_DOWN, grad)
    return Tiles(gemm, MMA_DOWN, grad, splits, one_pass=not wide, chunk=chunk, on_the_fly=False)


def for_kernels(tiles: Tiles, kernels: str) -> Tiles:
    """The same tiles, launched by others."""
    gemm, down, grad = (replace(tile, kernels=kernels) for tile in (tiles.gemm, tiles.down, tiles.grad))
    return replace(tiles, gemm=gemm, down=down, grad=grad)


# (BM, BN) of csrc/cuda/lora_linear_sm90.cu -> the time of a step of 64 of the depth, in 128 clocks, counted and not
# measured: the products of the first tile; what shared memory feeds to those of the second, 128 bytes a clock; what L2
# brings for those of the third, 64 bytes a clock.
SM90_GEMM = {(128, 256): 8, (128, 128): 5, (64, 128): 3}


def pick_sm90_tile(M: int, N: int, steps: int) -> tuple[int, int, int, int]:
    """(BM, BN, cluster, splits) of csrc/cuda/lora_linear_sm90.cu for a depth of `steps` times 64: the tile, how many
    above each other share the reads of their weight, and how many blocks share the depth of one.

    The least of times that are counted, not measured: the largest tile, unless it leaves too much of the GPU idle in
    its last turn; whole tiles, unless most of it is idle. Blocks that share a depth leave float32 sums in shared memory
    and pass them on at 14 bytes a clock (arXiv 2501.12084), between two barriers of 3 units; clusters of more than two
    find 120 of 132 multiprocessors, as cuBLAS takes them (NVIDIA/cutlass issue 1921)."""

    def time(tile: tuple[int, int, int, int]) -> float:
        BM, BN, cluster, splits = tile
        at_once = MULTIPROCESSORS[90] // cluster if splits == 1 else 120 // splits
        turns = _tiles(_tiles(M, BM * cluster) * _tiles(N, BN), at_once)
        passed_on = 6 + 4 * BM * BN * (1 / 128 + (splits - 1) / splits / 14) / 128 if splits > 1 else 0
        return turns * (_tiles(steps, splits) * SM90_GEMM[BM, BN] + passed_on)

    whole = [(BM, BN, 2 if M > BM else 1, 1) for BM, BN in SM90_GEMM]
    parted = [(BM, BN, 1, splits) for BM, BN in SM90_GEMM for splits in (2, 4, 8)]
    return min(whole + parted, key=time)


def _parts(M: int, N: int, K: int, programs: int, down: Tile, grad: Tile) -> tuple[int, int]:
    """Splits and chunk: two programs a multiprocessor keep enough loads in flight; parts of fewer than 256 columns or
    rows do not pay."""
    splits = min(max(1, 2 * programs // _tiles(M, down.BM)), max(1, K // 256), 4)
    chunks = min(max(1, 2 * programs // _tiles(min(N, K), grad.BN)), max(1, M // 256))
    return splits, _tiles(_tiles(M, chunks), grad.BM) * grad.BM


def _tiles(size: int, tile: int) -> int:
    return max(1, -(-size // tile))
