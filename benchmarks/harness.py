"""What every benchmark shares: cases, the gate that lets only right results be timed, clocks, records.

A subject is a module of this package with CASES, PROVIDERS, floor() and main(argv). It hands `measure` its providers as
functions that build a Contender; records come back and, with --record, go to results/, one JSON line each.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import records as store
from benchmarks.clock import Runner, eager, graphed, interleave, peak_bytes, percentiles
from federa_kernels import FrozenWeight, lora_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

TRIES, MOST_APART, MOST_SPREAD = 3, 0.03, 0.15


@dataclass(frozen=True)
class Case:
    """One thing to measure: `group` is the model or family its sizes come from, dtype that of the rows."""

    group: str
    sizes: Mapping[str, int | str]
    dtype: str = "fp32"

    def __str__(self) -> str:
        sizes = (f"{name}{size}" if isinstance(size, int) else size for name, size in self.sizes.items())
        return "-".join([self.group, *sizes, self.dtype])


class Judgement(NamedTuple):
    """Relative errors of a result against float64, by name, and how large each may be."""

    error: dict[str, float]
    allowed: dict[str, float]

    def complaint(self) -> str | None:
        """What is wrong, or None. NaN is wrong."""
        wrong = [f"{name} {self.error[name]:.1e} > {limit:.1e}" for name, limit in self.allowed.items()
                 if not self.error[name] <= limit]  # fmt: skip
        return f"wrong: {', '.join(wrong)}" if wrong else None


class Contender(NamedTuple):
    """A provider, ready to run one case.

    phases  in order; the first takes a slot (one set of inputs), each other what the one before returned
    judge   runs it once and compares
    floor   ms that each phase, and all together, cannot go below
    note    which path it took, where that is a question
    """

    phases: Mapping[str, Callable[[Any], Any]]
    judge: Callable[[], Judgement]
    floor: Mapping[str, float] = MappingProxyType({})
    note: str = ""


@dataclass(frozen=True)
class Record:
    """One provider's time in one phase of one case, or why it has none."""

    subject: str
    group: str
    sizes: Mapping[str, int | str]
    dtype: str
    provider: str
    mode: str  # eager or graph
    phase: str
    refused: str | None
    ms: tuple[float, float, float] | None  # p20, p50, p80
    rounds: int
    ratio: float | None  # of the medians, to `baseline`, in the same rounds
    baseline: str
    floor_ms: float | None
    peak_bytes: int | None  # what one step takes beyond what it is given
    error: Mapping[str, float]
    allowed: Mapping[str, float]
    note: str
    environment: Mapping[str, Any]

    def json(self) -> dict[str, Any]:
        """Plain values; null for an error that is no number."""
        error = {name: float(f"{value:.3g}") if math.isfinite(value) else None for name, value in self.error.items()}
        allowed = {name: float(f"{value:.3g}") for name, value in self.allowed.items()}
        floor_ms, ratio = (None if v is None else float(f"{v:.4g}") for v in (self.floor_ms, self.ratio))
        return asdict(self) | {"error": error, "allowed": allowed, "floor_ms": floor_ms, "ratio": ratio}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`, in float64; NaN where the shapes differ."""
    if value.shape != exact.shape:
        return math.nan
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def compare(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor], dtype: torch.dtype
) -> Judgement:
    """Each error may be twice that of plain torch in the same dtype, plus one rounding."""
    error = {name: relative_error(value, exact[name]) for name, value in got.items()}
    floor = torch.finfo(dtype).eps / 2
    return Judgement(error, {name: 2 * relative_error(plain[name], exact[name]) + floor for name in got})


def admit(build: Callable[[], Contender]) -> tuple[Contender | None, Judgement, str | None]:
    """The contender, its errors and, where it must not be timed, the reason."""
    try:
        contender = build()
        judgement = contender.judge()
    except Exception as problem:  # one provider that cannot run must not end the others' measurement
        first = (str(problem).splitlines() or [""])[0]
        return None, Judgement({}, {}), f"{type(problem).__name__}: {first[:200]}"
    return contender, judgement, judgement.complaint()


def measure(
    subject: str,
    case: Case,
    providers: Mapping[str, Callable[[], Contender]],
    slots: Sequence[Any],
    environment: Mapping[str, Any],
    options: argparse.Namespace,
    baseline: str = "frozen",
) -> list[Record]:
    """Judges every provider, times those that are right in turns, and returns a record for each phase of each.

    slots  sets of inputs on the device, many enough that none is in the last cache when its turn comes
    """
    judged = {name: admit(build) for name, build in providers.items()}
    fit = {name: contender for name, (contender, _, refused) in judged.items() if contender and not refused}
    names = list(next(iter(fit.values())).phases) if fit else []
    names += ["+".join(names)] * (len(names) > 1)
    peaks = {name: peak_bytes(contender.phases, slots[0], options.device) for name, contender in fit.items()}

    def record(mode: str, provider: str, phase: str, times: Sequence[float], base: Sequence[float], problem=None):
        contender, judgement, refused = judged[provider]
        ms = percentiles(times) if len(times) else None
        return Record(
            subject, case.group, case.sizes, case.dtype, provider, mode, phase, refused or problem, ms, len(times),
            ms[1] / percentiles(base)[1] if ms and len(base) else None, baseline,
            contender.floor.get(phase) if contender else None, peaks.get(provider), judgement.error,
            judgement.allowed, contender.note if contender else "", environment,
        )  # fmt: skip

    records = []
    for mode in ("eager", "graph") if options.device == "cuda" else ("eager",):
        runners, problems = _runners(mode, fit, slots, options.device)
        times = interleave(runners, options.seconds) if runners else {}
        for provider in judged:
            for place, phase in enumerate(names or ["all"]):
                own, base = ([row[place] for row in times.get(name, ())] for name in (provider, baseline))
                records.append(record(mode, provider, phase, own, base, problems.get(provider)))
    return records


def _runners(
    mode: str, fit: Mapping[str, Contender], slots: Sequence[Any], device: str
) -> tuple[dict[str, Runner], dict[str, str]]:
    """A runner for each contender, and why some have none."""
    if mode == "eager":
        return {name: eager(contender.phases, slots, device) for name, contender in fit.items()}, {}
    runners, problems, pool = {}, {}, torch.cuda.graph_pool_handle()
    for name, contender in fit.items():
        try:
            runners[name] = graphed(contender.phases, slots, pool)
        except Exception as problem:  # not every provider can be captured
            problems[name] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
    return runners, problems


class Ceilings(NamedTuple):
    """The most this machine was seen to do: FLOP/s of a large product, by the dtypes of rows and weight, in torch or
    over a packed weight; bytes/s of a copy, read and written."""

    flops: Mapping[tuple[str, str], float]
    bytes: float

    def ms(self, flops: float, moved: float, rows: str, weight: str) -> float:
        """The floor of some work."""
        return 1e3 * max(flops / self.flops[rows, weight], moved / self.bytes)


def ceilings(device: str) -> Ceilings:
    def fastest(work: Callable[[], Any]) -> float:
        rows = interleave({"": eager({"": lambda _: work()}, [None], device)}, 0.0, (3, 3))[""]
        return min(row[0] for row in rows) / 1e3

    flops = {}
    sizes = ((1024, 1024, 1024), (2048, 3072, 768)) if device == "cpu" else ((4096,) * 3, (8192,) * 3)
    for rows, weight in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        rates = []
        for M, N, K in sizes:
            x, W = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
            x, W = x.to(DTYPES[rows]), W.to(DTYPES[weight])
            packed, A, B = FrozenWeight(W), x.new_empty(0, K), x.new_empty(N, 0)
            ways = [lambda x=x, W=W: x @ W.T] * (rows == weight)
            ways.append(lambda x=x, packed=packed, A=A, B=B: lora_linear(x, packed, A, B, 1.0))
            rates += [2 * M * N * K / fastest(way) for way in ways]
        flops[rows, weight] = max(rates)
    source = torch.zeros(2**26 if device == "cpu" else 2**29, device=device)
    target = torch.zeros_like(source)  # of pages that are there, as `source`
    return Ceilings(flops, 2 * source.nbytes / fastest(lambda: target.copy_(source)))


def arguments(description: str | None, subject: str) -> argparse.ArgumentParser:
    """The options that every subject has."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m benchmarks {subject}", description=description, formatter_class=form)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few cases, briefly")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT, as M512-N768-K768")
    parser.add_argument("--seconds", type=float, help="to spend on timing each case")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="after which no case is begun")
    return parser


def prepare(parser: argparse.ArgumentParser, argv: Sequence[str] | None, seconds: float) -> argparse.Namespace:
    """Parsed options, with the threads set and the random state fixed."""
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.seconds is None:
        options.seconds = seconds / 5 if options.quick else seconds
    torch.manual_seed(0)
    return options


def run(
    cases: Iterable[Case],
    run_case: Callable[[Case, Ceilings, Mapping[str, Any], argparse.Namespace], list[Record]],
    options: argparse.Namespace,
) -> list[Record]:
    """Case after case, each printed and, with --record, saved when it is done; one that other work disturbed is
    measured again."""
    environment, ceiling, found = store.environment(options.device), ceilings(options.device), []
    rates = ", ".join(f"{'x'.join(names)} {rate / 1e9:,.0f} GFLOP/s" for names, rate in ceiling.flops.items())
    print(f"{environment['device']}, {environment['threads']} CPU threads, commit {environment['commit']}")
    print(f"seen here: {rates}, copies at {ceiling.bytes / 1e9:.1f} GB/s")
    gc.freeze()  # what is imported by now is not searched again before each case
    start = time.perf_counter()
    for case in cases:
        if options.budget and time.perf_counter() - start > options.budget:
            print(f"{case}: left out, {options.budget:.0f} s are over")
            continue
        tries: list[list[Record]] = []
        while len(tries) < TRIES and (not tries or unrest(tries[-1]) > 1):
            tries.append(run_case(case, ceiling, environment, options))
            gc.collect()  # a case's tensors must be gone before the next one's
        records = min(tries, key=unrest)
        tried = "" if len(tries) == 1 else f"  the quietest of {len(tries)} tries, {unrest(records):.1f} of what may be"
        print(f"{case}{tried}", *lines(records), sep="\n", flush=True)
        if options.record:
            store.save(record.json() for record in records)
        found += records
    return found


def unrest(records: Iterable[Record]) -> float:
    """How disturbed a measurement was, in parts of what is let pass: the same provider timed twice ("... again") should
    have one median, and the baseline's p80 be near its p20."""
    apart = spread = 0.0
    for record in records:
        if record.ms and record.phase.count("+"):
            if record.provider.endswith(" again") and record.ratio:
                apart = max(apart, abs(record.ratio - 1))
            if record.provider == record.baseline:
                spread = max(spread, record.ms[2] / record.ms[0] - 1)
    return max(apart / MOST_APART, spread / MOST_SPREAD)


def lines(records: Iterable[Record]) -> Iterable[str]:
    """One line a provider and mode, for people who watch."""
    rows: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        rows.setdefault((record.mode, record.provider), []).append(record)
    for (mode, provider), phases in rows.items():
        first = phases[0]
        if first.refused:
            yield f"  {provider:22} {mode:6} {first.refused}"
            continue
        times = "  ".join(f"{r.phase} {r.ms[1]:8.3f} ms {r.ratio or math.nan:5.2f}" for r in phases if r.ms)
        worst = max((first.error[name] / first.allowed[name] for name in first.allowed), default=0.0)
        yield f"  {provider:22} {mode:6} {times}  error {worst:4.2f} of allowed  {first.note.partition(':')[0]}"
