"""Flower's simulation of the clients that train with PEFT: the same steps as provider "peft", by a real ServerApp and
ClientApp, in processes of Ray.

Flower is given what suits it best: a core to each client, so that as many train at once as there are cores (its own
default is two cores for each), and a model that each of its processes loads once and keeps. It runs in a process of its
own, which nothing leaves: Flower's telemetry and update check and Ray's usage statistics are off.
"""

import atexit
import functools
import importlib.util
import math
import multiprocessing
import os
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.round_work import Work, peft_model, train_plain_client

NO_RAY = "flower: left out, ray is not installed, on which Flower's simulation runs (pip install 'flwr[simulation]')"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class Flower:
    """A simulation that waits for turns; each is one round of FedAvg over all clients, from the same start."""

    def __init__(self, work: Work):
        began, context = time.perf_counter(), multiprocessing.get_context("spawn")
        self._pipe, own = context.Pipe()
        sizes = (str(work.data.resolve()), work.tokens, work.batch, work.clients)
        device = work.experiment.learner.device.type
        # No daemon: Ray's processes are its children.
        self._process = context.Process(target=_serve, args=(own, sizes, device, torch.get_num_threads()))
        self._process.start()
        own.close()
        atexit.register(self.close)  # before multiprocessing waits for its children
        self(0)  # all models are loaded
        self.startup = time.perf_counter() - began

    @staticmethod
    def there() -> bool:
        return all(importlib.util.find_spec(name) for name in ("flwr", "ray"))

    def __call__(self, turn: int) -> float:
        """The mean of the clients' losses."""
        self._pipe.send(turn)
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"Flower's simulation ended, status {self._process.exitcode}") from None

    def close(self) -> None:
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(60)


@functools.cache
def _loaded(*sizes: Any) -> tuple[Work, torch.nn.Module]:
    """Once in a process."""
    data, *others = sizes
    work = Work(Path(data), *others)
    return work, peft_model(work)


def _apps(pipe: Connection, sizes: tuple[Any, ...]) -> tuple[Any, Any]:
    """(ServerApp, ClientApp)"""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    client_app, server_app, clients = ClientApp(), ServerApp(), sizes[-1]

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        work, model = _loaded(*sizes)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        client = int(context.node_config["partition-id"])
        loss = train_plain_client(work, model, client, message.content["config"]["turn"])
        metrics = MetricRecord({"loss": loss, "num-examples": len(work.experiment.clients[client])})
        reply = RecordDict({"arrays": ArrayRecord(_trained(model)), "metrics": metrics})
        return Message(reply, reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord(_trained(_loaded(*sizes)[1]))
        every = {"min_train_nodes": clients, "min_available_nodes": clients, "fraction_evaluate": 0.0}
        for turn in iter(pipe.recv, None):
            strategy = FedAvg(**every)
            result = strategy.start(grid, start, num_rounds=1, train_config=ConfigRecord({"turn": turn}))
            pipe.send(float(result.train_metrics_clientapp[1]["loss"]) if result.train_metrics_clientapp else math.nan)

    return server_app, client_app


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def _serve(pipe: Connection, sizes: tuple[Any, ...], device: str, threads: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(QUIET, FLWR_HOME=home)
        from flwr.simulation import run_simulation

        server_app, client_app = _apps(pipe, sizes)
        resources = {"num_cpus": 1, "num_gpus": float(device == "cuda")}
        cluster = {"num_cpus": threads, "num_gpus": int(device == "cuda"), "_temp_dir": home}
        run_simulation(
            server_app, client_app, sizes[-1],
            backend_config={"client_resources": resources, "init_args": cluster},
        )  # fmt: skip
