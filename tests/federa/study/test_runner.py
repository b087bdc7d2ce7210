"""Whole studies of a tiny model: what they write, what a restart reads, five kills, budgets and failures."""

import csv
import html
import json
import multiprocessing
import re
import shutil
import signal
import time

import numpy as np
import pytest

from federa import InputError, strict_yaml
from federa.cli import main
from federa.folder import RunFolder
from federa.study import dry_run, run_study
from federa.study.forecast import Cost
from federa.study.report import is_study, write_study
from federa.study.results import SECONDS, read_study


@pytest.fixture(scope="module")
def finished(tiny_study, tmp_path_factory):
    """(the folder of a finished study, the events it told)."""
    told = []
    folder = tmp_path_factory.mktemp("study") / "out"
    run_study(tiny_study(), folder, watch=lambda event, facts: told.append((event, facts)))
    return folder, told


def rows_of(folder):
    with open(folder / "study.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_grid_is_run_with_the_chosen_rates(finished):
    """Sweep and grid share a cell: two methods of two rates on seed 0, and seed 1 at the better one."""
    folder, told = finished
    done = [facts["name"] for event, facts in told if event == "unit-done"]
    assert len(done) == len({*done}) == 2 * 3 + 2
    rows = rows_of(folder)
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("federa", "lora") for s in "01"]
    with open(folder / "sweep.csv", newline="") as file:
        tried = list(csv.DictReader(file))
    for method in ("federa", "lora"):
        own = [row for row in tried if row["method"] == method]
        best = max(own, key=lambda row: float(row["validation"]))
        assert [row["chosen"] for row in own] == [str(int(row is best)) for row in own]
        assert {row["swept"] for row in rows if row["method"] == method} == {best["swept"]}


def test_a_row_holds_what_its_run_wrote(finished):
    folder, _ = finished
    row = rows_of(folder)[0]
    run = RunFolder(next(folder.glob(f"runs/base/docs/federa/alpha=1,seed=0,{row['swept']}")))
    result, records = run.result(), run.metrics()
    assert (
        float(row["test"]) == result["test"]["accuracy"]
        and float(row["validation"]) == result["validation"]["accuracy"]
    )
    assert float(row["worst_client"]) == result["test"]["worst_client"]
    assert int(row["trainable_parameters"]) == result["trainable_parameters"]
    assert int(row["bytes_total"]) == records[-1]["bytes"]["total"]
    assert float(row["direction_variation"]) == 1 - records[2]["update"]["cosine"]
    ratio = records[2]["update"]["norm"] / records[1]["update"]["norm"]
    assert float(row["magnitude_variation"]) == abs(ratio - 1)
    assert float(row["seconds_to_adapt"]) > 0 and row["state"] == "finished" and row["metric"] == "accuracy"


def test_a_finished_study_is_read(finished, tiny_study):
    """The same file again, times included; a report of the folder alone gives the same page."""
    folder, _ = finished
    names = ("study.csv", "sweep.csv", "sessions.json")
    before = [(folder / name).read_bytes() for name in names]
    runs = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.name == "result.json"}
    told = []
    run_study(tiny_study(), folder, watch=lambda event, facts: told.append(event))
    assert {*told} <= {"plan", "warn"} and [(folder / name).read_bytes() for name in names] == before
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    page = (folder / "study.html").read_bytes()
    assert is_study(folder) and write_study(folder).read_bytes() == page


def test_the_prediction_comes_first_and_is_kept(finished):
    folder, told = finished
    events = [event for event, _ in told]
    plan = next(facts for event, facts in told if event == "plan")
    assert events.index("plan") < events.index("unit") and plan["units"] == plan["of"] == 8
    (session,) = json.loads((folder / "sessions.json").read_text())
    assert session["predicted"] == plan["predicted"] > 0 and session["took"] > 0
    left = [facts["left"] for event, facts in told if event == "unit-done"]
    assert left[-1] == 0 and left[0] > 0


def test_the_page_is_self_contained_and_small(finished):
    folder, _ = finished
    content = (folder / "study.html").read_text(encoding="utf-8")
    assert len(content.encode()) < 5 * 2**20
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\(|href=", content)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]{30})', content))
    assert all(re.findall(r'<img [^>]*alt="([^"]+)"', content))
    text = " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", content, flags=re.S)).split())
    for expected in (
        "federa against lora",
        "highest mean test score in",
        "95 % interval",
        "Worst client",
        "federa − lora",
        "pooled",
        "local",
        "Direction variation",
        "Uₜ is the change that round t makes",
        "is at the edge of those tried",
        "the test set chooses nothing",
    ):
        assert expected in text, expected
    assert "*" not in re.sub(r"<pre>.*?</pre>", "", content.partition("</style>")[2], flags=re.S)  # no stars


def study_process(values, folder):
    """Runs in a process of its own, which is killed."""
    run_study(values, folder)


def without_times(path):
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key not in SECONDS} for row in csv.DictReader(file)]


def test_five_kills_change_nothing(finished, tiny_study, tmp_path):
    """SIGKILL at five random moments; then the same study.csv but for its time columns, and the same sweep.csv."""
    reference = finished[0]
    values = tiny_study(seeds=read_study(reference).study.config.seeds)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["federa.study", "federa.report", "sklearn.metrics", "sklearn.linear_model"])
    warm = processes.Process(target=int)
    warm.start()
    warm.join()
    rng = np.random.default_rng(11)
    folder = tmp_path / "killed"
    for _ in range(5):
        process = processes.Process(target=study_process, args=(values, folder))
        process.start()
        time.sleep(rng.uniform(0.1, 1.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (folder / "study.html").exists()
    run_study(values, folder)
    assert without_times(folder / "study.csv") == without_times(reference / "study.csv")
    assert (folder / "sweep.csv").read_bytes() == (reference / "sweep.csv").read_bytes()


def test_a_study_grows_by_seeds(finished, tiny_study):
    """What is there is read, what is new is run."""
    folder, _ = finished
    told = []
    run_study(tiny_study(seeds=[0, 1, 2]), folder, watch=lambda event, facts: told.append((event, facts)))
    done = [facts["name"] for event, facts in told if event == "unit-done"]
    assert len(done) == 2 and all("seed=2" in name for name in done)
    assert [row["seed"] for row in rows_of(folder)] == ["0", "1", "2"] * 2


def test_too_long_a_study_stops_before_it_starts(tiny_study, tmp_path):
    told, asked = [], []
    values = tiny_study(methods={"lora": {}}, baselines=[], seeds=[0], sweep={}, budget=0.001)
    with pytest.raises(InputError, match=r"--budget: the study is predicted to take .* the budget is 0.001 min"):
        run_study(values, tmp_path, watch=lambda event, facts: told.append(event))
    assert "unit" not in told and not list(tmp_path.glob("**/result.json"))
    with pytest.raises(InputError, match="--budget"):
        run_study(values, tmp_path, confirm=lambda question: asked.append(question))
    assert asked[0].endswith("Run it?")
    assert run_study(values, tmp_path, confirm=lambda question: True).is_file()


def test_a_rate_that_fails_is_not_chosen(tiny_study, tmp_path):
    """A rate of 1e20 ends in NaN in every client: the run fails, is recorded, and is not run again."""
    over = {"client.lr": [0.003, 1e20]}
    values = tiny_study(methods={"lora": {}}, baselines=[], seeds=[0], sweep={"over": over})
    run_study(values, tmp_path)
    (choice,) = read_study(tmp_path).choices.values()
    assert choice.point == (("client.lr", 0.003),) and choice.tried[1][1] is None
    failed = next(tmp_path.glob("**/failed.json"))
    assert "good updates" in json.loads(failed.read_text())["error"]
    told = []
    run_study(values, tmp_path, watch=lambda event, facts: told.append(event))
    assert "unit" not in told
    assert "failed" in (tmp_path / "study.html").read_text()


def test_an_unfinished_study_has_a_page(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    cells = len(rows_of(folder))
    for path in folder.glob("runs/base/docs/federa/*/result.json"):
        path.unlink()
    text = write_study(folder).read_text()
    assert f"{cells // 2} of {cells} runs done" in text
    assert "No two methods have finished runs in one setting yet" in text
    assert [row["method"] for row in rows_of(folder)] == ["lora"] * (cells // 2)


def test_other_folders_are_left_alone(tiny_study, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="must be empty or hold a study"):
        run_study(tiny_study(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_unknown_metric_is_named(tiny_study, finished, tmp_path):
    folder, _ = finished
    file = tmp_path / "study"
    file.mkdir()
    for item in ("study.yaml", "runs"):
        (file / item).symlink_to(folder / item)
    (file / "study.yaml").unlink()
    stored = (folder / "study.yaml").read_text().replace("metric: null", "metric: bleu")
    (file / "study.yaml").write_text(stored)
    with pytest.raises(InputError, match="metric: must be a score of the dataset's task, loss, accuracy, macro_f1"):
        write_study(file)


def test_a_cost_by_hand(tiny_config):
    """Two rounds of 4 steps of 0.5 s, each evaluated; built, scored on the test set one and a half times, reported."""
    from federa.config import changed

    cost = Cost(build=10, step=0.5, steps=4, aggregate=0.25, validation=1, test=3, train_passes=9, report=2)
    config = changed(tiny_config, server={"rounds": 2})
    assert cost.run(config) == 10 + 2 * (4 * 0.5 + 0.25 + 1) + 1.5 * 3 + 2
    assert cost.run(config, done=1) == cost.run(config) - 3.25
    sparse = changed(config, evaluation={"every": 2, "test_every": 1})
    assert cost.run(sparse) == cost.run(config) - 1 + 2 * 3
    assert cost.baseline("pooled", config) == 10 + 2 + 1 + 1.5 * 3 + 2 * 4 * 0.5


def test_dry_run_builds_every_cell(tiny_study, tmp_path):
    """On other models and data than the study's: no file of theirs is needed."""
    told = []
    values = tiny_study(
        alphas=[0.1, 1.0], baselines=[], models={"RoBERTa": {"architecture": {"model_type": "roberta"}}}
    )
    values["base"]["model"]["name"] = "nobody/has-this-model"
    values["base"]["data"] |= {"path": "/nowhere"}
    page = dry_run(values, tmp_path, watch=lambda event, facts: told.append((event, facts)))
    built = [facts["name"] for event, facts in told if event == "build"]
    assert len(built) == len({*built}) == 2 * 2 * 2
    assert "warn" not in [event for event, _ in told]  # of rates that are tried for their own sake
    rows = rows_of(page.parent)
    assert [row["state"] for row in rows] == ["finished"] * 2 and {row["model"] for row in rows} == {"RoBERTa"}


def test_the_command_line(finished, tiny_study, tmp_path, monkeypatch, capsys):
    """A finished study is read and its page written again, by both commands; a mistake is one line and exit code 2."""
    folder, _ = finished
    (tmp_path / "tiny.yaml").write_text(strict_yaml.render(tiny_study()))
    (tmp_path / "wrong.yaml").write_text(strict_yaml.render(tiny_study(seed=[1])))

    def federa(*arguments):
        monkeypatch.setattr("sys.argv", ["federa", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    code, out, err = federa("study", tmp_path / "tiny.yaml", "--output", folder)
    assert code == 0 and err == "" and "8 runs and yardsticks, 8 are finished and only read" in out
    assert out.splitlines()[-1] == f"study    {folder / 'study.html'}"
    assert federa("report", folder)[:2] == (0, f"wrote {folder / 'study.html'}\n")
    code, out, err = federa("study", tmp_path / "wrong.yaml", "--output", tmp_path / "out")
    assert code == 2 and err.startswith("federa: study: seed: ") and err.count("\n") == 1
