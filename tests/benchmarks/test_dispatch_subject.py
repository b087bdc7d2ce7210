"""The table of kernels as a function of records; and that what is timed for it is right, on small problems."""

from argparse import Namespace

import pytest
import torch

from benchmarks import dispatch, lora_linear, records
from benchmarks.dispatch import CASES, PROVIDERS, table_of, text_of, winners
from benchmarks.harness import Case, Ceilings
from federa_kernels.lora_linear import dispatch as lookup

CEILING = Ceilings({("fp32", "fp32"): 1e11}, 1e10)
ENVIRONMENT = {
    "device": "NVIDIA H200", "capability": "9.0", "utc": "2026-11-24T10:00:00+00:00", "commit": "abc1234",
    "kind": "cuda", "threads": 8, "versions": {"torch": "2.13.0", "triton": "3.7.1"},
}  # fmt: skip


def rows(ms, phase="fwd", mode="graph", M=2048, dtype="bf16", again=1.0, **changes):
    """A record for each provider of `ms`, and the noise."""
    sizes = {"M": M, "N": 768, "K": 768, "R": 16} | changes
    for provider, time in (ms | {"triton again": again * ms["triton"]}).items():
        yield {
            "subject": "dispatch", "group": "RoBERTa", "sizes": sizes, "dtype": dtype, "provider": provider,
            "mode": mode, "phase": phase, "ms": time and [time] * 3, "environment": ENVIRONMENT,
        }  # fmt: skip


def kernels_of(*groups):
    return [entry["kernels"] for entry in table_of([row for group in groups for row in group])["entries"]]


def timed(triton, again=1.0, **others):
    return {"triton": triton, "triton again": again * triton, **others}


def test_who_wins():
    assert winners([timed(1.0, mma=0.9, sm90=0.5, torch=1.2)]) == {"sm90": 2.0, "mma": pytest.approx(1 / 0.9)}
    assert winners([timed(1.0, mma=0.985)]) == {}  # less than what two medians of one thing may differ by
    assert winners([timed(1.0, 1.2, mma=0.9)]) == winners([timed(1.0, 0.8, mma=0.9)]) == {}  # that differ by more
    assert list(winners([timed(1.0, 1.05, mma=0.9)])) == ["mma"]
    assert winners([]) == winners([timed(1.0)]) == {}


def test_who_is_slower_anywhere_does_not_win():
    assert list(winners([timed(1.0, mma=0.5), timed(1.0, mma=1.01)])) == ["mma"]
    assert winners([timed(1.0, mma=0.5), timed(1.0, mma=1.05)]) == {}
    assert winners([timed(1.0, mma=0.5), timed(1.0)]) == {}  # nor who could not be measured everywhere
    assert winners([timed(1.0, mma=0.5), {"mma": 1.0}]) == {}


def test_a_table_is_made_of_records():
    graph, eager = rows({"triton": 1.0, "mma": 0.8, "torch": 0.9}), rows({"triton": 2.0, "mma": 2.0}, mode="eager")
    backward = rows({"triton": 1.0, "mma": 1.5, "torch": 0.8}, "bwd")
    whole = rows({"triton": 1.0, "mma": 0.1}, "fwd+bwd")
    table = table_of([*graph, *eager, *backward, *whole])
    common = {"arch": 90, "dtype": "bfloat16", "M": 1024, "N": 512, "K": 512, "R": 16}
    assert table["entries"] == [
        common | {"kind": "one backward", "kernels": ["torch"], "times": [1.25]},
        common | {"kind": "one forward", "kernels": ["mma"], "times": [1.12]},
    ]
    assert [device["device"] for device in table["measured"]] == ["NVIDIA H200"]


def test_an_entry_speaks_for_all_cases_of_its_sizes():
    """512 and 256 rows, two machines, both modes: one loss undoes it."""
    won = {"triton": 1.0, "mma": 0.5}
    assert kernels_of(rows(won, M=512), rows(won, M=256)) == [["mma"]]
    assert kernels_of(rows(won, M=512), rows({"triton": 1.0, "mma": 1.1}, M=256)) == []
    assert kernels_of(rows(won), rows({"triton": 1.0, "mma": 1.1}, mode="eager")) == []
    other = {"environment": ENVIRONMENT | {"device": "NVIDIA H100"}}
    assert kernels_of(rows(won), (row | other for row in rows({"triton": 1.0, "mma": 1.1}))) == []
    assert kernels_of(rows(won, M=2048), rows({"triton": 1.0, "mma": 1.1}, M=8192)) == [["mma"]]
    assert kernels_of(rows({"triton": 1.0, "mma": None})) == []  # what was refused


def test_forms_have_entries_of_their_own():
    won = {"triton": 1.0, "mma": 0.5}
    found = table_of([*rows(won), *rows(won, C=32, cut="zipf"), *rows(won, P=3)])["entries"]
    assert {(entry["kind"], entry["N"], entry["R"]) for entry in found} == {
        ("one forward", 512, 16),
        ("clients forward", 512, 16),
        ("shared forward", 2048, 64),
    }


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    fast = rows({"triton": 1.0, "mma": 0.8, "torch": 0.5})
    text = text_of(table_of([*fast, *rows({"triton": 1.0, "torch": 0.8}, "bwd", dtype="fp32")]))
    assert len(text.splitlines()) == 6 and max(map(len, text.splitlines())) < 320
    (tmp_path / "dispatch.json").write_text(text)
    monkeypatch.setattr(lookup, "TABLE", tmp_path / "dispatch.json")
    lookup.entries.cache_clear()
    assert lookup.entries() == {
        (90, torch.bfloat16, "one forward", 1024, 512, 512, 16): ("torch", "mma"),
        (90, torch.float32, "one backward", 1024, 512, 512, 16): ("torch",),
    }
    lookup.entries.cache_clear()


def test_the_table_in_the_package_is_what_the_records_give():
    """python -m benchmarks dispatch --record writes it."""
    assert lookup.TABLE.read_text() == text_of(table_of(records.read(records.path_of("dispatch", "cuda"))))


@pytest.mark.parametrize("form", [{}, {"C": 5, "cut": "zipf"}, {"P": 3}], ids=["one", "clients", "shared"])
def test_each_form_from_end_to_end(form, monkeypatch):
    monkeypatch.setattr(lora_linear, "slots_past_cache", lambda size, device: 2)
    case = Case("Toy", {"M": 40, "N": 32, "K": 48, "R": 4} | form)
    found = dispatch.run_case(case, CEILING, {}, Namespace(device="cpu", seconds=0.0))
    expected = {"triton", "triton again", "torch"} - ({"torch"} if "C" in form else set())
    assert {record.provider for record in found} == expected
    assert all(record.refused is None and record.ms and record.ratio for record in found)
    assert {record.phase for record in found} == {"fwd", "bwd", "fwd+bwd"}
    table_of([record.json() | {"environment": ENVIRONMENT} for record in found])


def test_a_wrong_result_of_a_projection_is_not_timed():
    problem = dispatch.Shared(Case("Toy", {"M": 40, "N": 32, "K": 48, "R": 4, "P": 2}), "cpu")
    good = problem.by_definition(torch.float32)
    assert problem.judge_all(good).complaint() is None
    assert problem.judge_all(good | {"dA": good["dA"].flip(0)}).complaint().startswith("wrong: dA")


def test_cases_are_unlike_and_those_that_decide_most_come_first():
    assert len({str(case) for case in CASES}) == len(CASES)
    first = CASES[:12]
    assert {case.sizes["M"] for case in first} == {8192} and {dispatch.form_of(c.sizes) for c in first} == set(
        dispatch.FORMS
    )
    assert set(PROVIDERS.values()) == set(lookup.KERNELS)


def test_without_a_gpu_the_table_comes_from_the_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(lookup, "TABLE", tmp_path / "dispatch.json")
    assert dispatch.main([]) == 0
    assert "no GPU has been measured" in capsys.readouterr().out and not lookup.TABLE.exists()
    records.save(rows({"triton": 1.0, "mma": 0.8}))
    assert dispatch.main(["--record"]) == 0
    assert '"kernels": ["mma"]' in capsys.readouterr().out and '"kernels": ["mma"]' in lookup.TABLE.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("form", [{}, {"C": 8, "cut": "zipf"}, {"P": 3}], ids=["M37-one", "M37-clients", "M37-shared"])
def test_on_a_gpu_all_kernels_are_right_and_captured(form):
    case = Case("Toy", {"M": 37, "N": 48, "K": 64, "R": 8} | form, "bf16")
    found = dispatch.run_case(case, CEILING, {}, Namespace(device="cuda", seconds=0.0))
    assert {record.mode for record in found} == {"eager", "graph"}
    assert {record.refused for record in found} == {None}
