"""Flower's ClientApp: carries requests to the site's worker and its replies back.

What a site says of itself stands in its SuperNode's --node-config: partition-id and num-partitions (client c is served
by the site whose partition-id is c modulo num-partitions), worker (the socket of `federa worker`), and any of the
site's own keys, as in data.path="/srv/texts" or model.device="cuda".
"""

import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import federa
from federa.flower.parcel import Parcel
from federa.flower.worker import ask, site_folder

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Says which clients this site serves."""
    site, sites = _place(context)
    facts = {"site": site, "sites": sites, "federa": federa.__version__}
    return Message(Parcel(facts).to_record(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one client for one round."""
    request = Parcel.from_record(message.content)
    site, sites = _place(context)
    if request.facts["client"] % sites != site:
        raise ValueError(f"this is site {site} of {sites}, which does not serve client {request.facts['client']}")
    settings = {key: value for key, value in context.node_config.items() if "." in key}
    reply = _answer(Parcel(request.facts | {"settings": settings}, request.blobs), context)
    reply.facts["traffic"] = {"received": request.size, "sent": reply.size}
    return Message(reply.to_record(), reply_to=message)


def _answer(request: Parcel, context: Context) -> Parcel:
    worker = context.node_config.get("worker")
    if worker is not None:
        try:
            return ask(worker_socket(str(worker)), request)
        except ConnectionError as error:
            problem = str(error)
    else:
        problem = "no worker in --node-config"
    warnings.warn(
        f"federa: {problem}; the base model is loaded for this message alone. "
        "Start `federa worker SOCKET` and name it: --node-config 'worker=\"SOCKET\"'",
        stacklevel=2,
    )
    return _site_in_process(os.getpid()).handle(request)


def worker_socket(name: str) -> Path:
    """A relative path is one in FLWR_HOME, which is the site's folder."""
    return Path(os.environ.get("FLWR_HOME", "."), Path(name).expanduser())


@cache
def _site_in_process(pid: int) -> Any:
    from federa.flower.site import Site

    return Site(site_folder())


def _place(context: Context) -> tuple[int, int]:
    """(partition-id, num-partitions) of the node's configuration."""
    values = [context.node_config.get(key) for key in ("partition-id", "num-partitions")]
    if not all(type(value) is int for value in values) or not 0 <= values[0] < values[1]:
        raise ValueError(f"--node-config: must hold partition-id=I num-partitions=N with 0 <= I < N, got {values}")
    return values[0], values[1]
