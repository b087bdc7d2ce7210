"""The highest memory that a run has needed, as the device or the system counted it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from federa.folder import RunFolder


@contextmanager
def measured_peak(folder: Path) -> Iterator[None]:
    """Writes memory.json into the run's folder: the peak of CUDA's allocator, or of the process on Linux, in bytes;
    nothing where neither can be measured. A run taken up again keeps the higher of its peaks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = cuda or _reset_process_peak()
    yield
    peak = (torch.cuda.max_memory_allocated() if cuda else _process_peak()) if begun else None
    files, file = RunFolder(folder), folder / "memory.json"
    if peak is not None:
        before = files.read_json(file, ("bytes",))["bytes"] if file.is_file() else 0
        files.write_json(file.name, {"bytes": max(peak, before), "of": "CUDA" if cuda else "process"})


def _reset_process_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return False
    return True


def _process_peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
