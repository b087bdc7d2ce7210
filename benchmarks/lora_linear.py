"""A frozen linear with a low-rank adapter against the frozen linear alone, and against others who do the same.

fwd is the layer, bwd the gradient of x and, where there is an adapter, of A and B; ratios are to `frozen`. The second
`frozen` is the noise. Weights and adapters are drawn on bfloat16's grid, so that all providers compute the same.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.clock import slots_past_cache
from benchmarks.harness import (
    DTYPES,
    Case,
    Ceilings,
    Contender,
    Judgement,
    Record,
    arguments,
    compare,
    measure,
    prepare,
    run,
)
from federa_kernels import FrozenWeight, lora_linear
from federa_kernels.lora_linear import mma, path_for, reference, sm90
from federa_kernels.lora_linear.op import launchers

SUBJECT = "lora_linear"
SCALING = 0.5
SHAPES = {  # (K, N) of the linear layers; DeBERTa-v3-base has RoBERTa-base's
    "RoBERTa": ((768, 768), (768, 3072), (3072, 768)),
    "MiniLM": ((384, 384), (384, 1536), (1536, 384)),
    "Llama-3-8B": ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)),
}
MOST_LAYERS = 16  # copies on a GPU: with their rows more than its L2 for every shape here
RANKS = (8, 16, 32, 64)


def _case(group: str, M: int, shape: tuple[int, int], R: int = 16, dtype: str = "fp32") -> Case:
    return Case(group, {"M": M, "N": shape[1], "K": shape[0], "R": R}, dtype)


def _cases() -> Iterator[tuple[str, Case]]:
    """(kind, case): what decides most first, so that a run cut short has it."""
    small = [(group, shape) for group in ("RoBERTa", "MiniLM") for shape in SHAPES[group]]
    every = [(group, shape) for group, shapes in SHAPES.items() for shape in shapes]
    for M in (512, 2048, 256, 64):
        yield from (("cpu", _case(group, M, shape)) for group, shape in small)
    yield from (("cpu", _case("RoBERTa", M, (768, 768), R)) for M in (512, 2048) for R in RANKS if R != 16)
    yield from (("cpu-large", _case(group, 8192, shape)) for group, shape in small)
    yield from (("cpu-large", _case("Llama-3-8B", 256, shape)) for shape in SHAPES["Llama-3-8B"])
    yield from (("cpu-bf16", _case(group, M, shape, dtype="bf16")) for M in (512, 2048, 64) for group, shape in small)
    for M in (8192, 2048, 512, 32768, 256):
        yield from (("cuda", _case(group, M, shape, dtype="bf16")) for group, shape in every)
    for group, shape in (("RoBERTa", (768, 768)), ("Llama-3-8B", (4096, 4096))):
        ranks = [(M, R) for M in (8192, 2048) for R in RANKS if R != 16]
        yield from (("cuda", _case(group, M, shape, R, "bf16")) for M, R in ranks)
    yield from (("cuda", _case("RoBERTa", M, shape)) for M in (8192, 2048) for shape in SHAPES["RoBERTa"])


CASES: dict[str, list[Case]] = {}
for kind, case in _cases():
    CASES.setdefault(kind, []).append(case)


class Problem:
    """The tensors of one case, and what must come out of them."""

    def __init__(self, case: Case, device: str):
        M, N, K, R = (case.sizes[name] for name in "MNKR")
        self.dtype, self.device = DTYPES[case.dtype], device
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def on_grid(tensor: Tensor) -> Tensor:
            return tensor.bfloat16().float()

        self.x, self.dy = drawn(M, K).to(self.dtype), drawn(M, N).to(self.dtype)
        self.weight, self.bias = on_grid(drawn(N, K) / K**0.5), on_grid(drawn(N))
        self.lora_A, self.lora_B = on_grid(drawn(R, K) / K**0.5), on_grid(drawn(N, R) / R**0.5)
        self.known: dict[tuple, dict[str, Tensor]] = {}  # results that several providers are held against

    def once(self, key: tuple, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def exact(self, adapter: bool) -> dict[str, Tensor]:
        """By the definition, in float64."""
        x, dy, W, A, B, b = (t.double() for t in (self.x, self.dy, self.weight, self.lora_A, self.lora_B, self.bias))
        A, B = (A, B) if adapter else (A[:0], B[:, :0])
        y, h = reference.forward(x, W, A, B, b, SCALING)
        dx, _, dA, dB, _ = reference.backward(dy, x, h, W, A, B, SCALING, (True, False, True, True, False))
        return _named(y, dx, dA, dB) if adapter else _named(y, dx)

    def plain(self, adapter: bool) -> dict[str, Tensor]:
        """By plain torch in the rows' dtype."""
        layer = reference_eager(self) if adapter else frozen(self)
        x = self.x.detach().requires_grad_()
        y = layer.call(x)
        return _named(y, *torch.autograd.grad(y, [x, *layer.parameters], self.dy))

    def judge(self, got: dict[str, Tensor], adapter: bool = True) -> Judgement:
        exact = self.once(("exact", adapter), lambda: self.exact(adapter))
        plain = self.once(("plain", adapter), lambda: self.plain(adapter))
        return compare(got, exact, plain, self.dtype)


class Several(Problem):
    """A problem with more than one adapter, held against its by_definition(dtype) in float64 and in the rows' dtype."""

    def judge_all(self, got: dict[str, Tensor]) -> Judgement:
        exact, plain = (self.once((t,), lambda t=t: self.by_definition(t)) for t in (torch.float64, self.dtype))
        return compare(got, exact, plain, self.dtype)


def _named(*tensors: Tensor) -> dict[str, Tensor]:
    return dict(zip(("y", "dx", "dA", "dB"), (t.detach() for t in tensors), strict=False))


class Layer(NamedTuple):
    """A provider's y = f(x), or several, and what it trains: A and B, or nothing; `named` its results by name."""

    call: Callable[[Tensor], Tensor | list[Tensor]]
    parameters: Sequence[Tensor] = ()
    note: str = ""
    named: Callable[..., dict[str, Tensor]] = _named


class Provider(NamedTuple):
    """`weight` is the frozen weight's dtype where that is not the rows' own; `on` the kinds of case it is for;
    `kernels` what `lora_linear` runs on a GPU."""

    build: Callable[[Problem], Layer]
    adapter: bool = True
    weight: str | None = None
    on: Sequence[str] = ("fp32-cpu", "bf16-cpu", "fp32-cuda", "bf16-cuda")
    kernels: str = "auto"


def _adapter(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype, copy=True).requires_grad_() for t in (problem.lora_A, problem.lora_B)]


def _linear(problem: Problem) -> nn.Linear:
    N, K = problem.weight.shape
    layer = nn.Linear(K, N, device="meta").to_empty(device=problem.device).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
        layer.bias.copy_(problem.bias)
    return layer.to(problem.dtype)


def frozen(problem: Problem) -> Layer:
    return Layer(_linear(problem))


def reference_eager(problem: Problem) -> Layer:
    """What one writes in PyTorch without further thought."""
    base, (A, B) = _linear(problem), _adapter(problem, problem.dtype)
    return Layer(lambda x: linear(x, base.weight, base.bias) + SCALING * (x @ A.T) @ B.T, (A, B))


def reference_compiled(problem: Problem) -> Layer:
    layer = reference_eager(problem)
    return Layer(torch.compile(layer.call, dynamic=False), layer.parameters)


def peft(problem: Problem, adapter_dtype: torch.dtype | None = None, autocast: bool = False) -> Layer:
    """peft's layer alone, without the model around it."""
    from peft import LoraConfig, get_peft_model

    R = problem.lora_A.shape[0]
    settings = LoraConfig(r=R, lora_alpha=SCALING * R, lora_dropout=0.0, target_modules=["0"])
    keep = adapter_dtype is None  # adapters in the base's dtype, not raised to float32
    model = get_peft_model(nn.Sequential(_linear(problem)), settings, autocast_adapter_dtype=not keep)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(problem.lora_A)
        B.copy_(problem.lora_B)
    if A.dtype != (adapter_dtype or problem.dtype):
        raise RuntimeError(f"peft holds its adapter in {A.dtype}, not in {adapter_dtype or problem.dtype}")
    if not autocast:
        return Layer(layer, (A, B))

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, problem.dtype):
            return layer(x)

    return Layer(under_autocast, (A, B))


class _Addmm(torch.autograd.Function):
    """The adapter added to the output in place, x and the factors saved, h and dy B computed twice."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B):
        ctx.save_for_backward(x, weight, A, B)
        return linear(x, weight, bias).addmm_(x @ A.T, B.T, alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        dA = (dy @ B).T.mul_(SCALING) @ x
        dB = (dy.T @ (x @ A.T)).mul_(SCALING)
        dx = (dy @ weight).addmm_(dy @ B, A, alpha=SCALING)
        return dx, None, None, dA, dB


def addmm(problem: Problem) -> Layer:
    """By hand on BLAS, as trainers do who have no fused kernel."""
    base, (A, B) = _linear(problem), _adapter(problem, problem.dtype)
    return Layer(lambda x: _Addmm.apply(x, base.weight, base.bias, A, B), (A, B))


def ours(problem: Problem, residual: torch.dtype | None = None, adapter: bool = True) -> Layer:
    """`lora_linear` with float32 factors; without an adapter it is the packed frozen layer."""
    weight = FrozenWeight(problem.weight.clone(), dtype=residual or problem.dtype)
    bias = problem.bias.to(problem.dtype)
    A, B = _adapter(problem, torch.float32)
    if not adapter:
        A, B = A.detach()[:0], B.detach()[:, :0]
    path = path_for(weight.weight, len(A), problem.dtype)
    parameters = (A, B) if adapter else ()
    return Layer(lambda x: lora_linear(x, weight, A, B, SCALING, bias), parameters, path)


fp32_adapter = {"adapter_dtype": torch.float32}
bf16_residual = functools.partial(ours, residual=torch.bfloat16)
PROVIDERS = {
    "frozen": Provider(frozen, adapter=False),
    "frozen again": Provider(frozen, adapter=False),
    "reference": Provider(reference_eager),
    "reference compiled": Provider(reference_compiled),
    "peft": Provider(peft),
    "peft autocast": Provider(functools.partial(peft, autocast=True, **fp32_adapter), on=["bf16-cuda"]),
    "peft fp32 adapter": Provider(functools.partial(peft, **fp32_adapter), on=["bf16-cuda"]),
    "addmm": Provider(addmm),
    "ours": Provider(ours),
    "ours Triton": Provider(ours, on=["fp32-cuda", "bf16-cuda"], kernels="triton"),
    "ours CUDA C++": Provider(ours, on=["bf16-cuda"], kernels="mma"),
    "ours CUDA C++ for Hopper": Provider(ours, on=["bf16-cuda"], kernels="sm90"),
    "ours bf16 residual": Provider(bf16_residual, True, "bf16", ["fp32-cpu"]),
    "packed frozen": Provider(functools.partial(ours, adapter=False), False, None, ["fp32-cpu", "bf16-cpu"]),
    "packed frozen bf16": Provider(functools.partial(bf16_residual, adapter=False), False, "bf16", ["fp32-cpu"]),
}


def floor(case: Case, ceiling: Ceilings, adapter: bool = True, weight: str | None = None) -> dict[str, float]:
    """ms that no exact method can go below: its arithmetic, or every tensor read or written once (x twice, for dA)."""
    M, N, K, R = (case.sizes[name] for name in "MNKR")
    R, entry, dtypes = R if adapter else 0, DTYPES[case.dtype].itemsize, (case.dtype, weight or case.dtype)
    read = N * K * DTYPES[dtypes[1]].itemsize
    fwd = ceiling.ms(2 * M * N * K + 2 * M * R * (K + N), read + entry * M * (K + N), *dtypes)
    bwd = ceiling.ms(2 * M * N * K + 4 * M * R * (K + N), read + entry * M * (N + K + K * adapter), *dtypes)
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}


class Slot(NamedTuple):
    """Inputs of one step, dy (P,M,N) where there are several y; `number` chooses among copies of the layer."""

    x: Tensor
    dy: Tensor
    number: int


def slots(x: Tensor, dy: Tensor, weight_bytes: int = 0) -> list[Slot]:
    """Copies of the inputs that together do not fit into the last cache."""
    count = slots_past_cache(x.nbytes + dy.nbytes + weight_bytes, x.device.type)
    xs, dys = (t.expand(count, *t.shape).clone().unbind() for t in (x, dy))
    return [Slot(x.requires_grad_(), dy, number) for number, (x, dy) in enumerate(zip(xs, dys, strict=True))]


def contender(
    layers: Sequence[Layer],
    judge: Callable[[dict[str, Tensor]], Judgement],
    first: Slot,
    floor: Mapping[str, float],
    kernels: str = "auto",
) -> Contender:
    """fwd and bwd of a layer, or of copies of it in turn."""

    def chosen(phase: Callable) -> Callable:
        def call(argument: Any) -> Any:
            launchers().use_kernels(kernels)
            try:
                return phase(argument)
            finally:
                launchers().use_kernels("auto")

        return phase if kernels == "auto" else call

    @chosen
    def fwd(slot: Slot) -> tuple[Tensor | list[Tensor], Slot]:
        return layers[slot.number % len(layers)].call(slot.x), slot

    @chosen
    def bwd(state: tuple[Tensor | list[Tensor], Slot]) -> tuple[Tensor, ...]:
        y, slot = state
        dy = slot.dy if isinstance(y, Tensor) else slot.dy.unbind()
        return torch.autograd.grad(y, [slot.x, *layers[slot.number % len(layers)].parameters], dy)

    def judged() -> Judgement:
        state = fwd(first)
        return judge(layers[0].named(state[0], *bwd(state)))

    return Contender({"fwd": fwd, "bwd": bwd}, judged, floor, layers[0].note)


def run_case(case: Case, ceiling: Ceilings, environment: dict, options: argparse.Namespace) -> list[Record]:
    """On a CPU the other providers' weights push a provider's own out of the cache; on a GPU the weights rotate too."""
    cuda = options.device == "cuda"
    problem = Problem(case, options.device)
    sets = slots(problem.x, problem.dy, problem.weight.numel() * problem.dtype.itemsize if cuda else 0)

    def build(provider: Provider) -> Contender:
        layers = [provider.build(problem) for _ in sets[: MOST_LAYERS if cuda else 1]]
        judge = functools.partial(problem.judge, adapter=provider.adapter)
        bound = floor(case, ceiling, provider.adapter, provider.weight)
        return contender(layers, judge, sets[0], bound, provider.kernels)

    kind = f"{case.dtype}-{options.device}"
    chosen = {name: functools.partial(build, provider) for name, provider in PROVIDERS.items() if kind in provider.on}
    if not options.compile:
        chosen.pop("reference compiled")
    if mma.why_not():
        chosen.pop("ours CUDA C++", None)
    if sm90.why_not() or (options.device == "cuda" and torch.cuda.get_device_capability() != (9, 0)):
        chosen.pop("ours CUDA C++ for Hopper", None)
    return measure(SUBJECT, case, chosen, sets, environment, options)


def select(options: argparse.Namespace) -> list[Case]:
    kinds = [options.device]
    if options.device == "cpu":
        kinds += [f"cpu-{extra}" for extra in ("large", "bf16") if getattr(options, extra)]
    cases = [case for kind in kinds for case in CASES[kind] if (options.only or "") in str(case)]
    if options.quick:
        cases = [case for case in cases if case.sizes["R"] == 16 and (case.sizes["K"], case.sizes["N"]) == (768, 768)]
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, SUBJECT)
    parser.add_argument("--compile", action="store_true", help="the reference under torch.compile too: minutes")
    parser.add_argument("--large", action="store_true", help="on a CPU: M = 8192 and Llama's shapes too")
    parser.add_argument("--bf16", action="store_true", help="on a CPU: bfloat16 rows too")
    options = prepare(parser, argv, seconds=0.6 if "cuda" in (argv or []) else 4.0)
    records = run(select(options), run_case, options)
    return 1 if any(record.refused and record.provider.startswith("ours") for record in records) else 0
