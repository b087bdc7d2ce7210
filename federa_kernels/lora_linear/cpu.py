"""The CPU path: kernels in C++ (csrc/cpu/lora_linear.h) over packed frozen weights, where the processor has tile units.

float32 rows meet a float32 weight as three bfloat16 planes each, six products: as exact as float32. A bfloat16 weight
takes three products with float32 rows, which are not rounded, and one with bfloat16 rows.
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .._extension import load_extension
from .reference import rank_columns

KINDS = {torch.float32: "f", torch.bfloat16: "b"}
MAX_RANK = 128

Clients = tuple[Tensor, Tensor, Tensor]


@functools.cache
def kernels() -> ModuleType | None:
    """The extension, where it can use the processor's tile units."""
    extension = load_extension()
    return extension if extension is not None and extension.tiles_available() else None


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
    return None if kernels() else "the processor has no tile units (AMX)"


def packs(rows: torch.dtype, weight: Tensor) -> bool:
    """Whether a packed form of this weight serves rows of this dtype on this machine."""
    return why_not(rows, weight) is None


def takes(rows: Tensor, ranks: Sequence[int]) -> bool:
    """Whether these kernels take rows (M,K) and adapters of these ranks, given packed weights."""
    return kernels() is not None and rows.dtype in KINDS and rows.numel() > 0 and max(ranks, default=0) <= MAX_RANK


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """The panels of W^T, for x W^T, or of W (transposed), for dy W: bytes, laid out as csrc/cpu/lora_linear.h says."""
    C, kind = kernels(), KINDS[weight.dtype]
    columns, depth = weight.shape[::-1] if transposed else weight.shape
    column_stride, depth_stride = weight.stride()[::-1] if transposed else weight.stride()
    packed = torch.empty(C.packed_bytes(kind, columns, depth), dtype=torch.uint8)
    threads = torch.get_num_threads()
    C.pack(weight.data_ptr(), kind, columns, column_stride, depth, depth_stride, packed.data_ptr(), threads)
    return packed


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class _Call:
    """Products with one x: h = x down^T, out = x P + s h up^T + bias. Keeps what it points to until `run`."""

    def __init__(self, x: Tensor, clients: Clients | None):
        self.x, self.clients = _rows(x), tuple(t.contiguous() for t in clients or ())
        self.projections: list[tuple] = []
        self.alive: list[Tensor] = []

    def add(
        self,
        packed: Tensor | None,
        weight: Tensor,
        columns: int,
        down: Tensor,
        up: Tensor,
        scaling: float,
        out: Tensor | None,
        h: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        """down (R,depth) or (C,R,depth), up (columns,R) or (C,columns,R), bias (columns,) or (C,columns)."""
        down, up = down.float(), up.float()
        bias = None if bias is None else bias.float().contiguous()
        self.alive += [down, up] if bias is None else [down, up, bias]
        per_client = down.dim() == 3
        self.projections.append(
            (
                *(0 if packed is None else packed.data_ptr(), KINDS[weight.dtype]),
                *(columns, down.shape[-2], scaling, down.data_ptr(), up.data_ptr()),
                *(down.stride() if per_client else (0, *down.stride())),
                *(up.stride() if per_client else (0, *up.stride())),
                *(0 if bias is None else bias.data_ptr(), columns if bias is not None and bias.dim() == 2 else 0),
                *(0 if out is None else out.data_ptr(), h.data_ptr(), h.stride(0)),
            )
        )

    def run(self, accumulate: bool = False) -> None:
        x, (offsets, *_) = self.x, self.clients or (None,)
        kernels().low_rank_linear(
            *(x.data_ptr(), KINDS[x.dtype], *x.shape, x.stride(0), self.projections),
            *(tuple(t.data_ptr() for t in self.clients), 1 if offsets is None else len(offsets) - 1),
            *(accumulate, torch.get_num_threads()),
        )


def _gradient(
    h: Tensor, x: Tensor, scaling: float, gradient: Tensor, transposed: bool, clients: Clients | None
) -> Tensor:
    """gradient (.., R,K) = s h^T x, or its transpose (.., K,R), for all rows or for each client's."""
    x, clients = _rows(x), tuple(t.contiguous() for t in clients or ())
    *client_stride, first, second = gradient.stride()
    strides = (second, first) if transposed else (first, second)
    kernels().low_rank_gradient(
        *(h.data_ptr(), h.stride(0), h.shape[1], x.data_ptr(), KINDS[x.dtype], *x.shape, x.stride(0)),
        *(tuple(t.data_ptr() for t in clients), len(clients[0]) - 1 if clients else 1, scaling),
        *(gradient.data_ptr(), *(client_stride or (0,)), *strides, torch.get_num_threads()),
    )
    return gradient


def _forward(x, weight, packed, lora_A, lora_B, bias, scaling, clients):
    (M, _), N = x.shape, weight.shape[0]
    y, h = x.new_empty(M, N), x.new_empty(M, lora_A.shape[-2])
    call = _Call(x, clients)
    call.add(packed, weight, N, lora_A, lora_B, scaling, y, h, bias)
    call.run()
    return y, h


def _backward(dy, x, h, weight, packed, lora_A, lora_B, bias, scaling, needs, clients):
    need_x, _, need_A, need_B, need_bias = needs
    (M, _), K, R = dy.shape, weight.shape[1], lora_A.shape[-2]
    dx = dy.new_empty(M, K) if need_x else None
    dA = dB = db = None
    if need_x or need_A:
        dh = dy.new_empty(M, R)
        call = _Call(dy, clients)
        call.add(packed if need_x else None, weight, K, lora_B.mT, lora_A.mT, scaling, dx, dh)
        call.run()
    if need_A:
        dA = _gradient(dh, x, scaling, torch.empty(lora_A.shape), False, clients)
    if need_B:
        dB = _gradient(h, dy, scaling, torch.empty(lora_B.shape), True, clients)
    if need_bias and bias.dim() == 2:
        spans = zip(clients[0].tolist(), clients[0].tolist()[1:], strict=False)
        db = torch.stack([dy[start:stop].float().sum(0) for start, stop in spans])
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
    return _forward(x, weight, packed, lora_A, lora_B, bias, 1.0, (offsets, scalings, ranks))


def clients_backward(
    dy, x, h, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks, needs
) -> list[Tensor | None]:
    """As `reference.clients_backward`; ranks may exceed R."""
    return _backward(dy, x, h, weight, packed, lora_A, lora_B, bias, 1.0, needs, (offsets, scalings, ranks))


def shared_forward(x, weights, packed, lora_As, lora_Bs, biases, scalings) -> tuple[list[Tensor], Tensor]:
    """As `reference.shared_forward`: x is read and split into planes once."""
    M, columns = x.shape[0], rank_columns(lora_As)
    ys = [x.new_empty(M, weight.shape[0]) for weight in weights]
    h = x.new_empty(M, columns[-1].stop)
    call = _Call(x, None)
    for y, weight, form, A, B, bias, s, own in zip(
        ys, weights, packed, lora_As, lora_Bs, biases, scalings, columns, strict=True
    ):
        call.add(form, weight, weight.shape[0], A, B, s, y, h[:, own], bias)
    call.run()
    return ys, h


def shared_backward(dys, x, h, weights, packed, lora_As, lora_Bs, biases, scalings, needs) -> list[Tensor | None]:
    """As `reference.shared_backward`: each projection's share is added to dx where it lies."""
    need_x, M, K, columns = needs[0], dys[0].shape[0], weights[0].shape[1], rank_columns(lora_As)
    dx = dys[0].new_empty(M, K) if need_x else None
    dh = dys[0].new_empty(M, columns[-1].stop)
    grads: list[Tensor | None] = [dx]
    for p, (dy, weight, form, A, B, bias, s, own) in enumerate(
        zip(dys, weights, packed, lora_As, lora_Bs, biases, scalings, columns, strict=True)
    ):
        _, need_A, need_B, need_bias = needs[1 + 4 * p : 5 + 4 * p]
        if need_x or need_A:
            call = _Call(dy, None)
            call.add(form if need_x else None, weight, K, B.mT, A.mT, s, dx, dh[:, own])
            call.run(accumulate=need_x and p > 0)
        dA = _gradient(dh[:, own], x, s, torch.empty(A.shape), False, None) if need_A else None
        dB = _gradient(h[:, own], dy, s, torch.empty(B.shape), True, None) if need_B else None
        grads += [None, dA, dB, dy.sum(0, dtype=torch.float32) if need_bias else None]
    return grads
