"""The rule every result is held to, y and each gradient alone, in Frobenius norms; NaN fails:

    |ours - exact| <= 2 |plain torch in the same dtype - exact| + 4 eps max(|size|, |exact|)

`exact` is the definition in float64 on the upcast inputs. `size`, entry by entry, is the root of the definition on
squared inputs: what the sum would be if its terms had random signs, which cancellation in a tiny sum leaves standing.
In float64, where torch's own error is not known, 64 eps in place of 4.
"""

import math

import torch
from hypothesis import strategies as st

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")

# On and beside the multiples of 16 and 32 that kernels tile by, with a few long ones.
EDGES = [15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 191, 193]
rows = st.one_of(st.integers(0, 9), st.sampled_from([*EDGES[:16], 257]))
widths = st.one_of(st.integers(1, 9), st.integers(1, 40), st.sampled_from([*EDGES, 200, 1025]))
ranks = st.one_of(st.integers(0, 5), st.sampled_from([8, 12, 15, 16, 17, 20, 24, 31, 32, 33, 48, 64, 127, 128]))
scalings = st.sampled_from([1.0, 0.75, -0.5, 2.0, 0.0, -1 / 3])
dtypes = st.sampled_from(["fp32", "fp32", "fp32", "bf16", "fp16", "fp64"]).map(DTYPES.get)
weights = st.sampled_from(["tensor", "frozen", "frozen bf16"])
EXPANDED = ("one row", "one number")
LAYOUTS = ["contiguous", "contiguous", "transposed", "swapped", "every other", "columns", "offset", *EXPANDED]
layouts = st.sampled_from(LAYOUTS)
# Of x and dy, not both expanded: a sum of equal products has an error that grows with its length, not its root.
x_and_dy = st.tuples(layouts, layouts).filter(lambda both: not set(both) <= set(EXPANDED))
# Of weight, lora_A, lora_B and bias; A and B not both expanded: h B^T would be such a sum.
of_layer = st.tuples(*[layouts] * 4).filter(lambda each: not set(each[1:3]) <= set(EXPANDED))


def laid(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in other strides; the memory between them is NaN, or large where torch's own half products read
    and cancel it (oneDNN issue 5717). The expanded layouts repeat eighths, whose sums are exact."""
    shape, n = tensor.shape, tensor.shape[-1]
    between = torch.nan if tensor.dtype in (torch.float32, torch.float64) else 1e4
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "swapped" and tensor.dim() > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "one row" and tensor.dim() > 1 and tensor.shape[-2] > 0:
        return tensor[..., :1, :].mul(8).round().div(8).expand(shape)
    if layout == "one number" and tensor.numel() > 0:
        return tensor.flatten()[0].mul(8).round().div(8).expand(shape)
    if layout == "offset":
        room = tensor.new_full((tensor.numel() + 1,), between)[1:].view(shape)
    elif layout == "every other":
        room = tensor.new_full((*shape[:-1], 2 * n + 1), between)[..., 1::2]
    elif layout == "columns":
        room = tensor.new_full((*shape[:-1], n + 8), between)[..., 3 : n + 3]
    else:
        return tensor.contiguous()
    return room.copy_(tensor)


class Draw:
    """Normal random numbers from one seed, in float64 and then rounded."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> torch.Tensor:
        return laid(torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype), layout)

    def of_width(self, *shape: int, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> torch.Tensor:
        """Of length about one along the last dimension."""
        return laid(self(*shape).div_(math.sqrt(max(shape[-1], 1))).to(dtype), layout)


def plain(scaling, x, weight, lora_A, lora_B, bias):
    """The definition, for autograd to differentiate."""
    weight, lora_A, lora_B = (t.to(x.dtype) for t in (weight, lora_A, lora_B))
    y = x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias.to(x.dtype)


def run(function, scaling, tensors, dys, mask=None):
    """[y, ...] and the gradient of each tensor, None where `mask` (default: all but None) asks for none."""
    mask = [t is not None for t in tensors] if mask is None else mask
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]
    ys = function(scaling, *leaves)
    ys = [ys] if isinstance(ys, torch.Tensor) else list(ys)
    pairs = zip(ys, [dys] if isinstance(dys, torch.Tensor) else dys, strict=True)
    trained = [(y, dy) for y, dy in pairs if y.requires_grad]
    if trained:
        torch.autograd.backward(*zip(*trained, strict=True))
    return [*(y.detach() for y in ys), *(leaf if leaf is None else leaf.grad for leaf in leaves)]


def assert_as_good_as_torch(ours, definition, scaling, tensors, dys, mask=None):
    """Both called with (scaling, *tensors); scaling is a number or a list of them."""

    def each(change, tensors):
        return [t if t is None else change(t) for t in tensors]

    dys = [dys] if isinstance(dys, torch.Tensor) else dys
    doubles, double_dys = each(torch.Tensor.double, tensors), each(torch.Tensor.double, dys)
    got, theirs = run(ours, scaling, tensors, dys, mask), run(definition, scaling, tensors, dys, mask)
    exact = run(definition, scaling, doubles, double_dys, mask)
    square = [s * s for s in scaling] if isinstance(scaling, list) else scaling * scaling
    sizes = run(definition, square, each(torch.square, doubles), each(torch.square, double_dys), mask)
    for place, (a, b, true, size) in enumerate(zip(got, theirs, exact, sizes, strict=True)):
        name = f"y[{place}]" if place < len(dys) else f"gradient {place - len(dys)}"
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        eps = max(torch.finfo(got[0].dtype).eps, torch.finfo(a.dtype).eps)
        floor = (64 if got[0].dtype == torch.float64 else 4) * eps * max(size.sqrt().norm(), true.norm())
        error, theirs = (a.double() - true).norm(), (b.double() - true).norm()
        assert error <= 2 * theirs + floor, f"{name}: {error:.3g}, torch {theirs:.3g}, floor {floor:.3g}"
