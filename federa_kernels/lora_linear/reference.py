"""A frozen linear layer with low-rank adapters beside it: the definition, on rows.

    h = x A^T        y = x W^T + s h B^T + b

x (M,K), weight (N,K), lora_A (R,K), lora_B (N,R), bias (N,) or None, all of one dtype. For clients, rows offsets[c] to
offsets[c+1] belong to client c, who has lora_A[c], lora_B[c], scalings[c], perhaps bias[c], and of both factors only
the first ranks[c] components. For shared projections x is one and every other argument a list.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from torch import Tensor
from torch.nn.functional import linear


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """y (M,N) and h (M,R)."""
    h = linear(x, lora_A)
    return linear(x, weight, bias).addmm_(h, lora_B.t(), alpha=scaling), h


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (x, weight, lora_A, lora_B, bias), None where `needs` is False; x, h and weight may be None where
    unused.

    dh = s dy B    dx = dy W + dh A    dW = dy^T x    dA = dh^T x    dB = s dy^T h    db = sum of the rows of dy
    """
    need_x, need_weight, need_A, need_B, need_bias = needs
    dh = (dy @ lora_B).mul_(scaling) if need_x or need_A else None
    return [
        (dy @ weight).addmm_(dh, lora_A) if need_x else None,
        dy.t() @ x if need_weight else None,
        dh.t() @ x if need_A else None,
        (dy.t() @ h).mul_(scaling) if need_B else None,
        dy.sum(0) if need_bias else None,
    ]


def clients_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    scalings: Tensor,
    ranks: Tensor,
) -> tuple[Tensor, Tensor]:
    """y (M,N) and h (M,R), zero beyond a client's rank; lora_A (C,R,K), lora_B (C,N,R), bias (N,) or (C,N)."""
    own_bias = bias is not None and bias.dim() == 2
    y = linear(x, weight, None if own_bias else bias)
    h = x.new_zeros(x.shape[0], lora_A.shape[1])
    for c, rows, R, s in _clients(offsets, scalings, ranks):
        h[rows, :R] = linear(x[rows], lora_A[c, :R])
        y[rows].addmm_(h[rows, :R], lora_B[c, :, :R].t(), alpha=s)
        if own_bias:
            y[rows] += bias[c]
    return y, h


def clients_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    scalings: Tensor,
    ranks: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """As `backward`, each client's rows with its own factors; components beyond a client's rank get zero."""
    need_x, need_weight, need_A, need_B, need_bias = needs
    own_bias = bias is not None and bias.dim() == 2
    dx = dy @ weight if need_x else None
    dA = dy.new_zeros(lora_A.shape) if need_A else None
    dB = dy.new_zeros(lora_B.shape) if need_B else None
    db = dy.new_zeros(bias.shape) if need_bias else None
    for c, rows, R, s in _clients(offsets, scalings, ranks):
        dh = (dy[rows] @ lora_B[c, :, :R]).mul_(s) if need_x or need_A else None
        if need_x:
            dx[rows].addmm_(dh, lora_A[c, :R])
        if need_A:
            dA[c, :R] = dh.t() @ x[rows]
        if need_B:
            dB[c, :, :R] = (dy[rows].t() @ h[rows, :R]).mul_(s)
        if need_bias and own_bias:
            db[c] = dy[rows].sum(0)
    if need_bias and not own_bias:
        db = dy.sum(0)
    return [dx, dy.t() @ x if need_weight else None, dA, dB, db]


def _clients(offsets: Tensor, scalings: Tensor, ranks: Tensor) -> Iterator[tuple[int, slice, int, float]]:
    spans = pairwise(offsets.tolist())
    for c, ((start, stop), s, R) in enumerate(zip(spans, scalings.tolist(), ranks.tolist(), strict=True)):
        yield c, slice(start, stop), R, s


def shared_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """y (M,N_p) of every projection p, and the h of all side by side (M, sum of R_p)."""
    both = [forward(x, *each) for each in zip(weights, lora_As, lora_Bs, biases, scalings, strict=True)]
    h = x.new_empty(x.shape[0], sum(h.shape[1] for _, h in both))
    for (_, h_p), columns in zip(both, rank_columns(lora_As), strict=True):
        h[:, columns] = h_p
    return [y for y, _ in both], h


def shared_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weights: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, which is the sum over projections, then of (weight, lora_A, lora_B, bias) of each in turn."""
    grads: list[Tensor | None] = [None]
    every = zip(dys, weights, lora_As, lora_Bs, scalings, rank_columns(lora_As), strict=True)
    for p, (dy, weight, lora_A, lora_B, scaling, columns) in enumerate(every):
        own = [needs[0], *needs[1 + 4 * p : 5 + 4 * p]]
        h_p = None if h is None else h[:, columns]
        dx, *others = backward(dy, x, h_p, weight, lora_A, lora_B, scaling, own)
        grads[0] = dx if grads[0] is None else grads[0].add_(dx)
        grads += others
    return grads


def rank_columns(lora_As: Sequence[Tensor]) -> list[slice]:
    """Where each projection's h lies among the columns of all."""
    edges = accumulate((lora_A.shape[0] for lora_A in lora_As), initial=0)
    return [slice(start, stop) for start, stop in pairwise(edges)]
