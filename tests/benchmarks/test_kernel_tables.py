"""Tables and figures from hand-made records."""

import pytest

from benchmarks.kernel_tables import NOT_YET, clients_figure, clients_table, kernel_figure, kernel_table

VERSIONS = {"torch": "2.13.0", "peft": "0.21.2"}


def record(provider, ratio, M=512, threads=2, device="Some CPU", **others):
    environment = {"kind": "cpu", "device": device, "threads": threads, "commit": "abc1234",
                   "utc": others.pop("utc", "2026-01-02T00:00:00+00:00"), "versions": VERSIONS}  # fmt: skip
    sizes = {"M": M, "N": 3072, "K": 768, "R": 16} | others.pop("sizes", {})
    ms = None if ratio is None else [9.0 * ratio, 10.0 * ratio, 11.0 * ratio]
    return {
        "group": "RoBERTa", "dtype": "fp32", "mode": "eager", "phase": "fwd+bwd", "provider": provider, "sizes": sizes,
        "ms": ms, "ratio": ratio, "floor_ms": 5.0, "refused": None, "environment": environment,
    } | others  # fmt: skip


ROWS = [
    record(provider, ratio + (M == 64), M, threads)
    for M in (64, 512, 2048)
    for threads in (1, 2)
    for provider, ratio in (("frozen", 1.0), ("frozen again", 1.02), ("peft", 1.4), ("ours", 0.8 + M / 20480))
]


def test_kernel_table():
    lines = kernel_table(ROWS).splitlines()
    assert lines[0] == "| K→N, rows | frozen, ms | PEFT | federa |"
    assert lines[2:5] == [
        "| 768→3072, 64 | 20.00 | 2.40 | 1.80 |",
        "| 768→3072, 512 | 10.00 | 1.40 | 0.83 |",
        "| 768→3072, 2048 | 10.00 | 1.40 | 0.90 |",
    ]
    assert lines[5] == "| mean / worst, 512 rows and more, 2 threads | | **1.40** / 1.40 | **0.86** / 0.90 |"
    assert lines[8] == "| mean / worst, below 512 rows, 1 thread | | **2.40** / 2.40 | **1.80** / 1.80 |"
    assert lines[-1].startswith("fp32, rank 16, on 2 CPU threads: Some CPU; torch 2.13.0, peft 0.21.2.") and lines[
        -1
    ].endswith("2026-01-02.")
    assert "Commit abc1234" in lines[-1]


def test_other_ranks_phases_and_dtypes_stay_out():
    others = [record("ours", 9.0, sizes={"R": 64}), record("ours", 9.0, phase="fwd"), record("ours", 9.0, dtype="bf16")]
    assert kernel_table(ROWS + others) == kernel_table(ROWS)


def test_of_two_machines_the_one_measured_last_is_shown():
    newer = [row | {"environment": row["environment"] | {"device": "New CPU", "utc": "2026-02-01"}} for row in ROWS]
    assert "New CPU" in kernel_table([*newer, *ROWS]) and "Some CPU" not in kernel_table([*newer, *ROWS])


def test_a_refused_row_shows_and_leaves_no_mean():
    text = kernel_table([*ROWS, record("addmm", 1.1), record("addmm", None, 2048, refused="wrong")])
    assert "| refused |" in text
    assert "| mean / worst, 512 rows and more, 2 threads | | **1.40** / 1.40 |  | **0.86** / 0.90 |" in text


CLIENT_ROWS = [
    record(provider, ratio, sizes={"C": C, "cut": cut})
    for C in (8, 128)
    for cut in ("zipf", "skewed")
    for provider, ratio in (("one adapter", 1.0), ("ours", 1.05), ("chain per client", 2.0), ("padded", 3.0))
    if (provider, C, cut) != ("padded", 128, "skewed")
]


def test_clients_table():
    lines = clients_table(CLIENT_ROWS).splitlines()
    assert lines[0] == "| clients, rows | federa | one chain per client | padded |"
    assert "| 128, skewed | 1.05 | 2.00 | not tried |" in lines and "| 8, zipf | 1.05 | 2.00 | 3.00 |" in lines


@pytest.mark.parametrize("table", [kernel_table, clients_table])
def test_no_records_say_so(table):
    assert table([]) == NOT_YET


def test_figures_are_the_same_for_the_same_records(tmp_path):
    for draw, rows in ((kernel_figure, ROWS), (clients_figure, CLIENT_ROWS)):
        draw(rows, tmp_path / "a.svg")
        draw(rows, tmp_path / "b.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        draw([], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
