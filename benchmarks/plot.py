"""Records -> the README's tables and the figures under plots/. No number is typed into the README by hand.

python -m benchmarks.plot                                 write tables and figures again
python -m benchmarks.plot --add NAME RUN_FOLDER           record a finished run and copy its curves first
python -m benchmarks.plot --add NAME RUN_FOLDER --busy    the same on a machine with other work: no times
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import records as store
from benchmarks.kernel_tables import clients_figure, clients_table, kernel_figure, kernel_table
from benchmarks.round_tables import round_figure, round_table
from benchmarks.svd_tables import svd_figure, svd_table

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks/results/runs.jsonl"
PLOTS = ROOT / "benchmarks/plots"
README = ROOT / "README.md"


def record_run(name: str, folder: Path, busy: bool) -> dict[str, Any]:
    """One record of a finished run: its scores beside its yardsticks, its cost, and what it ran on."""
    from federa.folder import RunFolder
    from federa.records import read_run
    from federa.report import results_table

    run, config = read_run(folder), RunFolder.open(folder).config()
    traffic = run.rounds[-1].bytes
    facts = run.result
    kept = ("python", "platform", "device", "threads", "torch", "transformers")
    return {
        "subject": "run",
        "name": name,
        "rows": [row._asdict() for row in results_table(folder)],
        "rounds": facts.rounds,
        "clients": len(run.partition.counts),
        "clients_per_round": config.server.clients_per_round,
        "convention": run.partition.convention,
        "seconds": None if busy else round(facts.seconds, 1),
        "bytes_up_per_client": traffic.up_per_client,
        "trainable_parameters": facts.trainable_parameters,
        "total_parameters": facts.total_parameters,
        "source": Path(config.data.path).name if config.data.path else facts.source,
        "seed": config.seed,
        "environment": {key: run.environment[key] for key in kept},
        "recorded_at_commit": store.commit(),  # of the checkout that wrote the record
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def add(name: str, folder: Path, busy: bool) -> None:
    """Puts a run's record in the place of an older one of that name, and its curves under plots/."""
    records = [record for record in read_records() if record["name"] != name] + [record_run(name, folder, busy)]
    store.write(RECORDS, "".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda r: r["name"])))
    PLOTS.mkdir(exist_ok=True)
    shutil.copyfile(folder / "curves.png", PLOTS / f"{name}-curves.png")


def read_records() -> list[dict[str, Any]]:
    return store.read(RECORDS)


def every_table() -> dict[str, str]:
    """The text of each table by its name."""
    runs = {record["name"]: _table(record) for record in read_records()}
    kernels = {f"lora_linear-{device}": kernel_table(read("lora_linear", device)) for device in ("cpu", "cuda")}
    clients = {
        f"lora_linear_clients-{device}": clients_table(read("lora_linear_clients", device))
        for device in ("cpu", "cuda")
    }
    svd = {f"truncated_svd-{device}": svd_table(read("truncated_svd", device)) for device in ("cpu", "cuda")}
    rounds = {f"federated_round-{device}": round_table(read("federated_round", device)) for device in ("cpu", "cuda")}
    return runs | kernels | clients | svd | rounds


def read(subject: str, device: str) -> list[dict[str, Any]]:
    return store.read(store.path_of(subject, device))


def tables(readme: str, texts: Mapping[str, str]) -> str:
    """The README with each table it has markers for made anew."""
    for name, text in texts.items():
        start, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = readme.partition(start)
        if found:
            readme = before + start + text + end + rest.partition(end)[2]
    return readme


def _table(record: dict[str, Any]) -> str:
    lines = ["| | test accuracy | macro-F1 | |", "|---|---:|---:|---|"]
    lines += [
        f"| {row['name']} | {row['accuracy']:.1%} | {row['macro_f1']:.3f} | {row['note']} |" for row in record["rows"]
    ]
    share = record["trainable_parameters"] / record["total_parameters"]
    full = 4 * record["total_parameters"] / 1e6
    environment, seconds = record["environment"], record["seconds"]
    spent = "" if seconds is None else f"{seconds / 60:.1f} min of training and scoring on "
    facts = (
        f"{record['rounds']} rounds, {record['clients_per_round']} of {record['clients']} clients each; "
        f"{spent}{environment['threads']} CPU thread{'s' * (environment['threads'] > 1)}. "
        f"{share:.1%} of the parameters train, {record['bytes_up_per_client'] / 1e6:.1f} MB up per client and round "
        f"instead of {full:.0f} MB. Seed {record['seed']}, {record['convention']}, torch {environment['torch']}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "RUN_FOLDER"))
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args(argv)
    if options.add:
        add(options.add[0], Path(options.add[1]), options.busy)
    store.write(README, tables(README.read_text(encoding="utf-8"), every_table()))
    for device in ("cpu", "cuda"):
        kernel_figure(read("lora_linear", device), PLOTS / f"lora_linear-{device}.svg")
        clients_figure(read("lora_linear_clients", device), PLOTS / f"lora_linear_clients-{device}.svg")
        svd_figure(read("truncated_svd", device), PLOTS / f"truncated_svd-{device}.svg")
        round_figure(read("federated_round", device), PLOTS / f"federated_round-{device}.svg")


if __name__ == "__main__":
    main()
