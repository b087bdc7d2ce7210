"""What wants a GPU of all kernels alike: large problems, replays, offsets beyond 2^31, and the table's choice."""

import pytest
import torch

from federa_kernels import lora_linear
from federa_kernels.lora_linear import dispatch, op, sm90

from . import against_float64 as cases
from .against_float64 import assert_as_good_as_torch, run
from .test_triton_kernels import (
    SCALING,
    client_by_client,
    clients,
    installed,  # noqa: F401
    linear,
    make,
    make_clients,
    make_shared,
    one_by_one,
    scalings_of,
    shared,
    trained,
)

pytestmark = pytest.mark.gpu
launch = op.launchers()
SHAPES = [
    (2048, 768, 768, 16),
    (513, 3072, 768, 64),
    (4096, 4096, 4096, 8),
    (300, 500, 1000, 128),
    (300, 504, 1000, 128),
    (7, 3424, 384, 12),
]


def need(name):
    if missing := dispatch.why_not(name):
        pytest.skip(missing)
    if name == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")


@pytest.fixture(autouse=True, params=("triton", "mma", "sm90"))
def chosen(request, monkeypatch):
    need(request.param)
    monkeypatch.setattr(launch, "_kernels", request.param)
    return request.param


@pytest.fixture
def hoppers(monkeypatch):
    """The names of Hopper's kernels, as they are launched."""
    names, run_it = [], sm90._run
    monkeypatch.setattr(sm90, "_run", lambda name, values: names.append(name) or run_it(name, values))
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}-R{}".format(*s))
def test_usual_layers_are_as_good_as_torch(chosen, hoppers, shape, dtype):
    if dtype == torch.float32 and chosen != "triton":
        pytest.skip("takes halves")
    tensors, dy = make(*shape, dtype, adapter=torch.float32)
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))
    assert ("gemm" in hoppers) == (chosen == "sm90" and shape[1] % 8 == 0)


@pytest.mark.parametrize("R", [8, 16, 64, 128])
@pytest.mark.parametrize("sizes", [[256] * 32, [4000, 1, 0, 95], [1] * 200], ids=["equal", "skewed", "single-rows"])
def test_clients_are_as_good_as_torch(chosen, hoppers, sizes, R):
    ranks = [(R, 1, max(1, R // 2))[c % 3] for c in range(len(sizes))]
    tensors, dy = make_clients(sizes, ranks, 768, 768, R, torch.bfloat16)
    pair = clients(sizes, ranks, None), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(len(sizes)), tensors, dy, trained(tensors, 1))
    assert ("gemm" in hoppers) == (chosen == "sm90")


@pytest.mark.parametrize("R", [8, 16, 40])
def test_shared_inputs_are_as_good_as_torch(R):
    tensors, dys = make_shared(1500, 768, [768, 768, 768], [R] * 3, torch.bfloat16)
    assert_as_good_as_torch(shared(None), one_by_one, scalings_of(3), tensors, dys, trained(tensors, 1, 5, 9))


def test_offsets_go_beyond_two_to_the_31():
    """As vllm issue 53028: the last rows of 150,000 x 14,336 must be those of the same rows alone."""
    (x, weight, lora_A, lora_B, bias), _ = make(150_000, 14_336, 64, 8, torch.bfloat16)
    y, _ = launch.launch_lora_linear_fwd(x, weight, lora_A, lora_B, bias, SCALING)
    tail, _ = launch.launch_lora_linear_fwd(x[-256:], weight, lora_A, lora_B, bias, SCALING)
    torch.testing.assert_close(y[-256:], tail)
    arguments = (weight, lora_A, lora_B, SCALING, [True, False, False, False, False])
    dx = launch.launch_lora_linear_bwd(y, None, None, *arguments)[0]
    torch.testing.assert_close(dx[-256:], launch.launch_lora_linear_bwd(tail, None, None, *arguments)[0])


def test_a_captured_step_replays():
    (x, weight, lora_A, lora_B, bias), dy = make(512, 768, 768, 16, torch.bfloat16)

    def step():
        y, h = launch.launch_lora_linear_fwd(x, weight, lora_A, lora_B, bias, SCALING)
        grads = launch.launch_lora_linear_bwd(
            dy, x, h, weight, lora_A, lora_B, SCALING, [True, False, True, True, True]
        )
        return [y, *(grad for grad in grads if grad is not None)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_a_hundred_steps_that_follow_each_other_have_the_same_bits():
    """With rows written just before each: kernels that begin early must not read them early."""
    tensors, dy = make(1000, 1536, 776, 24, torch.bfloat16)
    mask, source = trained(tensors, 1), tensors[0].clone()
    first = run(linear(None), SCALING, tensors, dy, mask)
    for _ in range(100):
        tensors[0].fill_(torch.nan)
        tensors[0].copy_(source)
        for got, want in zip(run(linear(None), SCALING, tensors, dy, mask), first, strict=True):
            assert got is want is None or torch.equal(got, want)


def test_the_table_chooses(chosen, monkeypatch):
    """Forward by these kernels, backward by cuBLAS."""
    major, minor = torch.cuda.get_device_capability()
    place = (10 * major + minor, torch.bfloat16)
    sizes = dispatch.bucket(512, 768, 768, 16)
    table = {(*place, "one forward", *sizes): (chosen,), (*place, "one backward", *sizes): ("torch",)}
    monkeypatch.setattr(dispatch, "entries", lambda: table)
    monkeypatch.setattr(launch, "_kernels", "auto")
    dispatch.fastest.cache_clear()
    try:
        tensors, dy = make(512, 768, 768, 16, torch.bfloat16)
        (x, weight, lora_A, *_), needs = tensors, trained(tensors, 1)
        assert launch.choose("one forward", x, [weight], lora_A.shape[:1]) == chosen
        assert op.path_of(dy, [None], lora_A.shape[:1], "one backward", [weight]) == "reference"
        call = lambda scaling, x, W, A, B, b: lora_linear(x, W, A, B, scaling, b)  # noqa: E731
        assert_as_good_as_torch(call, cases.plain, SCALING, tensors, dy, needs)
    finally:
        dispatch.fastest.cache_clear()
