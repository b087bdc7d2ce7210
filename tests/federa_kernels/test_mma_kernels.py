"""The CUDA C++ kernels of lora_linear: their own source on the CPU, thread by thread (tests/emulator), against float64.

What nobody has written is NaN, in outputs as in shared memory. Threads run forward, but for the tests of their order.
Where there is a GPU and a build that has them, the kernels run there.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels import load_extension, lora_linear, lora_linear_shared
from federa_kernels.lora_linear import dispatch, mma, op, path_for
from federa_kernels.lora_linear.tiles import MMA_GEMM, pick_mma_tiles

from . import against_float64 as cases
from .against_float64 import DTYPES, assert_as_good_as_torch, run
from .emulated import ORDERS, Emulated, assert_within_bounds
from .test_triton_kernels import (
    CUTS,
    DEVICE,
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

launch = op.launchers()
# Around the tiles' 64, 128 and 256 rows and columns and steps of 32 and 64; rows on 16 bytes and beside them.
SHAPES = [
    (1, 1, 1, 1),
    (17, 33, 7, 1),
    (63, 65, 64, 3),
    (64, 64, 128, 8),
    (65, 136, 104, 16),
    (130, 264, 100, 24),
    (70, 40, 72, 64),
    (5, 257, 96, 100),
    (9, 24, 16, 128),
    (0, 16, 24, 12),
]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
halves = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


@pytest.fixture(scope="module")
def emulator(request):
    return Emulated(request.getfixturevalue("mma_library")) if DEVICE == "cpu" else None


@pytest.fixture
def emulated(emulator):
    if emulator is None:
        pytest.skip("for the emulator alone")
    return emulator


@pytest.fixture(autouse=True)
def these_kernels(emulator, poisoned, monkeypatch):
    """They are chosen, and without a GPU launches go to the emulator."""

    def emulate(name, values):
        emulator("lora_linear_mma", name.encode(), ctypes.byref(values), ctypes.c_size_t(ctypes.sizeof(values)))

    if emulator is not None:
        emulator.order(0)
        monkeypatch.setattr(mma, "_run", emulate)
    elif missing := mma.why_not():
        pytest.skip(missing)
    monkeypatch.setattr(launch, "_kernels", "mma")


def tiles_of(name, R):
    """None for what is picked; "large" tiles of 128 x 128, "parted" K and M, "two passes" over dy."""
    picked = pick_mma_tiles(64, 64, 64, R, 80)
    changes = {
        "picked": None,
        "large": {"gemm": MMA_GEMM[0]},
        "parted": {"splits": 2, "chunk": 64},
        "two-passes": {"splits": 3, "chunk": 128, "one_pass": False},
    }[name]
    return changes and dataclasses.replace(picked, **changes)


@pytest.mark.parametrize("tiles", ["picked", "large", "parted", "two-passes"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}-R{}".format(*s))
def test_one_adapter_is_as_good_as_torch(shape, tiles):
    dtype = torch.float16 if tiles == "parted" else torch.bfloat16
    tensors, dy = make(*shape, dtype)
    pair = linear(tiles_of(tiles, shape[3])), cases.plain
    assert_as_good_as_torch(*pair, SCALING, tensors, dy, trained(tensors, 1))


@halves
@pytest.mark.parametrize("tiles", ["picked", "large"])
@pytest.mark.parametrize("cut", CUTS)
def test_clients_are_as_good_as_torch_one_by_one(cut, tiles, dtype):
    sizes = CUTS[cut]
    ranks = [(16, 8, 1, 12)[c % 4] for c in range(len(sizes))]
    tensors, dy = make_clients(sizes, ranks, dtype=dtype)
    pair = clients(sizes, ranks, tiles_of(tiles, 16)), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(len(sizes)), tensors, dy, trained(tensors, 1))


@pytest.mark.parametrize("bias", ["one", None])
@pytest.mark.parametrize("R", [12, 40, 128])
def test_clients_of_any_rank_and_bias(R, bias):
    sizes, ranks = [7, 0, 120, 64], [R, 5, 2**31 - 1, 17]
    tensors, dy = make_clients(sizes, None, R=R, bias=bias, dtype=torch.bfloat16)
    pair = clients(sizes, ranks, tiles_of("parted", R)), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(4), tensors, dy, trained(tensors, 1))


@pytest.mark.parametrize(
    ("widths", "ranks"),
    [([40, 17, 72], [8, 12, 5]), ([16, 24], [24, 1]), ([8] * 6, [3] * 6), ([20, 20], [120, 70])],
    ids=["query-key-value", "gate-up", "six", "ranks-of-190"],
)
def test_shared_inputs_are_as_good_as_torch_one_by_one(widths, ranks):
    tensors, dys = make_shared(70, 40, widths, ranks, torch.bfloat16)
    frozen = range(1, len(tensors), 4)
    assert_as_good_as_torch(shared(None), one_by_one, scalings_of(len(ranks)), tensors, dys, trained(tensors, *frozen))


@pytest.mark.parametrize(
    ("adapter", "weight"), [("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"), ("fp64", "fp64")]
)
def test_other_tensors_may_be_of_another_dtype(adapter, weight):
    tensors, dy = make(70, 24, 40, 8, torch.bfloat16, DTYPES[adapter], DTYPES[weight])
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


@pytest.mark.parametrize("layouts", [("transposed", "columns"), ("offset", "one number"), ("one row", "every other")])
def test_rows_in_any_layout(layouts):
    tensors, dy = make(33, 24, 40, 8, torch.float16, layouts=layouts)
    tensors[1:4] = [t.T.contiguous().T for t in tensors[1:4]]
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


def test_rows_that_do_not_start_on_16_bytes_give_the_same_bits():
    tensors, dy = make(70, 72, 104, 16, torch.bfloat16)
    beside = [cases.laid(t, "columns") for t in tensors]
    mask = trained(tensors, 1)
    for got, want in zip(
        run(linear(None), SCALING, beside, cases.laid(dy, "columns"), mask),
        run(linear(None), SCALING, tensors, dy, mask),
        strict=True,
    ):
        assert got is want is None or torch.equal(got, want)


def test_offsets_go_beyond_two_to_the_31():
    """Rows 2^27 entries apart, in memory that is only reserved."""
    (x, weight, lora_A, lora_B, bias), dy = make(20, 24, 40, 8, torch.bfloat16)
    if DEVICE != "cpu":
        pytest.skip("for the emulator alone")
    far, apart, no_reserve = [], 2**27, 0x4000  # MAP_NORESERVE of Linux
    for tensor in (x, weight, dy):
        room = mmap.mmap(-1, 2 * apart * 24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        place = torch.frombuffer(room, dtype=torch.bfloat16).as_strided(tensor.shape, (apart, 1))
        far.append(place.copy_(tensor))
    needs = [True, False, True, True, True]
    y, h = launch.launch_lora_linear_fwd(x, weight, lora_A, lora_B, bias, SCALING)
    assert torch.equal(launch.launch_lora_linear_fwd(*far[:2], lora_A, lora_B, bias, SCALING)[0], y)
    grads = launch.launch_lora_linear_bwd(dy, x, h, weight, lora_A, lora_B, SCALING, needs)
    others = launch.launch_lora_linear_bwd(far[2], far[0], h, far[1], lora_A, lora_B, SCALING, needs)
    for got, want in zip(others, grads, strict=True):
        assert got is want is None or torch.equal(got, want)


def problems_of_each_form():
    """(call, scaling, tensors, dys) that need every barrier: several steps, stages, clients and terms."""
    yield linear(tiles_of("large", 24)), SCALING, *make(130, 136, 264, 24, torch.bfloat16)
    yield linear(None), SCALING, *make(65, 40, 57, 8, torch.float16)
    sizes, ranks = [31, 2, 90], [16, 5, 12]
    yield (
        clients(sizes, ranks, tiles_of("parted", 16)),
        scalings_of(3),
        *make_clients(sizes, ranks, N=72, K=200, dtype=torch.bfloat16),
    )
    yield shared(None), scalings_of(2), *make_shared(70, 136, [72, 33], [8, 60], torch.bfloat16)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(emulated, order):
    for call, scaling, tensors, dys in problems_of_each_form():
        mask = trained(tensors, *range(1, len(tensors), 4))
        emulated.order(0)
        forward = run(call, scaling, tensors, dys, mask)
        emulated.order(order)
        for got, want in zip(run(call, scaling, tensors, dys, mask), forward, strict=True):
            assert got is want is None or torch.equal(got, want)


@pytest.fixture
def calls(monkeypatch):
    """What is given to the extension."""
    names, run_it = [], mma._run

    def noted(name, values):
        steps = ctypes.cast(values.steps, ctypes.POINTER(mma.Step)) if name == "steps" else None
        names.append([steps[i].kernel.decode() for i in range(values.count)] if steps else name)
        run_it(name, values)

    monkeypatch.setattr(mma, "_run", noted)
    return names


def test_each_operator_is_one_call(calls):
    """24 or 1500 columns: with more parts of dh than a product sums, their sum is a launch among the others."""
    for N, sums in ((24, []), (1500, ["sum"])):
        tensors, dy = make(70, N, 40, 8, torch.bfloat16)
        run(linear(None), SCALING, tensors, dy, trained(tensors, 1))
        assert calls == [["down", "gemm"], ["columns", *sums, "gemm", "columns"]]
        del calls[:]
    sizes, ranks = [31, 2, 90], [16, 5, 12]
    tensors, dy = make_clients(sizes, ranks, dtype=torch.bfloat16)
    run(clients(sizes, ranks, tiles_of("two-passes", 16)), scalings_of(3), tensors, dy, trained(tensors, 1))
    assert calls == [["down", "gemm"], ["columns", "down", "gemm", "columns", "sum"]]
    del calls[:]
    tensors, dys = make_shared(70, 40, [40, 24], [8, 12], torch.bfloat16)
    run(shared(None), scalings_of(2), tensors, dys, trained(tensors, 1, 5))
    assert calls == [["down", "gemm", "gemm"], ["columns", "columns", "gemm", "columns"]]


def test_one_call_and_one_by_one_give_the_same_bits(monkeypatch):
    for call, scaling, tensors, dys in problems_of_each_form():
        mask = trained(tensors, *range(1, len(tensors), 4))
        together = run(call, scaling, tensors, dys, mask)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_together", lambda tiles: contextlib.nullcontext())
            for got, want in zip(run(call, scaling, tensors, dys, mask), together, strict=True):
                assert got is want is None or torch.equal(got, want)


def test_what_pytorch_reads_in_between_is_launched_before(calls):
    """Without dx the rows' dtype of dh comes from PyTorch."""
    tensors, dy = make(70, 24, 40, 8, torch.bfloat16)
    mask = [False, False, True, True, False]
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, mask)
    assert calls[:3] == [["down", "gemm"], ["columns"], ["columns"]]


def test_a_call_that_fails_leaves_nothing_to_the_next(calls):
    def fail():
        x, lora_A = torch.ones(4, 8, dtype=torch.bfloat16, device=DEVICE), torch.ones(2, 8, device=DEVICE)
        with mma.in_one_call():
            launch._down(x, lora_A, launch.ONE, tiles_of("parted", 2))
            raise RuntimeError("the end")

    with pytest.raises(RuntimeError, match="the end"):
        fail()
    assert mma._held.steps is None and not calls
    tensors, dy = make(20, 24, 40, 8, torch.bfloat16)
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


def test_a_gradient_does_not_depend_on_which_others_are_asked_for():
    tensors, dy = make(70, 24, 18, 4, torch.float16)
    full = run(linear(tiles_of("two-passes", 4)), SCALING, tensors, dy, trained(tensors, 1))
    for kept in (0, 2, 3, 4):
        mask = [i == kept for i in range(5)]
        got = run(linear(tiles_of("two-passes", 4)), SCALING, tensors, dy, mask)
        assert [g is not None for g in got[1:]] == mask
        assert torch.equal(got[1 + kept], full[1 + kept])


def test_launches_do_not_depend_on_the_number_of_clients(emulated):
    counts = []
    for C in (2, 24):
        sizes = [24 // C] * C
        tensors, dy = make_clients(sizes, None, N=16, K=16, R=4, dtype=torch.bfloat16)
        before = emulated.launches()
        run(clients(sizes, None, None), [1.0] * C, tensors, dy, trained(tensors, 1))
        counts.append(emulated.launches() - before)
    assert counts == [6, 6]


@pytest.mark.parametrize("tiles", ["picked", "large"])
def test_one_client_never_reaches_another(tiles):
    sizes = [9, 14, 11]
    tensors, dy = make_clients(sizes, None, dtype=torch.bfloat16)
    tensors[0][9:23], dy[9:23] = torch.inf, torch.nan
    tensors[2][1], tensors[3][1] = torch.nan, torch.inf
    call = clients(sizes, None, tiles_of(tiles, 16))
    y, dx, _, dA, dB, db = run(call, [1.0] * 3, tensors, dy, trained(tensors, 1))
    for rows in (y, dx):
        assert rows[:9].isfinite().all() and rows[23:].isfinite().all() and not rows[9:23].isfinite().any()
    for grads in (dA, dB, db):
        assert grads[[0, 2]].isfinite().all()


@st.composite
def problems(draw):
    """(ours, the definition, scaling, tensors, dys, mask) of any form."""
    sizes = st.integers(1, 140)
    N, K, R = draw(sizes), draw(sizes), draw(st.sampled_from([1, 3, 8, 16, 20, 33]))
    dtype, seed = draw(st.sampled_from(list(HALVES.values()))), draw(st.integers(0, 2**31))
    tiles = tiles_of(draw(st.sampled_from(["picked", "large", "parted"])), R)
    form = draw(st.sampled_from(["one", "clients", "shared"]))
    if form == "clients":
        cuts = draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
        ranks = draw(st.none() | st.lists(st.integers(1, R), min_size=len(cuts), max_size=len(cuts)))
        bias, scaling = draw(st.sampled_from(["own", "one", None])), scalings_of(len(cuts))
        tensors, dys = make_clients(cuts, ranks, N, K, R, dtype, bias, seed)
        pair = clients(cuts, ranks, tiles), client_by_client(cuts, ranks)
    elif form == "shared":
        widths = draw(st.lists(sizes, min_size=1, max_size=3))
        tensors, dys = make_shared(draw(sizes), K, widths, [R] * len(widths), dtype, seed)
        pair, scaling = (shared(None), one_by_one), scalings_of(len(widths))
    else:
        layouts = draw(st.tuples(*[st.sampled_from(["contiguous", "offset", "columns"])] * 2))
        tensors, dys = make(
            draw(sizes), N, K, R, dtype, draw(st.sampled_from([dtype, torch.float32])), seed=seed, layouts=layouts
        )
        pair, scaling = (linear(tiles), cases.plain), draw(cases.scalings)
    mask = [
        need and draw(st.sampled_from([True, True, False])) for need in trained(tensors, *range(1, len(tensors), 4))
    ]
    return *pair, scaling, tensors, dys, mask


@given(problems())
@settings(max_examples=20, deadline=None)
def test_any_problem_is_as_good_as_torch(problem):
    assert_as_good_as_torch(*problem)


@pytest.mark.exhaustive
@given(problem=problems(), order=st.sampled_from(ORDERS))
@settings(max_examples=600, deadline=None)
def test_any_problem_in_any_order_is_as_good_as_torch(emulator, problem, order):
    if emulator is not None:
        emulator.order(order)
    assert_as_good_as_torch(*problem)


def test_the_operator_takes_them(monkeypatch, emulated):
    """As on a GPU, where the path of rows that the kernels take is "triton"."""
    monkeypatch.setattr(op, "path_of", lambda *_: "triton")
    tensors, dy = make(20, 24, 40, 8, torch.bfloat16)
    before = emulated.launches()
    call = lambda scaling, x, W, A, B, b: lora_linear(x, W, A, B, scaling, b)  # noqa: E731
    assert_as_good_as_torch(call, cases.plain, SCALING, tensors, dy, trained(tensors, 1))
    assert emulated.launches() == before + 5  # h, y; dy, dx, dA: one piece of each gradient, which no sum needs


def test_the_table_chooses_forward_and_backward(monkeypatch, emulated):
    """These kernels forward, cuBLAS (here the CPU's) backward; the other way round for shared inputs."""
    one, shared_inputs = dispatch.bucket(20, 24, 40, 8), dispatch.bucket(20, 48, 40, 16)
    table = {
        (0, torch.bfloat16, "one forward", *one): ("sm90", "mma"),  # sm90 is for Hopper alone
        (0, torch.bfloat16, "one backward", *one): ("torch",),
        (0, torch.bfloat16, "shared forward", *shared_inputs): ("torch",),
        (0, torch.bfloat16, "shared backward", *shared_inputs): ("mma",),
    }

    def path_of(rows, packed, ranks, kind, weights, needs_weight=False):
        return "reference" if launch.choose(kind, rows, weights, ranks) == "torch" else "triton"

    monkeypatch.setattr(launch, "_kernels", "auto")
    monkeypatch.setattr(op, "path_of", path_of)
    monkeypatch.setattr(dispatch, "why_not", lambda name: None)
    monkeypatch.setattr(dispatch, "entries", lambda: table)
    dispatch.fastest.cache_clear()
    try:
        tensors, dy = make(20, 24, 40, 8, torch.bfloat16)
        counts = [emulated.launches()]
        with torch.no_grad():
            lora_linear(*tensors[:4], SCALING, tensors[4])
        counts.append(emulated.launches())
        call = lambda scaling, x, W, A, B, b: lora_linear(x, W, A, B, scaling, b)  # noqa: E731
        assert_as_good_as_torch(call, cases.plain, SCALING, tensors, dy, trained(tensors, 1))
        counts.append(emulated.launches())
        tensors, dys = make_shared(20, 40, [24, 24], [8, 8], torch.bfloat16)

        def together(scalings, x, *flat):
            each = zip(flat[0::4], flat[1::4], flat[2::4], scalings, flat[3::4], strict=True)
            return lora_linear_shared(x, list(each))

        mask = trained(tensors, 1, 5)
        assert_as_good_as_torch(together, one_by_one, scalings_of(2), tensors, dys, mask)
        counts.append(emulated.launches())
        assert [after - before for before, after in itertools.pairwise(counts)] == [2, 2, 4]
    finally:
        dispatch.fastest.cache_clear()


@given(
    sizes=st.tuples(*[st.sampled_from([0, 1, 63, 512, 768, 8192, 14336, 150_000])] * 3),
    R=st.integers(1, 128),
    arch=st.sampled_from([80, 86, 89, 90, 100, 120, 999]),
)
@settings(max_examples=200, deadline=None)
def test_every_problem_on_every_gpu_gets_tiles(sizes, R, arch):
    tiles = pick_mma_tiles(*sizes, R, arch)
    assert tiles.gemm in MMA_GEMM and all(tile.kernels == "mma" for tile in (tiles.gemm, tiles.down, tiles.grad))
    assert 1 <= tiles.splits <= launch.MAX_PARTS and not tiles.on_the_fly
    assert tiles.one_pass == (R <= 32) == (tiles.grad.BN == 256)
    assert tiles.chunk % tiles.grad.BM == 0 and sizes[0] <= 65535 * tiles.chunk


def test_who_takes_which_rows():
    assert [launch.kernels_for(DTYPES[name]) for name in ("bf16", "fp16", "fp32")] == ["mma", "mma", "triton"]
    launch.use_kernels("triton")
    assert launch.kernels_for(torch.bfloat16) == "triton"


def test_a_build_without_them_says_so():
    if load_extension() is not None and not load_extension().build_info()["cuda_missing"]:
        pytest.skip("this build has them")
    with pytest.raises(RuntimeError, match="lora_linear: the kernels in CUDA C\\+\\+ must be built"):
        launch.use_kernels("mma")


def test_a_weight_on_a_gpu_is_told_who_multiplies_it(monkeypatch):
    weight = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "takes", lambda rows, rank: True)
    fake = type("Weight", (), {"device": torch.device("cuda"), "new_empty": weight.new_empty})()
    assert path_for(fake, 8, torch.bfloat16) == "CUDA C++: fused"
    assert path_for(fake, 8, torch.float32) == "Triton: fused"


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("down", mma.Down(kind=0, M=1, splits=1), "rows must be bfloat16 or float16"),
        ("down", mma.Down(kind=1, M=1, splits=1, R=129), "ranks must be 1 to 128"),
        ("gemm", mma.Gemm(kind=1, M=1, N=1, P=5), "one product takes 1 to 4 terms"),
        ("gemm", mma.Gemm(kind=1, M=1, N=1, P=1, BM=128, BN=64), "tiles must be 128 x 128 or 64 x 64"),
        ("columns", mma.Columns(kind=1, M=1, N=1, R=33, BN=256), "BN must be 256 up to rank 32, else 128"),
        ("columns", mma.Columns(kind=1, N=1, R=33, BN=128, dh_parts=16), "dh and dB from one pass go up to rank 32"),
        ("columns", mma.Columns(kind=1, M=2**30, N=1, R=1, BN=256, chunk=64), "at most 2^31 - 1 by 65535 blocks"),
        ("sum", mma.Columns(), "the arguments have another size"),
        ("up", mma.Sum(), "kernel must be down, gemm, columns, sum or steps"),
        ("steps", mma.Sum(), "the arguments have another size"),
    ],
)
def test_what_would_reach_other_memory_is_refused(name, values, error):
    with pytest.raises((RuntimeError, ValueError), match=f"lora_linear \\(CUDA C\\+\\+\\): .*{re.escape(error)}"):
        mma._run(name, values)


@pytest.mark.exhaustive
def test_nothing_reads_or_writes_beyond_an_end(tmp_path):
    assert_within_bounds(tmp_path, "csrc/cuda/lora_linear_mma.cu", "tests/emulator/bounds.cpp")


@pytest.mark.gpu
def test_on_a_gpu_every_small_problem_is_as_good_as_torch():
    """What the emulator proves, on the real thing."""
    for tiles in ("picked", "large", "parted", "two-passes"):
        for shape in SHAPES:
            test_one_adapter_is_as_good_as_torch(shape, tiles)
        for cut in CUTS:
            test_clients_are_as_good_as_torch_one_by_one(cut, tiles, torch.bfloat16)
    for layouts in (("transposed", "columns"), ("offset", "one number")):
        test_rows_in_any_layout(layouts)
    test_rows_that_do_not_start_on_16_bytes_give_the_same_bits()
    test_one_client_never_reaches_another("large")


@pytest.mark.gpu
def test_on_a_gpu_twenty_runs_have_the_same_bits():
    for call, scaling, tensors, dys in problems_of_each_form():
        mask = trained(tensors, *range(1, len(tensors), 4))
        first = run(call, scaling, tensors, dys, mask)
        for _ in range(20):
            for got, want in zip(run(call, scaling, tensors, dys, mask), first, strict=True):
                assert got is want is None or torch.equal(got, want)
