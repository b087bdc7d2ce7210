"""Attention within each of many examples whose tokens stand one after another, without padding."""

import functools
from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._checks import check_shape, failure
from ._extension import load_extension
from .transfer import GPUS, to_device

KINDS = {torch.float32: "f", torch.bfloat16: "b"}


def _heads(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


class _PackedAttention(torch.autograd.Function):
    """On tile units; keeps q, k, v, the result and 8 bytes a query and head. offsets (2, E + 1): keys', queries'."""

    @staticmethod
    def forward(ctx, query, key, value, offsets, scaling):
        query, key, value = map(_rows, (query, key, value))
        Q, H, D = query.shape
        out, softmax = query.new_empty(Q, H, D), query.new_empty((2, H, Q), dtype=torch.float32)
        ctx.shape = (offsets.shape[1] - 1, H, D, scaling)
        load_extension().attention_forward(
            *(KINDS[out.dtype], (*map(Tensor.data_ptr, offsets), *ctx.shape)),
            *(*map(_heads, (query, key, value, out)), softmax.data_ptr(), torch.get_num_threads()),
        )
        ctx.save_for_backward(query, key, value, out, softmax, offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """dv = p^T do    ds = p * (do v^T - (do * o) 1)    dq = scaling ds k    dk = scaling ds^T q"""
        query, key, value, out, softmax, offsets = ctx.saved_tensors
        d_out = _rows(d_out)
        grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
        load_extension().attention_backward(
            *(KINDS[out.dtype], (*map(Tensor.data_ptr, offsets), *ctx.shape)),
            *(*map(_heads, (query, key, value, out)), softmax.data_ptr()),
            *(*map(_heads, (d_out, *grads)), torch.get_num_threads()),
        )
        return *grads, None, None


def _on_tiles(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    extension = load_extension()
    return (
        query.device.type == "cpu"
        and query.dtype in KINDS
        and query.dtype == key.dtype == value.dtype
        and dropout == 0
        and hasattr(extension, "attention_available")
        and extension.attention_available(query.shape[2])
    )


@functools.lru_cache(maxsize=8)
def _offsets(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(E + 1,): where each example begins and the last one ends. All layers of a step ask for the same."""
    return to_device(torch.tensor([0, *accumulate(sizes)]), device)


def _at_once(query, key, value, lengths, queries, scaling, dropout) -> Tensor:
    """PyTorch's attention of variable length, one launch for all examples, none of which may be empty or ask nothing.

    Nested tensors lead to it in every dtype and with dropout, and read nothing back from the device where they are told
    the shortest and the longest. Their Python costs as much as some twenty launches: not for a single length. They
    cannot be made in inference mode, where batches are sorted by length.
    """

    def nested(rows: Tensor, sizes: Sequence[int]) -> Tensor:
        bounds = {"min_seqlen": min(sizes), "max_seqlen": max(sizes)}
        offsets = _offsets(tuple(sizes), rows.device)
        return torch.nested.nested_tensor_from_jagged(rows.contiguous(), offsets, **bounds)

    parts = (nested(*part).transpose(1, 2) for part in ((query, queries), (key, lengths), (value, lengths)))
    with torch.autocast(query.device.type, enabled=False):
        out = nn.functional.scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).values()


def _by_length(query, key, value, lengths, queries, scaling, dropout) -> Tensor:
    """PyTorch's attention, neighbours of equal length together; 16-bit rows on a CPU in float32, where its backward
    takes a third of the time."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    groups = [(*sizes, len(list(same))) for sizes, same in groupby(zip(queries, lengths, strict=True))]
    asked, held = ([group[which] * group[2] for group in groups] for which in (0, 1))
    parts = zip(query.split(asked), key.split(held), value.split(held), strict=True)
    outputs = []
    for (own, length, count), part in zip(groups, parts, strict=True):
        q, k, v = (
            rows.unflatten(0, (count, size)).transpose(1, 2)
            for rows, size in zip(part, (own, length, length), strict=True)
        )
        with torch.autocast(q.device.type, enabled=False):
            out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0,
    queries: Sequence[int] | None = None,
) -> Tensor:
    """softmax(scaling q k^T) v within each example, every query seeing all of its own example.

    query    (Q, H, D): the queries of all examples, H heads of size D
    key      (M, H, D): their tokens, and value alike
    lengths  tokens of each example, in order, M together
    scaling  D^(-1/2) by default
    dropout  of the probabilities, drawn from torch's generator
    queries  of each example, Q together, none where there is no token; `lengths` by default

    Returns (Q, H, D) in the dtype given. float32 and bfloat16 on a CPU with AMX take a kernel for heads of 32 or 64
    (csrc/cpu/attention.h): sums and softmax in float32, products in bfloat16 or, of float32, as exact as float32; an
    example's bits the same in any company and on any number of threads. Raises ValueError for shapes and lengths that
    do not fit.
    """
    check_shape("packed_attention", "query", query, Q=None, H=None, D=None)
    Q, H, D = query.shape
    check_shape("packed_attention", "key", key, M=Q if queries is None else None, H=H, D=D)
    check_shape("packed_attention", "value", value, M=(M := key.shape[0]), H=H, D=D)
    if min(lengths, default=0) < 0 or sum(lengths) != M:
        raise ValueError(failure("packed_attention", "lengths", f"be at least 0 and sum to M = {M}", list(lengths)))
    queries = lengths if queries is None else queries
    fits = len(queries) == len(lengths) and all(0 <= n <= n * size for n, size in zip(queries, lengths, strict=True))
    if not fits or sum(queries) != Q:
        wanted = f"be one for each of lengths, 0 where that is 0, and sum to Q = {Q}"
        raise ValueError(failure("packed_attention", "queries", wanted, list(queries)))
    scaling = D**-0.5 if scaling is None else scaling
    sizes = set(zip(queries, lengths, strict=True))
    several = len(sizes) > 1 and min(sizes)[0] > 0
    if query.device.type in GPUS and several and not torch.is_inference_mode_enabled():
        return _at_once(query, key, value, lengths, queries, scaling, dropout)
    if not _on_tiles(query, key, value, dropout):
        return _by_length(query, key, value, lengths, queries, scaling, dropout)
    offsets = torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(queries)]], dtype=torch.int64)
    return _PackedAttention.apply(query, key, value, offsets, scaling)
