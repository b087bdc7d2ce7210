"""A run's folder: its files, written so that a kill at any moment leaves each of them whole."""

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from federa.config import Config, config_digest, dump_config, load_config
from federa.errors import InputError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file so that `path` holds either its old content or all of the new one, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable where the system allows it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(value: Any) -> str:
    """JSON with null for NaN and infinities, which JSON has no words for."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class RunFolder:
    """The files of one run: config.yaml, environment.json, metrics.jsonl, checkpoints/, adapter/, result.json, ..."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lock_file = self.path / ".lock"
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.partition_file = self.path / "partition.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.report_file = self.path / "report.html"
        self.init_file = self.path / "init.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run. Raises InputError if the folder holds none."""
        folder = cls(path)
        if not folder.path.is_dir():
            raise InputError(f"{path}: must be the folder of a run, got no such folder")
        if not folder.config_file.is_file():
            raise InputError(f"{path}: must be the folder of a run, got no config.yaml in it")
        return folder

    @classmethod
    def create(cls, path: str | Path, config: Config) -> "RunFolder":
        """A folder for this configuration: new, empty or of an earlier run of the same. InputError if it is taken.

        Nothing is written into it yet: a run that cannot begin leaves it free.
        """
        folder = cls(path)
        if folder.config_file.is_file():
            if config_digest(folder.config()) != config_digest(config):
                raise InputError(
                    f"{path}: already holds a run of another configuration; choose another --output or delete it"
                )
        elif folder.path.exists():
            if not folder.path.is_dir():
                raise InputError(f"{path}: must be a folder, got a file")
            if not all(item.name.startswith(".") for item in folder.path.iterdir()):
                raise InputError(f"{path}: must be empty or hold a run, got other files; choose another --output")
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.lock_file.touch()
        except OSError as error:
            raise InputError(f"{path}: must be a folder that can be written, got {error}") from None
        return folder

    def write_config(self, config: Config) -> None:
        write_atomic(self.config_file, dump_config(config))

    def config(self) -> Config:
        return load_config(self.config_file)

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, or None while there is none."""
        return self.read_json(self.result_file, ("test", "validation", "best")) if self.result_file.is_file() else None

    def read_json(self, path: Path, keys: Sequence[str] = ()) -> Any:
        """What a file of the folder holds; with `keys`, a mapping that has them. InputError for anything else."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: must be JSON written by federa, got {error}") from None
        if keys and not (isinstance(value, dict) and value.keys() >= {*keys}):
            raise InputError(f"{path}: must hold {', '.join(keys)}, got {to_json(value)[:60]}")
        return value

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, to_json(value) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of finished rounds; a last line cut by a kill is left out."""
        if not self.metrics_file.is_file():
            return []
        records = []
        lines = self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise InputError(
                    f"{self.metrics_file}: line {number} must be a JSON record, got {line[:40]!r}"
                ) from None
        return records

    def append_metrics(self, record: dict[str, Any]) -> None:
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind_metrics(self, round: int) -> None:
        """Drops records of rounds after `round`: they were measured but their state was not saved.

        Raises InputError unless the records of all rounds up to it are there.
        """
        try:
            kept = [record for record in self.metrics() if record["round"] <= round]
        except (KeyError, TypeError):
            raise InputError(f"{self.metrics_file}: must hold the records of rounds, got other ones") from None
        if [record["round"] for record in kept] != list(range(round + 1)):
            raise InputError(f"{self.metrics_file}: must hold rounds 0 to {round} once each, got {len(kept)} records")
        write_atomic(self.metrics_file, "".join(to_json(record) + "\n" for record in kept))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process out of the folder. Raises InputError if one is in it."""
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open(self.lock_file, "w"))
            except OSError as error:
                raise InputError(f"{self.path}: must be a folder that can be written, got {error}") from None
            try:
                import fcntl
            except ImportError:
                yield
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another process is running in this folder") from None
            yield


def free_folder(path: Path) -> Path:
    """An empty temporary neighbour of `path`, for content that `publish_folder` will put there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Puts a finished folder at `path`, durably; an older one there goes away."""
    for item in temporary.rglob("*"):
        if item.is_file():
            with open(item, "r+b") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(item)
    sync_folder(temporary)
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    sync_folder(path.parent)


def environment(device: str, threads: int, cohort: int) -> dict[str, str | int | None]:
    """Versions and settings that results may depend on; `cohort` is how many clients train in one batch."""
    packages = ("federa", "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "scikit-learn")
    found: dict[str, str | int | None] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": threads,
        "cohort": cohort,
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["command"] = " ".join(["federa", *sys.argv[1:]]) if sys.argv[0].endswith("federa") else None
    return found
