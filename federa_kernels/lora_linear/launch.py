"""What launches the kernels of triton_kernels.py, or those in CUDA C++ that take their place: outputs allocated, tiles
picked, grids laid."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import failure
from . import dispatch, mma, sm90
from .dispatch import padded
from .reference import rank_columns
from .tiles import Tile, Tiles, for_kernels, pick_mma_tiles, pick_tiles
from .triton_kernels import _dA_kernel, _down_kernel, _dy_kernel, _gemm_kernel, _sum_kernel

MAX_RANK = 128
MAX_TERMS = 4  # projections in one product of dx
MAX_PARTS = 4  # that a product sums as it starts; more are summed before
EARLY_RANK = 32  # above it the low-rank step would hold too many registers through the long loop
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton 3.10 no longer fuses multiply and add unless asked.
OPTIONS = {"enable_fp_fusion": True}

Segmented = tuple[Tensor | None, Tensor | None, Tensor | None]  # offsets, scalings, ranks of the clients
ONE: Segmented = (None, None, None)


class _Term(NamedTuple):
    """rows (M,D) weight (D,N) + s low factor (R,N). `down`: low in parts (S,M,R), or (1,R,D) that makes it of rows."""

    rows: Tensor
    weight: Tensor
    down: Tensor
    factor: Tensor
    scaling: float


@functools.cache
def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def takes(rows: Tensor, rank: int) -> bool:
    """Whether these kernels run on this device, in this dtype and rank."""
    return rows.dtype in DTYPES and 1 <= rank <= MAX_RANK and _arch(rows.device) >= 80


_kernels = "auto"


def kernels_for(rows: torch.dtype) -> str:
    """Which kernels are asked to take rows of this dtype: a name of `use_kernels`."""
    return "triton" if _kernels in ("mma", "sm90") and rows not in mma.DTYPES else _kernels


def use_kernels(name: str) -> None:
    """Which kernels run on GPUs. "auto", the default: those that were measured to be fastest (dispatch.json), Triton's
    where nothing was. The others are for tests and measurements: "triton"; "mma", those in CUDA C++
    (csrc/cuda/lora_linear_mma.h) for bfloat16 and float16 rows; "sm90", the same but for products on Hopper
    (csrc/cuda/lora_linear_sm90.h); "torch", the definition on cuBLAS. Raises RuntimeError where this build lacks them.
    """
    global _kernels
    if name not in ("auto", *dispatch.KERNELS):
        raise ValueError(failure("use_kernels", "name", "be auto, triton, mma, sm90 or torch", name))
    if missing := dispatch.why_not(name):
        raise RuntimeError(missing)
    _kernels = name


def choose(kind: str, rows: Tensor, weights: Sequence[Tensor], ranks: Sequence[int]) -> str:
    """The kernels for x or dys of M rows: one of dispatch.KERNELS."""
    asked, arch = kernels_for(rows.dtype), _arch(rows.device)
    if asked != "auto":
        return "mma" if asked == "sm90" and arch != 90 else asked
    N = 0
    for weight in weights:
        if weight.dtype != rows.dtype:
            return "triton"
        N += weight.shape[0]
    return dispatch.fastest(kind, rows.shape[0], N, weights[0].shape[1], sum(ranks), rows.dtype, arch)


def describe(rows: torch.dtype, weight: Tensor) -> str:
    """In words, which kernels take rows of this dtype where this weight is."""
    asked = kernels_for(rows)
    if asked == "auto" and dispatch.measured(rows, _arch(weight.device)):
        return "Triton, CUDA C++ or cuBLAS: whichever was measured to be fastest"
    if asked == "torch":
        return "PyTorch: asked for"
    return f"{'CUDA C++' if asked in ('mma', 'sm90') else 'Triton'}: fused"


@functools.lru_cache(maxsize=2**12)
def _pick(kernels: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int, clients: bool = False) -> Tiles:
    if kernels in ("mma", "sm90"):
        tiles = pick_mma_tiles(M, N, K, R, arch)
        return tiles if kernels == "mma" else for_kernels(tiles, kernels)
    return pick_tiles(M, N, K, R, dtype, arch, clients)


def _contiguous_rows(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(1) == 1 else t.contiguous()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _clients(offsets: Tensor | None) -> int:
    return 1 if offsets is None else offsets.shape[0] - 1


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    if tile.kernels == "mma":
        mma.launch(kernel.__name__, tile, arguments, constants)
        return
    with torch.cuda.device_of(arguments[0]):
        if tile.kernels == "sm90":
            sm90.launch(kernel.__name__, tile, arguments, constants)
        else:
            kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS)


def _together(tiles: Tiles) -> AbstractContextManager[None]:
    """For all launches of one operator: by one call, where that can be."""
    return mma.in_one_call() if tiles.gemm.kernels == "mma" else nullcontext()


def _down(x: Tensor, lora_A: Tensor, segments: Segmented, tiles: Tiles, scaling: float = 1.0) -> Tensor:
    """s x A^T in parts (splits, M, R) float32."""
    (M, K), R, tile = x.shape, lora_A.shape[-2], tiles.down
    if tile.kernels != "triton":  # which copies rows of 16 bytes at a time as they are, and others slowly
        lora_A = lora_A.to(x.dtype)
    steps = _blocks(_blocks(K, tiles.splits), tile.BK)
    splits = _blocks(K, steps * tile.BK)
    parts = x.new_empty((splits, M, R), dtype=torch.float32)
    strides = (0, *lora_A.stride())[-3:]
    sizes = (scaling, M, K, _clients(segments[0]), steps, x.stride(0), *strides)
    constants = {"R": R, "RP": padded(R), "BM": tile.BM, "BK": tile.BK, "EVEN": K % tile.BK == 0}
    grid = (_blocks(M, tile.BM), splits)
    _launch(_down_kernel, grid, tile, x, lora_A, parts, *segments, *sizes, **constants)
    return parts


def _gemm(
    out: Tensor,
    terms: Sequence[_Term],
    tile: Tile,
    low: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Segmented = ONE,
    on_the_fly: bool = False,
) -> None:
    (M, N), C = out.shape, _clients(segments[0])
    rows, weights, downs, factors, scalings = zip(*terms, strict=True)
    R = tuple(factor.shape[-2] for factor in factors)
    D = tuple(t.shape[1] for t in rows)
    strides = [(0, *factor.stride())[-3:] for factor in factors]
    arguments = (
        *(out, low, rows, weights, downs, factors, bias, *segments, scalings, M, N, C, max(R), D),
        tuple(t.stride(0) for t in rows),
        *zip(*(weight.stride() for weight in weights), strict=True),
        tuple(down.stride(-2) for down in downs),
        *zip(*strides, strict=True),
        0 if low is None else low.stride(0),
        N if bias is not None and bias.dim() == 2 else 0,
    )
    RP = padded(max(R))
    early = segments[0] is None and len(terms) == 1 and RP <= EARLY_RANK
    constants = {
        **{"P": len(terms), "S": tuple(down.shape[0] for down in downs), "R": R, "RS": RP if early else 16},
        **{"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "EVEN": all(d % tile.BK == 0 for d in D)},
        **{"EARLY": early, "ON_THE_FLY": on_the_fly, "GROUP": 8},
    }
    _launch(_gemm_kernel, (_blocks(M, tile.BM) * _blocks(N, tile.BN),), tile, *arguments, **constants)


def launch_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M,N) and h = x A^T (M,R), both in the dtype of x; the other tensors may have another."""
    return _forward(x, weight, lora_A, lora_B, bias, scaling, ONE, tiles)


def launch_lora_linear_clients_fwd(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    scalings: Tensor,
    ranks: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M,N) and h (M,R), each row with its client's factors; h is zero beyond the client's rank."""
    return _forward(x, weight, lora_A, lora_B, bias, 1.0, (offsets, scalings, ranks), tiles)


def _forward(x, weight, lora_A, lora_B, bias, scaling, segments, tiles):
    (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[-2]
    clients = segments is not ONE
    kernels = choose("clients forward" if clients else "one forward", x, [weight], [R])
    tiles = tiles or _pick(kernels, M, N, K, R, x.dtype, _arch(x.device), clients)
    x, y, h = _contiguous_rows(x), x.new_empty((M, N)), x.new_empty((M, R))
    on_the_fly = tiles.on_the_fly and not clients and R <= 16
    with _together(tiles):
        down = lora_A.contiguous()[None] if on_the_fly else _down(x, lora_A, (segments[0], None, segments[2]), tiles)
        term = _Term(x, weight.t(), down, lora_B.transpose(-1, -2), scaling)
        bias = bias if bias is None else bias.contiguous()
        _gemm(y, [term], tiles.gemm, low=h, bias=bias, segments=segments, on_the_fly=on_the_fly)
    return y, h


def launch_lora_linear_shared_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    tiles: Tiles | None = None,
) -> tuple[list[Tensor], Tensor]:
    """y (M,N_p) of every projection and the h of all side by side (M, sum of R_p), from one pass over x."""
    (M, K), arch, columns = x.shape, _arch(x.device), rank_columns(lora_As)
    h, ys = x.new_empty((M, columns[-1].stop)), [x.new_empty((M, weight.shape[0])) for weight in weights]
    kernels = choose("shared forward", x, weights, [lora_A.shape[0] for lora_A in lora_As])
    x = _contiguous_rows(x)
    for group in _groups(lora_As):
        lora_A = torch.cat(list(lora_As[group.start : group.stop]))
        own = rank_columns(lora_As[group.start : group.stop])
        picked = [tiles or _pick(kernels, M, weights[p].shape[0], K, lora_A.shape[0], x.dtype, arch) for p in group]
        with _together(picked[0]), sm90.in_one_launch(x):
            parts = _down(x, lora_A, ONE, picked[0])
            for p, of_group, own_tiles in zip(group, own, picked, strict=True):
                term = _Term(x, weights[p].t(), parts[:, :, of_group], lora_Bs[p].t(), scalings[p])
                bias = biases[p] if biases[p] is None else biases[p].contiguous()
                _gemm(ys[p], [term], own_tiles.gemm, low=h[:, columns[p]], bias=bias)
    return ys, h


def _groups(lora_As: Sequence[Tensor]) -> list[range]:
    """The projections in turns that one pass takes: at most MAX_TERMS, of rank MAX_RANK together."""
    groups, total = [range(0, 0)], 0
    for p, lora_A in enumerate(lora_As):
        total += lora_A.shape[0]
        if total > MAX_RANK or len(groups[-1]) == MAX_TERMS:
            groups.append(range(p, p))
            total = lora_A.shape[0]
        groups[-1] = range(groups[-1].start, p + 1)
    return groups


def launch_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    needs: Sequence[bool],
    tiles: Tiles | None = None,
) -> list[Tensor | None]:
    """Gradients of (x, weight, lora_A, lora_B, bias), None where not needed; that of weight is never."""
    return _backward("one backward", [dy], x, h, [weight], [lora_A], [lora_B], [scaling], ONE, None, needs, tiles)


def launch_lora_linear_clients_bwd(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    scalings: Tensor,
    ranks: Tensor,
    needs: Sequence[bool],
    tiles: Tiles | None = None,
) -> list[Tensor | None]:
    """The same for clients, whose factors get zero beyond their ranks and everywhere without rows."""
    lists = ([weight], [lora_A], [lora_B], [1.0], (offsets, scalings, ranks), bias)
    return _backward("clients backward", [dy], x, h, *lists, needs, tiles)


def launch_lora_linear_shared_bwd(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    needs: Sequence[bool],
    tiles: Tiles | None = None,
) -> list[Tensor | None]:
    """Gradients of x, written once, then of (weight, lora_A, lora_B, bias) of each projection in turn."""
    columns, grads = rank_columns(lora_As), [None]
    for group in _groups(lora_As):
        span = slice(group.start, group.stop)
        lists = (weights[span], lora_As[span], lora_Bs[span], scalings[span], ONE, None)
        own = [needs[0], *needs[1 + 4 * span.start : 1 + 4 * span.stop]]
        h_own = None if h is None else h[:, columns[span.start].start : columns[span.stop - 1].stop]
        dx, *others = _backward("shared backward", dys[span], x, h_own, *lists, own, tiles)
        grads[0] = dx if grads[0] is None else grads[0].add_(dx)
        grads += others
    return grads


def _backward(kind, dys, x, h, weights, lora_As, lora_Bs, scalings, segments, bias, needs, tiles):
    dys, x, h = [_contiguous_rows(dy) for dy in dys], _contiguous_rows(x), _contiguous_rows(h)
    (M, K), C, first = (dys[0].shape[0], weights[0].shape[1]), _clients(segments[0]), dys[0]
    N, R = [weight.shape[0] for weight in weights], [lora_A.shape[-2] for lora_A in lora_As]
    need_x, need_A, need_B, need_b = needs[0], any(needs[2::4]), needs[3::4], needs[4::4]
    kernels = choose(kind, first, weights, R)
    target = (first.dtype, _arch(first.device), segments is not ONE)
    over_dys = [tiles or _pick(kernels, M, K, n, r, *target) for n, r in zip(N, R, strict=True)]
    tiles = tiles or _pick(kernels, M, K, sum(N), sum(R), *target)
    sizes = [need_A * sum(R) * K, *(need * n * r for need, n, r in zip(need_B, N, R, strict=True))]
    sizes += [need * n for need, n in zip(need_b, N, strict=True)]
    count = max(1, _blocks(M, tiles.chunk)) + C - 1
    pieces = first.new_empty((count, sum(sizes)), dtype=torch.float32)
    dA_pieces, *others = pieces.split(sizes, dim=1)
    dh = first.new_empty((M, sum(R))) if need_A else None
    columns = [slice(end - r, end) for end, r in zip(accumulate(R), R, strict=True)]
    dx, terms = first.new_empty((M, K)) if need_x else None, []
    with _together(tiles):
        for p, dy in enumerate(dys):
            own = (others[p] if need_B[p] else None, others[len(dys) + p] if need_b[p] else None)
            h_p = h[:, columns[p]] if need_B[p] else None
            over_dy = replace(over_dys[p], chunk=tiles.chunk)
            dh_parts = _over_dy(dy, h_p, lora_Bs[p], need_x or need_A, own, scalings[p], segments, over_dy)
            terms.append(_Term(dy, weights[p], dh_parts, lora_As[p], 1.0))
        if need_x:
            _gemm(dx, terms, tiles.gemm, low=dh, segments=(segments[0], None, segments[2]))
        elif need_A:
            mma.flush()  # PyTorch reads what is still to be written
            torch.cat([term.down.sum(0) for term in terms], dim=1, out=dh)
        if need_A:
            _over_x(x, dh, dA_pieces, segments[0], tiles)
        dA, *others = _sum(pieces, sizes, segments[0], M, tiles).split([C * size for size in sizes])
    grads = [dx]
    for p, (A, B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        dA_p = dA.view(C, sum(R), K)[:, columns[p]].view(A.shape) if needs[2 + 4 * p] else None
        dB_p = others[p].view(B.shape) if need_B[p] else None
        db_p = others[len(dys) + p].view(C, N[p]) if need_b[p] else None
        if need_b[p] and (bias is None or bias.dim() == 1):
            db_p = db_p.sum(0)
        grads += [None, dA_p, dB_p, db_p]
    return grads


def _over_dy(dy, h, lora_B, need_dh, own, scaling, segments, tiles):
    """Fills `own`, the pieces of dB and db or None; returns dh in parts (., M, R) or None. One pass over dy, or two."""
    (M, N), R, tile = dy.shape, lora_B.shape[-1], tiles.grad
    slabs, chunks = _blocks(N, tile.BN), max(1, _blocks(M, tiles.chunk))
    pieces = [t for t in own if t is not None]
    one_pass = need_dh and pieces and tiles.one_pass
    dh_parts = dy.new_empty((slabs, M, R), dtype=torch.float32) if one_pass else None
    if pieces:
        strides = (dy.stride(0), 0 if h is None else h.stride(0), *(0, *lora_B.stride())[-3:], pieces[0].stride(0))
        sizes = (scaling, M, N, _clients(segments[0]), tiles.chunk, *strides)
        constants = {"R": R, "RP": padded(R), "BM": tile.BM, "BN": tile.BN}
        _launch(_dy_kernel, (slabs, chunks), tile, dy, h, lora_B, dh_parts, *own, *segments, *sizes, **constants)
    if need_dh and not one_pass:
        dh_parts = _down(dy, lora_B.transpose(-1, -2), segments, tiles, scaling)
    return dh_parts if dh_parts is None or dh_parts.shape[0] <= MAX_PARTS else _sum_of(dh_parts, tile)


def _sum_of(parts, tile):
    """(1, M, R). PyTorch's, unless that would come between launches that one call makes."""
    if tile.kernels == "triton":
        return parts.sum(0, keepdim=True)
    whole = parts.new_empty((1, *parts.shape[1:]))
    _launch(_sum_kernel, (), tile, parts, whole, None, len(parts), 1, 1, whole.numel(), 0, 0)
    return whole


def _over_x(x, dh, dA_pieces, offsets, tiles):
    """One pass over x: the pieces of dA."""
    (M, K), R, tile = x.shape, dh.shape[1], tiles.grad
    grid = (_blocks(K, tile.BN), max(1, _blocks(M, tiles.chunk)))
    sizes = (M, K, _clients(offsets), tiles.chunk, x.stride(0), dA_pieces.stride(0))
    constants = {"R": R, "RP": padded(R), "BM": tile.BM, "BN": tile.BN}
    _launch(_dA_kernel, grid, tile, x, dh, dA_pieces, offsets, *sizes, **constants)


def _sum(pieces, sizes, offsets, M, tiles):
    """(C size) of each size in turn: every client's gradients, from their pieces."""
    C, (count, size), tile = _clients(offsets), pieces.shape, Tile(1, 1024, 0, 4, 1, tiles.gemm.kernels)
    if (offsets is None and count == 1) or size == 0:
        return pieces.view(-1)
    sums = pieces.new_empty(C * size)
    kinds = (sizes[0], size - sizes[0], 0)
    if offsets is not None:  # one projection: its dB, then its db
        kinds = tuple(sizes)
    _launch(
        _sum_kernel,
        (C, _blocks(size, tile.BN)),
        tile,
        pieces,
        sums,
        offsets,
        M,
        C,
        tiles.chunk,
        *kinds,
        BLOCK=tile.BN,
    )
    return sums
