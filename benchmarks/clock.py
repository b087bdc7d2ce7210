"""Time: one step on its clock, providers in turns, what a step takes in memory."""

import ctypes
import gc
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

Phases = Mapping[str, Callable[[Any], Any]]
Runner = Callable[[int], Sequence[float]]  # turn -> ms of each phase and, where there are several, of all

BURST = 5  # steps in a row on a GPU, so that one step's launches hide behind the one before, as in training
STATUS = Path("/proc/self/status")


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, to four digits."""
    p20, p50, p80 = (float(f"{value:.4g}") for value in np.percentile(times, (20, 50, 80)))
    return p20, p50, p80


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _with_total(times: Sequence[float]) -> list[float]:
    return [*times, sum(times)] if len(times) > 1 else list(times)


def eager(phases: Phases, slots: Sequence[Any], device: str) -> Runner:
    """Runs the phases one after another, each turn on other slots."""

    def on_cpu(turn: int) -> list[float]:
        state, marks = slots[turn % len(slots)], [time.perf_counter_ns()]
        for phase in phases.values():
            state = phase(state)
            marks.append(time.perf_counter_ns())
        return _with_total([(stop - start) / 1e6 for start, stop in pairwise(marks)])

    def on_cuda(turn: int) -> list[float]:
        bursts = []
        for step in range(BURST):
            state, marks = slots[(turn * BURST + step) % len(slots)], [_event()]
            for phase in phases.values():
                state = phase(state)
                marks.append(_event())
            bursts.append(marks)
        torch.cuda.synchronize()
        times = [[a.elapsed_time(b) for a, b in pairwise(marks)] for marks in bursts]
        return _with_total([sum(phase) / BURST for phase in zip(*times, strict=True)])

    return on_cuda if device == "cuda" else on_cpu


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def graphed(phases: Phases, slots: Sequence[Any], pool: Any) -> Runner:
    """The first phase, the first two and so on, each captured over all slots in one CUDA graph; times are of one slot.

    A later phase's time is the difference of two graphs, replayed one after the other. Graphs share the memory `pool`:
    their outputs are written over and never read.
    """
    functions, stream = list(phases.values()), torch.cuda.Stream()

    def run(count: int) -> None:
        for state in slots:
            for phase in functions[:count]:
                state = phase(state)

    graphs = []
    for count in range(1, len(functions) + 1):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(count)  # once outside, so that nothing is set up during the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            run(count)
        graphs.append(graph)

    def replay(turn: int) -> list[float]:
        marks = [_event()]
        for graph in graphs:
            graph.replay()
            marks.append(_event())
        torch.cuda.synchronize()
        totals = [a.elapsed_time(b) / len(slots) for a, b in pairwise(marks)]
        own = [total - before for total, before in zip(totals, [0.0, *totals], strict=False)]
        return [*own, totals[-1]] if len(own) > 1 else own

    return replay


def interleave(
    runners: Mapping[str, Runner], seconds: float, rounds: tuple[int, int] = (9, 101)
) -> dict[str, list[list[float]]]:
    """Times of every runner, one row a round: in each round all have one turn, in an order drawn anew.

    Two rounds to warm up, then as many as fit into `seconds`, within `rounds`.
    """
    order, turns, shuffle = list(runners), 0, random.Random(0)
    times: dict[str, list[list[float]]] = {name: [] for name in order}

    def one_round(keep: bool) -> None:
        nonlocal turns
        shuffle.shuffle(order)
        for name in order:
            row = runners[name](turns)
            turns += 1
            if keep:
                times[name].append(list(row))

    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        one_round(keep=False)
        start = time.perf_counter()
        one_round(keep=False)
        spent = max(time.perf_counter() - start, 1e-9)
        least, most = rounds
        for _ in range(min(max(int(seconds / spent), least), most)):
            one_round(keep=True)
    finally:
        if was_on:
            gc.enable()
    return times


def last_cache_bytes(device: str) -> int:
    """The GPU's L2; on a CPU its outermost cache, of which a virtual machine may see the whole host's; else 64 MiB."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**26)


def slots_past_cache(slot_bytes: int, device: str) -> int:
    """How many sets of inputs make sure that the next one is not in the last cache; at least two."""
    past = last_cache_bytes(device) * (2 if device == "cuda" else 1)
    return max(2, -(-past // max(slot_bytes, 1)))


def peak_bytes(phases: Phases, slot: Any, device: str, warm: bool = False) -> int | None:
    """The most memory one step holds beyond what was there before it; None where the system does not tell.

    On a GPU what torch allocates; on Linux resident memory, which has the libraries' own buffers in it. One step goes
    before it, unless `warm`.
    """

    def step() -> None:
        state = slot
        for phase in phases.values():
            state = phase(state)

    if not warm:
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not forget_peak():
        return None
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def forget_peak() -> bool:
    """Frees what malloc keeps and lets VmHWM begin anew, where the system can: whether it did. (getrusage's highest
    cannot, and a process begins with its parent's.)"""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmHWM") is not None
    return False


def resident(name: str) -> int | None:
    """VmRSS, the memory in use, or VmHWM, the highest so far, in bytes; None where the system does not tell."""
    with suppress(OSError):
        if found := re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) * 1024
    return None
