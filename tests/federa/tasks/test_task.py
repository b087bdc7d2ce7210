"""Tasks in configurations, partitions, baselines and reports: what fits, and one line for what does not."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import federa
from federa.baselines import run_baseline, yardsticks
from federa.config import changed, load_config
from federa.errors import InputError
from federa.experiment import build, partition_of
from federa.folder import RunFolder
from federa.metrics import METRICS
from federa.records import read_run
from federa.report import results_table, write_comparison, write_report
from federa.tasks import TASKS


def watch(event, facts):
    pass


@pytest.fixture(scope="module")
def config_of(tiny_config, tiny_models, tiny_rows):
    def config_of(task, family="bert", **sections):
        base = changed(
            tiny_config,
            task={"name": task, "stride": 2},
            model={"name": str(tiny_models(family))},
            data={"path": str(tiny_rows(task)), "max_length": 40},
            partition={"scheme": "iid", "clients": 3},
            server={"rounds": 1},
        )
        return changed(base, **sections)

    return config_of


def test_every_task_has_its_metrics():
    assert TASKS.keys() == METRICS.keys()
    assert all(TASKS[name]().metric == METRICS[name].main for name in TASKS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": {"name": "tokenclassification"}}, "task.name .*'; did you mean token-classification?"),
        ({"task": {"name": "qa"}}, "task.name must be 'classification', 'pair-classification', .* got 'qa'"),
        ({"task": {"name": "causal-lm"}}, "partition.scheme must be iid, quantity, natural or kmeans for task.name"),
        ({"task": {"name": "causal-lm"}, "partition": {"scheme": "fednlp"}}, "have no one label each, got fednlp"),
        (
            {"task": {"name": "token-classification"}, "partition": {"scheme": "iid"}, "model": {"pooling": "mean"}},
            "model.pooling must be default for task.name token-classification, which predicts more than one label",
        ),
        (
            {"task": {"name": "causal-lm"}, "partition": {"scheme": "iid"}, "method": {"name": "head-only"}},
            "method.name must train more than a head for task.name causal-lm, whose head is pretrained",
        ),
        (
            {"task": {"name": "question-answering", "stride": 60}, "partition": {"scheme": "iid"}},
            "task.stride must be below data.max_length / 2 - 4 = 60, .* got 60",
        ),
        ({"method": {"name": "federaa"}}, "method.name .*did you mean federa?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(settings, message):
    with pytest.raises(InputError, match=message.replace("?", "\\?")) as raised:
        load_config(settings)
    assert "\n" not in str(raised.value)


def test_the_demo_data_serve_classification_alone():
    config = load_config({"task": {"name": "causal-lm"}, "partition": {"scheme": "iid"}})
    with pytest.raises(
        InputError, match="data.name: stdlib-docs holds texts and labels only and cannot serve task.name"
    ):
        build(config)


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "causal-lm"])
def test_kmeans_partitions_without_labels(config_of, task):
    """Rows are embedded as FedNLP does it (a question with its answer, a sentence), and all of them shared out."""
    family = "gpt2" if task == "causal-lm" else "bert"
    config = config_of(task, family, partition={"scheme": "kmeans", "clusters": 3, "alpha": 0.1})
    experiment = build(config)
    assert np.array_equal(np.sort(np.concatenate(experiment.clients)), np.arange(len(experiment.train)))
    corpus, partition, counts = partition_of(config)
    assert [own.tolist() for own in partition.indices] == [own.tolist() for own in experiment.clients]
    assert counts.sum() == len(experiment.train) and counts.shape == (3, 1)
    if task == "question-answering":
        row, answer = corpus.train.texts[0], corpus.train.fields["answers"][0]["text"][0]
        assert row == f"{corpus.train.fields['question'][0]} {answer}"


@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_a_run_is_told_in_its_own_metric(config_of, task, tmp_path, capsys):
    """Records, result, report, tables and comparison; no word of accuracy where F1 is meant."""
    main, second = METRICS[task]
    config = config_of(task, evaluation={"per_client": True, "test_every": 1})
    result = federa.run(config, tmp_path / "run", watch=watch)
    assert result.score == result.test[main.key] and result.facts["metric"] == main.key
    assert {"worst_client", "mean_client"} < result.test.keys()
    run = read_run(tmp_path / "run")
    assert run.metric == main and run.curve("test")[1][-1] == result.score
    text = (tmp_path / "run" / "report.html").read_text()
    assert f"test {main.noun} ({second.noun} {second.show(result.test[second.key])})" in text
    assert f"<th>{main.title}</th>" in text and "label" not in text.split("Who holds what")[1].split("Configuration")[0]
    scores = [row.score for row in results_table(tmp_path / "run")]
    assert result.score in scores and scores == sorted(scores, reverse=True)
    page = write_comparison([tmp_path / "run"], tmp_path / "comparison.html").read_text()
    assert f"The highest test {main.noun} is {main.show(result.score)}" in page

    row = run_baseline("local", config, tmp_path / "local", watch)
    assert list(row)[:4] == ["name", main.key, second.key, "note"]
    for name in ("linear-probe",):
        with pytest.raises(
            InputError, match=f"--baseline: {name} predicts one label an example and cannot serve task.name"
        ):
            run_baseline(name, config, tmp_path / name, watch)
    rows = yardsticks(config, tmp_path / "run", watch)
    assert [row["name"] for row in rows] == ["head-only", "pooled"]
    assert all(row[main.key] == stored[main.key] for row, stored in zip(
        rows, json.loads((tmp_path / "run" / "yardsticks.json").read_text()), strict=True))  # fmt: skip

    (tmp_path / "run" / "yardsticks.json").write_text('[{"name": "pooled", "accuracy": 0.5}]')
    with pytest.raises(InputError, match=f"yardsticks.json: 0.{main.key}: Field required"):
        write_report(tmp_path / "run")


def test_head_only_cannot_serve_a_language_model(config_of, tmp_path):
    config = config_of("causal-lm", "gpt2")
    with pytest.raises(
        InputError, match="--baseline: head-only trains a new head alone and cannot .*; pooled, local can"
    ):
        run_baseline("head-only", config, tmp_path / "out", watch)
    for name in ("pooled", "local"):
        assert run_baseline(name, config, tmp_path / name, watch)["perplexity"] > 1


def test_pooled_sees_as_many_windows(config_of, tmp_path):
    """Questions over several windows each: the client of the pooled run takes the federated run's windows in steps."""
    config = config_of("question-answering", data={"max_length": 16})
    experiment = build(config)
    assert len(experiment.train) > 1.5 * len(np.unique(experiment.train.rows))
    run_baseline("pooled", config, tmp_path, watch)
    mean = np.mean([len(own) for own in experiment.clients])
    seen = config.server.rounds * experiment.clients_per_round * mean
    assert RunFolder(tmp_path).metrics()[1]["steps"] == math.ceil(seen / config.client.batch_size)


def test_comparisons_are_of_one_metric(config_of, tiny_config, tmp_path):
    federa.run(config_of("token-classification"), tmp_path / "tags", watch=watch)
    federa.run(changed(tiny_config, server={"rounds": 1}), tmp_path / "labels", watch=watch)
    with pytest.raises(InputError, match="comparison: must get runs judged by one metric, got accuracy, entity_f1"):
        write_comparison([tmp_path / "tags", tmp_path / "labels"], tmp_path / "out.html")


def test_other_data_are_noticed_on_resume(config_of, tmp_path):
    """The digest covers targets and references, not the tokens alone."""
    experiment = build(config_of("token-classification"))
    before = experiment.data_digest()
    experiment.test.truth[0][0] = "B-other"
    assert experiment.data_digest() != before
    other = build(config_of("token-classification"))
    targets = np.minimum(other.train.targets, 0)
    assert replace(other, train=replace(other.train, targets=targets)).data_digest() != before
