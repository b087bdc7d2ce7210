"""The CPU path: kernels in C++ (csrc/cpu/lora_linear.h) over packed frozen weights, by the best engine that runs here.

On tile units (amx) float32 rows meet a float32 weight as three bfloat16 planes each, six products: as exact as float32.
A bfloat16 weight takes three products with float32 rows, which are not rounded, and one with bfloat16 rows. With
AVX-512 or AVX2 float32 rows are multiplied in float32, and bfloat16 rows are left to PyTorch.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from .._extension import load_extension
from .reference import rank_columns

KINDS = {torch.float32: "f", torch.bfloat16: "b"}
MAX_RANK = 128

Clients = tuple[Tensor, Tensor, Tensor]


@functools.cache
def engine() -> str:
    """The one in use: "amx", "avx512", "avx2", or "none" where none of them runs here or the extension is not built."""
    extension = load_extension()
    return "none" if extension is None else extension.engine()


def use_engine(name: str) -> None:
    """For tests and measurements: another of `load_extension().engines()`, or "none". What an earlier engine packed
    must not be used any more: a FrozenWeight packs again, a backward pass that is still to come does not."""
    load_extension().set_engine(name)
    engine.cache_clear()
    _rows_taken.cache_clear()


def kernels() -> ModuleType | None:
    """The extension, where one of its engines runs on this processor."""
    return None if engine() == "none" else load_extension()


@functools.cache
def _rows_taken() -> tuple[torch.dtype, ...]:
    return {"amx": (torch.float32, torch.bfloat16), "none": ()}.get(engine(), (torch.float32,))


def why_not(rows: torch.dtype, weight: Tensor) -> str | None:
    """What keeps a weight from being packed for rows of this dtype; None where it can be."""
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}"
    if rows not in KINDS or weight.dtype not in KINDS:
        return f"{rows} rows and a {weight.dtype} weight, where float32 and bfloat16 have kernels"
    if not weight.numel():
        return "the weight is empty"
    if load_extension() is None:
        return "federa_kernels._C is not built"
    if kernels() is None:
        return "the processor has neither tile units (AMX) nor AVX-512 nor AVX2 with FMA"
    return None if rows in _rows_taken() else f"{rows} rows, which take tile units (AMX); this is {engine()}"


def packs(rows: torch.dtype, weight: Tensor) -> bool:
    """Whether a packed form of this weight serves rows of this dtype on this machine."""
    return why_not(rows, weight) is None


def describe(rows: torch.dtype, weight: Tensor) -> str:
    """What is computed where `packs` says so."""
    if engine() != "amx":
        return f"C++ on {engine()}: packed {weight.dtype}, float32 products for {rows} rows, exact to float32"
    products = {(torch.float32, torch.float32): 6, (torch.float32, torch.bfloat16): 3}.get((rows, weight.dtype), 1)
    exact = "exact to float32" if products > 1 else "rounded to bfloat16"
    return f"C++ on tile units (AMX): packed {weight.dtype}, {products} bfloat16 products for {rows} rows, {exact}"


def takes(rows: Tensor, ranks: Sequence[int]) -> bool:
    """Whether these kernels take rows (M,K) and adapters of these ranks, given packed weights."""
    return rows.dtype in _rows_taken() and rows.numel() > 0 and max(ranks, default=0) <= MAX_RANK


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """The panels of W^T, for x W^T, or of W (transposed), for dy W: bytes, laid out as csrc/cpu/lora_linear.h says."""
    C, kind = kernels(), KINDS[weight.dtype]
    columns, depth = weight.shape[::-1] if transposed else weight.shape
    column_stride, depth_stride = weight.stride()[::-1] if transposed else weight.stride()
    packed = weight.new_empty(C.packed_bytes(kind, columns, depth), dtype=torch.uint8)
    threads = torch.get_num_threads()
    C.pack(weight.data_ptr(), kind, columns, column_stride, depth, depth_stride, packed.data_ptr(), threads)
    return packed


def unpack(packed: Tensor, like: Tensor, engine: str) -> Tensor:
    """The weight, of the shape and dtype of `like`, from its panels for x W^T of an engine."""
    (N, K), dtype = like.shape, like.dtype
    if engine == "amx":
        planes = 3 if dtype == torch.float32 else 1
        # [panel][step][plane][half][pair (k, k + 16)][column][which of the two]
        tiles = packed.view(torch.bfloat16).view(-(-N // 32), -(-K // 32), planes, 2, 16, 16, 2)
        parts = tiles.permute(2, 0, 3, 5, 1, 6, 4).flatten(1, 3).flatten(2)[:, :N, :K].to(dtype)
        if planes == 1:
            return parts[0].contiguous()
        rest = parts[1] + parts[2]
        return torch.where(rest == 0, parts[0], parts[0] + rest)  # -0.0 + 0.0 would be 0.0
    lanes = 16 if engine == "avx512" else 8
    width, stretch = -(-N // lanes) * lanes, -(-K // -(-K // 384))
    depths = [min(stretch, K - k) for k in range(0, K, stretch)]
    stretches = packed.view(dtype).split([depth * width for depth in depths])
    panels = [one.view(-1, depth, lanes) for one, depth in zip(stretches, depths, strict=True)]
    return torch.cat([one.transpose(1, 2).reshape(width, -1)[:N] for one in panels], dim=1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _projection(packed, weight, columns, down, up, scaling, out, h, bias=None) -> tuple:
    """down (R,depth) or (C,R,depth), up (columns,R) or (C,columns,R), bias (columns,) or (C,columns), all float32."""
    per_client = down.dim() == 3
    return (
        *(packed.data_ptr(), KINDS[weight.dtype]),
        *(columns, down.shape[-2], scaling, down.data_ptr(), up.data_ptr()),
        *(down.stride() if per_client else (0, *down.stride())),
        *(up.stride() if per_client else (0, *up.stride())),
        *(0 if bias is None else bias.data_ptr(), columns if bias is not None and bias.dim() == 2 else 0),
        *(out.data_ptr(), h.data_ptr(), h.stride(0)),
    )


def _run(x: Tensor, projections: list[tuple], clients: Clients | None) -> None:
    kernels().low_rank_linear(
        *(x.data_ptr(), KINDS[x.dtype], *x.shape, x.stride(0), projections),
        *(*_pointers(clients), torch.get_num_threads()),
    )


def _pointers(clients: Clients | None) -> tuple[tuple[int, ...], int]:
    return ((), 1) if clients is None else (tuple(t.data_ptr() for t in clients), clients[0].shape[0] - 1)


def _gradients(dy, x, h, weight, packed, lora_A, lora_B, scaling, dx, need_A, need_B, clients=None, accumulate=False):
    """Writes or adds to dx, where there is one, and returns dA and dB, float32, or None."""
    A, B, (M, N), R = lora_A.float(), lora_B.float(), dy.shape, lora_A.shape[-2]
    dA = A.new_empty(A.shape) if need_A else None
    dB = B.new_empty(B.shape) if need_B else None
    one = (0,) if A.dim() == 2 else ()  # the stride from client to client
    kernels().low_rank_backward(
        (
            *(0 if dx is None else packed.data_ptr(), KINDS[weight.dtype], N, weight.shape[1], R, scaling),
            *(A.data_ptr(), *one, *A.stride(), B.data_ptr(), *one, *B.stride()),
        ),
        *(KINDS[dy.dtype], M, dy.data_ptr(), dy.stride(0)),
        *((x.data_ptr(), x.stride(0)) if need_A else (0, 0)),
        *((h.data_ptr(), h.stride(0)) if need_B else (0, 0)),
        *(*_pointers(clients), accumulate),
        *(0 if t is None else t.data_ptr() for t in (dx, dA, dB)),
        torch.get_num_threads(),
    )
    return dA, dB


def _forward(x, weight, packed, lora_A, lora_B, bias, scaling, clients):
    (M, _), N = x.shape, weight.shape[0]
    y, h = x.new_empty((M, N)), x.new_empty((M, lora_A.shape[-2]))
    x, lora_A, lora_B = _rows(x), lora_A.float(), lora_B.float()
    bias = None if bias is None else bias.float().contiguous()
    _run(x, [_projection(packed, weight, N, lora_A, lora_B, scaling, y, h, bias)], clients)
    return y, h


def _backward(dy, x, h, weight, packed, lora_A, lora_B, bias, scaling, needs, clients):
    need_x, _, need_A, need_B, need_bias = needs
    dx = dy.new_empty((dy.shape[0], weight.shape[1])) if need_x else None
    dA = dB = db = None
    if need_x or need_A or need_B:
        rows, x = _rows(dy), _rows(x) if need_A else None
        dA, dB = _gradients(rows, x, h, weight, packed, lora_A, lora_B, scaling, dx, need_A, need_B, clients)
    if need_bias and bias.dim() == 2:
        db = torch.stack([dy[start:stop].float().sum(0) for start, stop in pairwise(clients[0].tolist())])
    elif need_bias:
        db = dy.sum(0, dtype=torch.float32)
    return [dx, None, dA, dB, db]


def forward(
    x: Tensor, weight: Tensor, packed: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`, A, B and bias of any float dtype; y and h in the dtype of x."""
    return _forward(x, weight, packed, lora_A, lora_B, bias, scaling, None)


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    packed: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """As `reference.backward`; the gradients of A, B and bias in float32."""
    return _backward(dy, x, h, weight, packed, lora_A, lora_B, bias, scaling, needs, None)


def clients_forward(x, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks) -> tuple[Tensor, Tensor]:
    """As `reference.clients_forward`; ranks may exceed R."""
    clients = (offsets.contiguous(), scalings.contiguous(), ranks.contiguous())
    return _forward(x, weight, packed, lora_A, lora_B, bias, 1.0, clients)


def clients_backward(
    dy, x, h, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks, needs
) -> list[Tensor | None]:
    """As `reference.clients_backward`; ranks may exceed R."""
    clients = (offsets.contiguous(), scalings.contiguous(), ranks.contiguous())
    return _backward(dy, x, h, weight, packed, lora_A, lora_B, bias, 1.0, needs, clients)


def shared_forward(x, weights, packed, lora_As, lora_Bs, biases, scalings) -> tuple[list[Tensor], Tensor]:
    """As `reference.shared_forward`: x is read and split into planes once."""
    M, columns = x.shape[0], rank_columns(lora_As)
    ys = [x.new_empty(M, weight.shape[0]) for weight in weights]
    h = x.new_empty(M, columns[-1].stop)
    x, lora_As, lora_Bs = _rows(x), [A.float() for A in lora_As], [B.float() for B in lora_Bs]
    biases = [bias if bias is None else bias.float().contiguous() for bias in biases]
    every = zip(packed, weights, lora_As, lora_Bs, scalings, ys, columns, biases, strict=True)
    projections = [_projection(f, W, W.shape[0], A, B, s, y, h[:, own], b) for f, W, A, B, s, y, own, b in every]
    _run(x, projections, None)
    return ys, h


def shared_backward(dys, x, h, weights, packed, lora_As, lora_Bs, scalings, needs) -> list[Tensor | None]:
    """As `reference.shared_backward`: each projection's share is added to dx where it lies."""
    need_x, columns = needs[0], rank_columns(lora_As)
    dx = dys[0].new_empty(dys[0].shape[0], weights[0].shape[1]) if need_x else None
    grads: list[Tensor | None] = [dx]
    every = zip(dys, weights, packed, lora_As, lora_Bs, scalings, columns, strict=True)
    for p, (dy, weight, form, A, B, s, own) in enumerate(every):
        _, need_A, need_B, need_bias = needs[1 + 4 * p : 5 + 4 * p]
        dA = dB = None
        if need_x or need_A or need_B:
            rows, own_x, own_h = _rows(dy), _rows(x) if need_A else None, h[:, own] if need_B else None
            dA, dB = _gradients(rows, own_x, own_h, weight, form, A, B, s, dx, need_A, need_B, None, p > 0)
        grads += [None, dA, dB, dy.sum(0, dtype=torch.float32) if need_bias else None]
    return grads
