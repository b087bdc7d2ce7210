"""python -m benchmarks SUBJECT hands over to that subject."""

import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command


def test_subjects_are_the_modules_with_a_main():
    assert {"lora_linear", "lora_linear_clients", "targets", "plot"} <= set(command.subjects())
    assert not {"harness", "clock", "records", "test_short"} & set(command.subjects())


def test_arguments_and_status_pass_through(monkeypatch):
    seen = []
    monkeypatch.setitem(
        sys.modules, "benchmarks.lora_linear", SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    )
    assert command.main(["lora_linear", "--device", "cpu"]) == 3
    assert seen == [["--device", "cpu"]]


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["--help"], 0), (["nonsense"], 2)])
def test_without_a_subject_it_names_them(argv, status, capsys):
    assert command.main(argv) == status
    assert "lora_linear" in capsys.readouterr().err
