"""Launches the kernels of csrc/cuda/lora_linear_sm90.h in place of products; what they do not take, and the other
kernels of a step, go to mma.py.

A launch is the address of a struct; the structs here mirror those of the header, field by field.
"""

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import load_extension
from . import mma
from .mma import Segments, _at, _fields, _kind, _segments
from .tiles import Tile, pick_sm90_tile

MAX_PRODUCTS, MAX_PAIRS = 4, 8
STEP = 64  # of the depth
MAX_RANK, MAX_SIZE = 128, 2**31 - 256
GAP = 256  # rows of zeros between those of two clients
ENTRIES = 8  # of 16 bytes, on which TMA's rows begin


@functools.cache
def why_not() -> str | None:
    """What keeps this build from launching them; None where nothing does."""
    if missing := mma.why_not():
        return missing
    if not hasattr(load_extension(), "lora_linear_sm90"):
        return "lora_linear: the kernels for Hopper must be built, this build is older than they are"
    if "sm_90a" not in load_extension().build_info()["architectures"]:
        return "lora_linear: the kernels for Hopper must be built for it; let TORCH_CUDA_ARCH_LIST have 9.0a"
    return None


class Low(ctypes.Structure):
    _fields_ = [
        *_fields("kind M N R S down* stride_down low* stride_low copy* stride_copy"),
        *_fields("factor* factor_kind stride_fc stride_fr stride_fn scaled* stride_scaled along_n scale."),
        *_fields("bias* bias_kind stride_bias add*"),
        ("segments", Segments),
    ]


class Lows(ctypes.Structure):
    _fields_ = [*_fields("count"), ("lows", Low * MAX_PRODUCTS)]


class Pair(ctypes.Structure):
    _fields_ = _fields("rows* depth stride_rows weight* stride_weight own")


class Product(ctypes.Structure):
    _fields_ = _fields("out* bias* bias_kind N P")


class Gemm(ctypes.Structure):
    _fields_ = [
        *_fields("kind M BM BN cluster splits along_n count"),
        ("segments", Segments),
        ("products", Product * MAX_PRODUCTS),
        ("pairs", Pair * MAX_PAIRS),
    ]


class _Planned(NamedTuple):
    """A product to launch. kept: the tensors that it reads and writes."""

    kind: int
    M: int
    along_n: bool
    segments: Segments
    lows: list[Low]
    product: Product
    pairs: list[Pair]
    kept: list[Tensor | None]


class _Held(threading.local):
    planned: list[_Planned] | None = None


_held = _Held()


@contextmanager
def in_one_launch(rows: Tensor) -> Iterator[None]:
    """Holds back the products within, which are of the same rows, and launches them together when it ends."""
    _held.planned = []
    try:
        yield
        with torch.cuda.device_of(rows):
            for along_n in (False, True):
                if together := [planned for planned in _held.planned if planned.along_n == along_n]:
                    _launch(together)
    finally:
        _held.planned = None


def launch(kernel: str, tile: Tile, arguments: tuple, constants: dict[str, Any]) -> None:
    """Of the Triton kernel of this name, on the current device, of compute capability 9.0, and its current stream."""
    if kernel != "_gemm_kernel" or not takes(*arguments[:4], offsets=arguments[7]):
        mma.launch(kernel, tile, arguments, constants)
    elif _held.planned is None:
        _launch([_plan(*arguments[:11])])
    else:
        _held.planned.append(_plan(*arguments[:11]))


def takes(
    out: Tensor, low: Tensor | None, rows: Sequence[Tensor], weights: Sequence[Tensor], offsets: Tensor | None
) -> bool:
    """Whether TMA reaches every matrix: not empty, one dtype, rows that begin on 16 bytes, less than 2^31 of them."""
    along_n, C = _along_n(weights[0]), _clients(offsets)
    matrices = [out, *rows, *(weight if along_n else weight.t() for weight in weights)]
    small = max(out.shape[0] + GAP * C, C * max(out.shape[1], MAX_RANK)) <= MAX_SIZE
    return small and all(t.dtype == out.dtype and t.numel() > 0 and _reachable(t) for t in matrices)


def _clients(offsets: Tensor | None) -> int:
    return 1 if offsets is None else offsets.shape[0] - 1


def _along_n(weight: Tensor) -> bool:
    return weight.stride(1) == 1 and weight.stride(0) != 1


def _reachable(t: Tensor) -> bool:
    stride = t.stride(0)
    return t.stride(1) == 1 and stride >= t.shape[1] and stride % ENTRIES == 0 and t.data_ptr() % 16 == 0


def _padded(rows: int, columns: int, like: Tensor) -> Tensor:
    """Rows that begin on 16 bytes."""
    return like.new_empty((rows, -(-columns // ENTRIES) * ENTRIES))[:, :columns]


def _plan(out, low, rows, weights, downs, factors, bias, offsets, scalings, ranks, scale) -> _Planned:
    """out = sum of rows weight + low factor, where low and the scaled factor are further depth of the one product."""
    (M, N), along_n, C, clients = out.shape, _along_n(weights[0]), _clients(offsets), offsets is not None
    R, segments = [factor.shape[-2] for factor in factors], _segments(offsets, scalings, ranks, C)
    add = out.new_empty((C, N), dtype=torch.float32) if clients else None
    of_bias = (_at(bias), _kind(bias), bias.stride(0) if bias is not None and bias.dim() == 2 else 0)
    lows, pairs, kept = [], [], [add]
    for p, (start, down) in enumerate(zip(accumulate([0, *R]), downs, strict=False)):
        own = None if low is None else low[:, start : start + R[p]]
        in_place = own is not None and not clients and _reachable(own)
        taken = own if in_place else _padded(M + GAP * (C - 1), R[p], out)
        scaled = _padded(C * R[p], N, out) if along_n else _padded(C * N, R[p], out)
        copy = (None, 0) if own is None or in_place else (_at(own), own.stride(0))
        factor = (_at(factors[p]), _kind(factors[p]), *(0, *factors[p].stride())[-3:])
        values = Low(
            *(_kind(out), M, N, R[p], down.shape[0], _at(down), down.stride(-2), _at(taken), taken.stride(0), *copy),
            *(*factor, _at(scaled), scaled.stride(0), along_n, scale[p], *of_bias, _at(add), segments),
        )
        lows.append(values)
        weight = weights[p] if along_n else weights[p].t()
        depth = rows[p].shape[1]
        pairs.append(Pair(_at(rows[p]), depth, rows[p].stride(0), _at(weight), weight.stride(0), False))
        pairs.append(Pair(_at(taken), R[p], taken.stride(0), _at(scaled), scaled.stride(0), clients))
        kept += [taken, scaled, rows[p], weights[p], down, factors[p]]
    summand = bias if add is None else add
    product = Product(_at(out), _at(summand), _kind(summand), N, len(pairs))
    return _Planned(_kind(out), M, along_n, segments, lows, product, pairs, [*kept, out, bias])


def _launch(planned: list[_Planned]) -> None:
    """Products of the same rows: one launch for all that goes on in their depth, one for themselves."""
    kind, M, along_n, segments, *_ = planned[0]
    lows = [low for each in planned for low in each.lows]
    pairs = [pair for each in planned for pair in each.pairs]
    products = [each.product for each in planned]
    _run("low", Lows(len(lows), (Low * MAX_PRODUCTS)(*lows)))
    steps = max(sum(-(-pair.depth // STEP) for pair in each.pairs) for each in planned)
    sizes = (kind, M, *pick_sm90_tile(M, sum(product.N for product in products), steps), along_n, len(products))
    _run("gemm", Gemm(*sizes, segments, (Product * MAX_PRODUCTS)(*products), (Pair * MAX_PAIRS)(*pairs)))


def _run(name: str, values: ctypes.Structure) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    load_extension().lora_linear_sm90(name, ctypes.addressof(values), ctypes.sizeof(values), stream)
