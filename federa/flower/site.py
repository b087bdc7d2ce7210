"""What a site does with a request: it trains one client for one round on data that stay where they are."""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from federa.client import train_client
from federa.config import Config, changed, load_config
from federa.errors import InputError
from federa.experiment import Experiment, build
from federa.flower.codec import pack_update, unpack_correction, unpack_state
from federa.flower.parcel import Parcel
from federa.folder import write_atomic
from federa.methods import Broadcast

# Which keys a site decides for itself, in its SuperNode's --node-config: where its data, its model and its device are.
# What an example is (data.max_length) stays the run's.
_OWN_KEYS = re.compile(
    r"data\.(?!(max_length|validation|max_train|max_test)$)\w+"
    r"|model\.(name|revision|device|trust_remote_code)|run\.threads"
)


class Site:
    """A site's model and data, kept in memory from round to round; `handle` answers one request with one reply.

    folder: keeps the initial factors of runs, so that they are sent once even where processes come and go.
    loads: how often the base model has been loaded.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.loads = 0
        self._key: list[Any] | None = None
        self._experiment: Experiment | None = None

    def handle(self, request: Parcel) -> Parcel:
        """The reply holds the update, or says {"need": "init"}, or says in one line what is wrong."""
        started = time.perf_counter()
        try:
            reply = self._train(request)
        except Exception as error:  # whatever it is, the server shall name it and the site stay up for the next round
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            reply = Parcel({"error": " ".join(text.split())[:500]})
        reply.facts.update(loads=self.loads, pid=os.getpid(), seconds=time.perf_counter() - started)
        return reply

    def _train(self, request: Parcel) -> Parcel:
        facts = request.facts
        file = self._initial_factors(str(facts["init"]), request.blobs.get("init"))
        if file is None:
            return Parcel({"need": "init"})
        client = facts["client"]
        key = [facts[name] for name in ("config", "settings", "init", "data", "label_names")]
        if key != self._key:
            self._key = self._experiment = None  # the old model goes before the new one comes
            self._experiment = self._build(facts, Broadcast.load(file))
            self._key = key
        experiment = self._experiment
        learner, own = experiment.learner, _share_of(experiment, client)
        state = unpack_state(facts["state"], request.blobs["state"], dict(learner.trainable))
        learner.load(state.tensors, state.base)
        packed = request.blobs.get("correction")
        correction = None if packed is None else unpack_correction(packed)
        update = train_client(
            learner, experiment.train, own, client, facts["round"], state.tensors, experiment.config, correction
        )
        update_facts, content = pack_update(update, learner.start_of(state.tensors, client), facts["wire"])
        return Parcel({"update": update_facts}, {"update": content})

    def _initial_factors(self, digest: str, content: bytes | None) -> Path | None:
        """The file of the factors whose SHA-256 the server names, or None if they were never here."""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise InputError(f"init: must be a SHA-256, got {digest!r:.60}")
        file = self.folder / f"{digest}.safetensors"
        if content is not None:
            if hashlib.sha256(content).hexdigest() != digest:
                raise InputError("init: the initial factors must have the SHA-256 that the server names, got others")
            write_atomic(file, content)
        intact = file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest
        return file if intact else None

    def _build(self, facts: Mapping[str, Any], broadcast: Broadcast) -> Experiment:
        self.loads += 1
        config = site_config(load_config(facts["config"]), facts["settings"])
        if config.partition.scheme == "sites":
            return _with_own_data(config, broadcast, facts["label_names"])
        experiment = build(config, broadcast)
        if experiment.data_digest() != facts["data"]:
            raise InputError(
                "data: with partition.scheme other than sites, every site must read the texts that the server reads, "
                f"got others in {experiment.corpus.source}"
            )
        return experiment


def site_config(config: Config, settings: Mapping[str, Any]) -> Config:
    """The server's configuration with a site's own settings ("data.path", "model.device", ...) in it.

    The server names no file of a site's: its data.path and model.trust_remote_code are dropped. InputError for a
    setting that is the run's and not the site's, and where a site that must has not said where its data are.
    """
    for key in settings:
        if not _OWN_KEYS.fullmatch(key):
            raise InputError(f"--node-config: {key} must be a key that a site may set: data.path, model.name, ...")
    placed = "data.path" in settings or "data.name" in settings
    if not placed and (config.data.path is not None or config.partition.scheme == "sites"):
        raise InputError("data.path: the site must say where its data are: --node-config 'data.path=\"/its/folder\"'")
    private = changed(config, data={"path": None, "cache": None}, model={"trust_remote_code": False})
    return load_config(private, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def _with_own_data(config: Config, broadcast: Broadcast, label_names: list[str]) -> Experiment:
    """The experiment of a site that holds one client's data: all of its training texts, in their order."""
    with tempfile.TemporaryDirectory() as view:
        data: dict[str, Any] = {"max_train": None, "max_test": None}
        if config.data.path is not None:
            data["path"] = _labelled_view(Path(config.data.path).expanduser(), Path(view), label_names)
        experiment = build(changed(config, data=data), broadcast, at_site=True)
    if experiment.corpus.label_names != label_names:
        raise InputError(
            f"data.label: must have the server's labels {label_names}, got {experiment.corpus.label_names}"
        )
    return experiment


def _labelled_view(path: Path, view: Path, label_names: list[str]) -> str:
    """A folder as `load_corpus` wants it, of links: the site's texts with the server's label names.

    A site needs no test set; where it has none, its training texts stand there, and nobody looks at them.
    """
    if not path.exists():
        raise InputError(f"data.path: must be a file or a folder of this site, got {path}, which does not exist")
    files = sorted(path.iterdir()) if path.is_dir() else []
    train = next((file for file in files if file.name.split(".")[0] == "train"), None) if files else path
    if train is None or train.is_dir():
        raise InputError(f"data.path: must hold train.*, got {', '.join(file.name for file in files) or 'nothing'}")
    suffixes = train.name[train.name.index(".") :] if path.is_dir() else "".join(train.suffixes[-2:])
    for split in ("train", "test"):
        (view / f"{split}{suffixes}").symlink_to(train.resolve())
    if label_names:
        (view / "labels.json").write_text(json.dumps(label_names))
    return str(view)


def _share_of(experiment: Experiment, client: int) -> np.ndarray:
    """The indices of a client's examples; in a run over `sites`, of everything that is here."""
    if experiment.config.partition.scheme == "sites":
        return np.arange(len(experiment.train))
    return experiment.clients[client]
