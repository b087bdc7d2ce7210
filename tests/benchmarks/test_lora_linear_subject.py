"""Every provider of lora_linear and lora_linear_clients computes what it should, on small problems; none is timed."""

import functools
import gc
import weakref
from argparse import Namespace

import pytest
import torch

from benchmarks import harness, lora_linear, lora_linear_clients
from benchmarks.clock import slots_past_cache
from benchmarks.harness import Case, Ceilings
from benchmarks.lora_linear import CASES, PROVIDERS, SHAPES, Problem, Slot, contender

CEILING = Ceilings({("fp32", "fp32"): 1e11, ("fp32", "bf16"): 2e11, ("bf16", "bf16"): 1e12}, 1e10)


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    for module in (lora_linear, lora_linear_clients):
        monkeypatch.setattr(module, "slots_past_cache", lambda size, device: 2)


PAIRS = [
    (name, dtype)
    for name, provider in PROVIDERS.items()
    for dtype in ("fp32", "bf16")
    if name != "reference compiled" and any(kind.startswith(dtype) for kind in provider.on)
]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_every_provider_is_right(name, dtype):
    problem, provider = Problem(Case("Toy", {"M": 37, "N": 48, "K": 64, "R": 8}, dtype), "cpu"), PROVIDERS[name]
    judge = functools.partial(problem.judge, adapter=provider.adapter)
    first = Slot(problem.x.clone().requires_grad_(), problem.dy, 0)
    judgement = contender([provider.build(problem)], judge, first, {}).judge()
    assert judgement.complaint() is None
    assert set(judgement.error) == ({"y", "dx", "dA", "dB"} if provider.adapter else {"y", "dx"})


GPU_CASES = [
    pytest.param({"M": 37, "N": 48, "K": 64, "R": 8}, id="M37"),
    pytest.param({"M": 2048, "N": 3072, "K": 768, "R": 16}, id="M2048"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", GPU_CASES)
def test_on_a_gpu_every_provider_is_right_and_graphs_capture_ours(sizes, dtype):
    options = Namespace(device="cuda", seconds=0.0, compile=False)
    records = lora_linear.run_case(Case("Toy", sizes, dtype), CEILING, {}, options)
    assert {record.mode for record in records} == {"eager", "graph"}
    assert {r.refused for r in records if r.mode == "eager" or r.provider in ("frozen", "ours")} == {None}


@pytest.mark.gpu
@pytest.mark.parametrize("cut", ["equal", "skewed", "zipf"])
@pytest.mark.parametrize("sizes", GPU_CASES)
def test_on_a_gpu_clients_are_right_and_captured(sizes, cut):
    case = Case("Toy", sizes | {"C": 8, "cut": cut}, "bf16")
    records = lora_linear_clients.run_case(case, CEILING, {}, Namespace(device="cuda", seconds=0.0))
    assert {r.refused for r in records if r.provider in ("one adapter", "ours")} == {None}


def test_an_adapter_left_out_does_not_pass():
    problem = Problem(Case("Toy", {"M": 37, "N": 48, "K": 64, "R": 8}), "cpu")
    first = Slot(problem.x.clone().requires_grad_(), problem.dy, 0)
    judge = functools.partial(problem.judge, adapter=True)
    assert contender([lora_linear.frozen(problem)], judge, first, {}).judge().complaint().startswith("wrong: y")


def test_grids():
    shapes = {(case.sizes["K"], case.sizes["N"]) for case in CASES["cpu"]}
    assert shapes == {*SHAPES["RoBERTa"], *SHAPES["MiniLM"]}
    assert {case.sizes["M"] for case in CASES["cpu"]} == {64, 256, 512, 2048}
    assert {case.sizes["M"] for case in CASES["cuda"]} == {256, 512, 2048, 8192, 32768}
    for cases in CASES.values():
        assert len({str(case) for case in cases}) == len(cases)
    assert {case.sizes["R"] for case in CASES["cpu"]} == {8, 16, 32, 64}


def test_the_floor_is_below_what_more_work_takes():
    case, more = (Case("Toy", {"M": 512, "N": 768, "K": 768, "R": R}) for R in (16, 64))
    frozen, ours = lora_linear.floor(case, CEILING, adapter=False), lora_linear.floor(case, CEILING)
    assert frozen["fwd+bwd"] < ours["fwd+bwd"] < lora_linear.floor(more, CEILING)["fwd+bwd"]
    assert ours["fwd+bwd"] == ours["fwd"] + ours["bwd"]


def test_one_case_from_end_to_end(monkeypatch):
    case = Case("Toy", {"M": 33, "N": 32, "K": 48, "R": 4})
    options = Namespace(device="cpu", seconds=0.0, compile=False)
    for name in [name for name in PROVIDERS if name.startswith("peft")]:
        monkeypatch.delitem(PROVIDERS, name)
    records = lora_linear.run_case(case, CEILING, {}, options)
    assert {record.provider for record in records} == {
        name for name, provider in PROVIDERS.items() if "fp32-cpu" in provider.on and "compiled" not in name
    }
    assert all(record.refused is None and record.ms and record.ratio for record in records)
    assert len({record.rounds for record in records}) == 1


@pytest.mark.parametrize(("cut", "sizes"), [("equal", [4, 2, 2, 2]), ("skewed", [1, 1, 1, 7]), ("zipf", [6, 2, 1, 1])])
def test_cuts(cut, sizes):
    assert lora_linear_clients.client_sizes(10, 4, cut) == sizes


@pytest.mark.parametrize("cut", ["equal", "skewed", "zipf"])
def test_clients_from_end_to_end(cut):
    case = Case("Toy", {"M": 40, "N": 32, "K": 48, "R": 4, "C": 5, "cut": cut})
    records = lora_linear_clients.run_case(case, CEILING, {}, Namespace(device="cpu", seconds=0.0))
    assert {record.provider for record in records} == set(lora_linear_clients.PROVIDERS)
    assert {record.refused for record in records} == {None} and {r.baseline for r in records} == {"one adapter"}


def test_padding_without_end_is_not_tried():
    problem = lora_linear_clients.Clients(
        Case("Toy", {"M": 100, "N": 4, "K": 4, "R": 2, "C": 40, "cut": "skewed"}), "cpu"
    )
    with pytest.raises(ValueError, match="padding makes 2440 rows of 100"):
        lora_linear_clients.padded(problem)


def test_the_budget_leaves_later_cases_out(capsys, monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device: CEILING)
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    options = Namespace(device="cpu", record=False, budget=15.0)
    done = []
    harness.run([Case("A", {}), Case("B", {})], lambda case, *_: done.append(case.group) or [], options)
    assert done == ["A"] and "B-fp32: left out" in capsys.readouterr().out


def test_slots_hold_the_same_rows():
    x, dy = torch.randn(3, 4), torch.randn(3, 5)
    first, second = lora_linear.slots(x, dy)
    assert torch.equal(first.x, x) and torch.equal(second.dy, dy) and second.x.is_leaf and second.x.requires_grad
    assert first.x.data_ptr() != second.x.data_ptr() and slots_past_cache(1, "cpu") > 2


def test_a_case_leaves_no_tensors_behind(monkeypatch):
    problems = []

    class Watched(Problem):
        def __init__(self, *args):
            super().__init__(*args)
            problems.append(weakref.ref(self))

    monkeypatch.setattr(lora_linear, "Problem", Watched)
    case = Case("Toy", {"M": 3, "N": 4, "K": 4, "R": 2})
    lora_linear.run_case(case, CEILING, {}, Namespace(device="cpu", seconds=0.0, compile=False))
    gc.collect()
    assert len(problems) == 1 and problems[0]() is None
