"""Records on disk, one JSON line each under results/, and what they were taken on.

A file of measurements begins with its runs, {"run": id, "environment": {...}}; a record says `run` for its environment.

Imports nothing of federa/: GPU machines that only run kernels need not have what it needs.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
MADE_FROM_RECORDS = (
    *(":!benchmarks/results", ":!benchmarks/plots", ":!benchmarks/LOG.md", ":!README.md"),
    ":!federa_kernels/lora_linear/dispatch.json",
)
PACKAGES = ("torch", "triton", "peft")


def commit() -> str:
    """The checkout that is measured, with -dirty where anything but records and what is made from them has changed."""
    words = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", ".", *MADE_FROM_RECORDS])
    found = [subprocess.run(["git", *each], cwd=ROOT, capture_output=True, text=True) for each in words]
    if found[0].returncode:
        return "unknown"  # a copy without its history
    return found[0].stdout.strip() + "-dirty" * bool(found[1].stdout.strip())


def environment(device: str) -> dict[str, Any]:
    """What a time depends on besides its case."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    cuda = device == "cuda"
    return {
        "commit": commit(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": device,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "driver": _driver() if cuda else None,
        **({"capability": "{}.{}".format(*torch.cuda.get_device_capability())} if cuda else {}),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def processor() -> str:
    """The CPU's name and the widest instructions that matter here."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in facts.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = values.get("flags", "").split()
    has = [name for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("avx512_bf16", "AVX512-BF16"),
                                   ("amx_bf16", "AMX")) if flag in flags]  # fmt: skip
    return ", ".join([values.get("model name", platform.machine()), *has])


def _driver() -> str | None:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
    except OSError:
        return None


def path_of(subject: str, device: str) -> Path:
    return RESULTS / f"{subject}-{device}.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, each with its environment."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    environments = {row["run"]: row["environment"] for row in rows if set(row) == {"run", "environment"}}
    return [
        row | {"environment": environments[row.pop("run")]} if "run" in row else row
        for row in rows
        if set(row) != {"run", "environment"}
    ]


def _run_of(environment: Mapping[str, Any]) -> str:
    """The same for the same environment, wherever it is written."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:8]


def write(path: Path, text: str) -> None:
    """So that `path` holds either its old text or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def key(record: Mapping[str, Any]) -> str:
    """What a record is about: a newer one with the same key takes its place."""
    environment = record["environment"]
    about = [record.get(name) for name in ("subject", "group", "sizes", "dtype", "provider", "mode", "phase")]
    return json.dumps([*about, environment["kind"], environment["device"], environment["threads"]], sort_keys=True)


def save(records: Iterable[Mapping[str, Any]]) -> None:
    """Puts records into their files, in the place of older ones of the same key."""
    files: dict[Path, list[Mapping[str, Any]]] = {}
    for record in records:
        files.setdefault(path_of(record["subject"], record["environment"]["kind"]), []).append(record)
    for path, new in files.items():
        merged = {key(record): record for record in [*read(path), *new]}
        runs, rows = {}, []
        for record in merged.values():
            run = _run_of(record["environment"])
            runs[run] = {"run": run, "environment": record["environment"]}
            rows.append({**record, "run": run})
            del rows[-1]["environment"]
        write(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*runs.values(), *rows]))
