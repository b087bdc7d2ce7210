"""Whole rounds of runs with more and more clients, as many of them in each round: time, its parts and the most memory.

Every run is a process of its own, so that its memory is its own; the runs take turns, a round each. A round is all of
it: sampling, training in cohorts, aggregation, the geometry of the update, evaluation, metrics and checkpoint on disk.
Clients hold the longest examples, so that every step has as many tokens, whoever is sampled.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import records as store
from benchmarks.clock import forget_peak, percentiles, resident
from benchmarks.round_work import STEPS, config_of, with_clients
from federa.checkpoint import State
from federa.cohort import Cohorts, choose_size
from federa.config import Config
from federa.experiment import build
from federa.folder import RunFolder
from federa.memory import reuse_memory
from federa.rounds import run_rounds

COUNTS = (10, 100, 1000, 10_000)  # clients
PER_ROUND, TOKENS, BATCH = 6, 128, 16
ROUNDS = 4  # that are timed, after one to warm up


def run_clients(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each number of clients."""
    counts, rounds = (COUNTS[:2], 1) if options.quick else (COUNTS, ROUNDS)
    config = config_of(
        data, TOKENS, BATCH, COUNTS[0],
        data={"validation": 0.05},
        server={"rounds": 1 + rounds, "clients_per_round": PER_ROUND},
        run={"threads": torch.get_num_threads()},
    )  # fmt: skip
    pipes, context = {}, multiprocessing.get_context("spawn")
    for count in counts:
        pipes[count], own = context.Pipe()
        context.Process(target=_serve, args=(own, config, count), daemon=True).start()
        pipes[count].recv()  # is built
    times: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    shuffle, order = random.Random(0), list(counts)
    for number in range(1 + rounds):
        shuffle.shuffle(order)
        for count in order:
            pipes[count].send(None)
            seconds = pipes[count].recv()
            if number > 0:
                times[count].append(seconds)
    environment = store.environment(options.device)
    return [_record(count, times[count], pipes[count].recv(), environment) for count in counts]


def _serve(pipe: Connection, config: Config, clients: int) -> None:
    """One run: a round for each message, answered by its seconds; the most memory its rounds took at the end."""
    reuse_memory()
    experiment = build(config)
    longest = np.argsort(-experiment.train.lengths, kind="stable")
    shares = np.split(longest[: COUNTS[0] * STEPS * BATCH], COUNTS[0])
    experiment = with_clients(experiment, [shares[client % len(shares)].copy() for client in range(clients)])
    state, train = State(0, experiment.learner.state()), Cohorts(choose_size(experiment))
    forget_peak()
    began = 0.0

    def wait() -> None:
        nonlocal began
        pipe.recv()
        began = time.perf_counter()

    def watch(event: str, facts: dict[str, Any]) -> None:
        if event == "round":  # and all of it is on disk
            pipe.send(facts["seconds"] | {"all": time.perf_counter() - began})
            if facts["round"] < config.server.rounds:
                wait()

    pipe.send(None)
    wait()
    with tempfile.TemporaryDirectory() as folder:
        run_rounds(experiment, RunFolder(folder), state, watch, train)
        pipe.send(resident("VmHWM"))


def _record(count: int, times: list[dict[str, float]], peak: int | None, environment: dict[str, Any]) -> dict[str, Any]:
    parts = {name: float(np.median([row[name] for row in times])) for name in ("all", "train", "evaluate")}
    outside = [1 - (row["train"] + row["evaluate"]) / row["all"] for row in times]
    return {
        "subject": "federated_round",
        "group": "MiniLM",
        "sizes": {"T": TOKENS, "B": BATCH, "C": PER_ROUND, "clients": count},
        "dtype": "fp32",
        "provider": "federa",
        "mode": "eager",
        "phase": "clients",
        "refused": None,
        "ms": percentiles([1e3 * row["all"] for row in times]),
        "rounds": len(times),
        "samples_per_second": float(f"{PER_ROUND * STEPS * BATCH / parts['train']:.4g}"),  # while training
        "seconds": {name: float(f"{value:.4g}") for name, value in parts.items()},
        "outside": float(f"{np.median(outside):.3g}"),  # training and evaluation, share of a round's time
        "peak_bytes": peak,  # of the whole process in its rounds
        "environment": environment,
    }


def shown(row: dict[str, Any]) -> str:
    """For people who watch."""
    seconds = row["seconds"]
    return (
        f"{row['sizes']['clients']:6,} clients {seconds['all']:6.2f} s a round: training {seconds['train']:.2f}, "
        f"evaluation {seconds['evaluate']:.2f}, all else {row['outside']:.2%}"
    )
