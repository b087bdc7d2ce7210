"""Yardsticks for a run, on the same data, model and code: what its score has to be compared with."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from federa.client import train_client
from federa.config import Config, changed, config_digest, without_adapters
from federa.errors import InputError
from federa.experiment import Experiment, build, cheapest
from federa.folder import RunFolder
from federa.metrics import METRICS
from federa.partition import partition_like
from federa.randomness import Purpose, generator
from federa.report import write_report
from federa.rounds import Watch
from federa.simulation import run
from federa.sources import load_corpus
from federa.tasks import Predictions, make_task, mean_features

BASELINES = ("pooled", "local", "head-only", "linear-probe")
YARDSTICKS = ("majority", "head-only", "linear-probe", "pooled")
PROBE_C = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0)  # inverse regularisation, chosen on the validation split

Row = dict[str, Any]


def run_baseline(name: str, config: Config, output: str | Path, watch: Watch) -> Row:
    """Runs one of BASELINES for `config` into the folder `output` and returns {"name", the task's two metrics, "note"}.

    head-only: the same federated run without adapters. pooled: one site with all the data, as many examples seen in
    all. local: every client alone with the examples it would have seen on average, scored on its own share of the
    test set. linear-probe: logistic regression on the frozen backbone's mean-pooled features. A finished one is read.
    Raises InputError for a baseline that the task has no use for.
    """
    if name not in BASELINES:
        raise InputError(f"--baseline: must be one of {', '.join(BASELINES)}, got {name!r}")
    if (problem := misfit(name, config)) is not None:
        others = ", ".join(other for other in BASELINES if misfit(other, config) is None)
        raise InputError(f"--baseline: {name} {problem} and cannot serve task.name {config.task.name}; {others} can")
    stored = Path(output) / "baseline.json"
    key = {"name": name, "config": config_digest(config)}
    if stored.is_file():
        row = RunFolder(output).read_json(stored, (*_keys(config), "config"))
        if {field: row.get(field) for field in key} == key:
            return row
        raise InputError(f"{output}: already holds a baseline of another run; choose another --output or delete it")
    if name == "head-only":
        result = run(without_adapters(config), output, watch=watch)
        row = _row(name, config, result.test, "federated, backbone frozen")
    elif name == "pooled":
        result = run(_pooled(config), output, watch=watch)
        row = _row(name, config, result.test, "one site with all the data, as many examples seen")
    else:
        folder = RunFolder.create(output, config)
        with folder.lock():
            row = linear_probe(build(without_adapters(config))) if name == "linear-probe" else local_only(config, watch)
    RunFolder(output).write_json("baseline.json", row | key)
    return row


def yardsticks(config: Config, output: str | Path, watch: Watch) -> list[Row]:
    """The YARDSTICKS of the run in `output`, written to its yardsticks.json; all but majority keep a baseline.json too.

    `watch` hears "baseline" before each, and then what `run` says.
    """
    folder, rows = RunFolder.open(output), []
    for name in YARDSTICKS:
        if misfit(name, config) is not None:
            continue
        watch("baseline", {"name": name})
        if name == "majority":
            rows.append(majority(config))
        else:
            rows.append(run_baseline(name, config, folder.path / "baselines" / name, watch))
    folder.write_json("yardsticks.json", [{key: row[key] for key in _keys(config)} for row in rows])
    write_report(folder.path)
    return rows


def misfit(name: str, config: Config) -> str | None:
    """Why a baseline or yardstick cannot serve the configuration's task, or None."""
    task = make_task(config.task)
    if name in ("linear-probe", "majority") and task.unlabelled is not None:
        return "predicts one label an example"
    if name == "head-only" and config.task.name == "causal-lm":
        return "trains a new head alone"
    return None


def majority(config: Config) -> Row:
    """Always the label most frequent in the training data."""
    task = make_task(config.task)
    corpus = load_corpus(config.data, config.seed, task)
    labels = corpus.test.labels
    guess = np.full_like(labels, np.bincount(corpus.train.labels).argmax())
    scores = task.score(Predictions(guess, labels, np.zeros(len(labels))))
    return _row("majority", config, scores, "always the most frequent label")


def linear_probe(experiment: Experiment) -> Row:
    """Logistic regression on frozen mean-pooled features; its C is chosen on the validation split."""
    from sklearn.linear_model import LogisticRegression

    learner, batch_size = experiment.learner, experiment.config.evaluation.batch_size
    parts = (experiment.train, experiment.validation, experiment.test)
    train, validation, test = (mean_features(learner.model, part, batch_size, learner.device) for part in parts)
    best, chosen = -1.0, None
    for C in PROBE_C if len(validation) else PROBE_C[2:3]:
        probe = LogisticRegression(C=C, max_iter=2000).fit(train, experiment.train.labels)
        accuracy = probe.score(validation, experiment.validation.labels) if len(validation) else 0.0
        if accuracy > best:
            best, chosen = accuracy, probe
    predicted = chosen.predict(test).astype(np.int64)
    scores = experiment.task.score(Predictions(predicted, experiment.test.labels, np.zeros(len(predicted))))
    return _row("linear-probe", experiment.config, scores, f"logistic regression on frozen features, C = {chosen.C:g}")


def local_only(config: Config, watch: Watch) -> Row:
    """Mean over clients of the score of each one's own model on its own share of the test set; the worst beside."""
    config = _single(config)
    experiment = build(config)
    task, metric = experiment.task, experiment.task.metric
    config, learner, test = _alone(config, experiment), experiment.learner, experiment.test
    start = learner.state()
    rng = generator(config.seed, Purpose.EVALUATION)
    shares = partition_like(experiment.clients, experiment.train.labels, experiment.corpus.test.labels, rng)
    scores = []
    for client, (indices, share) in enumerate(zip(experiment.clients, shares, strict=True)):
        if len(share):
            update = train_client(learner, experiment.train, indices, client, 1, start, config)
            learner.load({**start, **update.tensors})
            own = test.take(test.of_rows(share))
            scores.append(task.score(task.predict(learner.model, own, config.evaluation.batch_size, learner.device)))
        watch("client", {"round": 1, "client": client, "position": client + 1, "of": len(shares)})
    means = {key: float(np.mean([one[key] for one in scores])) for key in scores[0]}
    worst = (min if metric.share else max)(one[metric.key] for one in scores)
    return _row("local", config, means, f"mean of {len(scores)} clients on their own test data; worst {worst:.3f}")


def _single(config: Config) -> Config:
    """`config` without what only rounds of many clients have: aggregation, mixed ranks, variates, noise, stages."""
    name = "lora" if config.method.name in ("rolora", "slora") else config.method.name
    return changed(
        config,
        method={"name": name, "client_ranks": None},
        server={"aggregation": "fedavg", "clip_update": None},
        client={"control_variates": False},
        privacy={"clip": None},
    )


def _alone(config: Config, experiment: Experiment) -> Config:
    """One round in which a client does the work of all the rounds it would have been sampled in, on average."""
    share = config.server.rounds * experiment.clients_per_round / len(experiment.clients)
    steps = config.client.steps
    epochs = max(1, round(share * config.client.epochs))
    work = {"epochs": epochs, "steps": steps and max(1, round(share * steps)), "proximal_mu": 0.0}
    return changed(config, server={"rounds": 1}, client=work)


def _pooled(config: Config) -> Config:
    """One client with all the data and one round, with as many examples seen as all rounds of the run together."""
    config = _single(config)
    client = config.client
    batch = client.batch_size * client.accumulate
    sizes = [len(own) for own in build(cheapest(config)).clients]  # in examples, of which a question gives several
    seen = [client.epochs * size if client.steps is None else client.steps * min(batch, size) for size in sizes]
    total = config.server.rounds * (config.server.clients_per_round or len(sizes)) * float(np.mean(seen))
    return changed(
        config,
        server={"rounds": 1, "min_updates": 1, "clients_per_round": 1, "optimizer": "fedavg", "lr": 1.0},
        partition={"scheme": "iid", "clients": 1, "min_size": 1},
        client={"steps": math.ceil(total / batch), "proximal_mu": 0.0},
        failures={"dropout": 0.0, "deadline": None},
        evaluation={"per_client": False, "every": 1, "test_every": None},
        run={"checkpoint_every": 1},
    )


def _row(name: str, config: Config, scores: Mapping[str, float], note: str) -> Row:
    return {"name": name} | {metric.key: scores[metric.key] for metric in METRICS[config.task.name]} | {"note": note}


def _keys(config: Config) -> list[str]:
    return ["name", *(metric.key for metric in METRICS[config.task.name]), "note"]
