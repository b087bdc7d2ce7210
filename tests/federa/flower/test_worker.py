"""The worker's socket: who may open it, what happens to requests when workers die, and who starts another."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from federa.errors import InputError
from federa.flower import client_app
from federa.flower.parcel import Parcel
from federa.flower.worker import answer, ask, listen

from .deployment import ROOT, wait_for


@pytest.fixture
def path(tmp_path_factory):
    return Path(os.path.relpath(tmp_path_factory.mktemp("w") / "s"))  # a unix socket's path has at most 107 bytes


class Echo:
    def handle(self, request: Parcel) -> Parcel:
        return Parcel({"echo": request.facts}, request.blobs)


def serve(path, behaviours):
    """A worker that meets each connection as told: "die" closes it in mid-request, "answer" answers."""
    listener = listen(path)

    def loop():
        with listener:
            for behaviour in behaviours:
                connection, _ = listener.accept()
                with connection, connection.makefile("rwb") as stream:
                    if behaviour == "answer":
                        answer(Echo(), stream)
                    else:
                        stream.read(1)

    threading.Thread(target=loop, daemon=True).start()


def test_only_its_owner_may_open_it(path):
    with listen(path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(InputError, match="another worker is listening there"):
            listen(path)
    with listen(path):  # a dead worker's socket is replaced
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_paths_that_cannot_be(path, tmp_path):
    path.write_text("notes")
    with pytest.raises(InputError, match="must be a free path or a worker's socket, got another file"):
        listen(path)
    assert path.read_text() == "notes"
    with pytest.raises(InputError, match="must be a path for a unix socket, got AF_UNIX path too long"):
        listen(tmp_path / ("x" * 108))


def test_requests_survive_their_worker(path):
    request = Parcel({"a": 1}, {"state": b"\0" * 300_000})
    serve(path, ["die", "die", "answer"])
    assert ask(path, request) == Parcel({"echo": {"a": 1}}, request.blobs)


def test_a_request_that_kills_every_worker(path):
    serve(path, ["die"] * 3)
    with pytest.raises(ConnectionError, match="3 workers at .* died over the same request"):
        ask(path, Parcel({}))


def test_nobody_there(path):
    with pytest.raises(ConnectionError, match="no worker at"):
        ask(path, Parcel({}), patience=0.0)


def test_strangers_bytes_are_dropped(path):
    serve(path, ["answer", "answer"])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert ask(path, Parcel({})).facts == {"echo": {}}


def test_a_killed_worker_is_started_again(path, tmp_path):
    """kill -9 of the child, twice; the supervisor's own end takes the child with it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "federa.cli", "worker", str(path), "--folder", str(tmp_path / "init")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as supervisor:
        try:
            child = None
            for _ in range(3):
                child = _next_worker(path, supervisor.pid, child)
                os.kill(child, signal.SIGKILL)
            _next_worker(path, supervisor.pid, child)
        finally:
            supervisor.terminate()
        assert supervisor.stderr.read().count(b"died (code -9); starting another") == 3
    wait_for("the worker's end", lambda: not _answers(path))


def _answers(path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _next_worker(path, supervisor: int, before: int | None) -> int:
    return wait_for(
        "another worker", lambda: _answers(path) and _child(supervisor) != before and _child(supervisor), seconds=30
    )


def _child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def test_the_worker_of_a_site_is_in_its_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert client_app.worker_socket("worker.sock") == tmp_path / "worker.sock"
    assert client_app.worker_socket("/run/federa.sock") == Path("/run/federa.sock")


def test_the_process_of_a_message_loads_no_torch():
    """Flower starts one for every message; where a worker is, it need not know the model's libraries."""
    script = (
        "import sys, federa.flower.client_app; assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
