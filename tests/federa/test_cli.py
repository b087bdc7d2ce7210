"""The command line: what each command prints and writes, and its exit code."""

import json
import re
import subprocess
import sys

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from federa.cli import main
from federa.config import changed, dump_config
from federa.folder import RunFolder

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def federa(monkeypatch, capsys, tmp_path):
    """federa(*arguments) -> (exit code, stdout, stderr), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def federa(*arguments):
        monkeypatch.setattr(sys, "argv", ["federa", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return federa


@pytest.fixture(scope="module")
def config_file(tiny_config, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(dump_config(changed(tiny_config, client={"lr": 0.01})))
    return file


@pytest.fixture(scope="module")
def done(config_file, tmp_path_factory):
    """The folder of a finished run, made by a real process whose output is a pipe, and that output."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "federa.cli", "run", str(config_file), "--output", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout, process.stderr


def test_output_to_a_pipe_is_a_few_lines(done):
    """What runs, the scores, where they lie: no bar, no escape sequence, nothing on stderr."""
    folder, out, err = done
    lines = out.splitlines()
    assert err == "" and len(lines) <= 20 and "\x1b" not in out and "\r" not in out
    assert [line.split()[0] for line in lines[:4]] == ["model", "data", "clients", "method"]
    assert lines[1].endswith("144 training examples, 16 validation, 48 test")
    assert lines[2].startswith("clients  5, 2 a round; dirichlet")
    assert lines[3] == "method   federa, 4,772 trainable parameters on cpu"
    accuracy = json.loads((folder / "result.json").read_text())["test"]["accuracy"]
    assert f"{accuracy:.1%}" in out
    assert f"report   {folder / 'report.html'}" in lines
    assert lines[-1] == f"adapter  {folder / 'adapter'} (peft.PeftModel.from_pretrained loads it)"


def test_help_names_every_command(federa):
    code, out, err = federa("--help")
    assert code == 0 and err == ""
    for command in ("run", "resume", "evaluate", "export", "partition", "report", "doctor"):
        assert re.search(rf"│ {command} ", out), command
        code, text, _ = federa(command, "--help")
        assert code == 0 and re.search(rf"Usage: .*federa {command} ", text)


def test_no_command_shows_the_help(federa):
    code, out, err = federa()
    assert code == 2 and re.search("Usage: .*federa ", out + err)


def test_a_finished_run_is_shown_again(federa, done, config_file):
    folder = done[0]
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    for command in (("resume", folder), ("run", config_file, "--output", folder)):
        code, out, _ = federa(*command)
        assert code == 0 and f"report   {folder / 'report.html'}" in out
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_run_defaults_to_a_folder_named_after_the_config(federa, config_file, tmp_path):
    code, out, _ = federa("run", config_file, "--set", "server.rounds=1", "--set", "method.name=head-only")
    assert code == 0 and "method   head-only, 1,188 trainable parameters" in out and "adapter " not in out
    folder = RunFolder(tmp_path / "runs" / "tiny")
    assert folder.config().server.rounds == 1 and folder.result()["method"] == "head-only"


def test_run_with_yardsticks(federa, config_file):
    code, out, _ = federa("run", config_file, "--output", "run", "--set", "server.rounds=1", "--yardsticks")
    assert code == 0
    for name in ("FeDeRA", "majority", "head-only", "linear-probe", "pooled"):
        assert name.lower() in out.lower(), name
    assert "25.0%" in out


def test_run_a_baseline(federa, config_file, tmp_path):
    code, out, _ = federa("run", config_file, "--baseline", "linear-probe")
    row = json.loads((tmp_path / "runs" / "tiny-linear-probe" / "baseline.json").read_text())
    assert code == 0 and "linear-probe" in out and f"{row['accuracy']:.1%}" in out


@pytest.mark.parametrize("round", ["last", "best", "3"])
def test_evaluate_repeats_the_runs_scores(federa, done, round):
    result = json.loads((done[0] / "result.json").read_text())
    code, out, _ = federa("evaluate", done[0], "--round", round)
    scores = result["best"]["test"] if round == "best" else result["test"]
    number = result["best"]["round"] if round == "best" else 3
    assert code == 0
    expected = f"round {number}: loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.4f}, "
    assert out.replace("\n", " ").startswith(expected + f"macro_f1 {scores['macro_f1']:.4f}")


def test_export_writes_each_format(federa, done, tmp_path):
    base = RunFolder(done[0]).config().model.name
    for format in ("peft", "merged", "residual"):
        code, out, err = federa("export", done[0], "--format", format, "--output", format)
        assert (code, out, err) == (0, f"wrote {format}\n", "")
    PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=4), tmp_path / "peft")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ours, theirs = (place / "adapter_model.safetensors" for place in (done[0] / "adapter", tmp_path / "peft"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "residual" / "base" / "model.safetensors").is_file()


def test_export_of_the_best_round_goes_beside_the_run(federa, done):
    code, out, _ = federa("export", done[0], "--round", "best")
    assert code == 0 and out == f"wrote {done[0] / 'peft'}\n"
    assert (done[0] / "peft" / "adapter_model.safetensors").is_file()


def test_partition_shows_a_table_and_a_picture(federa, config_file, tmp_path):
    code, out, _ = federa("partition", config_file, "--set", "partition.scheme=iid", "--output", "who.png")
    rows = re.findall(r"│ (\d) +│ +(\d+) +│ +(\d) +│", out)
    assert code == 0 and [row[0] for row in rows] == list("01234") and sum(int(row[1]) for row in rows) == 144
    assert (tmp_path / "who.png").read_bytes().startswith(PNG) and out.endswith("wrote who.png\n")


def test_report_of_one_run_is_written_again(federa, done):
    (done[0] / "report.html").unlink()
    code, out, _ = federa("report", done[0])
    assert code == 0 and out == f"wrote {done[0] / 'report.html'}\n"
    assert "FeDeRA" in (done[0] / "report.html").read_text()


def test_report_of_several_runs_compares_them(federa, done, config_file, tmp_path):
    federa("run", config_file, "--output", "lora", "--set", "method.name=lora")
    code, out, _ = federa("report", done[0], "lora", "--output", "both.html")
    assert code == 0 and out == "wrote both.html\n"
    text = (tmp_path / "both.html").read_text()
    accuracies = [RunFolder(folder).result()["test"]["accuracy"] for folder in (done[0], tmp_path / "lora")]
    assert "FeDeRA" in text and "LoRA" in text and all(f"{accuracy:.1%}" in text for accuracy in accuracies)


def test_doctor(federa):
    code, out, _ = federa("doctor")
    assert code == 0 and "torch" in out and "cpu" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("run", "nowhere.yaml"), "federa: config: no file nowhere.yaml"),
        (("resume", "nowhere"), "federa: nowhere: must be the folder of a run, got no such folder"),
        (("evaluate", "DONE", "--round", "first"), "federa: --round: must be a number, 'last' or 'best', got 'first'"),
        (("export", "DONE", "--format", "onnx"), "federa: --format: must be one of peft, merged, residual, got 'onnx'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(federa, done, arguments, line):
    code, out, err = federa(*(done[0] if argument == "DONE" else argument for argument in arguments))
    assert (code, out, err) == (2, "", line + "\n")


def test_a_run_that_cannot_go_on_exits_with_1(federa, config_file, tmp_path):
    settings = ("failures.dropout=0.99", "server.min_updates=2", "server.retries=0")
    code, _, err = federa("run", config_file, "--output", "run", *(part for s in settings for part in ("--set", s)))
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("federa: round 1: got ") and "`federa resume" in err


def test_an_interrupt_exits_with_130_and_resumes(federa, config_file, done, monkeypatch):
    """Ctrl-C during round 2; the taken-up run ends as the one that nothing stopped."""
    from federa.progress import RunProgress

    honest = RunProgress.__call__

    def interrupting(self, event, facts):
        honest(self, event, facts)
        if event == "client" and facts["round"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "__call__", interrupting)
        code, _, err = federa("run", config_file, "--output", "run")
    assert code == 130 and err.count("\n") == 1
    assert err.startswith("federa: interrupted; ") and "`federa resume DIR`" in err
    code, out, _ = federa("resume", "run")
    assert code == 0 and "report   run/report.html" in out
    first, second = (place / "adapter" / "adapter_model.safetensors" for place in (done[0], RunFolder("run").path))
    assert first.read_bytes() == second.read_bytes()
