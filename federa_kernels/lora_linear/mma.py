"""Launches the kernels of csrc/cuda/lora_linear_mma.h, each in place of the Triton kernel with the same arguments.

A launch is the address of a struct; the structs here mirror those of the header, field by field.
"""

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._extension import BUILD, load_extension, why_no_extension
from .tiles import Tile

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DTYPES = (torch.bfloat16, torch.float16)  # of rows
MAX_TERMS = 4


@functools.cache
def why_not() -> str | None:
    """What keeps this build from launching them; None where nothing does."""
    extension = load_extension()
    if extension is None:
        return f"lora_linear: the kernels in CUDA C++ must be built, federa_kernels._C is {why_no_extension()}"
    if missing := extension.build_info()["cuda_missing"]:
        return f"lora_linear: the kernels in CUDA C++ must be built, this build has no CUDA half: {missing}"
    if not hasattr(extension, "lora_linear_mma"):
        return f"lora_linear: the kernels in CUDA C++ must be built, this build is older than they are; {BUILD}"
    return None


def _fields(spec: str) -> list[tuple[str, Any]]:
    """Of 8 bytes each: `name` an integer, `name*` an address, `name.` a number."""
    kinds = {"*": ctypes.c_void_p, ".": ctypes.c_double}
    return [(name.rstrip("*."), kinds.get(name[-1], ctypes.c_int64)) for name in spec.split()]


class Segments(ctypes.Structure):
    _fields_ = _fields("offsets* scalings* ranks* C")


class Down(ctypes.Structure):
    _fields_ = [
        *_fields("kind M K R splits columns x* stride_x lora_A* A_kind stride_c stride_r stride_k parts* scale."),
        ("segments", Segments),
    ]


class Term(ctypes.Structure):
    _fields_ = _fields(
        "rows* D stride_rows weight* weight_kind stride_wd stride_wn down* S R stride_down "
        "factor* factor_kind stride_fc stride_fr stride_fn scale."
    )


class Gemm(ctypes.Structure):
    _fields_ = [
        *_fields("kind M N BM BN P out* low* stride_low bias* bias_kind stride_bias"),
        ("segments", Segments),
        ("terms", Term * MAX_TERMS),
    ]


class Columns(ctypes.Structure):
    _fields_ = [
        *_fields(
            "kind M N R chunk BN rows* stride_rows low* stride_low factor* factor_kind stride_c stride_n stride_r"
        ),
        *_fields("dh_parts* pieces* piece_column piece_rank sums* stride_piece scale."),
        ("segments", Segments),
    ]


class Sum(ctypes.Structure):
    _fields_ = _fields("pieces* sums* offsets* M C chunk size_A size_B size_b")


class Step(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_char_p), *_fields("arguments* bytes")]


class Steps(ctypes.Structure):
    _fields_ = _fields("steps* count")


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kind(tensor: Tensor | None) -> int:
    return 0 if tensor is None else KINDS[tensor.dtype]


def _segments(offsets: Tensor | None, scalings: Tensor | None, ranks: Tensor | None, C: int) -> Segments:
    return Segments(_at(offsets), _at(scalings), _at(ranks), C)


def _down(
    tile, x, lora_A, parts, offsets, scalings, ranks, scale, M, K, C, steps, stride_x, stride_c, stride_r, stride_k, **_
):
    R, splits = lora_A.shape[-2], parts.shape[0]
    sizes = (_kind(x), M, K, R, splits, steps * tile.BK, _at(x), stride_x)
    factor = (_at(lora_A), _kind(lora_A), stride_c, stride_r, stride_k)
    return "down", Down(*sizes, *factor, _at(parts), scale, _segments(offsets, scalings, ranks, C))


def _gemm(
    tile, out, low, rows, weights, downs, factors, bias, offsets, scalings, ranks, scale, M, N, C, components,
    D, stride_rows, stride_wd, stride_wn, stride_down, stride_fc, stride_fr, stride_fn, stride_low, stride_bias,
    *, R, S, **_,
):  # fmt: skip
    terms = [
        Term(
            *(_at(rows[p]), D[p], stride_rows[p], _at(weights[p]), _kind(weights[p]), stride_wd[p], stride_wn[p]),
            *(_at(downs[p]), S[p], R[p], stride_down[p]),
            *(_at(factors[p]), _kind(factors[p]), stride_fc[p], stride_fr[p], stride_fn[p], scale[p]),
        )
        for p in range(len(rows))
    ]
    sizes = (_kind(out), M, N, tile.BM, tile.BN, len(terms), _at(out), _at(low), stride_low)
    segments = _segments(offsets, scalings, ranks, C)
    return "gemm", Gemm(*sizes, _at(bias), _kind(bias), stride_bias, segments, (Term * MAX_TERMS)(*terms))


def _dy(
    tile, dy, h, lora_B, dh_parts, dB_pieces, db_pieces, offsets, scalings, ranks, scale, M, N, C, chunk,
    stride_dy, stride_h, stride_c, stride_n, stride_r, stride_piece, *, R, **_,
):  # fmt: skip
    factor = (_at(lora_B), _kind(lora_B), stride_c, stride_n, stride_r)
    pieces = (_at(dh_parts), _at(dB_pieces), R, 1, _at(db_pieces), stride_piece, scale)
    sizes = (_kind(dy), M, N, R, chunk, tile.BN, _at(dy), stride_dy, _at(h), stride_h)
    return "columns", Columns(*sizes, *factor, *pieces, _segments(offsets, scalings, ranks, C))


def _dA(tile, x, dh, dA_pieces, offsets, M, K, C, chunk, stride_x, stride_piece, *, R, **_):
    sizes = (_kind(x), M, K, R, chunk, tile.BN, _at(x), stride_x, _at(dh), R)
    pieces = (None, _at(dA_pieces), 1, K, None, stride_piece, 1.0)
    return "columns", Columns(*sizes, None, 0, 0, 0, 0, *pieces, _segments(offsets, None, None, C))


def _sum(tile, pieces, sums, offsets, M, C, chunk, size_A, size_B, size_b, **_):
    return "sum", Sum(_at(pieces), _at(sums), _at(offsets), M, C, chunk, size_A, size_B, size_b)


KERNELS = {
    **{"_down_kernel": _down, "_gemm_kernel": _gemm, "_dy_kernel": _dy},
    **{"_dA_kernel": _dA, "_sum_kernel": _sum},
}


class _Held(threading.local):
    steps: list[tuple[str, ctypes.Structure, tuple]] | None = None  # kernels, and their tensors, to launch


_held = _Held()


def launch(kernel: str, tile: Tile, arguments: tuple, constants: dict[str, Any]) -> None:
    """Of the Triton kernel of this name, on the device of its first tensor and the current stream."""
    name, values = KERNELS[kernel](tile, *arguments, **constants)
    if _held.steps is not None:
        _held.steps.append((name, values, arguments))
        return
    with torch.cuda.device_of(arguments[0]):
        _run(name, values)


@contextmanager
def in_one_call() -> Iterator[None]:
    """Holds back what is launched within and launches all of it by one call, with nothing in between; on Hopper each
    kernel may begin before the one ahead of it has ended. What other kernels are to read needs `flush` before."""
    _held.steps = []
    try:
        yield
        flush()
    finally:
        _held.steps = None


def flush() -> None:
    """Launches what is held back."""
    if not _held.steps:
        return
    steps, _held.steps = _held.steps, []
    listed = [Step(name.encode(), ctypes.addressof(values), ctypes.sizeof(values)) for name, values, _ in steps]
    array = (Step * len(steps))(*listed)
    with torch.cuda.device_of(steps[0][2][0]):
        _run("steps", Steps(ctypes.addressof(array), len(steps)))


def _run(name: str, values: ctypes.Structure) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    load_extension().lora_linear_mma(name, ctypes.addressof(values), ctypes.sizeof(values), stream)
