"""`lora_linear` and its forms for many clients and for shared inputs: schemas, implementations, fakes, the autograd
Functions and the public functions, in this order.

The ops work on rows and take x (or dy) in the dtype to compute in; the other tensors may be of any float dtype, and
gradients come back in the dtype of what they belong to. `packed` is a form of the weight that FrozenWeight made.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._checks import failure
from . import cpu, reference
from .checks import check, check_clients
from .segments import Segments

if TYPE_CHECKING:
    from ..frozen import FrozenWeight

for name, schema in {
    "lora_linear_fwd": "(Tensor x, Tensor weight, Tensor? packed, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "float scaling) -> (Tensor y, Tensor h)",
    "lora_linear_bwd": "(Tensor dy, Tensor? x, Tensor? h, Tensor weight, Tensor? packed, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, float scaling, bool[] needs) -> Tensor[]",
    "lora_linear_clients_fwd": "(Tensor x, Tensor weight, Tensor? packed, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Tensor offsets, Tensor scalings, Tensor ranks) -> (Tensor y, Tensor h)",
    "lora_linear_clients_bwd": "(Tensor dy, Tensor? x, Tensor? h, Tensor weight, Tensor? packed, Tensor lora_A, "
    "Tensor lora_B, Tensor? bias, Tensor offsets, Tensor scalings, Tensor ranks, bool[] needs) -> Tensor[]",
    "lora_linear_shared_fwd": "(Tensor x, Tensor[] weights, Tensor?[] packed, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] biases, float[] scalings) -> Tensor[]",
    "lora_linear_shared_bwd": "(Tensor[] dys, Tensor? x, Tensor? h, Tensor[] weights, Tensor?[] packed, "
    "Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] biases, float[] scalings, bool[] needs) -> Tensor[]",
}.items():
    torch.library.define(f"federa::{name}", schema)


@functools.cache
def launchers() -> ModuleType | None:
    """Of the Triton kernels, or None where triton is not installed."""
    try:
        from . import launch
    except ImportError:
        return None
    return launch


def path_of(
    rows: Tensor,
    packed: Sequence[Tensor | None],
    ranks: Sequence[int],
    kind: str,
    weights: Sequence[Tensor],
    needs_weight: bool = False,
) -> str:
    """Which implementation takes these rows (x or dy): "triton" (the launchers of launch.py), "cpu" or "reference".
    kind: one of dispatch.KINDS."""
    if needs_weight:
        return "reference"
    if rows.is_cuda:
        kernels = launchers()
        if kernels is None or not all(kernels.takes(rows, rank) for rank in ranks):
            return "reference"
        return "reference" if kernels.choose(kind, rows, weights, ranks) == "torch" else "triton"
    for form in packed:
        if form is None:
            return "reference"
    return "cpu" if rows.is_cpu and cpu.takes(rows, ranks) else "reference"


def path_for(weight: Tensor, rank: int, rows: torch.dtype) -> str:
    """In words, which implementation takes rows of this dtype and a frozen weight where it is, and why."""
    if weight.device.type == "cuda":
        kernels = launchers()
        if kernels is None:
            return "PyTorch: triton is not installed"
        if not kernels.takes(weight.new_empty(0, dtype=rows), rank):
            return f"PyTorch: Triton's kernels do not take {rows} of rank {rank} here"
        return kernels.describe(rows, weight)
    if rank > cpu.MAX_RANK:
        return f"PyTorch: the kernels take ranks up to {cpu.MAX_RANK}, this is {rank}"
    why = cpu.why_not(rows, weight)
    return f"PyTorch: {why}" if why else cpu.describe(rows, weight)


def _cast(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.to(dtype) for t in tensors]


def _grads(needed: Sequence[Tensor | None], owners: Sequence[Tensor | None]) -> list[Tensor]:
    return [d if d.dtype == t.dtype else d.to(t.dtype) for d, t in zip(needed, owners, strict=True) if d is not None]


def _fwd(x, weight, packed, lora_A, lora_B, bias, scaling):
    path = path_of(x, [packed], lora_A.shape[:1], "one forward", [weight])
    if path == "cpu":
        return cpu.forward(x, weight, packed, lora_A, lora_B, bias, scaling)
    if path == "triton":
        return launchers().launch_lora_linear_fwd(x, weight, lora_A, lora_B, bias, scaling)
    with torch.autocast(x.device.type, enabled=False):
        return reference.forward(x, *_cast(x.dtype, (weight, lora_A, lora_B, bias)), scaling)


def _bwd(dy, x, h, weight, packed, lora_A, lora_B, bias, scaling, needs):
    path = path_of(dy, [packed], lora_A.shape[:1], "one backward", [weight], needs[1])
    if path == "cpu":
        grads = cpu.backward(dy, x, h, weight, packed, lora_A, lora_B, bias, scaling, needs)
    elif path == "triton":
        grads = launchers().launch_lora_linear_bwd(dy, x, h, weight, lora_A, lora_B, scaling, needs)
    else:
        with torch.autocast(dy.device.type, enabled=False):
            tensors = _cast(dy.dtype, (weight if needs[0] else None, lora_A, lora_B))
            grads = reference.backward(dy, x, h, *tensors, scaling, needs)
    return _grads(grads, (dy, weight, lora_A, lora_B, bias))


torch.library.impl("federa::lora_linear_fwd", "default", _fwd)
torch.library.impl("federa::lora_linear_bwd", "default", _bwd)


@torch.library.impl("federa::lora_linear_clients_fwd", "default")
def _clients_fwd(x, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks):
    path = path_of(x, [packed], lora_A.shape[1:2], "clients forward", [weight])
    segments = (offsets, scalings, ranks)
    if path == "cpu":
        return cpu.clients_forward(x, weight, packed, lora_A, lora_B, bias, *segments)
    if path == "triton":
        return launchers().launch_lora_linear_clients_fwd(x, weight, lora_A, lora_B, bias, *segments)
    with torch.autocast(x.device.type, enabled=False):
        return reference.clients_forward(x, *_cast(x.dtype, (weight, lora_A, lora_B, bias)), *_ranked(segments, lora_A))


@torch.library.impl("federa::lora_linear_clients_bwd", "default")
def _clients_bwd(dy, x, h, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks, needs):
    path = path_of(dy, [packed], lora_A.shape[1:2], "clients backward", [weight], needs[1])
    segments = (offsets, scalings, ranks)
    if path == "cpu":
        grads = cpu.clients_backward(dy, x, h, weight, packed, lora_A, lora_B, bias, *segments, needs)
    elif path == "triton":
        launch = launchers().launch_lora_linear_clients_bwd
        grads = launch(dy, x, h, weight, lora_A, lora_B, bias, *segments, needs)
    else:
        with torch.autocast(dy.device.type, enabled=False):
            tensors = _cast(dy.dtype, (weight if needs[0] else None, lora_A, lora_B, bias))
            grads = reference.clients_backward(dy, x, h, *tensors, *_ranked(segments, lora_A), needs)
    return _grads(grads, (dy, weight, lora_A, lora_B, bias))


def _ranked(segments: tuple[Tensor, Tensor, Tensor], lora_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *segments[:2], segments[2].clamp(max=lora_A.shape[1])


@torch.library.impl("federa::lora_linear_shared_fwd", "default")
def _shared_fwd(x, weights, packed, lora_As, lora_Bs, biases, scalings):
    path = path_of(x, packed, [A.shape[0] for A in lora_As], "shared forward", weights)
    if path == "cpu":
        ys, h = cpu.shared_forward(x, weights, packed, lora_As, lora_Bs, biases, scalings)
    elif path == "triton":
        ys, h = launchers().launch_lora_linear_shared_fwd(x, weights, lora_As, lora_Bs, biases, scalings)
    else:
        with torch.autocast(x.device.type, enabled=False):
            lists = [_cast(x.dtype, tensors) for tensors in (weights, lora_As, lora_Bs, biases)]
            ys, h = reference.shared_forward(x, *lists, scalings)
    return [*ys, h]


@torch.library.impl("federa::lora_linear_shared_bwd", "default")
def _shared_bwd(dys, x, h, weights, packed, lora_As, lora_Bs, biases, scalings, needs):
    need_weight = any(needs[1::4])
    path = path_of(dys[0], packed, [A.shape[0] for A in lora_As], "shared backward", weights, need_weight)
    if path == "cpu":
        grads = cpu.shared_backward(dys, x, h, weights, packed, lora_As, lora_Bs, scalings, needs)
    elif path == "triton":
        launch = launchers().launch_lora_linear_shared_bwd
        grads = launch(dys, x, h, weights, lora_As, lora_Bs, scalings, needs)
    else:
        with torch.autocast(dys[0].device.type, enabled=False):
            read = weights if needs[0] else [None] * len(weights)
            lists = [_cast(dys[0].dtype, tensors) for tensors in (read, lora_As, lora_Bs)]
            grads = reference.shared_backward(dys, x, h, *lists, scalings, needs)
    return _grads(grads, _shared_owners(dys[0], weights, lora_As, lora_Bs, biases))


def _shared_owners(first: Tensor, *lists: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What each gradient belongs to, in the order of `needs`: x, then (weight, lora_A, lora_B, bias) in turn."""
    return [first, *(tensor for each in zip(*lists, strict=True) for tensor in each)]


# A layer's call costs as much as small products do: the operators are looked up once, and where nothing watches the
# dispatcher their implementation is called itself (15 of 150 us a step).
_fwd_op, _bwd_op = torch.ops.federa.lora_linear_fwd.default, torch.ops.federa.lora_linear_bwd.default


def _watched(tensor: Tensor) -> bool:
    """Whether a tracer, a mode, a tensor subclass or the meta device wants to see operators."""
    plain = type(tensor) in (Tensor, Parameter) and not tensor.is_meta
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not plain


@torch.library.register_fake("federa::lora_linear_fwd")
def _fwd_fake(x, weight, packed, lora_A, lora_B, bias, scaling):
    M = x.shape[0]
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, lora_A.shape[0]))


@torch.library.register_fake("federa::lora_linear_clients_fwd")
def _clients_fwd_fake(x, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks):
    M = x.shape[0]
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, lora_A.shape[1]))


@torch.library.register_fake("federa::lora_linear_shared_fwd")
def _shared_fwd_fake(x, weights, packed, lora_As, lora_Bs, biases, scalings):
    M = x.shape[0]
    return [*(x.new_empty((M, W.shape[0])) for W in weights), x.new_empty((M, sum(A.shape[0] for A in lora_As)))]


def _fake_grads(dy: Tensor, K: int, owners: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    shapes = [(dy.shape[0], K) if t is dy else t if t is None else t.shape for t in owners]
    return [t.new_empty(s) for t, s, need in zip(owners, shapes, needs, strict=True) if need]


@torch.library.register_fake("federa::lora_linear_bwd")
def _bwd_fake(dy, x, h, weight, packed, lora_A, lora_B, bias, scaling, needs):
    return _fake_grads(dy, weight.shape[1], (dy, weight, lora_A, lora_B, bias), needs)


@torch.library.register_fake("federa::lora_linear_clients_bwd")
def _clients_bwd_fake(dy, x, h, weight, packed, lora_A, lora_B, bias, offsets, scalings, ranks, needs):
    return _fake_grads(dy, weight.shape[1], (dy, weight, lora_A, lora_B, bias), needs)


@torch.library.register_fake("federa::lora_linear_shared_bwd")
def _shared_bwd_fake(dys, x, h, weights, packed, lora_As, lora_Bs, biases, scalings, needs):
    owners = _shared_owners(dys[0], weights, lora_As, lora_Bs, biases)
    return _fake_grads(dys[0], weights[0].shape[1], owners, needs)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Rows y in the leading dimensions of x; no view to autograd, so that the caller may write into it."""
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, forward_form, backward_form, lora_A, lora_B, bias, scaling):
        rows = _rows(x)
        y, h = (_fwd_op if _watched(rows) else _fwd)(rows, weight, forward_form, lora_A, lora_B, bias, scaling)
        _, need_weight, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        saved_x, saved_h = rows if need_weight or need_A else None, h if need_B else None
        ctx.save_for_backward(saved_x, saved_h, weight, backward_form, lora_A, lora_B, bias)
        ctx.scaling = scaling
        return y if rows is x else _shaped(y, x)

    @staticmethod
    def backward(ctx, dy):
        # Unless gradients are to be differentiated again, none are recorded here: once_differentiable costs 3 us more.
        return (_once if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx, dy):
    need_x, need_weight, _, _, need_A, need_B, need_bias, _ = ctx.needs_input_grad
    needs = [need_x, need_weight, need_A, need_B, need_bias]
    rows = _rows(dy)
    found = iter((_bwd_op if _watched(rows) else _bwd)(rows, *ctx.saved_tensors, ctx.scaling, needs))
    dx, dW, dA, dB, db = [next(found) if need else None for need in needs]
    dx = dx if dx is None or rows is dy else dx.view(*dy.shape[:-1], dx.shape[-1])
    return dx, dW, None, None, dA, dB, db, None


_once = once_differentiable(_backward)


class _LoraLinearClients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, forward_form, backward_form, lora_A, lora_B, bias, offsets, scalings, ranks):
        segments = (offsets, scalings, ranks)
        y, h = torch.ops.federa.lora_linear_clients_fwd(x, weight, forward_form, lora_A, lora_B, bias, *segments)
        _, need_weight, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        saved_x, saved_h = x if need_weight or need_A else None, h if need_B else None
        ctx.save_for_backward(saved_x, saved_h, weight, backward_form, lora_A, lora_B, bias, *segments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        asked = ctx.needs_input_grad
        needs = [asked[i] for i in (0, 1, 4, 5, 6)]
        found = iter(torch.ops.federa.lora_linear_clients_bwd(dy, *ctx.saved_tensors, needs))
        dx, dW, dA, dB, db = (next(found) if need else None for need in needs)
        return dx, dW, None, None, dA, dB, db, None, None, None


class _LoraLinearShared(torch.autograd.Function):
    """x and flat lists of P each: weights, forward forms, backward forms, A's, B's and biases; then the scalings."""

    @staticmethod
    def forward(ctx, scalings, x, *flat):
        P, rows = len(scalings), _rows(x)
        weights, forward_forms, backward_forms, As, Bs, biases = (flat[i * P : i * P + P] for i in range(6))
        *ys, h = torch.ops.federa.lora_linear_shared_fwd(rows, weights, forward_forms, As, Bs, biases, scalings)
        needs = ctx.needs_input_grad[2:]
        keep_x, keep_h = any(needs[:P]) or any(needs[3 * P : 4 * P]), any(needs[4 * P : 5 * P])
        saved = (weights, backward_forms, As, Bs, biases)
        ctx.save_for_backward(rows if keep_x else None, h if keep_h else None, *(t for one in saved for t in one))
        ctx.scalings = scalings
        return tuple(_shaped(y, x) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        P = len(dys)
        x, h, *saved = ctx.saved_tensors
        lists = [list(saved[i * P : i * P + P]) for i in range(5)]
        own = ctx.needs_input_grad[2:]
        places = [kind * P + p for p in range(P) for kind in (0, 3, 4, 5)]  # weight, lora_A, lora_B, bias of each
        needs = [ctx.needs_input_grad[1], *(own[place] for place in places)]
        rows = [_rows(dy) for dy in dys]
        found = iter(torch.ops.federa.lora_linear_shared_bwd(rows, x, h, *lists, list(ctx.scalings), needs))
        dx, *others = (next(found) if need else None for need in needs)
        flat: list[Tensor | None] = [None] * (6 * P)
        for place, grad in zip(places, others, strict=True):
            flat[place] = grad
        return None, None if dx is None else dx.view(*dys[0].shape[:-1], dx.shape[-1]), *flat


def _compute_dtype(x: Tensor) -> torch.dtype:
    """As F.linear has it: autocast decides, except over float64, which it leaves alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _unfrozen(weight: "Tensor | FrozenWeight") -> tuple[Tensor, "FrozenWeight | None"]:
    if isinstance(weight, Tensor):
        return weight, None
    operand = weight.operand
    return operand.detach() if operand.requires_grad else operand, weight


def _packed(
    frozen: "FrozenWeight | None", weight: Tensor, x: Tensor, backward: bool, rank: int
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The weight and its packed forms; a weight that was released is unpacked for a path that reads it."""
    if frozen is None:
        return weight, (None, None)
    forms = frozen.forms(x.dtype, backward)
    if frozen.release_canonical and path_of(x, forms[:1], (rank,), "one forward", (weight,)) != "cpu":
        weight = frozen.weight.detach()
    return weight, forms


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def lora_linear(
    x: Tensor,
    weight: "Tensor | FrozenWeight",
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer and its low-rank adapter in one call.

        y = x W^T + s (x A^T) B^T + b

    Computes in the dtype of x, or of autocast where it is on; the other tensors are cast to it, products accumulate in
    float32 or better. Each gradient comes in the dtype of its tensor; differentiable once. Between forward and backward
    it keeps x and h = x A^T, each only where a gradient asks for it.

    x       (..., K)  float32, bfloat16, float16 or float64, as all others
    weight  (N, K)    a FrozenWeight brings its packed forms, which are faster on CPUs
    lora_A  (R, K)    R may be 0: the frozen linear alone
    lora_B  (N, R)
    bias    (N,) or None
    y       (..., N)  in the dtype computed in

    Raises ValueError for shapes and devices, TypeError for dtypes. LoRA: Hu et al., arXiv 2106.09685.
    """
    weight, frozen = _unfrozen(weight)
    check("lora_linear", x, weight, lora_A, lora_B, bias)
    dtype = _compute_dtype(x)
    x = x if dtype == x.dtype else x.to(dtype)
    trains = torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    weight, forms = _packed(frozen, weight, x, trains and x.requires_grad, lora_A.shape[0])
    if trains:
        return _LoraLinear.apply(x, weight, *forms, lora_A, lora_B, bias, scaling)
    y, _ = _fwd_op(_rows(x), weight, forms[0], lora_A, lora_B, bias, scaling)
    return y.view(*x.shape[:-1], y.shape[-1])


def lora_linear_clients(
    x: Tensor,
    weight: "Tensor | FrozenWeight",
    lora_A: Tensor,
    lora_B: Tensor,
    segments: Segments,
    bias: Tensor | None = None,
) -> Tensor:
    """`lora_linear` for the rows of many clients in one batch, over one frozen weight.

        y[rows of c] = x W^T + s_c (x A_c^T) B_c^T + b        b shared, or b_c

    x         (M, K)     all clients' rows, in the order of `segments`, without padding
    weight    (N, K)
    lora_A    (C, R, K)  clients of lower rank padded; what lies beyond segments.ranks[c] is never read into a result
    lora_B    (C, N, R)  and its gradient is zero there
    segments  rows, scaling and rank of each client, on the device of x
    bias      (N,), (C, N) or None

    A client without rows has zero gradients. Dtypes, accumulation and errors as in `lora_linear`; nothing synchronises
    with the device.
    """
    weight, frozen = _unfrozen(weight)
    check_clients(x, weight, lora_A, lora_B, segments, bias)
    x = x.to(_compute_dtype(x))
    trains = _trains(x, weight, lora_A, lora_B, bias)
    weight, forms = _packed(frozen, weight, x, trains and x.requires_grad, lora_A.shape[1])
    on_device = (segments.offsets, segments.scalings, segments.ranks)
    if trains:
        return _LoraLinearClients.apply(x, weight, *forms, lora_A, lora_B, bias, *on_device)
    return torch.ops.federa.lora_linear_clients_fwd(x, weight, forms[0], lora_A, lora_B, bias, *on_device)[0]


Projection = tuple["Tensor | FrozenWeight", Tensor, Tensor, float, Tensor | None]


def lora_linear_shared(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """`lora_linear` for projections that read the same x: query, key and value, or gate and up.

        y_p = x W_p^T + s_p (x A_p^T) B_p^T + b_p

    All h_p = x A_p^T come from one pass over x, and one pass gives the gradients of all A_p in the backward.

    x            (..., K)
    projections  (weight (N_p,K), lora_A (R_p,K), lora_B (N_p,R_p), scaling, bias (N_p,) or None) of each
    y_p          (..., N_p)

    Dtypes, accumulation and errors as in `lora_linear`.
    """
    if not projections:
        raise ValueError(failure("lora_linear_shared", "projections", "hold at least one", 0))
    pairs = [_unfrozen(weight) for weight, *_ in projections]
    _, As, Bs, scalings, biases = map(list, zip(*projections, strict=True))
    for (weight, _), lora_A, lora_B, bias in zip(pairs, As, Bs, biases, strict=True):
        check("lora_linear_shared", x, weight, lora_A, lora_B, bias)
    x = x.to(_compute_dtype(x))
    weights = [weight for weight, _ in pairs]
    trains = _trains(x, *weights, *As, *Bs, *biases)
    # All of them take one path.
    most = max(A.shape[0] for A in As)
    packed = [_packed(f, W, x, trains and x.requires_grad, most) for W, f in pairs]
    if any(forms[0] is None for _, forms in packed):
        packed = [(f.weight.detach() if f else W, forms) for (W, forms), (_, f) in zip(packed, pairs, strict=True)]
    weights = [weight for weight, _ in packed]
    forward_forms, backward_forms = map(list, zip(*(forms for _, forms in packed), strict=True))
    if trains:
        flat = (*weights, *forward_forms, *backward_forms, *As, *Bs, *biases)
        return list(_LoraLinearShared.apply(tuple(scalings), x, *flat))
    lists = (weights, forward_forms, As, Bs, biases, scalings)
    *ys, _ = torch.ops.federa.lora_linear_shared_fwd(_rows(x), *lists)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
