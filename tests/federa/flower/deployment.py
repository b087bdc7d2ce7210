"""A real deployment on this machine: SuperLink, SuperNodes and workers as processes, by a project's own commands."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from federa.flower import project

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


def wait_for(what: str, done: Callable[[], object], seconds: float = 120):
    """The first true value of `done()`, within some seconds."""
    end = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.3)
    return value


class Deployment:
    """The processes of a project folder; every one ends with the `with` block. Logs are files named after them."""

    def __init__(self, folder: Path, address: str, first_port: int, insecure: bool = False):
        self.folder, self.address, self.first_port, self.insecure = folder, address, first_port, insecure
        self.processes: dict[str, subprocess.Popen] = {}
        self.groups: list[int] = []
        self.logs = folder.parent / f"{folder.name}-logs"
        self.logs.mkdir()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.processes):
            self.kill(name, signal.SIGTERM)
        for group in self.groups:  # whatever a killed process has left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def start(self, name: str, command: list[str], home: Path) -> subprocess.Popen:
        if command[0].startswith(("flower-", "federa")):
            command = [str(BIN / command[0]), *command[1:]]
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # Flower starts its own commands by their names
        environment = os.environ | project.QUIET | {"FLWR_HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": path}
        with open(self.logs / f"{name}.log", "a") as log:
            process = subprocess.Popen(
                command, cwd=home, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        self.groups.append(process.pid)  # each is a session of its own
        return process

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Ends one process, and waits for it; after SIGTERM and some patience, for good."""
        process = self.processes.pop(name)
        process.send_signal(how)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()

    def superlink(self) -> None:
        self.start("superlink", project.superlink_command(self.address, self.insecure), self.folder / "server")
        wait_for("superlink", lambda: self.flwr("ls", project.CONNECTION).returncode == 0)

    def worker(self, site: int) -> None:
        home = self.folder / f"site-{site}"
        self.start(
            f"worker-{site}", [sys.executable, "-m", "federa.cli", "worker", "worker.sock", "--folder", "init"], home
        )

    def supernode(self, site: int, name: str | None = None, change: Callable = lambda command: command) -> None:
        command = project.supernode_command(site, self.address, self.insecure)
        command[command.index("--port") + 1] = str(self.first_port + len(self.processes))
        self.start(name or f"supernode-{site}", change(command), self.folder / f"site-{site}")

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = project.environment_of(self.folder) | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*project.flwr(), *arguments], env=environment, capture_output=True, text=True, timeout=120
        )

    def register(self, *sites: int) -> None:
        for site in sites:
            key = self.folder / f"site-{site}" / "key.pub"
            done = self.flwr("supernode", "register", str(key), project.CONNECTION)
            assert done.returncode == 0, done.stdout + done.stderr

    def online(self) -> int:
        done = self.flwr("supernode", "list", project.CONNECTION, "--format", "json")
        return sum(node["status"] == "online" for node in json.loads(done.stdout)["nodes"])

    def run(self, name: str, **settings: str) -> subprocess.Popen:
        """`flwr run --stream` in the background."""
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        command = [*project.flwr(), "run", str(self.folder / "app"), project.CONNECTION, "--stream"]
        return self.start(name, command + (["--run-config", text] if text else []), self.folder / "server")

    def federa(self, *arguments) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "federa.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    def __str__(self) -> str:
        return shlex.join(self.processes)
