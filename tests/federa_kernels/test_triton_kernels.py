"""The Triton launchers: compiled where there is a GPU, else through Triton's interpreter on CPU tensors, in float32 and
float16 (bfloat16 products of the interpreter are garbage). Every test sees memory that nobody has written as NaN."""

import dataclasses
import itertools
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels.lora_linear import op
from federa_kernels.lora_linear.tiles import Tile, Tiles, gemm_tiles, pick_tiles

from . import against_float64 as cases
from .against_float64 import DTYPES, Draw, assert_as_good_as_torch, run

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's own products, where `poisoned` is on, ask for it
kernels = op.launchers()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 0.75
PARTED = Tiles(Tile(16, 16, 16, 4, 2), Tile(16, 0, 16, 4, 2), Tile(16, 16, 0, 4, 2), 2, True, 32, False)
TILES = {
    "parted": PARTED,
    "two-passes": dataclasses.replace(PARTED, one_pass=False, chunk=16),
    "on-the-fly": dataclasses.replace(PARTED, on_the_fly=True),
    "picked": None,
}
SHAPES = [
    (33, 40, 36, 8),
    (17, 33, 7, 1),
    (1, 1, 1, 1),
    (40, 48, 57, 24),
    (18, 20, 40, 64),
    (0, 16, 24, 12),
    (65, 16, 16, 16),
]
CUTS = {
    "one": [37],
    "uniform": [5, 31, 0, 12],
    "single-rows": [1] * 9,
    "some-empty": [0, 0, 7, 0, 0, 33, 0],
    "all-empty": [0, 0, 0],
    "on-the-tile": [32, 16, 32],
    "off-the-tile": [31, 33, 1],
}
half_and_full = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
by_tiles = pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
VARIANTS = {name: (tiles, torch.float32) for name, tiles in TILES.items()} | {"parted-fp16": (PARTED, torch.float16)}
by_variant = pytest.mark.parametrize(("tiles", "dtype"), VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module", autouse=True)
def installed(poisoned):
    if kernels is None:
        reason = "triton is not installed: pip install 'federa[test]'"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


@pytest.fixture(autouse=True)
def these_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_kernels", "triton")


def _cast(grads, owners):
    return [d if d is None else d.to(t.dtype) for d, t in zip(grads, owners, strict=True)]


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles, scaling, x, weight, lora_A, lora_B, bias):
        y, h = kernels.launch_lora_linear_fwd(x, weight, lora_A, lora_B, bias, scaling, tiles)
        ctx.save_for_backward(x, h, weight, lora_A, lora_B, bias)
        ctx.others = tiles, scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, h, *tensors, bias), (tiles, scaling), needs = ctx.saved_tensors, ctx.others, ctx.needs_input_grad[2:]
        x_kept, h_kept = x if needs[2] else None, h if needs[3] else None
        grads = kernels.launch_lora_linear_bwd(dy, x_kept, h_kept, *tensors, scaling, needs, tiles)
        assert [d is not None for d in grads] == list(needs)
        return None, None, *_cast(grads, (x, *tensors, bias))


class Clients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles, segments, x, weight, lora_A, lora_B, bias):
        y, h = kernels.launch_lora_linear_clients_fwd(x, weight, lora_A, lora_B, bias, *segments, tiles)
        ctx.save_for_backward(x, h, weight, lora_A, lora_B, bias)
        ctx.others = tiles, segments
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, h, *tensors), (tiles, segments), needs = ctx.saved_tensors, ctx.others, ctx.needs_input_grad[2:]
        x_kept, h_kept = x if needs[2] else None, h if needs[3] else None
        grads = kernels.launch_lora_linear_clients_bwd(dy, x_kept, h_kept, *tensors, *segments, needs, tiles)
        assert [d is not None for d in grads] == list(needs)
        return None, None, *_cast(grads, (x, *tensors))


class Shared(torch.autograd.Function):
    """x and (weight, lora_A, lora_B, bias) of each projection in turn."""

    @staticmethod
    def forward(ctx, tiles, scalings, x, *flat):
        weights, As, Bs, biases = (list(flat[i::4]) for i in range(4))
        ys, h = kernels.launch_lora_linear_shared_fwd(x, weights, As, Bs, biases, scalings, tiles)
        ctx.save_for_backward(x, h, *flat)
        ctx.others = tiles, scalings
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        (x, h, *flat), (tiles, scalings), needs = ctx.saved_tensors, ctx.others, ctx.needs_input_grad[2:]
        x_kept, h_kept = x if any(needs[2::4]) else None, h if any(needs[3::4]) else None
        lists = (flat[0::4], flat[1::4], flat[2::4], scalings, needs, tiles)
        grads = kernels.launch_lora_linear_shared_bwd(dys, x_kept, h_kept, *lists)
        return None, None, *_cast(grads, (x, *flat))


def linear(tiles):
    return lambda scaling, *tensors: Linear.apply(tiles, scaling, *tensors)


def clients(sizes, ranks, tiles):
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=DEVICE)
    own_ranks = torch.tensor(ranks or [2**31 - 1] * len(sizes), dtype=torch.int32, device=DEVICE)

    def call(scalings, *tensors):
        segments = (offsets, torch.tensor(scalings, dtype=torch.float32, device=DEVICE), own_ranks)
        return Clients.apply(tiles, segments, *tensors)

    return call


def client_by_client(sizes, ranks):
    def definition(scalings, x, weight, lora_A, lora_B, bias):
        ys = []
        for c, rows in enumerate(x.split(list(sizes))):
            R = min(lora_A.shape[1], ranks[c]) if ranks else lora_A.shape[1]
            own = bias if bias is None or bias.dim() == 1 else bias[c]
            ys.append(cases.plain(scalings[c], rows, weight, lora_A[c, :R], lora_B[c, :, :R], own))
        return torch.cat(ys)

    return definition


def shared(tiles):
    return lambda scalings, *tensors: Shared.apply(tiles, scalings, *tensors)


def one_by_one(scalings, x, *flat):
    return [cases.plain(s, x, *flat[4 * p : 4 * p + 4]) for p, s in enumerate(scalings)]


def make(M, N, K, R, dtype=torch.float32, adapter=None, weight=None, bias=True, seed=0, layouts=("contiguous",) * 2):
    """x, weight, lora_A, lora_B, bias; dy."""
    draw, adapter = Draw(seed), adapter or dtype
    x, dy = draw(M, K, dtype=dtype, layout=layouts[0]), draw(M, N, dtype=dtype, layout=layouts[1])
    tensors = [x, draw.of_width(N, K, dtype=weight or dtype), draw.of_width(R, K, dtype=adapter)]
    tensors += [draw.of_width(N, R, dtype=adapter), draw(N, dtype=dtype) if bias else None]
    return [t if t is None else t.to(DEVICE) for t in tensors], dy.to(DEVICE)


def make_clients(sizes, ranks, N=40, K=24, R=16, dtype=torch.float32, bias="own", seed=0):
    """The same for clients; beyond a client's rank both factors are NaN."""
    draw, C, M = Draw(seed), len(sizes), sum(sizes)
    lora_A, lora_B = draw.of_width(C, R, K, dtype=dtype), draw.of_width(C, N, R, dtype=dtype)
    for c, rank in enumerate(ranks or []):
        lora_A[c, rank:], lora_B[c, :, rank:] = torch.nan, torch.nan
    b = {"own": draw(C, N, dtype=dtype), "one": draw(N, dtype=dtype), None: None}[bias]
    tensors = [draw(M, K, dtype=dtype), draw.of_width(N, K, dtype=dtype), lora_A, lora_B, b]
    return [t if t is None else t.to(DEVICE) for t in tensors], draw(M, N, dtype=dtype).to(DEVICE)


def make_shared(M, K, widths, ranks, dtype=torch.float32, seed=0):
    draw = Draw(seed)
    tensors = [draw(M, K, dtype=dtype)]
    for p, (N, R) in enumerate(zip(widths, ranks, strict=True)):
        bias = None if p == 1 else draw(N, dtype=dtype)
        tensors += [draw.of_width(N, K, dtype=dtype), draw.of_width(R, K), draw.of_width(N, R), bias]
    dys = [draw(M, N, dtype=dtype).to(DEVICE) for N in widths]
    return [t if t is None else t.to(DEVICE, dtype) for t in tensors], dys


def trained(tensors, *frozen):
    return [t is not None and i not in frozen for i, t in enumerate(tensors)]


def scalings_of(count):
    return [0.5 + 0.25 * c for c in range(count)]


@by_variant
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}-R{}".format(*s))
def test_one_adapter_is_as_good_as_torch(shape, dtype, tiles):
    tensors, dy = make(*shape, dtype)
    assert_as_good_as_torch(linear(tiles), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


@by_variant
@pytest.mark.parametrize("cut", CUTS)
def test_clients_are_as_good_as_torch_one_by_one(cut, dtype, tiles):
    sizes = CUTS[cut]
    ranks = [(16, 8, 1, 12)[c % 4] for c in range(len(sizes))]
    tensors, dy = make_clients(sizes, ranks, dtype=dtype)
    pair = clients(sizes, ranks, tiles), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(len(sizes)), tensors, dy, trained(tensors, 1))


@pytest.mark.parametrize("bias", ["one", None])
@pytest.mark.parametrize("R", [12, 24, 64])
def test_clients_of_any_rank_and_bias(R, bias):
    sizes, ranks = [7, 0, 20], [R, 5, 2**31 - 1]
    tensors, dy = make_clients(sizes, None, R=R, bias=bias)
    pair = clients(sizes, ranks, PARTED), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(3), tensors, dy, trained(tensors, 1))


@pytest.mark.parametrize("tiles", [PARTED, None], ids=["parted", "picked"])
@half_and_full
@pytest.mark.parametrize(
    ("widths", "ranks"),
    [([40, 17, 33], [8, 12, 5]), ([16, 24], [24, 1]), ([8] * 6, [3] * 6), ([20, 20], [120, 70])],
    ids=["query-key-value", "gate-up", "six", "ranks-of-190"],
)
def test_shared_inputs_are_as_good_as_torch_one_by_one(widths, ranks, dtype, tiles):
    tensors, dys = make_shared(21, 36, widths, ranks, dtype)
    frozen = range(1, len(tensors), 4)
    assert_as_good_as_torch(shared(tiles), one_by_one, scalings_of(len(ranks)), tensors, dys, trained(tensors, *frozen))


@by_tiles
@pytest.mark.parametrize(("adapter", "weight"), [("fp32", "fp16"), ("fp32", "fp32"), ("fp16", "bf16")])
def test_other_tensors_may_be_of_another_dtype(adapter, weight, tiles):
    tensors, dy = make(33, 24, 40, 8, torch.float16, DTYPES[adapter], DTYPES[weight])
    assert_as_good_as_torch(linear(tiles), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


@by_tiles
@pytest.mark.parametrize("layouts", [("transposed", "columns"), ("offset", "one number"), ("one row", "every other")])
def test_rows_in_any_layout(layouts, tiles):
    tensors, dy = make(33, 24, 40, 8, layouts=layouts)
    tensors[1:4] = [t.T.contiguous().T for t in tensors[1:4]]
    assert_as_good_as_torch(linear(tiles), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


@pytest.mark.parametrize("form", ["one", "clients", "shared"])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(form):
    if form == "one":
        (tensors, dys), call, scaling = make(20, 24, 18, 4), linear(PARTED), SCALING
    elif form == "clients":
        (tensors, dys), call, scaling = make_clients([7, 9], [8, 16]), clients([7, 9], [8, 16], PARTED), [1.0, 0.5]
    else:
        (tensors, dys), call, scaling = make_shared(9, 18, [20, 8], [4, 8]), shared(PARTED), [1.0, 0.5]
    frozen = range(1, len(tensors), 4)
    full = run(call, scaling, tensors, dys, trained(tensors, *frozen))
    for kept in (0, 2, 3, 4):
        mask = [(t is not None) and i % 4 == kept % 4 and i not in frozen for i, t in enumerate(tensors)]
        for need, got, want in zip(
            mask, run(call, scaling, tensors, dys, mask)[-len(mask) :], full[-len(mask) :], strict=True
        ):
            if need:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert got is None


@pytest.mark.parametrize("tiles", [PARTED, None], ids=["parted", "picked"])
def test_twice_the_same_bits(tiles):
    for function, scaling, (tensors, dys) in (
        (linear(tiles), SCALING, make(65, 40, 57, 8)),
        (clients([31, 2, 33], None, tiles), scalings_of(3), make_clients([31, 2, 33], None)),
        (shared(tiles), scalings_of(2), make_shared(40, 36, [20, 33], [8, 12])),
    ):
        mask = trained(tensors, *range(1, len(tensors), 4))
        first = run(function, scaling, tensors, dys, mask)
        for a, b in zip(first, run(function, scaling, tensors, dys, mask), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_launches_do_not_depend_on_the_number_of_clients():
    counts = []
    for C in (2, 24):
        sizes = [24 // C] * C
        tensors, dy = make_clients(sizes, None, N=16, K=16, R=4)
        with mock.patch.object(kernels, "_launch", wraps=kernels._launch) as launch:
            run(clients(sizes, None, PARTED), [1.0] * C, tensors, dy, trained(tensors, 1))
        counts.append(launch.call_count)
    assert counts == [6, 6]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_client_never_reaches_another():
    sizes = [9, 14, 11]
    tensors, dy = make_clients(sizes, None)
    tensors[0][9:23], dy[9:23] = torch.inf, torch.nan
    tensors[2][1], tensors[3][1] = torch.nan, torch.inf
    y, dx, _, dA, dB, db = run(clients(sizes, None, PARTED), [1.0] * 3, tensors, dy, trained(tensors, 1))
    for rows in (y, dx):
        assert rows[:9].isfinite().all() and rows[23:].isfinite().all()
    for grads in (dA, dB, db):
        assert grads[[0, 2]].isfinite().all()


tile_sizes = st.sampled_from([16, 32])


@st.composite
def problems(draw):
    """(ours, the definition, scaling, tensors, dys, mask) of any form, with any tiles."""
    sizes = st.integers(1, 33)
    BM, BN, BK = draw(tile_sizes), draw(tile_sizes), draw(tile_sizes)
    tiles = Tiles(
        *(Tile(BM, BN, BK, 4, 2), Tile(BM, 0, BK, 4, 2), Tile(BM, BN, 0, 4, 2), draw(st.integers(1, 4))),
        *(draw(st.booleans()), BM * draw(st.integers(1, 2)), draw(st.booleans())),
    )
    N, K, R = draw(sizes), draw(sizes), draw(st.sampled_from([1, 3, 8, 16, 20]))
    dtype, seed = draw(st.sampled_from([torch.float32, torch.float16])), draw(st.integers(0, 2**31))
    form = draw(st.sampled_from(["one", "clients", "shared"]))
    if form == "clients":
        cuts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        ranks = draw(st.none() | st.lists(st.integers(1, R), min_size=len(cuts), max_size=len(cuts)))
        bias = draw(st.sampled_from(["own", "one", None]))
        scaling = scalings_of(len(cuts))
        tensors, dys = make_clients(cuts, ranks, N, K, R, dtype, bias, seed)
        pair = clients(cuts, ranks, tiles), client_by_client(cuts, ranks)
    elif form == "shared":
        widths = draw(st.lists(sizes, min_size=1, max_size=3))
        tensors, dys = make_shared(draw(sizes), K, widths, [R] * len(widths), dtype, seed)
        pair, scaling = (shared(tiles), one_by_one), scalings_of(len(widths))
    else:
        layouts = draw(cases.x_and_dy)
        tensors, dys = make(
            draw(st.integers(0, 33)), N, K, R, dtype, bias=draw(st.booleans()), seed=seed, layouts=layouts
        )
        pair, scaling = (linear(tiles), cases.plain), draw(cases.scalings)
    mask = [
        need and draw(st.sampled_from([True, True, False])) for need in trained(tensors, *range(1, len(tensors), 4))
    ]
    return *pair, scaling, tensors, dys, mask


@given(problems())
@settings(max_examples=150, deadline=None)
def test_any_problem_is_as_good_as_torch(problem):
    assert_as_good_as_torch(*problem)


@pytest.mark.exhaustive
@given(problems())
@settings(max_examples=1500, deadline=None)
def test_any_problem_is_as_good_as_torch_at_length(problem):
    assert_as_good_as_torch(*problem)


@given(
    sizes=st.tuples(*[st.sampled_from([0, 1, 63, 512, 768, 8192, 14336, 150_000])] * 3),
    R=st.integers(1, 128),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    arch=st.sampled_from([0, 70, 75, 80, 86, 89, 90, 100, 103, 120, 999]),
    clients=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_problem_on_every_gpu_gets_tiles(sizes, R, dtype, arch, clients):
    tiles = pick_tiles(*sizes, R, dtype, arch, clients)
    assert tiles == pick_tiles(*sizes, R, dtype, arch, clients)
    assert tiles.gemm in gemm_tiles(R, dtype, arch, clients)
    assert 1 <= tiles.splits <= kernels.MAX_PARTS
    assert tiles.chunk >= tiles.grad.BM and tiles.chunk % tiles.grad.BM == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiles.chunk = 1


def test_large_products_get_large_tiles_and_small_ones_enough_programs():
    large, small = (pick_tiles(M, 768, 768, 16, torch.bfloat16, 90).gemm for M in (32768, 256))
    assert (large.BM, large.BN) == (128, 256) and (small.BM, small.BN) == (64, 64)
    assert pick_tiles(32768, 4096, 4096, 16, torch.bfloat16, 86).gemm.BN == 64


def test_what_the_kernels_take():
    def rows(device, dtype=torch.bfloat16):
        return mock.Mock(device=torch.device(device), dtype=dtype)

    def arch(device):
        return {"cuda:0": 90, "cuda:1": 75}.get(str(device), 0)

    with mock.patch.object(kernels, "_arch", arch):
        assert all(kernels.takes(rows("cuda:0"), rank) for rank in (1, 128))
        assert not any(kernels.takes(rows("cuda:0"), rank) for rank in (0, 129))
        assert not kernels.takes(rows("cuda:1"), 8) and not kernels.takes(rows("cpu"), 8)
        assert not kernels.takes(rows("cuda:0", torch.float64), 8)
