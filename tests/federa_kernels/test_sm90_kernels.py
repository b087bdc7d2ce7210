"""The product of lora_linear for Hopper: its own source on the CPU (tests/emulator), against float64.

What nobody has written is NaN, in outputs as in shared memory; copies, products and stores happen as late as they may.
Where there is a Hopper GPU and a build that has them, the kernels run there.
"""

import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa_kernels import load_extension, lora_linear
from federa_kernels.lora_linear import mma, op, sm90
from federa_kernels.lora_linear.tiles import SM90_GEMM, pick_sm90_tile

from . import against_float64 as cases
from .against_float64 import DTYPES, assert_as_good_as_torch, run
from .emulated import ORDERS, Emulated, assert_within_bounds, build
from .test_triton_kernels import (
    CUTS as USUAL_CUTS,
)
from .test_triton_kernels import (
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
SOURCES = ("csrc/cuda/lora_linear_sm90.cu", "tests/emulator/lora_linear_sm90.cpp")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# (BM, BN, cluster, splits)
TILES = [(128, 256, 2, 1), (128, 256, 1, 1), (128, 128, 2, 1), (128, 128, 1, 1), (64, 128, 2, 1)]
SPLIT = [(64, 128, 1, 2), (64, 128, 2, 3), (128, 128, 1, 4), (128, 256, 1, 2)]
tiled = pytest.mark.parametrize("tile", TILES + SPLIT, ids="{0[0]}x{0[1]}-cluster{0[2]}-splits{0[3]}".format)
# Around the tiles' 128 and 256, the steps of 64 and 16 of the depth, more steps than stages, more tiles than clusters.
SHAPES = [
    (1, 8, 8, 1),
    (17, 40, 56, 4),
    (63, 72, 64, 8),
    (64, 64, 128, 12),
    (65, 136, 104, 16),
    (128, 256, 512, 16),
    (130, 264, 72, 24),
    (257, 520, 24, 64),
    (5, 8, 520, 100),
]
CUTS = USUAL_CUTS | {"across-tiles": [100, 30, 0, 126, 1, 260, 5]}


@pytest.fixture(scope="module")
def emulators(request, tmp_path_factory):
    """The product's and the other kernels', or None on a GPU."""
    if DEVICE == "cuda":
        return None
    return Emulated(build(tmp_path_factory.mktemp("sm90"), *SOURCES)), Emulated(request.getfixturevalue("mma_library"))


@pytest.fixture(autouse=True)
def launched(emulators, poisoned, monkeypatch):
    """They are chosen, and without a GPU launches go to the emulator. -> the names of kernels, as they are launched"""
    names = []

    def noted(prefix, of, call):
        def go(name, values):
            names.append(prefix + name)
            call(name, values)

        monkeypatch.setattr(of, "_run", go)

    def emulate(emulator, function):
        def call(name, values):
            emulator(function, name.encode(), ctypes.byref(values), ctypes.c_size_t(ctypes.sizeof(values)))

        return call

    if emulators is not None:
        for emulator in emulators:
            emulator.order(0)
        noted("sm90 ", sm90, emulate(emulators[0], "lora_linear_sm90"))
        noted("mma ", mma, emulate(emulators[1], "lora_linear_mma"))
        monkeypatch.setattr(launch, "_arch", lambda device: 90)
    elif missing := sm90.why_not():
        pytest.skip(missing)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")
    else:
        noted("sm90 ", sm90, sm90._run)
        noted("mma ", mma, mma._run)
    monkeypatch.setattr(launch, "_kernels", "sm90")
    return names


@pytest.fixture
def forced(monkeypatch):
    return lambda tile: monkeypatch.setattr(sm90, "pick_sm90_tile", lambda M, N, steps: tile)


@tiled
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}-R{}".format(*s))
def test_one_adapter_is_as_good_as_torch(launched, forced, shape, tile):
    forced(tile)
    dtype = torch.float16 if tile in ((128, 128, 1, 1), SPLIT[0]) else torch.bfloat16
    tensors, dy = make(*shape, dtype, adapter=torch.float32)
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))
    assert launched.count("sm90 gemm") == 2 and "mma gemm" not in launched


@pytest.mark.parametrize(
    ("M", "N", "tile"), [(1300, 16, TILES[3]), (2200, 264, TILES[2]), (700, 16, SPLIT[0])], ids=["1", "2", "splits"]
)
def test_bands_of_tiles_cover_the_whole_product(launched, forced, M, N, tile):
    """More rows of tiles than go over the columns together."""
    forced(tile)
    tensors, dy = make(M, N, 16, 8, torch.bfloat16)
    call = lambda scaling, *t: launch.launch_lora_linear_fwd(*t, scaling)[0]  # noqa: E731
    assert_as_good_as_torch(call, cases.plain, SCALING, tensors, dy, [False] * 5)
    assert "sm90 gemm" in launched


@pytest.mark.parametrize(
    ("widths", "ranks"),
    [([40, 16, 72], [8, 12, 4]), ([16, 24], [24, 1]), ([8] * 6, [3] * 6)],
    ids=["query-key-value", "gate-up", "six"],
)
def test_shared_inputs_are_as_good_as_torch_one_by_one(launched, widths, ranks):
    tensors, dys = make_shared(70, 40, widths, ranks, torch.bfloat16)
    frozen = range(1, len(tensors), 4)
    assert_as_good_as_torch(shared(None), one_by_one, scalings_of(len(ranks)), tensors, dys, trained(tensors, *frozen))
    together = -(-len(widths) // 4)  # forward; and dx
    assert launched.count("sm90 gemm") == launched.count("sm90 low") == 2 * together and "mma gemm" not in launched


@pytest.mark.parametrize("tile", [TILES[0], TILES[4], *SPLIT[1:3]], ids=str)
def test_shared_inputs_in_any_tile(launched, forced, tile):
    forced(tile)
    tensors, dys = make_shared(300, 72, [136, 8, 264], [8, 12, 4], torch.float16)
    tensors[5] = tensors[5].T.contiguous().T  # which goes alone, and keeps dx from going this way
    assert_as_good_as_torch(shared(None), one_by_one, scalings_of(3), tensors, dys, trained(tensors, 1, 5, 9))
    assert launched.count("sm90 gemm") == 2 and launched.count("mma gemm") == 1


@pytest.mark.parametrize("tile", [TILES[0], TILES[3], SPLIT[1]], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_clients_are_as_good_as_torch_one_by_one(launched, forced, cut, tile):
    forced(tile)
    sizes, ranks = CUTS[cut], [(16, 8, 1, 12)[c % 4] for c in range(len(CUTS[cut]))]
    N, K = (264, 136) if cut == "across-tiles" else (40, 24)
    tensors, dy = make_clients(sizes, ranks, N, K, dtype=torch.float16 if tile == TILES[3] else torch.bfloat16)
    pair = clients(sizes, ranks, None), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(len(sizes)), tensors, dy, trained(tensors, 1))
    assert launched.count("sm90 gemm") == 2 * (sum(sizes) > 0)


@pytest.mark.parametrize(("R", "bias"), [(12, "one"), (40, None), (100, "own")])
def test_clients_of_any_rank_and_bias(launched, R, bias):
    sizes, ranks = [7, 0, 120, 64], [R, 5, 2**31 - 1, 17]
    tensors, dy = make_clients(sizes, None, R=R, bias=bias, dtype=torch.bfloat16)
    pair = clients(sizes, ranks, None), client_by_client(sizes, ranks)
    assert_as_good_as_torch(*pair, scalings_of(4), tensors, dy, trained(tensors, 1))
    assert launched.count("sm90 gemm") == 2


def test_one_client_never_reaches_another(forced):
    sizes, rows, others = [90, 80, 30], slice(90, 170), [0, 2]
    tensors, dy = make_clients(sizes, None, dtype=torch.bfloat16)
    for tile in TILES + SPLIT:
        forced(tile)
        call, mask = clients(sizes, None, None), trained(tensors, 1)
        y, dx, _, *grads = run(call, [1.0] * 3, tensors, dy, mask)
        lost = [t.clone() for t in (*tensors, dy)]
        lost[0][rows], lost[5][rows], lost[4][1] = torch.inf, torch.nan, torch.nan
        lost[2][1], lost[3][1] = torch.nan, torch.inf
        y_lost, dx_lost, _, *grads_lost = run(call, [1.0] * 3, lost[:5], lost[5], mask)
        for got, want in ((y_lost, y), (dx_lost, dx)):
            assert not got[rows].isfinite().any()
            got[rows] = want[rows]
            assert torch.equal(got, want)
        for got, want in zip(grads_lost, grads, strict=True):
            assert torch.equal(got[others], want[others])


def test_an_infinite_entry_of_a_factor_reaches_its_column_of_its_client():
    sizes, rows, scalings = [90, 80, 30], slice(90, 170), [1.0, 2.0, 1.0]
    (x, weight, A, B, bias), dy = make_clients(sizes, None, dtype=torch.float16)
    call, mask = clients(sizes, None, None), [True, False, False, False, False]
    A_lost, B_lost = A.clone(), B.clone()
    A_lost[1, 4, 7], B_lost[1, 5, 3] = torch.inf, torch.finfo(torch.float16).max  # which scaling takes beyond float16
    y, dx = run(call, scalings, [x, weight, A, B, bias], dy, mask)[:2]
    y_lost = run(call, scalings, [x, weight, A, B_lost, bias], dy, mask)[0]
    dx_lost = run(call, scalings, [x, weight, A_lost, B, bias], dy, mask)[1]
    for got, want, column in ((y_lost, y, 5), (dx_lost, dx, 7)):
        assert got[rows, column].isnan().all()
        got[rows, column] = want[rows, column]
        assert torch.equal(got, want)


@pytest.mark.parametrize("bias", ["fp32", "fp64", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_bias_and_a_weight_in_either_order(launched, bias, transposed):
    tensors, dy = make(70, 136, 72, 8, torch.float16, bias=bias is not None)
    if bias:
        tensors[4] = tensors[4].to(DTYPES[bias])
    if transposed:
        tensors[1] = tensors[1].T.contiguous().T
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))
    assert launched.count("sm90 gemm") == 2


REFUSED = {
    "odd N": (70, 37, 40, 8),
    "odd K": (70, 40, 37, 8),
    "no rows": (0, 40, 40, 8),
}


@pytest.mark.parametrize("shape", REFUSED.values(), ids=REFUSED)
def test_what_tma_refuses_goes_the_portable_way(launched, monkeypatch, shape):
    tensors, dy = make(*shape, torch.bfloat16)
    mask = trained(tensors, 1)
    got = run(linear(None), SCALING, tensors, dy, mask)
    assert "sm90 gemm" not in launched and "mma gemm" in launched
    monkeypatch.setattr(launch, "_kernels", "mma")
    for a, b in zip(got, run(linear(None), SCALING, tensors, dy, mask), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("layouts", [("transposed", "columns"), ("offset", "one number"), ("one row", "every other")])
def test_rows_in_any_layout(layouts):
    tensors, dy = make(33, 24, 40, 8, torch.float16, layouts=layouts)
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))


def test_rows_beside_16_bytes_are_not_reached_and_those_of_a_part_are(launched):
    tensors, dy = make(70, 72, 104, 16, torch.bfloat16)
    want = run(linear(None), SCALING, tensors, dy, trained(tensors, 1))
    for start, kernels in ((8, ["sm90 low", "sm90 gemm"]), (3, ["mma gemm"])):
        room = tensors[0].new_full((70, 120), torch.nan)
        x = room[:, start : start + 104].copy_(tensors[0])
        del launched[:]
        y, h = launch.launch_lora_linear_fwd(x, *tensors[1:], SCALING)
        assert launched == ["mma down", *kernels]
        torch.testing.assert_close(y, want[0])
        assert h.isfinite().all()


def test_a_weight_of_another_dtype_goes_the_portable_way(launched):
    tensors, dy = make(70, 24, 40, 8, torch.bfloat16, weight=torch.float32)
    assert_as_good_as_torch(linear(None), cases.plain, SCALING, tensors, dy, trained(tensors, 1))
    assert not any(name.startswith("sm90") for name in launched)


def test_h_is_that_of_the_portable_way(monkeypatch):
    tensors, _ = make(70, 40, 72, 12, torch.bfloat16)
    of_clients, _ = make_clients([30, 0, 40], [5, 1, 16], dtype=torch.bfloat16)
    of_clients[0][7, 3] = torch.inf  # 0 times which is NaN, but h is zero beyond a client's rank
    segments = [torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([0, 30, 30, 70], [5, 1, 16])]
    segments.insert(1, torch.tensor(scalings_of(3), device=DEVICE))

    def both():
        own = launch.launch_lora_linear_clients_fwd(*of_clients, *segments)[1]
        return launch.launch_lora_linear_fwd(*tensors, SCALING)[1], own

    got = both()
    monkeypatch.setattr(launch, "_kernels", "mma")
    for h, want in zip(got, both(), strict=True):
        torch.testing.assert_close(h, want, rtol=0, atol=0, equal_nan=True)
    assert not got[1][:30, 5:].any()


def test_launches_do_not_depend_on_the_number_of_clients(launched):
    counts = []
    for C in (2, 24):
        tensors, dy = make_clients([24 // C] * C, None, N=16, K=16, R=4, dtype=torch.bfloat16)
        del launched[:]
        run(clients([24 // C] * C, None, None), [1.0] * C, tensors, dy, trained(tensors, 1))
        counts.append(len(launched))
    assert counts == [8, 8]


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_all_that_happens_changes_no_bit(emulators, forced, order):
    if emulators is None:
        pytest.skip("for the emulator alone")
    problems = ((TILES[0], (600, 16, 200, 24)), (TILES[3], (70, 136, 520, 8)), (SPLIT[1], (200, 136, 520, 8)))
    for tile, shape in problems:
        forced(tile)
        tensors, dy = make(*shape, torch.bfloat16)
        results = []
        for seed in (0, order):
            emulators[0].order(seed)
            results.append(run(linear(None), SCALING, tensors, dy, trained(tensors, 1)))
            tensors_of, dy_of = make_clients([90, 200], [8, 16], 136, 72, dtype=torch.bfloat16)
            results[-1] += run(clients([90, 200], [8, 16], None), [1.0, 2.0], tensors_of, dy_of, trained(tensors_of, 1))
        for got, want in zip(*results, strict=True):
            assert got is want is None or torch.equal(got, want)


def test_the_operator_takes_them(monkeypatch, launched):
    """As on a GPU, where the path of rows that the kernels take is "triton"."""
    monkeypatch.setattr(op, "path_of", lambda *_: "triton")
    tensors, dy = make(20, 24, 40, 8, torch.bfloat16)
    call = lambda scaling, x, W, A, B, b: lora_linear(x, W, A, B, scaling, b)  # noqa: E731
    assert_as_good_as_torch(call, cases.plain, SCALING, tensors, dy, trained(tensors, 1))
    of_y = ["mma down", "sm90 low", "sm90 gemm"]
    assert launched == [*of_y, "mma columns", "sm90 low", "sm90 gemm", "mma columns"]


@pytest.mark.parametrize("arch", [80, 86, 89, 100, 103, 120])
def test_no_other_gpu_sees_them(monkeypatch, launched, arch):
    if DEVICE == "cuda":
        pytest.skip("for the emulator alone")
    monkeypatch.setattr(launch, "_arch", lambda device: arch)
    tensors, dy = make(20, 24, 40, 8, torch.bfloat16)
    run(linear(None), SCALING, tensors, dy, trained(tensors, 1))
    assert launched and not any(name.startswith("sm90") for name in launched)


def test_who_is_asked_for_them(monkeypatch):
    assert [launch.kernels_for(DTYPES[name]) for name in ("bf16", "fp16", "fp32")] == ["sm90", "sm90", "triton"]
    if (extension := load_extension()) is None or extension.build_info()["cuda_missing"]:
        with pytest.raises(RuntimeError, match="lora_linear: the kernels in CUDA C\\+\\+ must be built"):
            launch.use_kernels("sm90")


@given(M=st.integers(1, 2**31 - 256), N=st.integers(1, 2**31 - 256), steps=st.integers(1, 2**25))
def test_every_product_gets_a_tile(M, N, steps):
    BM, BN, cluster, splits = pick_sm90_tile(M, N, steps)
    assert (BM, BN) in SM90_GEMM and cluster in (1, 2) and splits in (1, 2, 4, 8) and 1 in (cluster, splits)


def test_tiles_fill_the_last_turn():
    """768 columns: 192 wide tiles in two turns of 132, or 384 narrow ones in three of 5/8 of the time."""
    assert [pick_sm90_tile(8192, N, 13)[:2] for N in (768, 3072, 4096)] == [(128, 128), (128, 256), (128, 256)]
    assert [pick_sm90_tile(M, 4096, 65)[3] for M in (1024, 2048, 8192)] == [1, 1, 1]


def test_small_products_fill_the_gpu():
    """Of 768 x 768, and of 3072 deep: blocks at work, of 132."""
    for steps in (13, 49):
        for M, at_work in ((512, 96), (256, 96), (128, 96), (64, 48)):
            BM, BN, _, splits = pick_sm90_tile(M, 768, steps)
            assert -(-M // BM) * (768 // BN) * splits == at_work


@given(columns=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_columns_of_tiles_belong_to_one_product_after_the_other(emulators, columns):
    if emulators is None:
        pytest.skip("for the emulator alone")
    places = torch.full((sum(columns), 2), -1, dtype=torch.int32)
    emulators[0].library.products_of((ctypes.c_int * 4)(*columns), sum(columns), ctypes.c_void_p(places.data_ptr()))
    assert places.tolist() == [[p, c] for p, count in enumerate(columns) for c in range(count)]


@given(steps=st.integers(0, 2**31 - 1), splits=st.integers(1, 8))
def test_splits_share_all_steps_evenly(emulators, steps, splits):
    if emulators is None:
        pytest.skip("for the emulator alone")
    begins = [emulators[0].library.share_begin(steps, split, splits) for split in range(splits + 1)]
    sizes = [b - a for a, b in itertools.pairwise(begins)]
    assert begins[0] == 0 and begins[-1] == steps and max(sizes) - min(sizes) <= 1


@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_tiles_come_once_each_and_in_bands(emulators, rows, columns):
    if emulators is None:
        pytest.skip("for the emulator alone")
    places = torch.full((rows * columns, 2), -1, dtype=torch.int32)
    emulators[0].library.places_of(rows, columns, ctypes.c_void_p(places.data_ptr()))
    assert sorted(map(tuple, places.tolist())) == [(r, c) for r in range(rows) for c in range(columns)]
    bands = places[:, 0] // 8
    assert torch.equal(bands, bands.sort().values)
    for band in places[:, 1].split([8 * columns] * (rows // 8) + [rows % 8 * columns]):
        assert torch.equal(band, band.sort().values)


@given(
    sizes=st.lists(st.integers(0, 3) | st.integers(0, 300), min_size=1, max_size=8), height=st.sampled_from([128, 256])
)
def test_every_block_of_spread_rows_is_one_clients(emulators, sizes, height):
    """What the producer copies for each client of a tile: its rows in their places, and else the gaps' zeros."""
    if emulators is None:
        pytest.skip("for the emulator alone")
    library, M, C, first_last = emulators[0].library, sum(sizes), len(sizes), (ctypes.c_int * 2)()
    offsets = (ctypes.c_int * (C + 1))(*itertools.accumulate(sizes, initial=0))
    library.spread_row.restype = ctypes.c_int64
    place = lambda row, c: library.spread_row(ctypes.c_int64(row), ctypes.c_int64(c))  # noqa: E731
    owner = [c for c, size in enumerate(sizes) for _ in range(size)]
    lies = [None] * place(M, C - 1)
    assert len(lies) == M + sm90.GAP * (C - 1)
    for row in range(M):
        assert lies[place(row, owner[row])] is None
        lies[place(row, owner[row])] = row
    for top in range(0, M, height):
        stop = min(top + height, M)
        library.clients_of(offsets, C, top, stop, first_last)
        assert list(first_last) == [owner[top], owner[stop - 1]]
        for c in range(first_last[0], first_last[1] + 1):
            copied = lies[place(top, c) : place(stop, c)]
            assert copied == [row if owner[row] == c else None for row in range(top, stop)]


ONE = mma.Segments(C=1)
PRODUCT = {"N": 8, "P": 1, "out": 16}


def gemm(pair=(), product=None, **values):
    """Sound arguments, but for what is changed."""
    good = {"kind": 1, "M": 8, "BM": 128, "BN": 128, "cluster": 1, "splits": 1, "count": 1, "segments": ONE}
    return sm90.Gemm(**good | values, products=(sm90.Product(**PRODUCT | (product or {})),), pairs=(sm90.Pair(*pair),))


def lows(**values):
    return sm90.Lows(1, (sm90.Low(**{"segments": ONE} | values),))


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("gemm", gemm((16, 8, 8, 16, 8), kind=0), "rows must be bfloat16 or"),
        ("gemm", gemm(M=2**31), "M must be 1 to 2\\^31 - 256"),
        ("gemm", gemm(product={"N": 2**31}), "N must be 1 to 2\\^31 - 256"),
        ("gemm", gemm(count=5), "one launch takes 1 to 4 products"),
        ("gemm", gemm(product={"P": 9}), "products take 1 to 8 pairs"),
        ("gemm", gemm(BN=64), "tiles must be 128 x 256, 128 x 128 or 64 x 128"),
        ("gemm", gemm(splits=0), "splits must be 1 to 8, in clusters of at most 8 blocks"),
        ("gemm", gemm(cluster=2, splits=5), "splits must be 1 to 8, in clusters of at most 8"),
        ("gemm", gemm(cluster=4), "clusters must be of 1 or 2 tiles"),
        ("gemm", gemm(), "depths must be 1 to 2\\^31 - 256"),
        ("gemm", gemm((8, 8, 8, 16, 8)), "rows of every matrix must begin on 16"),
        ("gemm", gemm((16, 8, 8, 16, 8), {"N": 9}), "rows of every matrix must"),
        ("gemm", gemm(segments=mma.Segments(16, C=2**30)), "rows of clients must be fewer than 2"),
        ("gemm", gemm(segments=mma.Segments(16, C=2)), "clients must have a float32 bias"),
        ("low", sm90.Lows(5), "one launch takes 1 to 4"),
        ("low", lows(M=-1), "sizes must not be negative"),
        ("low", lows(segments=mma.Segments()), "there must be one client or more"),
        ("low", sm90.Gemm(), "the arguments have another size"),
        ("down", sm90.Lows(), "kernel must be low or gemm"),
    ],
)
def test_what_would_reach_other_memory_is_refused(name, values, error):
    with pytest.raises((RuntimeError, ValueError), match=f"lora_linear \\(CUDA C\\+\\+, sm_90a\\): {error}"):
        sm90._run(name, values)


@st.composite
def problems(draw):
    """(ours, the definition, scaling, tensors, dys), the tile, the order."""
    sizes = st.integers(1, 24).map(lambda n: 8 * n) | st.integers(1, 300)
    N, K, R = draw(sizes), draw(sizes), draw(st.integers(1, 70))
    dtype, seed = draw(st.sampled_from(list(HALVES.values()))), draw(st.integers(0, 2**31))
    tile, order = draw(st.sampled_from(TILES + SPLIT)), draw(st.sampled_from(ORDERS) | st.integers(3, 2**31))
    form = draw(st.sampled_from(["one", "clients", "shared"]))
    if form == "clients":
        cuts = draw(st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any))
        ranks = draw(st.none() | st.lists(st.integers(1, R), min_size=len(cuts), max_size=len(cuts)))
        bias = draw(st.sampled_from(["own", "one", None]))
        tensors, dys = make_clients(cuts, ranks, N, K, R, dtype, bias, seed)
        pair = clients(cuts, ranks, None), client_by_client(cuts, ranks)
        return *pair, scalings_of(len(cuts)), tensors, dys, tile, order
    if form == "shared":
        widths = draw(st.lists(sizes, min_size=1, max_size=4))
        tensors, dys = make_shared(draw(sizes), K, widths, [R] * len(widths), dtype, seed)
        return shared(None), one_by_one, scalings_of(len(widths)), tensors, dys, tile, order
    tensors, dy = make(draw(sizes), N, K, R, dtype, draw(st.sampled_from([dtype, torch.float32])), seed=seed)
    return linear(None), cases.plain, draw(cases.scalings), tensors, dy, tile, order


def assert_good(emulators, problem):
    *problem, tile, order = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90, "pick_sm90_tile", lambda M, N, steps: tile)
        if emulators:
            emulators[0].order(order)
        assert_as_good_as_torch(*problem, trained(problem[3], *range(1, len(problem[3]), 4)))


@given(problem=problems())
@settings(max_examples=6, deadline=None)
def test_any_problem_is_as_good_as_torch(emulators, problem):
    assert_good(emulators, problem)


@pytest.mark.exhaustive
@given(problem=problems())
@settings(max_examples=600, deadline=None)
def test_any_of_many_problems_is_as_good_as_torch(emulators, problem):
    assert_good(emulators, problem)


@pytest.mark.exhaustive
def test_nothing_reads_or_writes_beyond_an_end(tmp_path):
    assert_within_bounds(tmp_path, "csrc/cuda/lora_linear_sm90.cu", "tests/emulator/lora_linear_sm90_bounds.cpp")


@pytest.mark.gpu
def test_on_a_gpu_every_small_problem_is_as_good_as_torch(launched, forced):
    """What the emulator proves, on the real thing."""
    for tile in TILES + SPLIT:
        for shape in SHAPES:
            del launched[:]
            test_one_adapter_is_as_good_as_torch(launched, forced, shape, tile)
        for cut in CUTS:
            del launched[:]
            test_clients_are_as_good_as_torch_one_by_one(launched, forced, cut, tile)
    test_one_client_never_reaches_another(forced)


@pytest.mark.gpu
def test_on_a_gpu_twenty_runs_have_the_same_bits():
    tensors, dy = make(1000, 768, 776, 24, torch.bfloat16)
    first = run(linear(None), SCALING, tensors, dy, trained(tensors, 1))
    for _ in range(20):
        for got, want in zip(run(linear(None), SCALING, tensors, dy, trained(tensors, 1)), first, strict=True):
            assert got is want is None or torch.equal(got, want)
