import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from federa.config import dump_config, load_config
from federa.errors import InputError
from federa.figures import DPI, Line, _set_x_axis, _spread, _stride, draw_accuracy, draw_loss, draw_partition
from federa.records import read_run
from federa.report import plot_partition, results_table, write_comparison, write_report

VOID = {"meta", "img", "br", "link"}


def write_run(
    folder, *overrides, rounds=10, clients=12, labels=6, finished=True, evaluate=True, target=0.92, size=3.5e5, **names
):
    """A synthetic run's folder with the files that a run writes."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True)
    settings = (f"server.rounds={rounds}", f"partition.clients={clients}", "data.name=stdlib-docs")
    (folder / "config.yaml").write_text(dump_config(load_config({}, (*settings, *overrides))))
    dump(folder / "environment.json", {"python": "3.11.7", "device": "cpu", "threads": 2, "git": None})
    shares = rng.dirichlet(np.full(clients, 0.5), size=labels).T
    partition = {
        "scheme": "dirichlet_label",
        "convention": "dirichlet_label: every label is split over the clients by Dir(alpha = 0.5), min size 2",
        "label_names": names.get("label_names") or [f"label {i}" for i in range(labels)],
        "counts": (shares * 900).round().astype(int).tolist(),
        "names": names.get("client_names"),
    }
    dump(folder / "partition.json", partition)
    done = rounds if finished else rounds // 3
    records = []
    for index in range(done + 1):
        grown = 1 - np.exp(-3 * index / rounds)
        noise = 0.01 * rng.standard_normal()
        scores = {"loss": 1.8 - 1.5 * grown, "accuracy": 0.2 + (target - 0.2) * grown + noise, "macro_f1": 0.8 * grown}
        record = {"round": index, "validation": scores if evaluate else None, "test": None}
        if index:
            late = [1] if index % 4 == 0 else []
            record |= {
                "attempts": 1,
                "sampled": list(range(clients)),
                "completed": list(range(2, clients)),
                "dropped": [0] if index % 2 else [],
                "late": late,
                "rejected": [{"client": 1, "why": "update holds <NaN>"}] if index == 3 else [],
                "examples": 5000 - index,
                "steps": 310,
                "train_loss": 1.7 - 1.45 * grown,
                "lr": 1e-3,
                "update_norm": 2.0 / index,
                "bytes": {
                    "up_per_client": size,
                    "down_per_client": size,
                    "up": size * clients,
                    "down": size * clients,
                    "broadcast": size if index == 1 else 0,
                    "total": 2 * size * clients * index + size,
                },
                "seconds": {"train": 12.5, "aggregate": 0.01, "evaluate": 1.5, "checkpoint": 0.2},
            }
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        test = {"loss": 0.31, "accuracy": target - 0.013, "macro_f1": target - 0.03} if evaluate else None
        result = {
            "rounds": rounds,
            "test": test and test | {"worst_client": 0.71, "mean_client": 0.88},
            "validation": records[-1]["validation"],
            "best": None,
            "trainable_parameters": 87_552,
            "total_parameters": 22_715_136,
            "seconds": 142.1,
            "bytes_total": int(2 * size * clients * rounds + size),
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "source": "stdlib-docs",
            "method": "federa",
        }
        dump(folder / "result.json", result)
    yardsticks = [
        {"name": "majority class", "accuracy": 0.214, "macro_f1": 0.06, "note": "always the most frequent label"},
        {"name": "head-only", "accuracy": 0.842, "macro_f1": 0.81, "note": "frozen backbone, same rounds"},
        {"name": "linear probe", "accuracy": 0.861, "macro_f1": 0.84, "note": "logistic regression, pooled data"},
        {"name": "pooled", "accuracy": 0.924, "macro_f1": 0.91, "note": "same method, all data in one place"},
    ]
    if finished and evaluate:
        dump(folder / "yardsticks.json", yardsticks)
    return folder


def dump(path, value):
    path.write_text(json.dumps(value))


def change(path, **values):
    dump(path, json.loads(path.read_text()) | values)


class Page(HTMLParser):
    """Collects tags and text; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(path):
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    assert content.startswith("<!DOCTYPE html>")
    assert len(content.encode()) < 2 * 2**20
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\(", content)
    return page


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20]) / DPI, int.from_bytes(data[20:24]) / DPI


def test_a_finished_run_has_a_self_contained_page(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = assert_self_contained(path)
    assert sum(tag == "img" for tag, _ in page.tags) == 3
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    text = " ".join(page.text.split())
    for expected in (
        "After 10 rounds, 12 clients reached 90.7 % test accuracy (macro F1 89.0 %)",
        "training 0.39 % of 22.7 M parameters",
        "sending 0.35 MB per client a round",
        "would take 90.86 MB (260 times as much)",
        "FeDeRA on stdlib-docs",
        "majority class",
        "worst client 71.0 %",
        "split over the clients by Dir(alpha = 0.5)",
        "1 dropped, 1 rejected",
        "update holds <NaN>",
        "arXiv 2404.18848",
    ):
        assert expected in text
    names = {item.name for item in (tmp_path / "run").iterdir()}
    assert {"curves.png", "loss.png", "partition.png", "report.html"} <= names
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_same_files_give_the_same_bytes(tmp_path):
    folder = write_run(tmp_path / "run")
    outputs = [write_report(folder), *folder.glob("*.png")]
    first = [path.read_bytes() for path in outputs]
    write_report(folder)
    assert [path.read_bytes() for path in outputs] == first


def test_what_users_name_is_escaped(tmp_path):
    evil = '<script>alert("$x^$")</script>'
    folder = write_run(tmp_path / "run", labels=3, label_names=[evil, "日本語", "$\\frac$"], client_names=[evil] * 12)
    change(folder / "result.json", source=evil, model=evil)
    change(folder / "environment.json", **{evil: evil})
    dump(folder / "yardsticks.json", [{"name": evil, "accuracy": 0.5, "macro_f1": 0.4, "note": evil}])
    page = assert_self_contained(write_report(folder))
    assert page.text.count(evil) >= 6
    other = write_run(tmp_path / "<b>&", f"data.text='{evil}'")
    page = assert_self_contained(write_comparison([folder, other], tmp_path / "out.html"))
    assert evil in page.text
    assert "<b>&" in page.text


def test_an_unfinished_run(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 4, "attem')
    page = assert_self_contained(write_report(folder))
    assert "3 of 10 rounds are done with 12 clients, at 6" in page.text
    assert "unfinished run" in page.text
    assert [row.note for row in results_table(folder)] == ["validation, after round 3 (unfinished)"]


def test_a_run_that_just_began(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "partition.json", "environment.json"):
        (folder / name).unlink()
    page = assert_self_contained(write_report(folder))
    assert "0 of 10 rounds are done with 12 clients." in page.text
    assert not any(tag == "img" for tag, _ in page.tags)
    assert results_table(folder) == []


def test_a_run_without_evaluation(tmp_path):
    folder = write_run(tmp_path / "run", evaluate=False)
    page = assert_self_contained(write_report(folder))
    assert "had trained 0.39" in page.text
    assert (folder / "loss.png").exists()
    assert not (folder / "curves.png").exists()


def test_rounds_without_numbers_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[4] |= {"train_loss": None, "completed": [], "bytes": None, "seconds": None}
    lines[5]["validation"]["loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_self_contained(write_report(folder))
    run = read_run(folder)
    assert 5 not in run.curve("validation", "loss")[0]
    assert 5 in run.curve("validation")[0]


def test_results_come_best_first_with_the_best_round(tmp_path):
    folder = write_run(tmp_path / "run")
    scores = {"loss": 0.2, "accuracy": 0.95, "macro_f1": 0.94}
    change(folder / "result.json", best={"round": 7, "validation": scores, "test": scores})
    rows = results_table(folder)
    assert [row.name for row in rows] == [
        "FeDeRA, best round", "pooled", "FeDeRA", "linear probe", "head-only", "majority class",
    ]  # fmt: skip
    assert rows[0].note == "test, round 7 chosen on validation"
    assert rows[2] == ("FeDeRA", pytest.approx(0.907), pytest.approx(0.89), rows[2].note)
    assert rows[2].note.startswith("test, after round 10; worst client 71.0")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing: must be the folder of a run, got no such folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"got no config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="must get at least one run's folder"):
        write_comparison([], tmp_path / "out.html")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "model: [", "config.yaml"),
        ("config.yaml", "client: {lr: fast}", r"config.yaml: config: client.lr must be a valid number"),
        ("metrics.jsonl", '{"round": 1}\nnonsense\n', r"metrics.jsonl: line 2 must be a JSON record"),
        ("metrics.jsonl", '{"round": 0}\n{"round": "x"}\n', r"metrics.jsonl: line 2: round: must be a valid integer"),
        ("metrics.jsonl", "[]\n", r"metrics.jsonl: line 1: it: must be"),
        ("result.json", "{", r"result.json: must be JSON"),
        ("result.json", "{}", r"result.json: rounds: Field required"),
        ("partition.json", "null", r"partition.json: it: must be"),
        ("yardsticks.json", '[{"name": "pooled"}]', r"yardsticks.json: 0.accuracy: Field required"),
        ("environment.json", "[]", r"environment.json: it: must be a valid dictionary"),
    ],
    ids=lambda value: value[:24].replace("\n", " "),
)
def test_a_corrupt_file_is_named(tmp_path, name, content, message):
    folder = write_run(tmp_path / "run", rounds=2, clients=2)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        ({"counts": [[1, 2], [3]]}, "counts must hold 6 numbers >= 0 for every client"),
        ({"counts": [[-1, 0, 0, 0, 0, 0]]}, "counts must hold 6 numbers >= 0"),
        ({"counts": []}, "counts: List should have at least 1 item"),
        ({"names": ["a"]}, "names must name 2 clients, got 1"),
    ],
    ids=["ragged", "negative", "empty", "names"],
)
def test_a_partition_that_does_not_add_up_is_refused(tmp_path, change_to, message):
    folder = write_run(tmp_path / "run", rounds=2, clients=2)
    change(folder / "partition.json", **change_to)
    with pytest.raises(InputError, match=f"partition.json: .*{message}"):
        write_report(folder)


def test_comparison_shows_the_settings_that_differ(tmp_path):
    runs = [
        write_run(tmp_path / "federa"),
        write_run(tmp_path / "lora", "method.name=lora", "client.lr=0.0005", target=0.85),
        write_run(tmp_path / "full", "method.name=full", size=9e7, finished=False),
    ]
    page = assert_self_contained(write_comparison(runs, tmp_path / "out" / "comparison.html"))
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    text = page.text.replace("\xa0", " ")
    assert "The highest test accuracy is 90.7 %, of federa (FeDeRA), after 10 rounds and 84.35 MB sent." in text
    differing = text.partition("Settings that differ")[2]
    assert "method.name" in differing
    assert "client.lr" in differing
    assert "server.rounds" not in differing
    assert "3 of 10" in text
    first = (tmp_path / "out" / "comparison.html").read_bytes()
    assert write_comparison(runs, tmp_path / "out" / "comparison.html").read_bytes() == first


def test_comparison_of_runs_of_the_same_name_and_without_evaluation(tmp_path):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", evaluate=False)]
    page = assert_self_contained(write_comparison(runs, tmp_path / "out.html"))
    assert os.path.join("a", "run") in page.text
    assert f"Without validation accuracy: {os.path.join('b', 'run')}." in page.text
    assert "None." in page.text


def test_comparison_of_many_runs(tmp_path):
    run = write_run(tmp_path / "run", rounds=3, clients=2)
    page = assert_self_contained(write_comparison([run] * 30, tmp_path / "out.html"))
    assert "Comparison of 30 runs" in page.text
    assert "level with it: run, run, run, run and 25 more." in page.text


def test_a_page_of_a_large_run_stays_small(tmp_path):
    names = {"label_names": [f"a long name of the label number {i}" for i in range(100)]}
    page = assert_self_contained(
        write_report(write_run(tmp_path / "run", rounds=600, clients=1000, labels=100, **names))
    )
    assert "One round in 2; metrics.jsonl holds all." in page.text
    assert "The first 500 of 1,000 clients." in page.text


@pytest.mark.parametrize(("clients", "labels"), [(1, 1), (5, 2), (5, 100), (20, 24), (1000, 2)])
def test_partition_maps_of_every_size(tmp_path, clients, labels):
    counts = np.random.default_rng(0).integers(0, 3000, (clients, labels))
    counts[0] = 0
    path = tmp_path / "partition.png"
    plot_partition(counts.tolist(), [f"label {i}" for i in range(labels)], path, "one sentence on who got what")
    width, height = png_size(path)
    assert 2 < width < 11
    assert 1 < height < 9


def test_named_clients_and_empty_partitions_draw():
    draw_partition([[0, 0], [0, 0]], ["a", "b"], names=["hospital", "$bank$"])


@pytest.mark.parametrize(
    "points",
    [([0], [0.5]), ([0, 1], [0.0, 0.0]), ([0, 1], [1.0, 1.0]), ([0, 1, 2], [0.9, 0.95, 0.99])],
    ids=["point", "zero", "one", "high"],
)
def test_accuracies_at_the_edges_draw(points):
    assert draw_accuracy([Line("validation", *points, "#0072B2")], "round", "Accuracy").startswith(b"\x89PNG")


def test_small_amounts_have_ticks_of_their_own():
    axes = Figure().add_subplot()
    for end, expected in ((0.3, ["0", "0.05", "0.1"]), (6.0, ["0", "1", "2"]), (4000.0, ["0", "600", "1,200"])):
        _set_x_axis(axes, [Line("run", [0.0, end], [0.1, 0.2], "black")], None)
        ticks = axes.get_xticks()
        assert axes.xaxis.get_major_formatter().format_ticks(ticks)[:3] == expected


def test_losses_that_are_not_finite_draw():
    nan, inf = float("nan"), float("inf")
    draw_loss([Line("a", [0, 1, 2], [1.0, nan, inf], "#000000"), Line("b", [1], [nan], "#000000")], "round", "Loss")


def test_labels_spread_to_the_nearest_free_places():
    np.testing.assert_allclose(_spread([0.5, 0.5, 0.1], 0.1), [0.45, 0.55, 0.1])
    np.testing.assert_allclose(_spread([1.0, 1.0], 0.2), [0.8, 1.0])
    np.testing.assert_allclose(_spread([0.3] * 5, 0.5), [0, 0.25, 0.5, 0.75, 1])
    assert _spread([], 0.1).size == 0


@pytest.mark.parametrize(
    ("count", "room", "stride"), [(5, 10, 1), (11, 10, 2), (1000, 24.6, 50), (1000, 25, 50), (1, 1, 1)]
)
def test_tick_stride(count, room, stride):
    assert _stride(count, room) == stride
