"""The gate, the record's format and what the short way through a benchmark prints."""

import argparse
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import (
    Case,
    Ceilings,
    Contender,
    Judgement,
    Record,
    admit,
    arguments,
    compare,
    lines,
    measure,
    prepare,
    relative_error,
    unrest,
)

CASE = Case("Toy", {"M": 2, "cut": "equal"})
ENVIRONMENT = {"commit": "abc", "utc": "2026-01-01T00:00:00+00:00", "kind": "cpu", "device": "CPU", "threads": 1}
OPTIONS = argparse.Namespace(device="cpu", seconds=0.0)
RIGHT = Judgement({"y": 1e-7}, {"y": 2e-7})


def contender(judgement: Judgement = RIGHT, calls: list | None = None) -> Contender:
    def fwd(slot):
        if calls is not None:
            calls.append(slot)
        return slot

    return Contender({"fwd": fwd, "bwd": lambda state: state}, lambda: judgement, {"fwd": 0.5}, "a path")


def test_case_has_a_readable_name():
    assert str(CASE) == "Toy-M2-equal-fp32"


def test_relative_error_is_the_norm_of_the_difference():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.zeros(2), torch.zeros(3)))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize(("value", "passes"), [(1.0, True), (1.2, True), (1.3, False), (math.nan, False)])
def test_the_rule_is_twice_plain_torch(value, passes):
    exact, plain = {"y": torch.tensor([1.0])}, {"y": torch.tensor([1.125])}
    judged = compare({"y": torch.tensor([value])}, exact, plain, torch.float32)
    assert judged.allowed["y"] == pytest.approx(0.25, abs=1e-6)
    assert (judged.complaint() is None) == passes


def test_a_wrong_result_is_never_timed():
    calls: list = []
    wrong = contender(Judgement({"y": 1e-7, "dA": 1.0}, {"y": 2e-7, "dA": 2e-7}), calls)
    records = measure(
        "toy", CASE, {"frozen": contender, "wrong": lambda: wrong}, ["slot"], ENVIRONMENT, OPTIONS
    )  # fmt: skip
    assert calls == []
    assert {record.phase for record in records} == {"fwd", "bwd", "fwd+bwd"}
    for record in records:
        refused = record.provider == "wrong"
        assert (record.ms is None) == (record.ratio is None) == refused
        assert record.refused == ("wrong: dA 1.0e+00 > 2.0e-07" if refused else None)
    assert any("wrong: dA" in line for line in lines(records))


def test_a_provider_that_raises_is_refused_with_its_reason():
    def broken():
        raise RuntimeError("no such kernel\nsecond line")

    _, judgement, refused = admit(broken)
    assert refused == "RuntimeError: no such kernel" and judgement.error == {}
    records = measure("toy", CASE, {"frozen": contender, "broken": broken}, ["slot"], ENVIRONMENT, OPTIONS)
    assert {record.refused for record in records if record.provider == "broken"} == {refused}


def test_ratios_are_to_the_baseline_of_the_same_rounds():
    records = measure("toy", CASE, {"frozen": contender, "ours": contender}, [0, 1], ENVIRONMENT, OPTIONS)
    by = {(record.provider, record.phase): record for record in records}
    assert by["frozen", "fwd+bwd"].ratio == 1.0
    ours, base = by["ours", "fwd"], by["frozen", "fwd"]
    assert ours.ratio == pytest.approx(ours.ms[1] / base.ms[1])
    assert ours.rounds == base.rounds == 9 and ours.floor_ms == 0.5 and ours.note == "a path"


def test_a_record_is_one_json_object_with_everything_the_tables_need():
    record = Record(
        "toy", "Toy", {"M": 2}, "fp32", "ours", "eager", "fwd", None, (1.0, 2.0, 3.0), 9, 1 / 3, "frozen",
        0.123456, 1024, {"y": math.nan}, {"y": 1.23456e-7}, "", ENVIRONMENT,
    )  # fmt: skip
    loaded = json.loads(json.dumps(record.json(), allow_nan=False))
    assert set(loaded) == {
        "subject", "group", "sizes", "dtype", "provider", "mode", "phase", "refused", "ms", "rounds", "ratio",
        "baseline", "floor_ms", "peak_bytes", "error", "allowed", "note", "environment",
    }  # fmt: skip
    assert loaded["error"] == {"y": None} and loaded["allowed"] == {"y": 1.23e-7}
    assert loaded["floor_ms"] == 0.1235 and loaded["ratio"] == 0.3333 and loaded["ms"] == [1.0, 2.0, 3.0]


def test_a_disturbed_case_is_measured_again_and_the_quietest_kept(monkeypatch, capsys):
    def records(ratio: float, spread: float):
        base = Record("toy", "Toy", {}, "fp32", "frozen", "eager", "fwd+bwd", None, (1.0, 1.0, 1.0 + spread), 9, 1.0,
                      "frozen", None, None, {}, {}, "", ENVIRONMENT)  # fmt: skip
        return [base, replace(base, provider="frozen again", ms=(ratio, ratio, ratio), ratio=ratio)]

    assert unrest(records(1.03, 0.0)) == pytest.approx(1.0) and unrest(records(1.0, 0.3)) == pytest.approx(2.0)
    monkeypatch.setattr(harness, "ceilings", lambda device: Ceilings({}, 1.0))
    options = argparse.Namespace(device="cpu", record=False, budget=None)
    for tries, kept in (([1.0, 1.5], 1.0), ([1.5, 0.99], 0.99), ([1.5, 1.2, 1.3, 1.0], 1.2)):
        left = list(tries)
        found = harness.run([CASE], lambda *_, left=left: records(left.pop(0), 0.0), options)
        assert found[1].ratio == kept
    assert left == [1.0] and "the quietest of 3 tries" in capsys.readouterr().out


def test_the_floor_is_arithmetic_or_traffic():
    ceiling = Ceilings({("fp32", "fp32"): 1e9, ("fp32", "bf16"): 2e9}, bytes=1e9)
    assert ceiling.ms(1e9, 0, "fp32", "fp32") == pytest.approx(1e3)
    assert ceiling.ms(1e9, 0, "fp32", "bf16") == pytest.approx(5e2)
    assert ceiling.ms(1e9, 5e9, "fp32", "fp32") == pytest.approx(5e3)


def test_options():
    threads = torch.get_num_threads()
    options = prepare(arguments("", "toy"), ["--quick", "--threads", "1", "--only", "M2"], seconds=5.0)
    assert (options.device, options.seconds, options.only, options.record) == ("cpu", 1.0, "M2", False)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_said_at_once(capsys):
    with pytest.raises(SystemExit):
        prepare(arguments("", "toy"), ["--device", "cuda"], seconds=1.0)
    assert "torch finds no CUDA device" in capsys.readouterr().err
