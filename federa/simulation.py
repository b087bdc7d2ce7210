"""A whole run on one machine: build, train round after round, score, export, report; and taking one up again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from federa import ranks
from federa.checkpoint import (
    State,
    checkpoint_rounds,
    clear_leftovers,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from federa.cohort import Cohorts, choose_size
from federa.combinations import MOVES
from federa.config import FREE_KEYS, Config, anchored, config_digest, load_config
from federa.errors import InputError
from federa.experiment import Experiment, build
from federa.export import adapter_problem, export_peft
from federa.folder import RunFolder, environment
from federa.memory import reuse_memory
from federa.methods import Broadcast
from federa.partition import label_counts
from federa.records import read_run
from federa.rounds import Train, Watch, evaluate_round, run_rounds, test_scores, train_in_turn


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its scores and its records, one mapping a round."""

    folder: Path
    test: Mapping[str, float]
    validation: Mapping[str, float] | None
    best: Mapping[str, Any] | None
    records: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]

    @property
    def score(self) -> float:
        """The task's metric on the test set after the last round."""
        return self.test[self.facts["metric"]]

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last round, of tasks that have one: `score` is every task's."""
        return self.test["accuracy"]

    @property
    def adapter(self) -> Path | None:
        """The folder that `peft.PeftModel.from_pretrained` loads, or None for a method without adapters."""
        path = RunFolder(self.folder).adapter
        return path if path.is_dir() else None


def _silent(event: str, facts: dict[str, Any]) -> None:
    """Watches nothing."""


def run(
    config: str | Path | Mapping[str, Any] | Config,
    output: str | Path = "runs/latest",
    *,
    overrides: Sequence[str] = (),
    watch: Watch = _silent,
    train: Train | None = None,
) -> RunResult:
    """Runs a configuration (file, mapping or Config, with "section.key=value" overrides) into the folder `output`.

    A folder that holds the same run is taken up where it stopped, or read if it is finished. `watch(event, facts)` is
    called as things happen: "ready", "client", "round", "scored"; `train` is how a round's clients train (None: here,
    in cohorts). Raises InputError for bad input, before any training, and RunError when a round cannot be completed;
    every finished round stays saved.
    """
    resolved = anchored(load_config(config, overrides))
    folder = RunFolder.create(output, resolved)
    with folder.lock():
        return _finished(folder) or _train(folder, resolved, watch, train)


def resume(output: str | Path, *, overrides: Sequence[str] = (), watch: Watch = _silent) -> RunResult:
    """Takes up the run in `output` after its last saved round.

    On a CPU the result is bitwise that of a run never stopped. `overrides` may change only what finished rounds do not
    depend on, config.FREE_KEYS; InputError names another key.
    """
    folder = RunFolder.open(output)
    with folder.lock():
        before = folder.config()
        config = load_config(before, overrides)
        if config_digest(config) != config_digest(before):
            raise InputError(f"--set: may change {', '.join(FREE_KEYS)} of a begun run, got {', '.join(overrides)}")
        if config != before:
            folder.write_config(config)
        return _finished(folder) or _train(folder, config, watch)


def restore(output: str | Path, round: int | None = None) -> tuple[Experiment, State]:
    """The experiment of a run's folder with the tensors after `round` (None: the newest saved) loaded."""
    folder = RunFolder.open(output)
    config = folder.config()
    saved = checkpoint_rounds(folder)
    if not saved:
        raise InputError(f"{output}: must hold a checkpoint, got none")
    if round is not None and round not in saved:
        raise InputError(f"{output}: must hold a checkpoint of round {round}, got rounds {saved}")
    experiment = build(config, Broadcast.load(folder.init_file))
    chosen = saved[-1] if round is None else round
    state = load_checkpoint(folder, chosen, experiment.digest, experiment.learner.state())
    experiment.learner.load(state.tensors, state.base)
    return experiment, state


def best_round(output: str | Path) -> int:
    """The round with the best validation score of a finished run. InputError if there was no validation."""
    result = RunFolder.open(output).result()
    if result is None or result["best"] is None:
        raise InputError(f"{output}: must hold a finished run with a validation split to have a best round")
    return result["best"]["round"]


def _finished(folder: RunFolder) -> RunResult | None:
    facts = folder.result()
    if facts is None:
        return None
    read_run(folder.path)  # InputError for files that someone has changed
    clear_leftovers(folder.path)
    if not folder.report_file.is_file():  # killed right after result.json
        from federa.report import write_report

        write_report(folder.path)
    return RunResult(folder.path, facts["test"], facts["validation"], facts["best"], folder.metrics(), facts)


def _train(folder: RunFolder, config: Config, watch: Watch, train: Train | None = None) -> RunResult:
    if config.partition.scheme == "sites" and train is None:
        raise InputError("partition.scheme: sites is for real sites, which hold the data: `federa flower init`")
    reuse_memory()
    clear_leftovers(folder.path)
    begun = folder.init_file.is_file() or bool(checkpoint_rounds(folder))
    device = _recorded_device(folder) if begun else None
    experiment = build(config, Broadcast.load(folder.init_file) if begun else None, device)
    if begun and folder.read_json(folder.partition_file, ("data",))["data"] != experiment.data_digest():
        raise InputError(f"{folder.path}: data.* must give the texts that this run began with, got other ones")
    state = newest_checkpoint(folder, experiment.digest, experiment.learner.state()) if begun else None
    if state is None:
        state = _begin(experiment, folder, choose_size(experiment, ranks.count()) if train is None else 1)
    folder.rewind_metrics(state.round)
    if train is None:
        cohort = folder.metrics()[-1].get("cohort") or folder.read_json(folder.environment_file, ("cohort",))["cohort"]
        train = Cohorts(cohort) if cohort > 1 else train_in_turn
        if ranks.count() > 1:
            train = ranks.Ranks(experiment, cohort)
    watch("ready", {"experiment": experiment, "state": state, "cohort": getattr(train, "size", 1)})
    state = run_rounds(experiment, folder, state, watch, train)
    return _conclude(experiment, folder, state, watch)


def _recorded_device(folder: RunFolder) -> str:
    """The device that the run began on; takes its number of CPU threads too, since sums depend on both."""
    facts = folder.read_json(folder.environment_file, ("threads", "device", "cohort"))
    threads, device = facts["threads"], facts["device"]
    if not isinstance(threads, int) or threads < 1:
        raise InputError(f"{folder.environment_file}: threads must be a positive integer, got {threads!r}")
    if device not in ("cpu", "cuda", "mps"):
        raise InputError(f"{folder.environment_file}: device must be cpu, cuda or mps, got {device!r}")
    if not isinstance(facts["cohort"], int) or facts["cohort"] < 1:
        raise InputError(f"{folder.environment_file}: cohort must be a positive integer, got {facts['cohort']!r}")
    torch.set_num_threads(threads)
    return device


def _begin(experiment: Experiment, folder: RunFolder, cohort: int) -> State:
    """Writes what is known before the first round; init.safetensors last, so that it stands for all of it."""
    learner = experiment.learner
    folder.write_config(experiment.config)
    facts = environment(str(learner.device), torch.get_num_threads(), cohort)
    facts["adapt_seconds"] = experiment.adapt_seconds
    folder.write_json(folder.environment_file.name, facts)
    labels, partition = experiment.corpus.strata, experiment.partition
    counts = label_counts(partition.indices, experiment.train.labels, len(labels))
    facts = {"scheme": partition.scheme, "convention": partition.convention, "label_names": labels}
    facts |= {"counts": counts.tolist(), "names": partition.names, "data": experiment.data_digest()}
    folder.write_json(folder.partition_file.name, facts)
    learner.broadcast.save(folder.init_file)
    moves = experiment.config.server.aggregation in MOVES
    state = State(0, learner.state(), base=learner.base() if moves else {})
    folder.rewind_metrics(-1)
    folder.append_metrics({"round": 0} | evaluate_round(experiment, state))
    save_checkpoint(folder, state, experiment.digest)
    return state


def _conclude(experiment: Experiment, folder: RunFolder, state: State, watch: Watch) -> RunResult:
    """Scores the last and the best round on the test set, exports the adapter, writes result.json and the report."""
    from federa.report import write_report  # brings matplotlib along

    learner, config = experiment.learner, experiment.config
    best = state.best
    records = folder.metrics()
    if best is not None and best["round"] != state.round:
        chosen = load_checkpoint(folder, best["round"], experiment.digest, learner.state())
        learner.load(chosen.tensors, chosen.base)
        best = best | {"test": test_scores(experiment)}
    learner.load(state.tensors, state.base)
    test = test_scores(experiment)
    if best is not None and best["round"] == state.round:
        best = best | {"test": test}
    if adapter_problem(experiment) is None:
        export_peft(experiment, folder.adapter)
    trainable = sum(parameter.numel() for parameter in learner.trainable.values())
    facts = {
        "rounds": state.round,
        "metric": experiment.task.metric.key,
        "test": test,
        "validation": records[-1].get("validation"),
        "best": best,
        "trainable_parameters": trainable,
        "total_parameters": parameter_count(experiment),
        "seconds": state.seconds,
        "bytes_total": state.bytes_total,
        "model": experiment.source.origin,
        "source": experiment.corpus.source,
        "method": config.method.name,
    }
    folder.write_json("result.json", facts)
    write_report(folder.path)
    watch("scored", facts)
    return RunResult(folder.path, test, facts["validation"], best, records, facts)


def parameter_count(experiment: Experiment) -> int:
    """Parameters of the model before it was adapted: what sending the whole model would cost."""
    model = experiment.learner.model
    added = (".lora_", ".sparse", ".bottleneck.")
    extra = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in added))
    return sum(parameter.numel() for parameter in model.parameters()) - extra
