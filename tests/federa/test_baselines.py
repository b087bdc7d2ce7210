"""Yardsticks, each worked out a second time by other means."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import AutoModel

from federa import InputError, run
from federa.baselines import PROBE_C, majority, run_baseline, yardsticks
from federa.client import train_client
from federa.config import changed
from federa.experiment import build
from federa.folder import RunFolder
from federa.partition import partition_like
from federa.randomness import Purpose, generator
from federa.tasks import mean_features, predict


def silent(event, facts):
    pass


def config_and_metrics(folder):
    return RunFolder(folder).config(), RunFolder(folder).metrics()


def test_majority_by_hand(tiny_config):
    """Four labels of twelve test examples each; always "email": a quarter right, F1 2 * 0.25 / 1.25 of one label."""
    row = majority(tiny_config)
    assert row == {
        "name": "majority",
        "accuracy": 0.25,
        "macro_f1": pytest.approx(0.1),
        "note": "always the most frequent label",
    }


@pytest.mark.parametrize(
    ("client", "steps"),
    [
        ({}, 11),  # 3 rounds of 2 clients of 28.8 examples on average: 172.8 in batches of 16
        ({"epochs": 2, "batch_size": 8, "accumulate": 3}, 15),  # 345.6 in steps of 24
        ({"steps": 4, "batch_size": 4}, 24),  # 6 * 4 steps of 4
    ],
    ids=str,
)
def test_pooled_sees_as_many_examples(tiny_config, tmp_path, client, steps):
    config = changed(
        tiny_config,
        client=client,
        server={"optimizer": "fedadam"},
        partition={"min_size": 5},
        failures={"dropout": 0.1},
    )
    row = run_baseline("pooled", config, tmp_path / "out", silent)
    used, (_, record) = config_and_metrics(tmp_path / "out")
    assert record["steps"] == steps and record["examples"] == 144 and record["completed"] == [0]
    assert used.server.optimizer == "fedavg" and used.failures.dropout == 0 and used.method == config.method
    assert row["accuracy"] == RunFolder(tmp_path / "out").result()["test"]["accuracy"]


def test_head_only_is_a_run_of_the_method(tiny_config, tmp_path):
    row = run_baseline("head-only", tiny_config, tmp_path / "baseline", silent)
    same = run(changed(tiny_config, method={"name": "head-only"}), tmp_path / "run")
    assert row["accuracy"] == same.accuracy and row["macro_f1"] == same.test["macro_f1"]
    assert RunFolder(tmp_path / "baseline").result()["test"] == same.test


def test_linear_probe_by_sklearn(tiny_config, tmp_path):
    """Features are means of transformers' own hidden states; of sklearn's probes validation chooses C."""
    backbone = AutoModel.from_pretrained(tiny_config.model.name).eval()
    experiment = build(tiny_config)
    parts = (experiment.train, experiment.validation, experiment.test)
    features = [mean_features(experiment.learner.model, part, 48, experiment.learner.device) for part in parts]
    for part, found in zip(parts, features, strict=True):
        with torch.no_grad():  # one text at a time
            ids = [part.batch(np.array([i]))["input_ids"] for i in range(len(part))]
            alone = [backbone(input_ids=row).last_hidden_state[0].mean(0).numpy() for row in ids]
        assert found == pytest.approx(np.stack(alone), rel=1e-4, abs=1e-5)

    # From the same bits on: one prediction may hang on the last of them.
    train, validation, test = features
    probes = [LogisticRegression(C=C, max_iter=2000).fit(train, experiment.train.labels) for C in PROBE_C]
    best = max(probes, key=lambda probe: probe.score(validation, experiment.validation.labels))
    row = run_baseline("linear-probe", tiny_config, tmp_path / "out", silent)
    predicted = best.predict(test)
    assert row["accuracy"] == (predicted == experiment.test.labels).mean() > 0.25
    assert row["macro_f1"] == pytest.approx(f1_score(experiment.test.labels, predicted, average="macro"))
    assert row["note"].endswith(f"C = {best.C:g}")


def test_local_trains_every_client_alone(tiny_config, tmp_path):
    """10 rounds with 2 of 5 clients: 4 epochs each, from the common start, scored on the client's own test texts."""
    config = changed(tiny_config, server={"rounds": 10}, client={"lr": 0.01})
    row = run_baseline("local", config, tmp_path / "out", silent)
    experiment = build(config)
    learner, start = experiment.learner, experiment.learner.state()
    alone = changed(config, server={"rounds": 1}, client={"epochs": 4})
    rng = generator(0, Purpose.EVALUATION)
    shares = partition_like(experiment.clients, experiment.train.labels, experiment.test.labels, rng)
    accuracies = []
    for client in reversed(range(5)):  # the order does not matter
        update = train_client(learner, experiment.train, experiment.clients[client], client, 1, start, alone)
        learner.load(update.tensors)
        assert update.steps == 4 * -(-len(experiment.clients[client]) // 16)
        predictions = predict(learner.model, experiment.test, 48, learner.device)
        accuracies.append((predictions.predicted == predictions.labels)[shares[client]].mean())
    assert row["accuracy"] == pytest.approx(np.mean(accuracies))
    assert row["note"] == f"mean of 5 clients on their own test data; worst {min(accuracies):.3f}"


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"name": "rolora"}},
        {"method": {"name": "ffa-lora"}, "privacy": {"clip": 1.0}},
        {"method": {"name": "lora", "client_ranks": [2, 4]}, "server": {"aggregation": "flora"}},
        {"client": {"optimizer": "sgd", "control_variates": True}, "server": {"clip_update": 0.1}},
    ],
    ids=str,
)
def test_baselines_leave_out_what_needs_rounds_of_many(tiny_config, tmp_path, sections):
    config = changed(tiny_config, **sections)
    for name in ("pooled", "local", "head-only"):
        if name != "head-only" or "privacy" not in sections:
            assert run_baseline(name, config, tmp_path / name, silent)["accuracy"] > 0
    used, _ = config_and_metrics(tmp_path / "pooled")
    assert used.method.name == (config.method.name if config.method.name != "rolora" else "lora")
    assert (used.privacy.clip, used.server.aggregation, used.method.client_ranks) == (None, "fedavg", None)


def test_finished_baselines_are_read(tiny_config, tmp_path):
    told = []
    first = run_baseline("local", tiny_config, tmp_path, silent)
    again = run_baseline("local", tiny_config, tmp_path, lambda event, facts: told.append(event))
    assert {key: again[key] for key in ("name", "accuracy", "macro_f1", "note")} == {
        key: first[key] for key in ("name", "accuracy", "macro_f1", "note")
    }
    assert told == []
    for name, config in (("linear-probe", tiny_config), ("local", changed(tiny_config, client={"lr": 0.5}))):
        with pytest.raises(InputError, match="already holds a baseline of another run"):
            run_baseline(name, config, tmp_path, silent)


def test_yardsticks_stand_beside_the_run(tiny_config, tmp_path):
    run(tiny_config, tmp_path / "run")
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    told = []
    rows = yardsticks(tiny_config, tmp_path / "run", lambda event, facts: told.append((event, facts.get("name"))))
    assert [row["name"] for row in rows] == ["majority", "head-only", "linear-probe", "pooled"]
    assert [name for event, name in told if event == "baseline"] == [row["name"] for row in rows]
    stored = json.loads((tmp_path / "run" / "yardsticks.json").read_text())
    assert [(row["name"], row["accuracy"]) for row in stored] == [(row["name"], row["accuracy"]) for row in rows]
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(f"{row['accuracy']:.1%}" in report for row in rows)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_unknown_baselines_are_refused(tiny_config, tmp_path):
    with pytest.raises(
        InputError, match="--baseline: must be one of pooled, local, head-only, linear-probe, got 'best'"
    ):
        run_baseline("best", tiny_config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_data_at_real_sites_have_no_baselines(tiny_config, tmp_path):
    config = changed(tiny_config, partition={"scheme": "sites"})
    for name in ("pooled", "local", "head-only", "linear-probe"):
        with pytest.raises(
            InputError, match="--baseline: must have the clients' data here, got partition.scheme sites"
        ):
            run_baseline(name, config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
