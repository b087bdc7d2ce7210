"""Records on disk: what replaces what, and the checkout they name."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import records


def record(provider="ours", threads=1, ms=1.0, kind="cpu"):
    return {
        "subject": "toy", "group": "Toy", "sizes": {"M": 2}, "dtype": "fp32", "provider": provider, "mode": "eager",
        "phase": "fwd", "ms": [ms] * 3, "environment": {"kind": kind, "device": "CPU", "threads": threads},
    }  # fmt: skip


def test_a_newer_record_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    records.save([record("frozen"), record("ours"), record("ours", threads=2), record("ours", kind="cuda")])
    records.save([record("ours", ms=2.0)])
    saved = records.read(records.path_of("toy", "cpu"))
    assert [(r["provider"], r["environment"]["threads"], r["ms"][1]) for r in saved] == [
        ("frozen", 1, 1.0),
        ("ours", 1, 2.0),
        ("ours", 2, 1.0),
    ]
    assert len(records.read(records.path_of("toy", "cuda"))) == 1
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["toy-cpu.jsonl", "toy-cuda.jsonl"]


def test_an_environment_is_written_once_a_run_and_read_back_with_every_record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    one, other = [record(name) for name in "abc"], [record(name, threads=2) for name in "ab"]
    inline = "".join(json.dumps(each) + "\n" for each in one)  # as files were written once
    records.path_of("toy", "cpu").write_text(inline)
    records.save(other)
    text = records.path_of("toy", "cpu").read_text()
    assert text.count('"environment"') == 2
    assert records.read(records.path_of("toy", "cpu")) == [*one, *other]
    records.save(one)
    assert records.path_of("toy", "cpu").read_text() == text


def test_a_number_that_is_none_never_reaches_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.save([record(ms=float("nan"))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "name"), [("", "abc1234"), (" M setup.py\n", "abc1234-dirty")])
def test_the_commit_is_marked_where_sources_have_changed(monkeypatch, changes, name):
    def git(words, **_):
        return SimpleNamespace(returncode=0, stdout=changes if "status" in words else "abc1234\n")

    monkeypatch.setattr(records.subprocess, "run", git)
    assert records.commit() == name


def test_environment_says_what_a_time_depends_on():
    facts = records.environment("cpu")
    assert {"commit", "utc", "kind", "device", "driver", "threads", "versions"} == set(facts)
    assert facts["kind"] == "cpu" and facts["device"] and facts["versions"]["torch"]
