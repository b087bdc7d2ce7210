"""The table and the goals of whole rounds, from made-up records."""

import pytest

from benchmarks.round_tables import cases, kind_of, round_figure, round_table, round_verdicts

ENVIRONMENT = {"kind": "cpu", "device": "a CPU", "threads": 2, "utc": "2026-01-01T00:00:00", "commit": "abc",
               "versions": {"torch": "2", "peft": "1"}}  # fmt: skip


def row(provider, rate, batch=16, phase="round"):
    return {
        "phase": phase,
        "ms": rate and [1e3 / rate] * 3,
        "peak_bytes": 2**20 * len(provider),
        "client_bytes": 2**19,
        "provider": provider,
        "samples_per_second": rate,
        "ratio": rate and rate / 10,
        "sizes": {"B": batch, "T": 128, "C": 4},
        "mode": "eager",
        "environment": ENVIRONMENT,
    }


ROWS = [row("peft", 10.0), row("peft bf16", 20.0), row("alone", 24.0), row("cohort 2", 26.0), row("cohort 4", 25.0),
        row("alone bf16", 30.0), row("cohort 4 bf16 all", 41.0), row("plain", None)]  # fmt: skip


def test_the_fastest_of_a_kind_stands_for_it():
    assert kind_of("cohort 8 bf16 all") == "cohort bf16 all"
    ((case, here),) = cases(ROWS).items()
    assert case == (16, 128, 4) and here["cohort"]["provider"] == "cohort 2" and "plain" not in here


def test_table():
    table = round_table(ROWS)
    assert "| 16 a batch, up to 128 tokens |" in table and "| 26.0 (2.60; of 2) |" in table
    assert "FeDeRA in plain PyTorch" not in table and round_table([]).startswith("Not measured")


def run(clients, outside, peak=2**30):
    made = row("federa", 50.0, phase="clients")
    sizes, seconds = made["sizes"] | {"clients": clients}, {"all": 10.0, "train": 9.0, "evaluate": 1 - 10 * outside}
    return made | {"sizes": sizes, "outside": outside, "seconds": seconds, "peak_bytes": peak}


def test_goals_by_hand():
    """2.6 of 2.5 and 4.1 of 4.0 are met, 41/20 of 1.25 too; four a batch and whole runs were not measured."""
    assert [met for met, _ in round_verdicts(ROWS)] == [True, True, True, None, None, None]
    slow = [row("peft", 10.0), row("peft bf16", 20.0), row("alone", 24.0)]
    assert round_verdicts(slow)[0][0] is False


@pytest.mark.parametrize(("outside", "more", "met"), [(0.03, 70, [True, True]), (0.031, 74, [False, False])])
def test_goals_of_whole_runs(outside, more, met):
    """At most 3 % outside training and evaluation in the worst run; 64 MiB and 1 KiB for each of 10,000 clients."""
    runs = [run(10, 0.001), run(100, outside), run(10_000, 0.002, 2**30 + more * 2**20)]
    assert [one for one, _ in round_verdicts(ROWS + runs)][-2:] == met
    assert f"{more} MiB more" in round_verdicts(runs)[-1][1]
    assert [one for one, _ in round_verdicts(runs[:2])][-1] is None


def test_curves_change_no_table_and_are_drawn(tmp_path):
    curve = [row(name, rate, 4, "cohorts") for name, rate in (("peft", 9.0), ("alone", 40.0), ("cohort 16", 45.0))]
    runs = [run(10, 0.001), run(10_000, 0.001)]
    assert round_table(ROWS + curve + runs) == round_table(ROWS)
    round_figure(ROWS, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    round_figure(ROWS + curve + runs, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_bytes()
    round_figure(curve + runs, tmp_path / "again.svg")
    assert drawn and (tmp_path / "again.svg").read_bytes() == drawn
