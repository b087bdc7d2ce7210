"""Statistics by hand."""

import pytest

from federa.config import ClientConfig
from federa.study.results import _to_target, estimate, training_state_bytes, variations


def test_student_t_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, t_{0.975, 2} = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    found = estimate([1.0, None, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert (found.low, found.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    assert estimate([0.4]) == (0.4, None, None, None, 1)
    assert estimate([]) is None and estimate([None]) is None


def test_variations_by_hand():
    """Norms 2, 1, 3: | 1/2 - 1 | = 0.5, | 3/1 - 1 | = 2."""
    updates = [None, (2.0, None), (1.0, 0.25), (3.0, -1.0)]
    records = [
        {"round": round, "update": update and {"norm": update[0], "cosine": update[1]}}
        for round, update in enumerate(updates)
    ]
    assert variations(records) == {1: (2.0, None, None), 2: (1.0, 0.5, 0.75), 3: (3.0, 2.0, 2.0)}
    assert variations([{"round": 1}]) == {}  # of a run that recorded none


def test_rounds_bytes_and_seconds_to_a_target():
    records = [{"round": 0, "validation": {}}] + [
        {
            "round": round,
            "bytes": {"total": 100 * round},
            "seconds": {"train": 1.0, "aggregate": 0.25, "evaluate": 0.25},
        }
        for round in (1, 2, 3, 4)
    ]
    scores = {0: 0.1, 2: 0.5, 4: 0.4}  # evaluated every second round
    reached = {"rounds_to_target": 2, "bytes_to_target": 200, "seconds_to_target": 3.0}
    assert _to_target(records, scores, 0.45) == _to_target(records, scores, 0.5) == reached
    assert _to_target(records, scores, 0.51) == _to_target(records, scores, None) == {}
    assert _to_target(records, scores, 0.1)["rounds_to_target"] == 0


@pytest.mark.parametrize(
    ("client", "copies"), [({}, 3), ({"optimizer": "sgd"}, 1), ({"optimizer": "sgd", "momentum": 0.9}, 2)]
)
def test_training_state_by_hand(client, copies):
    """float32 weights once, and a gradient and the optimiser's moments of what trains."""
    result = {"total_parameters": 1000, "trainable_parameters": 10}
    assert training_state_bytes(result, ClientConfig(**client)) == 4 * (1000 + 10 * copies)
