"""Statistics, turns and memory; no test here looks at how long anything took."""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clock


def test_percentiles_keep_four_digits():
    assert clock.percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert clock.percentiles([1.234567])[1] == 1.235


def test_in_each_round_every_runner_has_one_turn_in_changing_order():
    turns: list[tuple[str, int]] = []

    def runner(name):
        def run(turn):
            assert not gc.isenabled()
            turns.append((name, turn))
            return [float(len(turns))]

        return run

    times = clock.interleave({name: runner(name) for name in "abc"}, seconds=0.0, rounds=(4, 10))
    assert gc.isenabled()
    assert [turn for _, turn in turns] == list(range(18))  # two rounds to warm up, then four
    rounds = ["".join(name for name, _ in turns[i : i + 3]) for i in range(0, 18, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"} and len(set(rounds)) > 1
    assert {name: len(rows) for name, rows in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert min(row[0] for rows in times.values() for row in rows) == 7  # warm-up is not among them


def test_the_collector_is_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        clock.interleave({"a": lambda turn: [1 / 0]}, 0.0)
    assert gc.isenabled()


def test_phases_follow_each_other_on_rotating_slots():
    seen = []
    run = clock.eager({"fwd": lambda slot: slot * 10, "bwd": seen.append}, [1, 2], "cpu")
    rows = [run(turn) for turn in range(3)]
    assert seen == [10, 20, 10]
    assert all(row[2] == pytest.approx(row[0] + row[1]) for row in rows)
    assert len(clock.eager({"only": lambda slot: slot}, [1], "cpu")(0)) == 1


def test_slots_reach_past_the_last_cache(monkeypatch):
    monkeypatch.setattr(clock, "last_cache_bytes", lambda device: 1000)
    assert clock.slots_past_cache(300, "cpu") == 4
    assert clock.slots_past_cache(300, "cuda") == 7
    assert clock.slots_past_cache(5000, "cpu") == 2


class FakeCuda:
    """CUDA's events and graphs on a clock that every launched piece of work moves on."""

    def __init__(self, monkeypatch):
        self.now, self.capturing = 0.0, None
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = outer.now

            def elapsed_time(self, other):
                return other.at - self.at

        class CUDAGraph:
            work = 0.0

            def replay(self):
                outer.now += self.work

        @contextmanager
        def graph(captured, pool, stream):
            outer.capturing = captured
            yield
            outer.capturing = None

        fakes = {"Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": lambda: None,
                 "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "current_stream": lambda: None,
                 "stream": lambda stream: nullcontext()}  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def work(self, ms):
        def phase(state):
            if self.capturing:
                self.capturing.work += ms
            else:
                self.now += ms
            return state

        return phase


def test_graphs_give_each_phase_and_all_of_one_slot(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    replay = clock.graphed({"fwd": cuda.work(2.0), "bwd": cuda.work(3.0)}, ["a", "b", "c"], pool=None)
    assert replay(0) == pytest.approx([2.0, 3.0, 5.0])
    assert clock.graphed({"only": cuda.work(2.0)}, ["a", "b"], pool=None)(0) == pytest.approx([2.0])


def test_eager_cuda_takes_the_mean_of_a_burst(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    run = clock.eager({"fwd": cuda.work(2.0), "bwd": cuda.work(3.0)}, ["a", "b"], "cuda")
    assert run(0) == pytest.approx([2.0, 3.0, 5.0]) and cuda.now == 5 * clock.BURST


@pytest.mark.skipif(not clock.STATUS.exists(), reason="the system does not tell")
def test_peak_memory_sees_what_a_step_holds():
    size = 64 * 2**20
    peak = clock.peak_bytes({"fwd": lambda slot: torch.ones(size // 4)}, None, "cpu")
    assert peak is None or size * 0.9 < peak < size * 1.5
