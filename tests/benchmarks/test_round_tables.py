"""The table and the goals of whole rounds, from made-up records."""

from benchmarks.round_tables import cases, kind_of, round_table, round_verdicts

ENVIRONMENT = {"kind": "cpu", "device": "a CPU", "threads": 2, "utc": "2026-01-01T00:00:00", "commit": "abc",
               "versions": {"torch": "2", "peft": "1"}}  # fmt: skip


def row(provider, rate, batch=16):
    return {
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


def test_goals_by_hand():
    """2.6 of 2.5 and 4.1 of 4.0 are met, 41/20 of 1.25 too; four a batch was not measured."""
    assert [met for met, _ in round_verdicts(ROWS)] == [True, True, True, None]
    slow = [row("peft", 10.0), row("peft bf16", 20.0), row("alone", 24.0)]
    assert round_verdicts(slow)[0][0] is False
