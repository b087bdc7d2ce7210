"""The process that keeps a site's model in memory: one request at a time over a unix socket that its owner alone may
open. Flower starts a new process for every message; those processes ask this one.

`supervise` runs it in a child, and starts another when that one dies, as under an out-of-memory killer.
"""

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from federa.errors import InputError, RunError
from federa.flower.parcel import Parcel

_PATIENCE = 120.0  # seconds that a worker may take to come back
_TRIES = 3  # of a request whose worker dies


def ask(path: Path, request: Parcel, patience: float = _PATIENCE) -> Parcel:
    """The worker's reply; a worker that dies over the request is waited for and asked again.

    Raises ConnectionError where none answers within `patience` seconds or three die over the same request.
    """
    for _ in range(_TRIES):
        connection = _connect(path, patience)
        try:
            with connection, connection.makefile("rwb") as stream:
                request.write(stream)
                return Parcel.read(stream)
        except (OSError, EOFError):
            continue
    raise ConnectionError(f"{_TRIES} workers at {path} died over the same request")


def _connect(path: Path, patience: float) -> socket.socket:
    end = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() >= end:
                raise ConnectionError(f"no worker at {path}: {error}") from None
            time.sleep(0.2)


def serve(path: Path, folder: Path) -> None:
    """Answers requests for ever. `folder` keeps initial factors. Raises InputError for a socket that cannot be."""
    with listen(path) as listener:
        from federa.flower.site import Site  # torch: the socket is there while it loads

        site = Site(folder)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                answer(site, stream)


def answer(site, stream: BinaryIO) -> None:
    """One request of a connection; one that ends early or was never federa's is dropped."""
    with contextlib.suppress(OSError, EOFError, ValueError):
        site.handle(Parcel.read(stream)).write(stream)


def listen(path: Path) -> socket.socket:
    """A socket that only the owner of the process may open (0600); one that a dead worker left is replaced."""
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InputError(f"{path}: must be a free path or a worker's socket, got another file")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            raise InputError(f"{path}: another worker is listening there")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        listener.bind(str(path))
    except OSError as error:  # a missing folder, or a path above 107 bytes
        listener.close()
        raise InputError(f"{path}: must be a path for a unix socket, got {error}") from None
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def supervise(path: Path, folder: Path) -> None:
    """Runs a worker and starts another whenever it dies. Raises RunError when five in a row die at once."""
    command = [sys.executable, "-m", "federa.flower.worker", str(path), str(folder)]
    early = 0
    while True:
        started = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.PIPE)  # a closed pipe tells it that this process is gone
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if code == 2:
            raise RunError(f"the worker at {path} cannot start; its last line says why")
        early = early + 1 if time.monotonic() - started < 10 else 0
        if early == 5:
            raise RunError(f"the worker at {path} died five times in a row within seconds, last with code {code}")
        print(f"federa: the worker at {path} died (code {code}); starting another", file=sys.stderr, flush=True)


def site_folder() -> Path:
    """Where a site keeps the initial factors of its runs: a folder of the user's cache."""
    from federa.data import cache_folder

    return cache_folder() / "sites"


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """The child: SOCKET FOLDER."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        print(f"federa: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
