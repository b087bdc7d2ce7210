"""The doctor tells what is there, and a broken part is a row and no crash."""

import io

import pytest
import torch
from rich.console import Console

import federa_kernels
from federa.doctor import diagnose, print_report


def rows():
    return {row.name: row for row in diagnose()}


def test_every_part_has_a_row():
    found = rows()
    assert {"python", "federa", "torch", "transformers", "datasets", "peft", "triton", "flwr", "cpu"} <= set(found)
    assert {"PyTorch path", "C++ extension", "Triton path", "tokenised data", "demo weights"} <= set(found)
    assert found["torch"].detail.startswith(torch.__version__.split("+")[0])
    assert all(row.status in ("ok", "off", "warn") and row.detail for row in found.values())


def test_a_missing_extension_is_off_and_says_the_command(monkeypatch):
    monkeypatch.setattr(federa_kernels, "load_extension", lambda: None)
    monkeypatch.setattr(federa_kernels, "why_no_extension", lambda: "never built; pip install .")
    assert rows()["C++ extension"] == ("C++ extension", "off", "never built; pip install .")


def test_a_broken_extension_is_a_warning(monkeypatch):
    def broken():
        raise RuntimeError("federa_kernels._C must load, got: no binary")

    monkeypatch.setattr(federa_kernels, "load_extension", broken)
    assert rows()["C++ extension"].status == "warn"


@pytest.mark.parametrize("width", [60, 200])
def test_the_report_is_readable_in_any_width(width):
    console = Console(file=io.StringIO(), width=width)
    print_report(console)
    assert "C++ extension" in console.file.getvalue()
