"""Which kernels a GPU should multiply with: each kind of lora_linear problem by all that this build has, in turns.

    python -m benchmarks dispatch --device cuda --record
        measures, and writes federa_kernels/lora_linear/dispatch.json from all that was ever recorded
    python -m benchmarks dispatch [--record]
        that table from the records alone; without --record it is printed and nothing written

Ratios are to Triton's kernels, and the second `triton` is the noise. An entry needs kernels that are faster by more
than the noise in one measurement and in none slower by more: of every case that the entry stands for, launched one by
one and in a CUDA graph.
"""

import argparse
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import records as store
from benchmarks.clock import geometric_mean
from benchmarks.harness import DTYPES, Case, Ceilings, Contender, Record, arguments, measure, prepare, run
from benchmarks.lora_linear import MOST_LAYERS, SCALING, SHAPES, Layer, Problem, Several, contender, ours, slots
from benchmarks.lora_linear_clients import Clients
from benchmarks.lora_linear_clients import ours as ours_for_clients
from federa_kernels import FrozenWeight, lora_linear_shared
from federa_kernels.lora_linear import dispatch, reference

SUBJECT = "dispatch"
LEAST = 0.02  # noise below which no two medians are told apart
PROVIDERS = {"triton": "triton", "triton again": "triton", "mma": "mma", "sm90": "sm90", "torch": "torch"}
NAMES = ("arch", "dtype", "kind", "M", "N", "K", "R")
PHASES = {"fwd": "forward", "bwd": "backward"}

Row = Mapping[str, Any]


def _cases() -> Iterator[Case]:
    """What decides most first, so that a run cut short has it. C: clients, P: projections."""

    def case(group: str, M: int, shape: tuple[int, int], R: int = 16, dtype: str = "bf16", **more: int | str) -> Case:
        return Case(group, {"M": M, "N": shape[1], "K": shape[0], "R": R, **more}, dtype)

    large = [(group, shape) for group in ("RoBERTa", "Llama-3-8B") for shape in SHAPES[group]]
    for M in (8192, 2048, 512, 32768, 256):
        yield from (case(group, M, shape) for group, shape in large)
        yield from (case("RoBERTa", M, shape, C=32, cut="zipf") for shape in SHAPES["RoBERTa"])
        yield case("RoBERTa", M, (768, 768), P=3)
        if M <= 8192:  # more does not fit beside its graphs
            yield case("Llama-3-8B", M, (4096, 14336), P=2)
    yield from (case("MiniLM", M, shape) for M in (8192, 2048, 512) for shape in SHAPES["MiniLM"])
    for group, shape in (("RoBERTa", (768, 768)), ("Llama-3-8B", (4096, 4096))):
        yield from (case(group, M, shape, R) for M in (8192, 2048) for R in (32, 64))
    yield from (case("RoBERTa", M, shape, dtype="fp32") for M in (8192, 2048) for shape in SHAPES["RoBERTa"])


CASES = list(_cases())


class Shared(Several):
    """P projections of one x, each turned by another number of rows; dy (P,M,N)."""

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        P = case.sizes["P"]
        parts = (self.dy, self.weight, self.lora_A, self.lora_B, self.bias)
        dys, *self.lists = ([t.roll(p, dims=0) for p in range(P)] for t in parts)
        self.dy, self.scalings = torch.stack(dys), [SCALING] * P

    def by_definition(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dys = self.x.to(dtype), self.dy.to(dtype).unbind()
        *lists, biases = ([t.to(dtype) for t in tensors] for tensors in self.lists)
        ys, h = reference.shared_forward(x, *lists, biases, self.scalings)
        needs = [True, *[False, True, True, False] * len(dys)]
        dx, *grads = reference.shared_backward(dys, x, h, *lists, self.scalings, needs)
        return _stacked(ys, dx, *grads[1::4], *grads[2::4])


def _stacked(ys: Sequence[Tensor], dx: Tensor, *grads: Tensor) -> dict[str, Tensor]:
    dAs, dBs = grads[: len(ys)], grads[len(ys) :]
    return {"y": torch.stack(list(ys)).detach(), "dx": dx, "dA": torch.stack(dAs), "dB": torch.stack(dBs)}


def _shared(problem: Shared) -> Layer:
    weights, As, Bs, biases = problem.lists
    As, Bs = ([t.clone().requires_grad_() for t in tensors] for tensors in (As, Bs))
    frozen = [FrozenWeight(weight.clone(), dtype=problem.dtype) for weight in weights]
    of_rows = [bias.to(problem.dtype) for bias in biases]
    projections = list(zip(frozen, As, Bs, problem.scalings, of_rows, strict=True))
    return Layer(lambda x: lora_linear_shared(x, projections), (*As, *Bs), named=_stacked)


def _clients(problem: Clients) -> Layer:
    _, call, parameters, named = ours_for_clients(problem)
    return Layer(call, parameters, named=named)


FORMS = {"one": (Problem, ours), "clients": (Clients, _clients), "shared": (Shared, _shared)}


def form_of(sizes: Mapping[str, Any]) -> str:
    return "clients" if "C" in sizes else "shared" if "P" in sizes else "one"


def run_case(case: Case, ceiling: Ceilings, environment: dict, options: argparse.Namespace) -> list[Record]:
    cuda, form = options.device == "cuda", form_of(case.sizes)
    make, layer_of = FORMS[form]
    problem = make(case, options.device)
    weights = problem.weight.numel() * problem.dtype.itemsize * case.sizes.get("P", 1)
    sets = slots(problem.x, problem.dy, weights if cuda else 0)
    layers = [layer_of(problem) for _ in sets[: MOST_LAYERS if cuda else 1]]

    def build(kernels: str) -> Contender:
        return contender(layers, problem.judge if form == "one" else problem.judge_all, sets[0], {}, kernels)

    major, minor = torch.cuda.get_device_capability() if cuda else (0, 0)
    problems = (f"{form} forward", problem.dtype, 10 * major + minor)
    chosen = {
        name: functools.partial(build, kernels)
        for name, kernels in PROVIDERS.items()
        if dispatch.able(kernels, *problems) and not dispatch.why_not(kernels)
    }
    return measure(SUBJECT, case, chosen, sets, environment, options, baseline="triton")


def _arch(row: Row) -> int:
    return int(row["environment"]["capability"].replace(".", ""))


def _place(row: Row) -> tuple[Any, ...]:
    """The entry that a record speaks for, in the order of NAMES."""
    M, N, K, R = (row["sizes"][name] for name in "MNKR")
    P, kind = row["sizes"].get("P", 1), f"{form_of(row['sizes'])} {PHASES[row['phase']]}"
    dtype = str(DTYPES[row["dtype"]]).removeprefix("torch.")
    return _arch(row), dtype, kind, *dispatch.bucket(M, P * N, K, P * R)


def winners(measurements: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of measurements (provider -> ms): whoever beats Triton's kernels, fastest first, and how many times as fast."""
    measurements, found = list(measurements), {}
    for name in dispatch.KERNELS[1:]:
        if all({"triton", "triton again", name} <= times.keys() for times in measurements):
            gains = [times["triton"] / times[name] for times in measurements]
            noise = [max(LEAST, abs(times["triton again"] / times["triton"] - 1)) for times in measurements]
            pairs = list(zip(gains, noise, strict=True))
            if all(gain >= 1 - n for gain, n in pairs) and any(gain > 1 + n for gain, n in pairs):
                found[name] = geometric_mean(gains)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def table_of(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """What was measured where, and an entry wherever others than Triton's kernels win."""
    devices: dict[str, dict[str, Any]] = {}
    places: dict[tuple, dict[str, dict[str, float]]] = {}  # entry -> what was timed -> provider -> ms
    for row in sorted(rows, key=lambda row: row["environment"]["utc"]):
        if row["phase"] not in PHASES:
            continue
        facts = row["environment"]
        devices[facts["device"]] = {"device": facts["device"], "arch": _arch(row)} | {
            name: facts[name] for name in ("utc", "commit", "versions")
        }
        timed = json.dumps([facts["device"], row["group"], row["sizes"], row["mode"]], sort_keys=True)
        times = places.setdefault(_place(row), {}).setdefault(timed, {})
        if row["ms"]:
            times[row["provider"]] = row["ms"][1]
    entries = []
    for place, measured in sorted(places.items()):
        if found := winners(measured.values()):
            ranked = {"kernels": list(found), "times": [round(gain, 2) for gain in found.values()]}
            entries.append(dict(zip(NAMES, place, strict=True)) | ranked)
    return {"measured": [devices[name] for name in sorted(devices)], "entries": entries}


def text_of(table: Mapping[str, Sequence[Any]]) -> str:
    """As JSON, a line for each device and each entry."""
    about = "Written by `python -m benchmarks dispatch` from benchmarks/results/dispatch-cuda.jsonl; see dispatch.py."
    parts = [f'{{"about": {json.dumps(about)}']
    for name, rows in table.items():
        lines = ",".join("\n  " + json.dumps(row) for row in rows)
        parts.append(f'"{name}": [{lines}]')
    return ",\n ".join(parts) + "}\n"


def select(options: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES if (options.only or "") in str(case)]
    return [case for case in cases if case.sizes["M"] == 2048 and case.sizes["K"] == 768] if options.quick else cases


def main(argv: Sequence[str] | None = None) -> int:
    options = prepare(arguments(__doc__, SUBJECT), argv, seconds=0.2)
    new = run(select(options), run_case, options) if options.device == "cuda" else []
    old = store.read(store.path_of(SUBJECT, "cuda"))
    table = table_of({store.key(row): row for row in [*old, *(record.json() for record in new)]}.values())
    print(text_of(table), end="")
    if not table["measured"]:
        print("no GPU has been measured: Triton's kernels everywhere")
    if options.record:
        store.write(dispatch.TABLE, text_of(table))
    return 1 if any(record.refused for record in new) else 0
