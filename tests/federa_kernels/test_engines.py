"""Every engine that runs on this machine: right, repeatable, and blind to threads and to other rows."""

import contextlib

import pytest
import torch

from federa_kernels import FrozenWeight, Segments, load_extension, lora_linear, lora_linear_clients, lora_linear_shared
from federa_kernels.lora_linear import cpu, path_for

from . import against_float64 as cases
from .against_float64 import Draw, assert_as_good_as_torch, run

ENGINES = load_extension().engines() if load_extension() else []
FMA = [name for name in ENGINES if name != "amx"]
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINED = (True, False, True, True, True)

# Around each engine's 8, 16 and 32 columns, 4 and 9 rows; depths of several stretches; many blocks of rows.
SHAPES = [
    (1, 1, 1, 1),
    (2, 9, 3, 128),
    (4, 24, 16, 8),
    (9, 48, 384, 16),
    (10, 49, 385, 17),
    (37, 65, 96, 0),
    (63, 127, 769, 24),
    (130, 33, 1031, 5),
    (300, 200, 129, 48),
    (517, 50, 40, 33),
]
CUTS = [([3], 1), ([0, 5, 0, 1, 1, 30], 8), ([9, 9, 9], 16), ([1] * 23, 4), ([250, 7, 0, 130], 33)]


@pytest.fixture(params=ENGINES)
def engine(request):
    with using(request.param):
        yield request.param


@contextlib.contextmanager
def using(name):
    before = cpu.engine()
    cpu.use_engine(name)
    try:
        yield
    finally:
        cpu.use_engine(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(M, N, K, R, clients=None, seed=0, weight=torch.float32):
    """x, weight, lora_A, lora_B, bias; dy."""
    draw, each = Draw(seed), () if clients is None else (clients,)
    adapters = [draw.of_width(*each, R, K, dtype=torch.float32), draw.of_width(*each, N, R, dtype=torch.float32)]
    tensors = [draw(M, K, dtype=torch.float32), draw.of_width(N, K, dtype=weight), *adapters]
    return [*tensors, draw(*each, N, dtype=torch.float32)], draw(M, N, dtype=torch.float32)


def packed(scaling, x, weight, lora_A, lora_B, bias):
    frozen = FrozenWeight(weight.detach())
    assert frozen.forms(x.dtype, True)[1] is not None
    return lora_linear(x, frozen, lora_A, lora_B, scaling, bias)


def same(ones, others):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.usefixtures("poisoned", "engine")
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}-R{0[3]}".format)
def test_results_are_as_good_as_torchs(shape, weight):
    tensors, dy = make(*shape, weight=weight)
    assert_as_good_as_torch(packed, cases.plain, 0.75, tensors, dy, TRAINED)


@pytest.mark.usefixtures("poisoned", "engine")
@pytest.mark.parametrize("layout", ["transposed", "every other", "columns", "one row"])
def test_strides(layout):
    tensors, dy = make(21, 45, 50, 7)
    tensors = [t if place == 1 else cases.laid(t, layout) for place, t in enumerate(tensors)]
    assert_as_good_as_torch(packed, cases.plain, 0.75, tensors, cases.laid(dy, layout), TRAINED)


# Not on tile units, which round the rows of two clients in one block of 32 in another order.
@pytest.mark.usefixtures("poisoned", "engine")
@pytest.mark.parametrize("engine", FMA, indirect=True)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("sizes", "R"), CUTS, ids=str)
def test_clients_get_the_bits_that_each_gets_alone(sizes, R, weight):
    N, K, scalings = 50, 390, [0.5 + c % 3 for c in range(len(sizes))]
    ranks = [1 + c % R for c in range(len(sizes))]
    tensors, dy = make(sum(sizes), N, K, R, clients=len(sizes), weight=weight)
    for c, rank in enumerate(ranks):
        tensors[2][c, rank:], tensors[3][c, :, rank:] = torch.nan, torch.nan
    segments = Segments.from_sizes(sizes, scalings=scalings, ranks=ranks)

    def ours(_, x, weight, lora_A, lora_B, bias):
        return lora_linear_clients(x, FrozenWeight(weight.detach()), lora_A, lora_B, segments, bias)

    _, *gradients = y, *_ = run(ours, None, tensors, dy, TRAINED)
    x, weight_, *stacked = (t if t.dim() < 3 else t.nan_to_num(0.0) for t in tensors)
    for c, (start, size) in enumerate(zip(segments.offsets.tolist(), sizes, strict=False)):
        rows, own = slice(start, start + size), [t[c] for t in stacked]
        alone = run(packed, scalings[c], [x[rows], weight_, *own], dy[rows], TRAINED)
        assert same([y[rows], gradients[0][rows], *(t[c] for t in gradients[2:])], [alone[0], alone[1], *alone[3:]])


@pytest.mark.usefixtures("poisoned", "engine")
def test_shared_projections_add_up_in_dx():
    tensors, _ = make(40, 64, 400, 8)
    widths, draw = (64, 30, 17), Draw(1)
    each = [make(1, N, 400, 8 + N % 3, seed=N)[0][1:] for N in widths]
    dys = [draw(40, N, dtype=torch.float32) for N in widths]

    def of(function):
        def call(scalings, x, *flat):
            return function(x, [(*flat[i * 4 : i * 4 + 3], s, flat[i * 4 + 3]) for i, s in enumerate(scalings)])

        return call

    def plain(x, projections):
        return [cases.plain(s, x, weight, A, B, bias) for weight, A, B, s, bias in projections]

    def ours(x, projections):
        return lora_linear_shared(x, [(FrozenWeight(weight.detach()), *rest) for weight, *rest in projections])

    flat = [tensors[0], *(t for one in each for t in one)]
    mask = [True, *[False, True, True, True] * 3]
    assert_as_good_as_torch(of(ours), of(plain), [0.5, 1.0, 2.0], flat, dys, mask)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("shape", [(64, 96, 400, 16), (1, 40, 33, 8), (300, 17, 64, 4)], ids=str)
def test_the_same_bits_again_and_with_any_number_of_threads(shape):
    tensors, dy = make(*shape)
    first = run(packed, 0.5, tensors, dy, TRAINED)
    assert same(first, run(packed, 0.5, tensors, dy, TRAINED))
    for count in (1, 2, 3, 7):
        with threads(count):
            assert same(first[:5], run(packed, 0.5, tensors, dy, TRAINED)[:5])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_a_row_does_not_depend_on_its_neighbours(weight):
    tensors, dy = make(300, 50, 800, 16, weight=weight)
    x, others = tensors[0], tensors[1:]
    y, dx, *_ = run(packed, 0.5, tensors, dy, TRAINED)
    for start, stop in ((0, 1), (7, 8), (3, 20), (250, 300), (0, 299)):
        part = run(packed, 0.5, [x[start:stop], *others], dy[start:stop], TRAINED)
        assert same([y[start:stop], dx[start:stop]], part[:2])


@pytest.mark.skipif(len(FMA) < 2, reason="needs AVX-512")
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_avx512_and_avx2_give_the_same_bits(weight):
    tensors, dy = make(150, 75, 500, 20, weight=weight)
    results = []
    for name in FMA:
        with using(name):
            results.append(run(packed, 0.5, tensors, dy, TRAINED))
    assert same(*results)


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs two engines")
def test_a_frozen_weight_packs_again_for_another_engine():
    tensors, _ = make(5, 40, 48, 4)
    frozen, sizes = FrozenWeight(tensors[1]), set()
    for name in ENGINES:
        with using(name):
            assert torch.equal(lora_linear(tensors[0], frozen, *tensors[2:4], 0.5), packed(0.5, *tensors[:4], None))
            sizes.add(frozen.packed_bytes())
    assert len(sizes) == len({2 if name == "avx512" else name for name in ENGINES})


def test_bfloat16_rows_go_to_torch_where_there_are_no_tile_units():
    for name in FMA:
        with using(name):
            weight = torch.zeros(4, 4)
            assert not cpu.packs(torch.bfloat16, weight)
            assert name in path_for(weight, 4, torch.float32)
            assert path_for(weight, 4, torch.bfloat16).startswith("PyTorch: torch.bfloat16 rows")


@pytest.mark.skipif(not load_extension(), reason="federa_kernels._C is not built")
def test_without_an_engine_torch_computes():
    tensors, _ = make(5, 40, 48, 4)
    with using("none"):
        assert FrozenWeight(tensors[1]).forms(torch.float32, True) == (None, None)
        assert path_for(tensors[1], 4, torch.float32).startswith("PyTorch: the processor has neither")
    with pytest.raises(ValueError, match="name must be of"):
        cpu.use_engine("abacus")
