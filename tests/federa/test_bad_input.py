"""Bad input through the command line: exit code 2, one line that names the key, nothing trained; never a traceback."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from federa import cli
from federa.config import dump_config
from federa.folder import RunFolder
from federa.simulation import run


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tiny_config) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump_config(tiny_config))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config) -> Path:
    return run(tiny_config, tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture
def federa(capsys, monkeypatch):
    """federa("run", ...) -> (exit code, standard error) of the command line in this process."""

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["federa", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def refused(federa, tmp_path):
    """refused(words, "run", ...) asserts one line with all the words, exit code 2 and that nothing was trained."""

    def check(words, *arguments):
        code, err = federa(*arguments)
        assert code == 2, err
        assert err.startswith("federa: ") and err.endswith("\n") and err.count("\n") == 1, err
        for word in [words] if isinstance(words, str) else words:
            assert word in err
        assert not [*tmp_path.rglob("round-*"), *tmp_path.rglob("init.safetensors")]

    return check


@pytest.fixture
def refused_run(refused, config_file, tmp_path):
    """refused_run(words, "key=value", ...): of `federa run` with these overrides, into a folder that stays free."""

    def check(words, *overrides):
        options = [option for override in overrides for option in ("--set", override)]
        refused(words, "run", config_file, "--output", tmp_path / "out", *options)
        assert not (tmp_path / "out" / "config.yaml").exists()

    return check


OVERRIDES = {
    "unknown key": ("client.batchsize=8", "client.batchsize is not a key; did you mean client.batch_size?"),
    "unknown section": ("clinet.lr=1", "clinet is not a key; did you mean client?"),
    "key of another section": ("method.alfa=1", "method.alfa is not a key; did you mean method.alpha?"),
    "far from any key": ("run.qqqqqq=1", "run.qqqqqq is not a key; run has cohort, threads, checkpoint_every"),
    "long key": (f"{'x' * 9999}=1", ["xxx...", "is not a key"]),
    "text for a number": ("client.lr=fast", "client.lr must be a valid number, got 'fast'"),
    "float for an integer": ("method.rank=8.0", "method.rank must be a valid integer, got 8.0"),
    "boolean for an integer": ("server.rounds=true", "server.rounds must be a valid integer, got true"),
    "integer for a boolean": ("evaluation.per_client=1", "evaluation.per_client must be a valid boolean, got 1"),
    "YAML 1.1 boolean": ("model.trust_remote_code=yes", "model.trust_remote_code must be a valid boolean, got 'yes'"),
    "octal": ("partition.clients=010", "partition.clients must be a valid integer, got '010'"),
    "sexagesimal": ("partition.clients=1:30", "partition.clients must be a valid integer, got '1:30'"),
    "null": ("client.batch_size=null", "client.batch_size must be a valid integer, got null"),
    "NaN": ("client.momentum=.nan", "client.momentum must be less than 1, got nan"),
    "infinite": ("client.lr=.inf", "client.lr must be a finite number, got inf"),
    "huge integer": (f"seed={'9' * 5000}", "seed must have a YAML value"),
    "alpha of 0": ("partition.alpha=0", "partition.alpha must be greater than 0, got 0"),
    "negative alpha": ("method.alpha=-1.5", "method.alpha must be greater than 0, got -1.5"),
    "unknown choice": ("method.name=dora", "'full' or 'head-only', got 'dora'; did you mean lora?"),
    "one of two betas": ("client.betas=[0.9]", "client.betas must be a list of 2 numbers in [0, 1), got [0.9]"),
    "betas as text": ("server.betas=['0.9', 0.9]", "server.betas must be a list of 2 numbers in [0, 1), got '0.9'"),
    "cohort": ("run.cohort=true", "run.cohort must be auto or a number of clients, got true"),
    "module list": (
        "method.target_modules=[1]",
        "method.target_modules must be a string or a list of strings, got [1]",
    ),
    "empty name": ("model.name=''", "model.name must not be empty, got ''"),
    "NUL": (r'data.cache="a\0b"', "data.cache must hold no NUL character"),
    "surrogate": (r'data.text="\ud800"', "data.text must be valid Unicode"),
    "section as a value": ("client=5", "client must be a mapping of keys, got 5"),
    "value as a section": ("client.lr.x=1", "--set: client.lr.x is not a key, lr holds 0.001"),
    "no value": ("client.lr", "--set: must be section.key=value, got 'client.lr'"),
    "no key": ("=1", "--set: must be section.key=value, got '=1'"),
    "not YAML": ("seed=[", "--set: seed must have a YAML value, got '['"),
    "a Python object": ("seed=!!python/object:os.system x", "--set: seed must have a YAML value"),
    "more a round than clients": ("server.clients_per_round=6", "server.clients_per_round must be at most"),
    "more updates than clients": ("server.min_updates=3", "server.min_updates must be at most"),
    "more clients than examples": ("partition.clients=2000", "partition.clients must be at most 144, the number of ex"),
    "more examples than there are": ("partition.min_size=40", "partition.clients x partition.min_size must be at most"),
    "more labels than there are": (
        "partition={scheme: pathological, labels_per_client: 9}",
        "partition.labels_per_client must be from 1 to 4",
    ),
    "natural without a column": ("partition.scheme=natural", "data.client must name the column"),
    "rank above min(N, K)": ("method.rank=33", ["method.rank for ", "must be between 1 and 32", "got 33"]),
    "no such layer": ("method.target_modules=nope", "method.target_modules must match a linear layer"),
    "no regular expression": ("method.target_modules='('", "method.target_modules must be a valid regular expression"),
    "no such model folder": ("model.name=./nowhere", "model.name: must be a hub name or a model's folder"),
    "no such data": ("data.path=/nowhere", "data.path must be a file or a folder, got /nowhere"),
    "no such text column": ("data.text=txt", ["data.text must be a column of train.jsonl", "did you mean text?"]),
    "no such label column": ("data.label=lable", ["data.label must be a column of train.jsonl", "did you mean label?"]),
    "no such client column": ("data.client=autor", ["data.client must be a column of", "did you mean author?"]),
    "longer than the model takes": ("data.max_length=300", ["data.max_length must suit the model, got an example of"]),
}


@pytest.mark.parametrize(("override", "words"), OVERRIDES.values(), ids=OVERRIDES)
def test_overrides(refused_run, override, words):
    refused_run(words, override)


def test_numbers_without_a_point(federa, config_file, tmp_path):
    """YAML 1.1 takes 1e-4, the help's own example, for a string."""
    code, err = federa("partition", config_file, "--set", "client.lr=1e-4", "--output", tmp_path / "p.png")
    assert (code, err) == (0, "")


CONFIGS = {
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff", "cannot read"),
    "control character": (b"seed: 1\x07", "special characters are not allowed"),
    "a list": (b"- seed", "must hold a mapping of sections, got ['seed']"),
    "a word": (b"seed", "must hold a mapping of sections, got 'seed'"),
    "not YAML": (b"client: {lr: 1", "line 1: "),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "line 2: "),
    "deep nesting": (b"[" * 9999, "nested too deeply"),
    "deep nesting of a value": (b"client: " + b"[" * 90 + b"]" * 90, "client must be a mapping of keys, got [[["),
    "Python object": (b"seed: !!python/object:os.system {}", "line 1: could not determine a constructor for the tag"),
    "set": (b"client: {betas: !!set {0.9, 0.99}}", "line 1: could not determine a constructor for the tag"),
    "key twice": (b"client:\n  lr: 1\n  lr: 2\n", "line 3: lr must be given once, got it twice"),
    "section twice": (b"client: {lr: 1}\nseed: 1\nclient: {epochs: 2}\n", "line 3: client must be given once"),
    "empty section": (b"client:\nseed: 1\n", "client must be a mapping of keys, got null"),
    "number as key": (b"1: 2\n", "line 1: a key must be a string"),
    "null as key": (b"seed: 1\nnull: x\n", "line 2: a key must be a string"),
    "list as key": (b"? [a]\n: 1\n", "line 1: a key must be a string"),
    "line break in a key": (b'"a\\nb": 1', r"'a\nb' is not a key"),
    "dots in a key": (b"client.lr: 1", "client.lr is not a key; write lr inside the section client"),
    "merge key": (b"client:\n  <<: {lr: 1}\n", "client.<< is not a key"),
    "alias": (b"client: &a {betas: [0.9, 0.9]}\nserver: *a\n", "line 2: must be written out, got an alias"),
    "bomb": (b"a: &a [x,x]\nb: &b [*a,*a]\n", "line 2: must be written out, got an alias"),
    "a date": (b"seed: 2020-01-01", "seed must be a valid integer, got '2020-01-01'"),
}


@pytest.mark.parametrize(("content", "words"), CONFIGS.values(), ids=CONFIGS)
def test_config_files(refused, tmp_path, content, words):
    (tmp_path / "bad.yaml").write_bytes(content)
    refused(["config: ", words], "run", tmp_path / "bad.yaml", "--output", tmp_path / "out")


def test_config_paths(refused, tmp_path):
    refused("config: no file", "run", tmp_path / "nowhere.yaml")
    refused(["config: cannot read", "Is a directory"], "run", tmp_path)
    refused("config: no file", "partition", tmp_path / "nowhere.yaml")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _settings(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _weights(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _without_layer_0(tensors) -> None:
    for name in [name for name in tensors if "layer.0." in name]:
        del tensors[name]


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


MODELS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "got no config.json"),
    "config cut": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "config empty": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "unknown architecture": (_settings(model_type="nope"), "nope"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "header too small"),
    "weights cut": (lambda folder: _truncate(folder / "model.safetensors"), "incomplete metadata"),
    "weights of another size": (_settings(hidden_size=48), "must hold weights that fit its config.json, got none for"),
    "too few layers": (_settings(num_hidden_layers=3), "must hold weights that fit its config.json, got none for"),
    "a layer missing": (_weights(_without_layer_0), "must hold weights that fit its config.json, got none for"),
    "NaN": (_weights(lambda tensors: tensors["encoder.layer.0.output.dense.weight"].fill_(float("nan"))), "be finite"),
    "no tokenizer": (_without_tokenizer, "must have a tokenizer, got one without a vocabulary"),
    "tokenizer cut": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load local folder"),
    "too few embeddings": (
        lambda folder: [
            _settings(vocab_size=100)(folder),
            _weights(lambda t: t.update({name: t[name][:100].clone() for name in t if "word_emb" in name}))(folder),
        ],
        "tokenizer of",
    ),
}


@pytest.mark.parametrize(("edit", "words"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_models(refused_run, tiny_models, tmp_path, edit, words, pooling):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models("bert"), folder)
    edit(folder)
    refused_run(["model.name: ", words], f"model.name={folder}", f"model.pooling={pooling}")


def test_hub_that_does_not_answer(refused_run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused_run(["model.name: nobody/nothing", "the hub did not answer"], "model.name=nobody/nothing")
    refused_run(["data.name: ", "nobody/nothing", "the hub did not answer"], "data={name: nobody/nothing}")


GOOD = "".join(json.dumps({"text": f"sentence number {i}", "label": i % 3}) + "\n" for i in range(60)).encode()
DATA = {
    "empty file": ("train.jsonl", b"", "it holds no examples"),
    "truncated gzip": ("train.jsonl.gz", gzip.compress(GOOD)[:-40], "ended before the end-of-stream marker"),
    "cut line": ("train.jsonl", GOOD[:-9], "cannot read"),
    "no test file": ("train.csv", b"text,label\na,b\n", "data.path must hold test.*"),
    "label outside the range": ("test.jsonl", b'{"text": "a", "label": 3}\n', "data.label must be one of 3 labels"),
    "unknown label": ("test.jsonl", b'{"text": "a", "label": "zebra"}\n', "got 'zebra' in row 1 of test.jsonl"),
    "one label": ("train.jsonl", b'{"text": "a", "label": 0}\n' * 60, "data.label "),
    "missing column": ("train.jsonl", b'{"text": "a"}\n' * 60, "data.label must be a column of train.jsonl (text)"),
}


@pytest.mark.parametrize(("name", "content", "words"), DATA.values(), ids=DATA)
def test_data(refused_run, tmp_path, name, content, words):
    folder = tmp_path / "data"
    folder.mkdir()
    files = {"train.jsonl": GOOD, "test.jsonl": b'{"text": "unseen", "label": 0}\n'}
    if name != "test.jsonl":
        del files["train.jsonl"]
    if name == "train.csv":
        del files["test.jsonl"]
    for file, held in (files | {name: content}).items():
        (folder / file).write_bytes(held)
    refused_run(["data.", words], f"data.path={folder}")


def test_output(refused, config_file, finished, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    refused("must be empty or hold a run, got other files", "run", config_file, "--output", tmp_path / "notes")
    refused("must be a folder, got a file", "run", config_file, "--output", tmp_path / "notes" / "todo.txt")
    refused("a folder that can be written", "run", config_file, "--output", tmp_path / "notes" / "todo.txt" / "run")
    before = _content(finished)
    refused("another configuration", "run", config_file, "--set", "seed=1", "--output", finished)
    refused("must be a new or empty folder", "export", finished, "--output", finished)
    refused(
        "must be a place that can be written", "export", finished, "--output", tmp_path / "notes" / "todo.txt" / "x"
    )
    refused("must be a place that can be written", "partition", config_file, "--output", tmp_path / "notes")
    refused("can be written", "report", finished, finished, "--output", tmp_path / "notes" / "todo.txt" / "x")
    assert _content(finished) == before and (tmp_path / "notes" / "todo.txt").read_text() == "mine"


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_options(refused, config_file, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    baseline = "--baseline: must be one of pooled, local, head-only, linear-probe, got 'nonsense'"
    refused(baseline, "run", config_file, "--output", tmp_path / "out", "--baseline", "nonsense")
    refused("got no such folder", "resume", tmp_path / "nowhere")
    refused("must be the folder of a run, got no config.yaml", "resume", tmp_path / "empty")
    refused("must be the folder of a run", "evaluate", tmp_path / "empty")
    refused("must be the folder of a run", "report", tmp_path / "empty")
    refused("must be one of peft, merged, residual, got 'zip'", "export", finished, "--format", "zip")
    refused("must hold a checkpoint of round 99", "evaluate", finished, "--round", "99")
    for text in ("first", "-1", "1.0", "²", "9" * 5000):
        refused("--round: must be a number, 'last' or 'best', got ", "evaluate", finished, "--round", text)
        refused("--round: must be a number, 'last' or 'best', got ", "export", finished, "--round", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["run"], "Missing argument"), (["run", "x", "--nope"], "No such option"), (["nope"], "No such command")],
    ids=["no config", "unknown option", "unknown command"],
)
def test_usage(federa, arguments, words):
    code, err = federa(*arguments)
    assert code == 2 and words in err and "Traceback" not in err


def _unfinished(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    return folder


NEWEST = "checkpoints/round-00003"
DAMAGE = {
    "config of another run": (
        "config.yaml",
        lambda text: text.replace("\nseed: 0", "").replace("lr: 0.001", "lr: 0.1"),
    ),
    "config cut": ("config.yaml", lambda text: text[:-9] + "["),
    "environment": ("environment.json", lambda text: "{}"),
    "threads": ("environment.json", lambda text: text.replace('"threads": 1', '"threads": "1"')),
    "partition": ("partition.json", lambda text: "[]"),
    "other data": ("partition.json", lambda text: text.replace('"data": "', '"data": "0')),
    "metrics of other rounds": ("metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[1:])),
    "metrics without a round": ("metrics.jsonl", lambda text: "{}\n" + text),
    "metrics of lists": ("metrics.jsonl", lambda text: "[]\n" + text),
    "metrics gone": ("metrics.jsonl", None),
    "factors cut": ("init.safetensors", lambda text: text[:100]),
    "factors gone": ("init.safetensors", None),
    "state gone": (f"{NEWEST}/state.json", None),
    "state of another type": (f"{NEWEST}/state.json", lambda text: "[]"),
    "state nested": (f"{NEWEST}/state.json", lambda text: "[" * 99999),
    "tensors gone": (f"{NEWEST}/state.safetensors", None),
    "tensors cut": (f"{NEWEST}/state.safetensors", lambda text: text[:-1]),
}


@pytest.mark.parametrize(("name", "change"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_runs(federa, finished, tmp_path, name, change):
    """A resumed run that is not what was saved ends in one line that names the file, and nothing is overwritten."""
    folder = _unfinished(finished, tmp_path)
    file = folder / name
    if change is None:
        file.unlink()
    else:
        file.write_text(change(file.read_text(encoding="latin-1")), encoding="latin-1")
    before = _content(folder)
    code, err = federa("resume", folder)
    assert code == 2 and err.startswith("federa: ") and err.count("\n") == 1, err
    assert _content(folder) == before


@pytest.mark.parametrize("content", ["{}", "[1]", "[" * 99999, "{", '{"test": 1, "validation": 2, "best": 3}'])
def test_damaged_results(refused, finished, tmp_path, content):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("round-*", "init.safetensors"))
    (folder / "result.json").write_text(content)
    refused("result.json: ", "resume", folder)
    refused("result.json: ", "report", folder)


def test_two_processes(refused, federa, finished, tmp_path):
    folder = _unfinished(finished, tmp_path)
    before = _content(folder)
    with RunFolder(folder).lock():
        code, err = federa("resume", folder)
        assert code == 2 and "another process is running in this folder" in err and err.count("\n") == 1
        assert _content(folder) == before
    assert federa("resume", folder)[0] == 0


def test_disk_full(federa, config_file, finished, tmp_path, monkeypatch):
    """Exit code 1 and one line in the middle of a run; what was saved is taken up and ends in the same tensors."""
    folder, fsync = tmp_path / "out", os.fsync

    def full(descriptor):
        if (folder / "checkpoints" / "round-00001").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, err = federa("run", config_file, "--output", folder)
    assert code == 1 and "No space left on device" in err and "federa resume" in err and err.count("\n") == 1
    monkeypatch.setattr(os, "fsync", fsync)
    assert federa("resume", folder)[0] == 0
    name = f"{NEWEST}/state.safetensors"
    assert (folder / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["run", "{config}", "--set", "client.lerning_rate=1", "--output", "{out}"],
            "client.lerning_rate is not a key",
        ),
        (["run", "{config}", "--set", "method.rank=33", "--output", "{out}"], "method.rank for"),
        (["resume", "{out}"], "must be the folder of a run"),
    ],
    ids=["key", "rank", "no run"],
)
def test_processes(config_file, tmp_path, command, words):
    """The same from outside: the process's own exit code and standard error."""
    arguments = [part.format(config=config_file, out=tmp_path / "out") for part in command]
    ended = subprocess.run(
        [sys.executable, "-m", "federa.cli", *arguments], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert words in ended.stderr and ended.stderr.count("\n") == 1
