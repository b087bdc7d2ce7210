"""The short suite, `make bench` or `pytest benchmarks`: one step of a MiniLM layer by every provider.

fp32, 512 rows, rank 16, one thread; a wrong provider fails instead of being timed. Long: python -m benchmarks.
"""

import functools

import pytest
import torch
from torch import nn

from benchmarks.harness import Case
from benchmarks.lora_linear import PROVIDERS, SCALING, Layer, Problem, Provider, contender, slots
from federa_kernels import FeDeRALinear, LoraInit

SHAPES = [(384, 384), (384, 1536), (1536, 384)]


def federa_layer(problem: Problem) -> Layer:
    """The module that replaces nn.Linear, on the problem's weight and factors."""
    N, K = problem.weight.shape
    linear = nn.Linear(K, N)
    linear.load_state_dict({"weight": problem.weight, "bias": problem.bias})
    init = LoraInit(problem.lora_A, problem.lora_B, problem.weight, 0.0)
    layer = FeDeRALinear(linear, init, alpha=SCALING * len(problem.lora_A))
    return Layer(layer, (layer.lora_A, layer.lora_B))


TIMED = {name: provider for name, provider in PROVIDERS.items() if "fp32-cpu" in provider.on}
for name in ("reference compiled", "frozen again"):
    del TIMED[name]
TIMED["FeDeRALinear"] = Provider(federa_layer)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def problem_of(K: int, N: int) -> tuple[Problem, list]:
    problem = Problem(Case("MiniLM", {"M": 512, "N": N, "K": K, "R": 16}), "cpu")
    return problem, slots(problem.x, problem.dy)


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize(("K", "N"), SHAPES, ids=lambda size: str(size))
def test_step(benchmark, name, K, N):
    (problem, sets), provider = problem_of(K, N), TIMED[name]
    judge = functools.partial(problem.judge, adapter=provider.adapter)
    ready = contender([provider.build(problem)], judge, sets[0], {})
    assert ready.judge().complaint() is None
    turns = iter(range(10**9))

    def step():
        state = sets[next(turns) % len(sets)]
        for phase in ready.phases.values():
            state = phase(state)

    benchmark.group = f"{K}x{N}"
    benchmark(step)
