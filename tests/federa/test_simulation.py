"""Whole runs: MiniLM on real text, every partition scheme, method and server optimiser, and what they leave behind."""

import json

import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from federa import InputError, RunResult, load_config, resume, run
from federa.checkpoint import checkpoint_rounds
from federa.config import changed
from federa.folder import RunFolder
from federa.simulation import best_round, restore
from federa.tasks import predict


def adapter_of(result: RunResult) -> bytes:
    return (result.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def minilm(minilm_path, tmp_path_factory):
    """A mapping: ten clients train MiniLM for two rounds on 200 docstrings of 15 packages of the standard library."""
    return {
        "model": {"name": str(minilm_path)},
        "data": {"max_train": 200, "max_test": 45, "max_length": 24, "cache": str(tmp_path_factory.mktemp("tokens"))},
        "partition": {"clients": 10, "alpha": 1.0},
        "client": {"lr": 0.005, "batch_size": 32, "schedule": "constant"},
        "server": {"rounds": 2},
        "evaluation": {"per_client": True, "test_every": 2},
        "run": {"threads": 1},
    }


@pytest.fixture(scope="module")
def ten_clients(minilm, tmp_path_factory):
    return run(minilm, tmp_path_factory.mktemp("minilm") / "run")


def test_ten_clients_learn(ten_clients):
    start, *rounds = ten_clients.records
    assert [record["round"] for record in ten_clients.records] == [0, 1, 2]
    losses = [record["validation"]["loss"] for record in ten_clients.records]
    assert losses[2] < losses[1] < losses[0] - 0.05
    assert rounds[1]["train_loss"] < rounds[0]["train_loss"] < np.log(15) + 0.05
    assert ten_clients.accuracy == ten_clients.test["accuracy"] == rounds[1]["test"]["accuracy"] > 2 / 15
    for split in ("validation", "test"):
        assert start[split]["loss"] == pytest.approx(np.log(15), abs=0.1)


def test_ten_clients_leave_a_folder(ten_clients):
    names = {path.name for path in ten_clients.folder.iterdir() if not path.name.startswith(".")}
    assert names >= {"config.yaml", "environment.json", "partition.json", "init.safetensors", "metrics.jsonl"}
    assert names >= {"checkpoints", "adapter", "result.json", "report.html"}
    assert checkpoint_rounds(RunFolder(ten_clients.folder)) in ([1, 2], [0, 1, 2])
    facts = json.loads((ten_clients.folder / "result.json").read_text())
    assert facts == ten_clients.facts and facts["rounds"] == 2 and facts["method"] == "federa"
    assert facts["model"].startswith("local folder") and facts["source"].startswith("stdlib-docs (CPython 3.")
    counts = np.array(json.loads((ten_clients.folder / "partition.json").read_text())["counts"])
    assert counts.shape == (10, 15) and counts.sum() == 180 and counts.sum(1).min() >= 2
    assert json.loads((ten_clients.folder / "environment.json").read_text())["threads"] == 1


def test_ten_clients_sizes_and_bytes_by_hand(ten_clients):
    """Six blocks of four 384 x 384 and two 384 x 1536 layers at rank 8, a pooler of 384 x 384, 15 labels."""
    adapters = 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))
    trainable = adapters + 384 * 384 + 384 + 15 * 384 + 15
    assert ten_clients.facts["trainable_parameters"] == trainable == 485_391
    assert ten_clients.facts["total_parameters"] == 22_565_376 + 147_840 + 15 * 384 + 15
    for record in ten_clients.records[1:]:
        assert record["sampled"] == record["completed"] == list(range(10))
        assert record["bytes"]["up"] == record["bytes"]["down"] == 10 * 4 * trainable
        assert record["bytes"]["broadcast"] == (10 * 4 * adapters if record["round"] == 1 else 0)
        assert record["examples"] == 180
        assert set(record["seconds"]) == {"train", "aggregate", "evaluate"}
    total = 2 * 2 * 10 * 4 * trainable + 10 * 4 * adapters
    assert ten_clients.records[-1]["bytes"]["total"] == ten_clients.facts["bytes_total"] == total


def test_ten_clients_adapter_scores_the_same_in_peft(ten_clients, minilm_path):
    """The accuracy and the loss that result.json reports, from PEFT's model."""
    base = AutoModelForSequenceClassification.from_pretrained(minilm_path, num_labels=15)
    experiment, _ = restore(ten_clients.folder)
    theirs = PeftModel.from_pretrained(base, ten_clients.adapter)
    predictions = predict(theirs, experiment.test, 64, experiment.learner.device)
    assert (predictions.predicted == predictions.labels).mean() == ten_clients.accuracy
    assert predictions.losses.mean() == pytest.approx(ten_clients.test["loss"], rel=1e-5)


def test_ten_clients_again_elsewhere_are_bitwise_the_same(ten_clients, minilm, tmp_path):
    again = run(minilm, tmp_path / "run")
    assert adapter_of(again) == adapter_of(ten_clients)
    assert again.test == ten_clients.test and again.best == ten_clients.best


def test_a_finished_run_is_read(ten_clients, minilm):
    """Nothing is trained, nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in ten_clients.folder.rglob("*") if path.is_file()}
    told = []
    for again in (run(minilm, ten_clients.folder, watch=lambda *facts: told.append(facts)), resume(ten_clients.folder)):
        assert (
            again.test == ten_clients.test and again.records == ten_clients.records and again.best == ten_clients.best
        )
    assert told == []
    after = {path: path.stat().st_mtime_ns for path in ten_clients.folder.rglob("*") if path.is_file()}
    assert {p for p in after if after[p] != before.get(p)} <= {ten_clients.folder / ".lock"}


@pytest.fixture(scope="module")
def tiny(tiny_config, tmp_path_factory):
    """tiny(**sections) -> the result of a run of the tiny BERT."""

    def tiny(**sections):
        return run(changed(tiny_config, **sections), tmp_path_factory.mktemp("tiny") / "run")

    return tiny


@pytest.fixture(scope="module")
def usual(tiny):
    return tiny()


ADAPTERS = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
HEAD = 32 * 32 + 32 + 4 * 32 + 4
FULL = 40_164
RUNS = [
    ("iid", "lora", "fedavg", ADAPTERS + HEAD),
    ("dirichlet_label", "federa", "fedavgm", ADAPTERS + HEAD),
    ("dirichlet_client", "head-only", "fedadam", HEAD),
    ("fednlp", "full", "fedavg", FULL),
    ("quantity", "lora", "fedadam", ADAPTERS + HEAD),
    ("pathological", "federa", "fedadam", ADAPTERS + HEAD),
    ("natural", "federa", "fedavg", ADAPTERS + HEAD),
    ("kmeans", "full", "fedavgm", FULL),
]


@pytest.mark.parametrize(("scheme", "method", "optimizer", "trainable"), RUNS)
def test_schemes_methods_and_server_optimisers(tiny, tiny_config, scheme, method, optimizer, trainable):
    result = tiny(
        partition={"scheme": scheme, "clusters": 5},
        data={"client": "author" if scheme == "natural" else None},
        method={"name": method},
        client={"lr": 0.01},
        server={"optimizer": optimizer, "lr": 0.01 if optimizer == "fedadam" else 1.0},
    )
    clients = 6 if scheme == "natural" else 5
    facts = json.loads((result.folder / "partition.json").read_text())
    assert facts["scheme"] == scheme and len(facts["counts"]) == clients and np.sum(facts["counts"]) == 144
    assert facts["names"] == ([f"author {i}" for i in range(6)] if scheme == "natural" else None)
    assert result.facts["trainable_parameters"] == trainable and result.facts["total_parameters"] == FULL
    assert [record["round"] for record in result.records] == [0, 1, 2, 3]
    assert all(record["update_norm"] > 0 and np.isfinite(record["train_loss"]) for record in result.records[1:])
    assert (result.adapter is None) == (method in ("head-only", "full"))
    assert (result.folder / "report.html").stat().st_size > 10_000
    _, state = restore(result.folder)
    memory = {"fedavg": set(), "fedavgm": {"v"}, "fedadam": {"m", "v"}}[optimizer]
    assert {name.split(".")[0] for name in state.server} == memory


def test_settings_that_change_the_result(usual, tiny):
    """Seed, method, rank and rate reach the training; what only watches does not."""
    others = [
        {"method": {"rank": 2}},
        {"client": {"lr": 1e-2}},
        {"partition": {"alpha": 5.0}},
        {"client": {"epochs": 2}},
    ]
    adapters = {adapter_of(usual), *(adapter_of(tiny(**sections)) for sections in others)}
    assert len(adapters) == 5
    watching = {"evaluation": {"every": 2, "test_every": 1, "per_client": True}, "run": {"checkpoint_every": 2}}
    assert adapter_of(tiny(**watching)) == adapter_of(usual)


def test_seeds_make_other_runs(usual, tiny_config, tmp_path):
    other = run(tiny_config.model_copy(update={"seed": 1}), tmp_path / "run")
    assert adapter_of(other) != adapter_of(usual)
    assert other.records[1]["sampled"] != usual.records[1]["sampled"] or other.records != usual.records


def test_a_run_can_do_without_validation(tiny):
    result = tiny(data={"validation": 0.0})
    assert result.validation is None and result.best is None
    with pytest.raises(InputError, match="must hold a finished run with a validation split to have a best round"):
        best_round(result.folder)


def test_evaluation_settings_reach_the_records(tiny):
    result = tiny(evaluation={"every": 2, "test_every": 2, "per_client": True})
    assert [bool(record["validation"]) for record in result.records] == [True, False, True, True]
    assert [bool(record["test"]) for record in result.records] == [True, False, True, True]
    assert set(result.test) == {"loss", "accuracy", "macro_f1", "worst_client", "mean_client"}
    assert result.test == result.records[-1]["test"]
    assert result.test["worst_client"] <= result.test["mean_client"]


def test_the_best_round_is_scored_beside_the_last(usual):
    best = max(usual.records, key=lambda record: record["validation"]["accuracy"])
    assert usual.best["round"] == best["round"] == best_round(usual.folder)
    assert usual.best["validation"] == best["validation"] and usual.validation == usual.records[-1]["validation"]
    experiment, state = restore(usual.folder, best["round"])
    predictions = predict(experiment.learner.model, experiment.test, 64, experiment.learner.device)
    assert state.round == best["round"]
    assert (predictions.predicted == predictions.labels).mean() == usual.best["test"]["accuracy"]


def test_the_test_set_is_not_looked_at_before_the_end(tiny_config, tmp_path, monkeypatch):
    """Until the last round, unless evaluation.test_every asks for it."""
    import federa.rounds
    import federa.simulation

    looks, rounds = [], []
    honest = federa.rounds.test_scores

    def watched(experiment):
        looks.append(len(rounds))
        return honest(experiment)

    for module in (federa.rounds, federa.simulation):
        monkeypatch.setattr(module, "test_scores", watched)
    run(tiny_config, tmp_path / "run", watch=lambda event, facts: rounds.append(event) if event == "round" else None)
    assert looks and set(looks) == {3}


def test_restore_loads_a_saved_round(usual):
    experiment, state = restore(usual.folder)
    assert state.round == 3
    assert all(experiment.learner.state()[name].equal(tensor) for name, tensor in state.tensors.items())
    saved = checkpoint_rounds(RunFolder(usual.folder))
    with pytest.raises(InputError, match=f"must hold a checkpoint of round 17, got rounds \\{saved}"):
        restore(usual.folder, 17)


def test_the_adapter_file_is_the_state(usual):
    """Of federa: A stacked over A0, B beside -B0."""
    experiment, state = restore(usual.folder)
    tensors = load_file(usual.adapter / "adapter_model.safetensors")
    for name, (A0, B0) in experiment.learner.broadcast.factors.items():
        lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert lora_A[:4].equal(state.tensors[f"{name}.lora_A"]) and lora_A[4:].equal(A0)
        assert lora_B[:, :4].equal(state.tensors[f"{name}.lora_B"]) and lora_B[:, 4:].equal(-B0)


def test_configurations_come_as_file_mapping_or_config(usual, tiny_config, tmp_path):
    from federa.config import dump_config

    file = tmp_path / "config.yaml"
    file.write_text(dump_config(tiny_config))
    mapping = json.loads(json.dumps(tiny_config.model_dump(mode="json")))
    assert load_config(file) == load_config(mapping) == tiny_config
    for config in (file, mapping):
        assert run(config, usual.folder).test == usual.test
    with pytest.raises(InputError, match="already holds a run of another configuration"):
        run(file, usual.folder, overrides=["client.lr=0.5"])


def test_watchers_hear_of_everything(tiny_config, tmp_path):
    told = []
    result = run(tiny_config, tmp_path / "run", watch=lambda event, facts: told.append((event, facts)))
    events = [event for event, _ in told]
    assert events[0] == "ready" and events[-1] == "scored" and told[-1][1] == result.facts
    assert events.count("client") == 6 and events.count("round") == 3
    assert [facts for event, facts in told if event == "round"] == result.records[1:]


def test_an_interrupted_run_is_taken_up(usual, tiny_config, tmp_path):
    """Ctrl-C in the middle of round 2."""

    def interrupt(event, facts):
        if event == "client" and facts["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config, tmp_path / "run", watch=interrupt)
    assert not (tmp_path / "run" / "result.json").exists()
    again = resume(tmp_path / "run")
    assert adapter_of(again) == adapter_of(usual) and again.test == usual.test and again.best == usual.best
