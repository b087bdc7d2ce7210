import csv
import gzip
import io
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from federa.config import DataConfig
from federa.data import (
    Texts,
)
from federa.errors import InputError
from federa.sources import is_test, load_corpus, text_key
from federa.stdlib_docs import LABELS, stdlib_docs

ROWS = [{"text": f"sentence number {i} here", "label": i % 3, "site": f"s{i % 4}"} for i in range(60)]
TEST_ROWS = [{"text": f"unseen {i}", "label": i % 3, "site": f"s{i % 4}"} for i in range(9)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows, delimiter) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(rows) -> bytes:
    import pandas

    stream = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(stream)
    return stream.getvalue()


FORMATS = {
    "jsonl": jsonl,
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": lambda rows: separated(rows, ","),
    "tsv": lambda rows: separated(rows, "\t"),
    "parquet": parquet,
    "jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "csv.gz": lambda rows: gzip.compress(separated(rows, ",")),
}


@pytest.fixture
def folder(tmp_path):
    """Writes train and test files and returns their folder."""

    def write(train=ROWS, test=TEST_ROWS, **files):
        for name, content in {"train.jsonl": train, "test.jsonl": test, **files}.items():
            if content is not None:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else jsonl(content))
        return tmp_path

    return write


def load(path, seed=0, **keys):
    return load_corpus(DataConfig(path=str(path), **keys), seed)


def refuse(match, path=None, **keys):
    """The source is refused with one line that matches."""
    with pytest.raises(InputError, match=match) as raised:
        load_corpus(DataConfig(path=path and str(path), **keys), 0)
    assert "\n" not in str(raised.value)


def pairs(texts: Texts):
    return list(zip(texts.texts, texts.labels.tolist(), strict=True))


# Local files


@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_reads_the_same(tmp_path, extension):
    (tmp_path / f"train.{extension}").write_bytes(FORMATS[extension](ROWS))
    (tmp_path / f"test.{extension}").write_bytes(FORMATS[extension](TEST_ROWS))
    corpus = load(tmp_path, client="site")
    assert pairs(corpus.train) == [(row["text"], row["label"]) for row in ROWS]
    assert pairs(corpus.test) == [(row["text"], row["label"]) for row in TEST_ROWS]
    assert corpus.train.clients == [row["site"] for row in ROWS]
    assert corpus.train.labels.dtype == np.int64
    assert corpus.label_names == ["0", "1", "2"]
    assert f"train.{extension}" in corpus.source


def test_single_file_is_split_by_text(tmp_path):
    file = tmp_path / "all[1]*.jsonl"  # not a pattern
    file.write_bytes(jsonl(ROWS + [{**row, "text": row["text"].upper() + "!"} for row in ROWS]))
    corpus = load(file)
    train, test = ({text_key(text) for text in texts.texts} for texts in (corpus.train, corpus.test))
    assert len(corpus.train) + len(corpus.test) == 2 * len(ROWS)
    assert not train & test
    assert all(is_test(key) for key in test)
    assert 0.05 < len(test) / len(train | test) < 0.4


def test_validation_file_serves_as_test(folder):
    path = folder(test=None, **{"validation.jsonl": TEST_ROWS})
    assert len(load(path).test) == len(TEST_ROWS)
    (path / "test.jsonl").write_bytes(jsonl(TEST_ROWS[:3]))
    assert len(load(path).test) == 3


def test_string_labels_are_sorted_and_words_like_null_stay(folder):
    names = ["None", "NA", "b"]
    rows = [{"text": ["null", "NA", ""][i % 3], "label": names[i % 3]} for i in range(6)]
    corpus = load(folder(None, None, **{"train.csv": separated(rows, ","), "test.csv": separated(rows, ",")}))
    assert corpus.label_names == ["NA", "None", "b"]
    assert pairs(corpus.train)[:3] == [("null", 1), ("NA", 0), ("", 2)]


def test_labels_json_names_ids_and_strings(folder):
    labels = json.dumps(["zero", "one", "two"]).encode()
    path = folder(**{"labels.json": labels})
    assert load(path).label_names == ["zero", "one", "two"]
    named = [{**row, "label": ["zero", "one", "two"][row["label"]]} for row in ROWS]
    assert load(folder(train=named)).train.labels.tolist() == [row["label"] for row in ROWS]


def test_class_label_features_give_names(tmp_path):
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    data.to_parquet(tmp_path / "test.parquet")
    assert load(tmp_path).label_names == ["no", "yes"]


def test_max_examples_are_a_seeded_choice(folder):
    path = folder()
    first, again, other = (load(path, seed, max_train=20, max_test=5) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test)) == (20, 5)
    assert pairs(first.train) == pairs(again.train) != pairs(other.train)
    assert set(pairs(first.train)) < set(pairs(load(path).train))
    assert pairs(load(path, 0, max_train=10).train) == pairs(first.train)[:10]
    assert len(load(path, max_train=1000).train) == len(ROWS)


def test_reading_leaves_nothing_behind_and_says_nothing(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    code = (
        "from federa.config import DataConfig\nfrom federa.sources import load_corpus\n"
        f"load_corpus(DataConfig(path={str(folder())!r}), 0)"
    )
    environment = {**os.environ, "HF_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    assert not [file for file in home.rglob("*") if file.is_file()]


# Files that are refused


def test_paths_that_are_refused(folder, tmp_path):
    refuse("data.path must be a file or a folder, got .*nowhere", tmp_path / "nowhere")
    refuse(r"data.path must hold train.* \(.*\), got nothing", tmp_path)
    (tmp_path / "train.txt").write_text("text")
    refuse("data.path must end in .jsonl, .*, got train.txt", tmp_path / "train.txt")
    refuse(r"data.path must hold train\.\* .*, got train.txt", tmp_path)
    path = folder(test=None)
    refuse(r"data.path must hold test\.\*", path)
    folder(**{"train.csv": separated(ROWS, ",")})
    refuse(r"data.path must hold one train\.\*, got train.csv, train.jsonl", path)


def test_too_small_to_split(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_bytes(jsonl(ROWS[:1]))
    refuse(r"data.path: .* is too small to split into train and test \(1 examples\)", file)


@pytest.mark.parametrize("kept", [0, 1, 9, 10, 50, -20, -8, -1])
def test_truncated_gzip(folder, kept):
    refuse(
        "data.path: cannot read .*train.jsonl.gz: ",
        folder(None, **{"train.jsonl.gz": gzip.compress(jsonl(ROWS))[:kept]}),
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.jsonl", b"", "it holds no examples"),
        ("train.jsonl", b"\n\n", "it holds no examples"),
        ("train.csv", b"text,label\n", "it holds no examples"),
        ("train.jsonl.gz", gzip.compress(b"", mtime=0), "it holds no examples"),
        ("train.jsonl.gz", jsonl(ROWS), "Not a gzipped file"),
        ("train.jsonl", b"no json\n", "JSON parse error"),
        ("train.jsonl", jsonl(ROWS)[:-9], "JSON parse error"),
        ("train.json", b"3", "."),
        ("train.csv", b"text,label\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("train.csv", b'text,label\n"a,1\n', "EOF inside string"),
        ("train.parquet", b"PAR1", "Parquet"),
    ],
)
def test_unreadable_files(folder, name, content, reason):
    refuse(f"data.path: cannot read .*{name}: .*{reason}", folder(None, **{name: content}))


def test_text_that_is_not_utf8(folder):
    refuse("data.text: train.jsonl is not UTF-8", folder('{"text": "é", "label": 1}\n'.encode("latin-1")))


def test_missing_columns(folder):
    path = folder()
    refuse(
        r"data.text must be a column of train.jsonl \(text, label, site\), got 'txt'; did you mean text\?",
        path,
        text="txt",
    )
    refuse(r"data.label must be a column of .*, got 'category'$", path, label="category")
    refuse(r"data.client must be a column of .*, got 'sites'; did you mean site\?", path, client="sites")


def with_row(row, **values):
    return [*ROWS[: row - 1], {**ROWS[row - 1], **values}, *ROWS[row:]]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (with_row(5, text=None), "data.text must hold strings, got null in row 5 of train.jsonl"),
        (with_row(5, text=3), "data.text must hold strings, got 3 in row 5"),
        ([{**row, "text": i} for i, row in enumerate(ROWS)], "data.text must hold strings, got 0 in row 1"),
        (with_row(7, label=None), "data.label must hold ids or strings, got null in row 7"),
        (with_row(7, label=""), "data.label must hold ids or strings, got '' in row 7"),
        (with_row(7, label="x"), "data.label must hold ids or strings, got 'x' in row 7"),
        ([{**row, "label": 0.5} for row in ROWS], "data.label must hold ids or strings, got 0.5 in row 1"),
        ([{**row, "label": [1]} for row in ROWS], r"data.label must hold ids or strings, got \[1\] in row 1"),
        (with_row(1, label=-1), r"data.label must hold every id from 0 to L-1, got \[-1, 0, 1, 2\]"),
        ([{**row, "label": row["label"] + 1} for row in ROWS], r"every id from 0 to L-1, got \[1, 2, 3\] in train"),
        ([{**row, "label": 0} for row in ROWS], r"data.label must be one of 1 labels .*, got 1 in row 2 of test"),
        (with_row(9, site=None), "data.client must name a client, got null in row 9"),
    ],
)
def test_rows_that_are_refused(folder, rows, match):
    refuse(match, folder(rows), client="site")


def test_labels_that_do_not_fit_together(folder):
    names = json.dumps(["a", "b", "c", "d"]).encode()
    refuse(r"one of 2 labels \(\['a', 'b'\]\), got 2 in row 3", folder(**{"labels.json": b'["a", "b"]'}))
    refuse(
        "occur in train.jsonl for every label of test.jsonl, got none of d",
        folder(test=[*TEST_ROWS, {**TEST_ROWS[0], "label": 3}], **{"labels.json": names}),
    )
    refuse("labels.json must hold a list of distinct strings", folder(**{"labels.json": b'["a", "a", "b"]'}))
    refuse("cannot read .*labels.json", folder(**{"labels.json": b"["}))
    one = [{**row, "label": "same"} for row in ROWS]
    path = folder(one, one, **{"labels.json": b'["same", "other"]'})
    refuse("at least 2 distinct labels, got 1", path)


# The hub


def test_hub_offline_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refuse("data.name: cannot load 'federa-tests/none': .*data.path reads local files", name="federa-tests/none")


def test_hub_unknown_or_unreachable_is_one_line():
    refuse("data.name: cannot load 'federa-tests/none': the hub .*data.path", name="federa-tests/none")


def test_hub_splits_and_subset(monkeypatch):
    import datasets

    def stored(name, subset, split):
        assert (name, subset, split) == ("someone/set", "small", ["train", "dev"])
        return [datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(TEST_ROWS)]

    monkeypatch.setattr(datasets, "load_dataset", stored)
    monkeypatch.setattr("federa.sources.ask_hub", lambda kind, name: None)
    corpus = load_corpus(DataConfig(name="someone/set", subset="small", test_split="dev"), 0)
    assert corpus.source == "hub dataset someone/set (small)"
    assert pairs(corpus.train) == [(row["text"], row["label"]) for row in ROWS]
    refuse("data.text must be a column of train", name="someone/set", subset="small", test_split="dev", text="body")


# stdlib-docs


@pytest.fixture(scope="module")
def docs():
    return stdlib_docs()


def test_stdlib_docs_is_the_default_and_the_same_twice(docs, monkeypatch):
    corpus = load_corpus(DataConfig(), 0)
    assert corpus.source == f"stdlib-docs ({platform.python_implementation()} {platform.python_version()})"
    assert (pairs(corpus.train), pairs(corpus.test), corpus.label_names) == (pairs(docs[0]), pairs(docs[1]), docs[2])
    monkeypatch.setattr("federa.stdlib_docs.stdlib_docs", lambda: docs)
    assert load_corpus(DataConfig(name="stdlib-docs"), 1).train is docs[0]


def test_stdlib_docs_properties(docs):
    train, test, names = docs
    keys = [text_key(text) for text in train.texts + test.texts]
    assert len(keys) == len(set(keys))
    assert names == list(LABELS) == sorted(LABELS)
    assert set(test.labels) <= set(train.labels) <= set(range(len(names)))
    assert len(train) > 1500
    assert 0.15 < len(test) / len(keys) < 0.25
    assert np.bincount(train.labels).min() > 40
    assert all(len(text.split()) >= 5 for text in train.texts)


def test_stdlib_docs_keeps_ids_where_packages_are_missing(monkeypatch, tmp_path):
    for name in ("urllib", "tarfile", "_pyio", "xml"):
        (tmp_path / f"{name}.py").write_text(f'"""One two three four five {name}."""\ndef f():\n    "too short"\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    train, test, names = stdlib_docs()
    found = {names[label] for texts in (train, test) for label in texts.labels}
    assert found == {"urllib", "tarfile", "io", "xml"}
    (tmp_path / "xml.py").unlink()
    with pytest.raises(InputError, match=r"data\.name: stdlib-docs needs"):
        stdlib_docs()


# The real data sets


@pytest.mark.parametrize(
    ("name", "train", "test", "labels"),
    [("20newsgroups", 9788, 3000, 20), ("ag_news", 4000, 1000, 4), ("semeval2010_task8", 8000, 2717, 19)],
)
def test_real_data_sets(data_dir, name, train, test, labels):
    corpus = load(data_dir / name)
    assert (len(corpus.train), len(corpus.test), len(corpus.label_names)) == (train, test, labels)
    assert np.bincount(corpus.train.labels, minlength=labels).min() >= 1
    assert corpus.label_names == json.loads((data_dir / name / "labels.json").read_text())
