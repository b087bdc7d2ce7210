"""The server's side of a round over real sites: requests out, replies checked, updates in client order."""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

import federa
from federa import scaffold
from federa.checkpoint import State
from federa.client import ClientUpdate
from federa.errors import RunError
from federa.experiment import Experiment
from federa.flower.codec import pack_correction, pack_state, unpack_update
from federa.flower.parcel import Parcel
from federa.folder import RunFolder, to_json

log = getLogger("flwr")  # what `flwr run --stream` shows
_POLL = 0.5  # seconds between two looks for replies
_AT_ONCE = 8  # replies taken from the network at a time: what is in memory beside the model
_INTRODUCTION = 60.0  # seconds for a new node to say which clients it serves
_REPLY_LIMIT = 4  # times the size of the state: a payload above it is not read


@dataclass
class _Request:
    """One client's part of a round."""

    client: int
    node: int
    parcel: Parcel
    sent: int = 0  # bytes
    since: float = 0.0  # when it was sent
    reply: Parcel | None = None
    problem: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Sites:
    """`train` of `federa.rounds.run_rounds` over Flower's grid.

    Client c of N sites' runs on the node whose partition-id is c modulo N. Every request goes out at once; an update
    that comes before its turn waits on the disk, so that sums run in client order with one update in memory (and up to
    eight replies as Flower hands them over). What went wrong with a client is its update's `problem`: a round then
    rejects it by that name. Every round's traffic and seconds are a line in sites.jsonl of the run's folder.
    """

    def __init__(self, grid: Grid, folder: RunFolder):
        self.grid = grid
        self.folder = folder
        self._places: dict[int, tuple[int, int]] = {}  # node id -> (partition-id, num-partitions), oldest first
        self._informed: set[int] = set()  # nodes that have the initial factors
        self._asked: dict[str, tuple[int, float]] = {}  # message id -> (node id, until when it may answer)
        self._foreign: set[int] = set()  # nodes that are no sites; asked again in the next round
        self._waited = False

    def __call__(
        self, experiment: Experiment, state: State, round: int, clients: Sequence[int]
    ) -> Iterator[ClientUpdate]:
        started = time.monotonic()
        self._foreign.clear()
        if not self._waited:
            self._wait(experiment)
            self._waited = True
        settings, limit = experiment.config.sites, 2**20 + _REPLY_LIMIT * sum(t.nbytes for t in state.tensors.values())
        requests = self._requests(experiment, state, round, clients)
        end = time.monotonic() + settings.timeout
        by_message = self._send([one for one in requests if one.problem is None], settings.timeout)
        with tempfile.TemporaryDirectory(dir=self.folder.path, prefix=".replies.", suffix=".tmp") as spool:
            for request in requests:
                while request.reply is None and request.problem is None:
                    self._collect(by_message, end, settings.timeout, limit, Path(spool))
                start = experiment.learner.start_of(state.tensors, request.client)
                update = self._update(request, start, settings.wire, Path(spool))
                if request is requests[-1]:
                    self._record(round, requests, time.monotonic() - started)
                yield update

    def _requests(self, experiment: Experiment, state: State, round: int, clients: Sequence[int]) -> list[_Request]:
        config, init = experiment.config, self._init
        state_facts, content = pack_state(state, config.sites.wire)
        facts = {
            "federa": federa.__version__,
            "config": config.model_dump(mode="json"),
            "init": hashlib.sha256(init).hexdigest(),
            "data": None if config.partition.scheme == "sites" else self._data_digest(),
            "label_names": experiment.corpus.label_names,
            "round": round,
            "wire": config.sites.wire,
            "state": state_facts,
        }
        homes = self._homes(experiment)
        requests = []
        for client in clients:
            node = homes.get(client, 0)
            blobs = {"state": content} | ({} if node in self._informed else {"init": init})
            if (change := scaffold.correction(state, client)) is not None:
                blobs["correction"] = pack_correction(change)
            request = _Request(client, node, Parcel(facts | {"client": client}, blobs))
            if client in homes:
                self._informed.add(node)
            else:
                request.problem = "no site serves it"
            requests.append(request)
        return requests

    @cached_property
    def _init(self) -> bytes:
        """The initial factors and their hashes, as the run's folder has them."""
        return self.folder.init_file.read_bytes()

    def _data_digest(self) -> str:
        return self.folder.read_json(self.folder.partition_file, ("data",))["data"]

    def _send(self, requests: list[_Request], timeout: float) -> dict[str, _Request]:
        """The requests by the ids of their messages; one that the network refuses has a problem instead."""
        sent = {}
        for request in requests:
            message = Message(request.parcel.to_record(), request.node, MessageType.TRAIN, ttl=timeout)
            (ident, *_) = [*self.grid.push_messages([message]), None]
            request.sent += request.parcel.size
            request.since = request.since or time.monotonic()
            if ident is None:
                request.problem = "the SuperLink did not take the request for its site"
            else:
                sent[ident] = request
        return sent

    def _collect(self, by_message: dict[str, _Request], end: float, timeout: float, limit: int, spool: Path) -> None:
        """Takes what replies there are; at the end of the time, every missing one is a problem."""
        over = time.monotonic() > end
        waiting, again = list(by_message), []
        for start in range(0, len(waiting), _AT_ONCE):
            for message in self.grid.pull_messages(waiting[start : start + _AT_ONCE]):
                request = by_message.pop(message.metadata.reply_to_message_id, None)
                if request is None:
                    continue
                _receive(request, message, limit)
                if request.reply is not None and request.reply.facts.get("need") == "init":
                    request.reply = None
                    if "init" in request.parcel.blobs:
                        request.problem = "its site asks for the initial factors again and again"
                        continue
                    request.parcel = replace(request.parcel, blobs={**request.parcel.blobs, "init": self._init})
                    again.append(request)
                elif request.reply is not None:
                    (spool / str(request.client)).write_bytes(request.reply.blobs["update"])
                    request.reply = replace(request.reply, blobs={})
        if again:
            by_message.update(self._send(again, max(1.0, end - time.monotonic())))
        if over:
            for request in by_message.values():
                request.problem = f"no reply within sites.timeout = {timeout:g} s"
            by_message.clear()
        if by_message:
            time.sleep(_POLL)

    def _update(self, request: _Request, start: Mapping[str, torch.Tensor], wire: str, spool: Path) -> ClientUpdate:
        if request.problem is None:
            try:
                file = spool / str(request.client)
                update = unpack_update(request.reply.facts.get("update"), file.read_bytes(), start, wire)
                file.unlink()
                return replace(update, client=request.client, problem=None)
            except (ValueError, TypeError, AttributeError) as error:
                request.problem = f"its payload is malformed: {' '.join(str(error).split())[:200]}"
        log.warning("client %s: %s", request.client, request.problem)
        return ClientUpdate(request.client, 0, 0, {}, {}, False, request.problem)

    def _wait(self, experiment: Experiment) -> None:
        """Until every client has a site, or sites.wait seconds; RunError if there is none at all."""
        wait = experiment.config.sites.wait
        end, missing, before = time.monotonic() + wait, None, None
        while True:
            homes = self._homes(experiment)
            missing = [client for client in range(len(experiment.clients)) if client not in homes]
            if not missing or time.monotonic() >= end:
                break
            if missing != before:
                log.info("waiting for the sites of %s clients: %s", len(missing), _few(missing))
                before = missing
            time.sleep(_POLL)
        if not homes:
            raise RunError(f"sites.wait: no site came within {wait:g} s; start SuperNodes, then `federa resume DIR`")
        if missing:
            log.warning("going on without the sites of %s clients: %s", len(missing), _few(missing))

    def _homes(self, experiment: Experiment) -> dict[int, int]:
        """client -> node id, of the nodes that are there now; nodes not seen before are asked what they serve."""
        alive = set(self.grid.get_node_ids())
        self._introduce(alive - self._places.keys())
        homes: dict[int, int] = {}
        clients = len(experiment.clients)
        for node, (site, sites) in self._places.items():
            if node not in alive:
                continue
            if experiment.config.partition.scheme == "sites" and sites != clients:
                log.warning("node %s: num-partitions must be partition.clients = %s, got %s", node, clients, sites)
                continue
            for client in range(site, clients, sites):
                if client in homes:
                    log.warning("client %s: served by nodes %s and %s; taking the later", client, homes[client], node)
                homes[client] = node
        return homes

    def _introduce(self, nodes: set[int]) -> None:
        """Asks nodes what they serve and takes what answers there are, now or at the next call."""
        now = time.monotonic()
        self._asked = {ident: (node, end) for ident, (node, end) in self._asked.items() if now < end}
        waiting = {node for node, _ in self._asked.values()}
        for node in sorted(nodes - waiting - self._foreign):
            message = Message(Parcel({}).to_record(), node, MessageType.QUERY, ttl=_INTRODUCTION)
            (ident, *_) = [*self.grid.push_messages([message]), None]
            if ident is not None:
                self._asked[ident] = (node, now + _INTRODUCTION)
        for message in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node, _ = self._asked.pop(message.metadata.reply_to_message_id, (None, 0.0))
            if node is None:
                continue
            try:
                self._places[node] = _place(message)
            except ValueError as error:
                log.warning("node %s: is no site of federa's: %s", node, error)
                self._foreign.add(node)

    def _record(self, round: int, requests: list[_Request], seconds: float) -> None:
        """One line of sites.jsonl: per client its node, bytes and seconds as both ends counted them, how often the base
        model has been loaded there, and what went wrong."""
        clients = []
        for request in requests:
            entry = {"client": request.client, "node": request.node, "sent": request.sent} | request.notes
            facts = {} if request.reply is None else request.reply.facts
            clients.append(entry | {"site": _own_account(facts), "problem": request.problem})
        with open(self.folder.path / "sites.jsonl", "a", encoding="utf-8") as file:
            file.write(to_json({"round": round, "seconds": seconds, "clients": clients}) + "\n")


def _place(message: Message) -> tuple[int, int]:
    """(partition-id, num-partitions) of the node that answers. Raises ValueError for any other answer."""
    if message.has_error():
        raise ValueError(f"it answers with the error {' '.join(str(message.error.reason).split())[:300]}")
    facts = Parcel.from_record(message.content).facts
    site, sites = facts.get("site"), facts.get("sites")
    if type(site) is not int or type(sites) is not int or not 0 <= site < sites:
        raise ValueError(f"it says that it is site {site!r:.30} of {sites!r:.30}")
    if facts.get("federa") != federa.__version__:
        theirs, ours = facts.get("federa"), federa.__version__
        log.warning("site %s: has federa %.30s, the server has %s", site, theirs, ours)
    return site, sites


def _receive(request: _Request, message: Message, limit: int) -> None:
    """Puts the reply, or what is wrong with it, into the request."""
    if message.has_error():
        reason = " ".join(str(message.error.reason).split())[:300]
        request.problem = f"its site failed: {reason} (Flower's code {message.error.code})"
        return
    try:
        reply = Parcel.from_record(message.content)
    except ValueError as error:
        request.problem = f"its payload is malformed: {error}"
        return
    request.notes |= {"received": reply.size, "seconds": time.monotonic() - request.since}
    if reply.size > limit:
        request.problem = f"its payload is oversized: {reply.size} bytes, at most {limit} are read"
    elif "error" in reply.facts:
        request.problem = f"its site says: {str(reply.facts['error'])[:500]}"
    elif reply.facts.get("need") != "init" and "update" not in reply.blobs:
        request.problem = "its payload is malformed: it holds no update"
    else:
        request.reply = reply


def _own_account(facts: dict[str, Any]) -> dict[str, float | None]:
    """What a site says of its part: numbers, or None for whatever else it sent."""
    traffic = facts.get("traffic")
    said = facts | (traffic if isinstance(traffic, dict) else {})
    keys = ("seconds", "loads", "pid", "received", "sent")
    return {key: said[key] if type(said.get(key)) in (int, float) else None for key in keys}


def _few(clients: list[int]) -> str:
    return ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
