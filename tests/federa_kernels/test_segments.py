import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federa_kernels import Segments
from federa_kernels.lora_linear.segments import ALL


@given(sizes=st.lists(st.integers(0, 2**20), min_size=1, max_size=200))
def test_offsets_are_the_running_sum_of_the_sizes(sizes):
    segments = Segments.from_sizes(sizes)
    assert segments.offsets.dtype == torch.int32
    assert segments.offsets.tolist() == [sum(sizes[:c]) for c in range(len(sizes) + 1)]
    assert (segments.sizes, segments.rows, len(segments)) == (tuple(sizes), sum(sizes), len(sizes))
    again = Segments.from_offsets(segments.offsets.tolist())
    assert torch.equal(again.offsets, segments.offsets) and again.sizes == segments.sizes


@pytest.mark.parametrize(
    ("given_scalings", "held"),
    [(2, [2.0, 2.0]), (-0.5, [-0.5, -0.5]), ([0, -1.5], [0.0, -1.5]), ((1.0, 3.0), [1.0, 3.0])],
    ids=["int", "negative", "list", "tuple"],
)
def test_scalings_are_one_or_one_each_in_float32(given_scalings, held):
    scalings = Segments.from_sizes([3, 0], scalings=given_scalings).scalings
    assert scalings.dtype == torch.float32
    assert scalings.tolist() == held


def test_scalings_are_not_rounded_below_float32():
    third = 1 / 3
    assert Segments.from_sizes([1], scalings=third).scalings.item() == torch.tensor(third).item()


def test_ranks_are_the_clients_own_or_all():
    segments = Segments.from_sizes([3, 0, 1], ranks=(16, 8, 1))
    assert segments.ranks.dtype == torch.int32
    assert (segments.ranks.tolist(), segments.max_rank) == ([16, 8, 1], 16)
    segments = Segments.from_sizes([3, 0, 1])
    assert (segments.ranks.tolist(), segments.max_rank) == ([ALL] * 3, None)


def test_from_offsets_takes_what_from_sizes_takes():
    segments = Segments.from_offsets(torch.tensor([0, 4, 4]), scalings=[1.0, 2.0], ranks=[3, 4], device="meta")
    assert segments.sizes == (4, 0)
    assert segments.max_rank == 4
    assert {t.device.type for t in (segments.offsets, segments.scalings, segments.ranks)} == {"meta"}


def test_to_moves_the_three_tensors_and_leaves_the_original():
    segments = Segments.from_sizes([4, 5], ranks=[1, 2])
    moved = segments.to("meta")
    assert {t.device.type for t in (moved.offsets, moved.scalings, moved.ranks)} == {"meta"}
    assert segments.offsets.device.type == "cpu"
    assert (moved.sizes, moved.rows, moved.max_rank, len(moved)) == ((4, 5), 9, 2, 2)


def test_the_largest_number_of_rows():
    assert Segments.from_sizes([2**30, 2**30 - 1]).offsets[-1] == 2**31 - 1


ERRORS = [
    ({"sizes": []}, r"sizes must be one count >= 0 for each client, got \[\]"),
    ({"sizes": [3, -1]}, r"sizes must be one count >= 0 for each client, got \[3, -1\]"),
    ({"sizes": [2.5, 1]}, r"sizes must be one count >= 0 for each client, got \[2.5, 1\]"),
    ({"sizes": [2**30, 2**30]}, r"sizes must sum to less than 2\^31 rows, got 2147483648"),
    ({"scalings": [1.0]}, r"scalings must be finite, one or C=2 of them, got \[1.0\]"),
    ({"scalings": [1.0] * 3}, r"scalings must be finite, one or C=2 of them, got \[1.0, 1.0, 1.0\]"),
    ({"scalings": float("nan")}, r"scalings must be finite, one or C=2 of them, got \[nan, nan\]"),
    ({"scalings": [1.0, float("inf")]}, r"scalings must be finite, one or C=2 of them, got \[1.0, inf\]"),
    ({"scalings": 1e39}, r"scalings must be finite, one or C=2 of them, got \[1e\+39, 1e\+39\]"),
    ({"ranks": [1]}, r"ranks must be C=2 integers >= 1, got \[1\]"),
    ({"ranks": []}, r"ranks must be C=2 integers >= 1, got \[\]"),
    ({"ranks": [0, 4]}, r"ranks must be C=2 integers >= 1, got \[0, 4\]"),
    ({"ranks": [4, -1]}, r"ranks must be C=2 integers >= 1, got \[4, -1\]"),
    ({"ranks": [4, 2**31]}, r"ranks must be C=2 integers >= 1, got \[4, 2147483648\]"),
    ({"ranks": [1.5, 2]}, r"ranks must be C=2 integers >= 1, got \[1.5, 2\]"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[str(options) for options, _ in ERRORS])
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^Segments: {message}$"):
        Segments.from_sizes(**{"sizes": [3, 4]} | options)


@pytest.mark.parametrize("offsets", [[], [1, 4], [0, 4, 3], [0, -1]], ids=str)
def test_offsets_that_do_not_start_at_zero_or_decrease_are_refused(offsets):
    with pytest.raises(ValueError, match=r"^Segments: offsets must start at 0 and never decrease, got "):
        Segments.from_offsets(offsets)


def test_offsets_of_no_client_are_refused():
    with pytest.raises(ValueError, match=r"^Segments: sizes must be one count >= 0 for each client, got \[\]$"):
        Segments.from_offsets([0])
