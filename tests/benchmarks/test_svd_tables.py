"""Tables, goals and the figure of truncated_svd from hand-made records."""

import pytest

from benchmarks.svd_tables import NOT_YET, svd_figure, svd_table
from benchmarks.targets import Speed, speed_verdicts


def record(provider, ms, loss=1e-8, group="RoBERTa", threads=1, **sizes):
    environment = {"kind": "cpu", "device": "Some CPU", "threads": threads, "commit": "abc1234",
                   "utc": "2026-01-02T00:00:00+00:00", "versions": {"torch": "2.13.0"}}  # fmt: skip
    return {
        "subject": "truncated_svd", "group": group, "sizes": {"G": 72, "R": 16} | sizes, "dtype": "fp32",
        "mode": "eager",
        "provider": provider, "phase": "svd", "ms": ms and [ms, ms, ms], "error": {"loss": loss},
        "refused": None if ms else "wrong: loss", "environment": environment,
    }  # fmt: skip


ROWS = [record("full", 200.0, 0.0), record("svd_lowrank(16)", 30.0, 7e-3), record("ours", 10.0)]
CLIENTS = {"group": "factored", "N": 64, "K": 32, "C": 8, "clients": "related"}


def test_cells_are_times_over_ours_and_a_large_loss_is_struck_out():
    lines = svd_table(ROWS).splitlines()
    assert lines[0] == "| matrices, R | federa, ms, loss | torch.linalg.svd | svd_lowrank, niter=16 |"
    assert lines[2] == "| 72 of RoBERTa-base, 16 | 10.0, 1e-08 | 20.0, 0e+00 | ~~3.0, 7e-03~~ |"
    assert lines[-1].endswith("Commit abc1234, 2026-01-02.") and "1 CPU thread: Some CPU" in lines[-1]


def test_factored_rows_have_a_table_of_their_own():
    text = svd_table([*ROWS, record("ours", 5.0, **CLIENTS), record("QR+QR+core", 30.0, **CLIENTS)])
    assert "| 64×32, 8 clients 30 % apart, 16 | 5.0, 1e-08 | 6.0, 1e-08 |" in text


def test_what_is_wrong_is_refused_and_nothing_measured_says_so():
    assert "| 72 of RoBERTa-base, 16 | refused |" in svd_table([*ROWS[:2], record("ours", None, 1e-3)])
    assert svd_table([]) == NOT_YET


@pytest.mark.parametrize(("must", "met"), [(2.9, True), (3.1, False)])
def test_goals(must, met):
    goal = Speed("set", lambda row: row["group"] == "RoBERTa", {"svd_lowrank(16)": (must, 4)})
    ((found, line),) = speed_verdicts(goal, ROWS)
    assert found is met and "3.00 times svd_lowrank(16)" in line
    assert speed_verdicts(goal, [row | {"group": "other"} for row in ROWS])[0][0] is None
    assert speed_verdicts(goal, [*ROWS[:2], record("ours", None)])[0][0] is False
    assert speed_verdicts(goal, [ROWS[0], ROWS[2]])[0][0] is False  # without the baseline it is not reached


def test_the_figure_is_the_same_for_the_same_records(tmp_path):
    points = {"svd_lowrank q=R 4": (9.0, 1e-2), "svd_lowrank q=R 16": (30.0, 1e-3), "ours 1e-06": (10.0, 1e-8)}
    rows = [record(name, ms, loss, "frontier") for name, (ms, loss) in points.items()]
    for name in "ab":
        svd_figure(rows, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    svd_figure(ROWS, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
