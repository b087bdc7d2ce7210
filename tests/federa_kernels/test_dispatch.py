"""Which kernels a GPU takes: lookups in the table, which need no GPU, and what they do to the operators."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federa_kernels.lora_linear import dispatch, op, path_for

kernels = op.launchers()
ENTRIES = [
    ("one forward", "bfloat16", 90, (1024, 512, 512, 16), ["sm90", "mma"]),
    ("one backward", "bfloat16", 90, (1024, 512, 512, 16), ["torch"]),
    ("one forward", "float32", 90, (1024, 512, 512, 16), ["mma", "torch"]),
    ("clients forward", "bfloat16", 90, (1024, 512, 512, 16), ["torch", "mma"]),
    ("shared forward", "bfloat16", 90, (1024, 2048, 512, 64), ["torch"]),
    ("one forward", "bfloat16", 80, (1024, 512, 512, 16), ["sm90", "mma"]),
]


def lines_of(entries):
    for kind, dtype, arch, sizes, names in entries:
        yield {"arch": arch, "dtype": dtype, "kind": kind, **dict(zip("MNKR", sizes, strict=True)), "kernels": names}


@pytest.fixture
def lacks(monkeypatch):
    """lacks(names): the build is without these kernels."""

    def change(names):
        monkeypatch.setattr(dispatch, "why_not", lambda name: "not built" if name in names else None)
        dispatch.fastest.cache_clear()

    return change


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch, lacks):
    """ENTRIES, and a build that has everything."""
    path = tmp_path / "dispatch.json"
    path.write_text(json.dumps({"entries": list(lines_of(ENTRIES))}))
    monkeypatch.setattr(dispatch, "TABLE", path)
    dispatch.entries.cache_clear()
    lacks(())
    yield
    dispatch.entries.cache_clear()
    dispatch.fastest.cache_clear()


def fastest(kind="one forward", M=2048, N=768, K=768, R=16, dtype=torch.bfloat16, arch=90):
    return dispatch.fastest(kind, M, N, K, R, dtype, arch)


@pytest.mark.parametrize(
    ("sizes", "bucket"),
    [
        ((2048, 768, 768, 16), (1024, 512, 512, 16)),
        ((1024, 512, 1023, 1), (1024, 512, 512, 16)),
        ((4095, 1023, 512, 9), (1024, 512, 512, 16)),
        ((4096, 1024, 3072, 17), (4096, 1024, 2048, 32)),
        ((512, 4096, 14336, 48), (256, 4096, 8192, 64)),
        ((256, 1, 7, 128), (256, 1, 4, 128)),
        ((1, 8, 8, 8), (1, 8, 8, 16)),
    ],
)
def test_an_entry_stands_for_sizes_around_it(sizes, bucket):
    assert dispatch.bucket(*sizes) == bucket


@given(M=st.integers(1, 2**31), N=st.integers(1, 2**31), K=st.integers(1, 2**31), R=st.integers(1, 128))
def test_every_size_lies_in_its_bucket(M, N, K, R):
    m, n, k, r = dispatch.bucket(M, N, K, R)
    assert m <= M < 4 * m and n <= N < 2 * n and k <= K < 2 * k and R <= r <= max(16, 2 * R)
    assert dispatch.bucket(m, n, k, r) == (m, n, k, r)


def test_entries_say_who_is_fastest_and_triton_is_where_none_is():
    assert fastest() == "sm90"
    assert fastest("one backward") == "torch"
    assert fastest("shared forward", N=2304, R=48) == "torch"
    assert fastest("shared backward", N=2304, R=48) == "triton"
    assert fastest(M=4096) == fastest(N=1024) == fastest(R=24) == fastest(dtype=torch.float16) == "triton"
    assert fastest(arch=100) == fastest(arch=0) == "triton"


def test_kernels_that_are_not_there_or_not_for_it_are_passed_over(lacks):
    assert fastest(arch=80) == "mma"  # an A100 has no wgmma
    assert fastest(dtype=torch.float32) == "torch"  # mma takes halves
    assert fastest("clients forward") == "mma"  # and PyTorch would wait for the device
    lacks({"sm90"})
    assert fastest() == "mma"
    lacks({"sm90", "mma"})
    assert fastest() == fastest("clients forward") == "triton" and fastest("one backward") == "torch"


@pytest.mark.parametrize("changed", [{"N": 770}, {"K": 772}, {"M": 0}, {"N": 0}, {"K": 0}, {"R": 0}], ids=str)
def test_what_is_not_measured_goes_to_triton(changed):
    assert fastest(**changed) == "triton"


def test_a_lookup_is_made_once(monkeypatch):
    first = [fastest(), fastest("one backward")]
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "entries", lambda: pytest.fail("looked up again"))
        assert [fastest(), fastest("one backward")] == first
    assert dispatch.fastest.cache_info().hits == 2


def test_the_table_that_is_shipped_is_sound(monkeypatch):
    monkeypatch.undo()
    rows = json.loads(dispatch.TABLE.read_text())["entries"]
    for row in rows:
        assert row["kind"] in dispatch.KINDS and row["kernels"] and "triton" not in row["kernels"]
        place = (row["kind"], getattr(torch, row["dtype"]), row["arch"])
        assert all(dispatch.able(name, *place) for name in row["kernels"])
        assert dispatch.bucket(*(row[size] for size in "MNKR")) == tuple(row[size] for size in "MNKR")
    dispatch.entries.cache_clear()
    assert len(dispatch.entries()) == len(rows)


@pytest.fixture
def on_hopper(monkeypatch):
    """As if tensors were on a GPU of compute capability 9.0."""
    if kernels is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(kernels, "_arch", lambda device: 90)
    return lambda name: monkeypatch.setattr(kernels, "_kernels", name)


def tensors(M=2048, N=768, K=768, rows=torch.bfloat16, weight=torch.bfloat16):
    return torch.empty(M, K, dtype=rows, device="meta"), [torch.empty(N, K, dtype=weight, device="meta")]


def test_a_name_forces_kernels_and_auto_asks_the_table(on_hopper):
    x, weights = tensors()
    assert kernels.choose("one forward", x, weights, [16]) == "sm90"
    assert kernels.choose("one backward", x, weights, [16]) == "torch"
    assert kernels.choose("shared forward", x, weights * 3, [16] * 3) == "torch"
    for name in dispatch.KERNELS:
        on_hopper(name)
        assert kernels.choose("one forward", x, weights, [16]) == name
        in_full = "triton" if name in ("mma", "sm90") else name
        assert kernels.choose("one forward", x.float(), weights, [16]) == in_full


def test_a_weight_in_another_dtype_was_not_measured(on_hopper):
    x, weights = tensors(weight=torch.float32)
    assert kernels.choose("one forward", x, weights, [16]) == "triton"


def test_tiles_say_who_launches_them(on_hopper):
    for name, launched_by in (("triton", "triton"), ("mma", "mma"), ("sm90", "sm90"), ("torch", "triton")):
        tiles = kernels._pick(name, 2048, 768, 768, 16, torch.bfloat16, 90)
        assert {tile.kernels for tile in (tiles.gemm, tiles.down, tiles.grad)} == {launched_by}


def test_the_operators_take_cublas_where_the_table_says_so(on_hopper, monkeypatch):
    """On tensors that say they are on a GPU."""
    (x, weights), monkey = tensors(), monkeypatch
    monkey.setattr(kernels, "takes", lambda rows, rank: True)
    rows = type("Rows", (), {"is_cuda": True, "dtype": x.dtype, "shape": x.shape, "device": x.device})()
    assert op.path_of(rows, [None], [16], "one forward", weights) == "triton"
    assert op.path_of(rows, [None], [16], "one backward", weights) == "reference"
    assert op.path_of(rows, [None], [16], "one forward", weights, needs_weight=True) == "reference"
    on_hopper("torch")
    assert op.path_of(rows, [None], [16], "one forward", weights) == "reference"


def test_a_layer_is_told_that_measurements_decide(on_hopper, monkeypatch):
    monkeypatch.setattr(kernels, "takes", lambda rows, rank: True)
    weight = type("Weight", (), {"device": torch.device("cuda"), "new_empty": torch.empty(0).new_empty})()
    assert path_for(weight, 8, torch.bfloat16).endswith("whichever was measured to be fastest")
    assert path_for(weight, 8, torch.float16) == "Triton: fused"
    on_hopper("torch")
    assert path_for(weight, 8, torch.bfloat16) == "PyTorch: asked for"


def test_names(on_hopper, lacks):
    with pytest.raises(ValueError, match="use_kernels: name must be auto, triton, mma, sm90 or torch, got wgmma"):
        kernels.use_kernels("wgmma")
    lacks({"mma"})
    with pytest.raises(RuntimeError, match="not built"):
        kernels.use_kernels("mma")
    for name in ("torch", "auto"):
        kernels.use_kernels(name)
        assert kernels.kernels_for(torch.float32) == name
