"""Flower's ServerApp: `federa.simulation.run` with the training of each round at real sites.

The project file's [tool.flwr.app.config] holds config (the run's configuration as YAML), set (overrides of it, one a
line), output (the run's folder, on the SuperLink's machine) and project (the deployment's folder).
"""

import time
from logging import getLogger
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federa import strict_yaml
from federa.errors import InputError
from federa.flower.sites import Sites
from federa.folder import RunFolder
from federa.simulation import run

app = ServerApp()
log = getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Begins the run, or takes it up after its last saved round where `output` holds it already."""
    settings = {key: str(context.run_config.get(key, "")) for key in ("config", "set", "output", "project")}
    if not settings["output"]:
        raise InputError("output: must be a folder on the SuperLink's machine, got none in the run's configuration")
    folder = RunFolder(settings["output"])

    def watch(event: str, facts: dict[str, Any]) -> None:
        if event == "ready":
            folder.write_json("flower.json", {"project": settings["project"]})
            log.info("round %s of %s is done", facts["state"].round, facts["experiment"].config.server.rounds)
        elif event == "round":
            log.info("round %s: %s", facts["round"], line_of(facts))
        elif event == "scored":
            log.info("finished: %s", facts["test"])

    overrides = settings["set"].split("\n") if settings["set"].strip() else []
    config = strict_yaml.parse(settings["config"]) or {}
    _until_free(folder)
    run(config, folder.path, overrides=overrides, watch=watch, train=Sites(grid, folder))


def _until_free(folder: RunFolder, seconds: float = 180.0) -> None:
    """Waits for a ServerApp that is in the folder still: one outlives its killed SuperLink by some seconds."""
    end = time.monotonic() + seconds
    while folder.path.is_dir():
        try:
            with folder.lock():
                return
        except InputError:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def line_of(record: dict[str, Any]) -> str:
    """A round in a few words."""
    text = f"{len(record['completed'])} of {len(record['sampled'])} clients"
    if record["train_loss"] is not None:  # Poisson sampling may pick nobody
        text += f", loss {record['train_loss']:.4f}"
    if record["validation"] is not None:
        text += f", validation {record['validation']}"
    return text
