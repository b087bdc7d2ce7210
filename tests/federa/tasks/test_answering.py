"""Answers as spans of contexts: windows, their targets, and the best span over them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from federa.config import DataConfig, TaskConfig, changed
from federa.data import Texts
from federa.errors import InputError
from federa.experiment import build
from federa.sources import load_corpus
from federa.tasks import make_task


def task(**settings):
    return make_task(TaskConfig(name="question-answering", **settings))


@pytest.fixture(scope="module")
def tokenizer(minilm_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_path)


def texts(*triples) -> Texts:
    """(question, context, answer or None) each."""
    answers = [{"text": [a] if a else [], "answer_start": [context.index(a)] if a else []} for _, context, a in triples]
    questions, contexts, _ = map(list, zip(*triples, strict=True))
    fields = {"question": questions, "context": contexts, "answers": answers}
    return Texts([q for q, _, _ in triples], np.zeros(len(triples), np.int64), None, fields)


LONG = (
    " ".join(f"word{i}," for i in range(40)) + " the answer is forty-two here. " + " ".join("tail" for _ in range(30))
)
SOME = texts(
    ("What is it?", LONG, "forty-two"),
    ("Who?", "Ada Lovelace, of course.", "Ada Lovelace"),
    (" ".join(["why"] * 60) + "?", "Nobody knows it.", None),
)


@pytest.fixture(scope="module")
def examples(tokenizer, tmp_path_factory):
    config = DataConfig(max_length=48, cache=str(tmp_path_factory.mktemp("tokens")))
    return task(stride=8, unanswerable=True).examples(SOME, tokenizer, config)


def test_windows_cover_the_context_and_share_their_stride(examples, tokenizer):
    """Every window begins with the question, fits, and the context's tokens are all there, in order."""
    assert examples.lengths.max() == 48 and (np.bincount(examples.rows)[1:] == 1).all()
    first = np.flatnonzero(examples.rows == 0)
    assert len(first) > 3
    question = tokenizer("What is it?")["input_ids"]
    whole = tokenizer(LONG, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    seen: list = []
    for window in first:
        own = slice(examples.offsets[window], examples.offsets[window + 1])
        assert examples.input_ids[own][: len(question)].tolist() == question
        assert examples.types[own].tolist() == [0] * len(question) + [1] * (len(examples.types[own]) - len(question))
        inside = examples.spans[own]
        spans = [tuple(span) for span in inside[inside[:, 0] >= 0].tolist()]
        shared = seen.index(spans[0]) if seen else 0
        assert not seen or len(seen) - shared == 8
        seen = seen[:shared] + spans
    assert seen == whole


def test_targets_are_the_answers_own_characters(examples):
    """The span of the answer where a window holds all of it, position 0 elsewhere."""
    found = []
    for window, (start, end) in enumerate(examples.targets):
        spans = examples.spans[examples.offsets[window] : examples.offsets[window + 1]]
        row = examples.rows[window]
        answer = SOME.fields["answers"][row]["text"]
        context = SOME.fields["context"][row]
        visible = [context[a:b] for a, b in spans if a >= 0]
        if answer and all(piece in visible for piece in ("forty", "two") if row == 0):
            assert context[spans[start, 0] : spans[end, 1]] == answer[0]
            found.append(row)
        else:
            assert (start, end) == (0, 0)
    assert 0 in found and 1 in found and 2 not in found
    assert found.count(0) < np.bincount(examples.rows)[0]


def test_long_questions_are_cut_to_leave_room(examples):
    last = examples.spans[examples.offsets[-2] : examples.offsets[-1], 0]
    assert examples.lengths[-1] <= 48 and (last >= 0).sum() == 4


def test_units_and_truth_follow_their_rows(examples):
    assert (examples.units == 1).all()
    taken = examples.take(examples.of_rows(np.array([0, 2])))
    assert set(taken.rows) == {0, 2} and taken.targets.shape == (len(taken), 2)
    assert taken.truth[taken.rows[-1]] == {"context": "Nobody knows it.", "answers": []}
    batch = examples.batch(np.array([0, len(examples) - 2]))
    assert batch["labels"].shape == (2, 2) and batch["token_type_ids"].shape == batch["input_ids"].shape


class Fixed(torch.nn.Module):
    """Says for each window the logits that were given for it; not a model, a table of them."""

    def __init__(self, start, end):
        super().__init__()
        self.start, self.end, self.config = start, end, SimpleNamespace(type_vocab_size=0)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(start_logits=self.start, end_logits=self.end)


def judged(kind, examples, start, end):
    batch = examples.batch(np.arange(len(examples)))
    return kind.judge(Fixed(start, end), batch, examples)


def test_the_best_span_is_that_of_an_exhaustive_search(examples):
    """Over all start <= end of at most max_answer tokens inside the context, by two loops in float64."""
    kind = task(max_answer=5, unanswerable=True)
    width = int(examples.lengths.max())
    rng = torch.Generator().manual_seed(0)
    start, end = (torch.randn(len(examples), width, generator=rng) for _ in range(2))
    _, found = judged(kind, examples, start, end)
    for window, span in enumerate(found):
        own = examples.spans[examples.offsets[window] : examples.offsets[window + 1]]
        best = max(
            (start[window, i].double() + end[window, j].double(), own[i, 0], own[j, 1])
            for i in range(len(own))
            for j in range(i, min(i + 5, len(own)))
            if own[i, 0] >= 0 and own[j, 0] >= 0
        )
        assert (span.start, span.end) == best[1:]
        assert span.score == pytest.approx(best[0].item(), rel=1e-6)
        assert span.null == pytest.approx((start[window, 0] + end[window, 0]).item(), rel=1e-6)


def test_a_question_takes_the_best_of_its_windows(examples):
    """The right span in one window beats a wrong one in another; a sure "no answer" has to win in every window."""
    kind, width = task(unanswerable=True), int(examples.lengths.max())
    start, end = torch.zeros(2, len(examples), width).unbind()
    right = next(i for i, pair in enumerate(examples.targets) if examples.rows[i] == 0 and pair.any())
    other = next(i for i, pair in enumerate(examples.targets) if examples.rows[i] == 0 and not pair.any())
    start[right, examples.targets[right, 0]] = end[right, examples.targets[right, 1]] = 5
    start[other, 20] = end[other, 20] = 4
    start[other, 0] = end[other, 0] = 9  # "no answer", surer than anything: the answer is not in this window
    last = len(examples) - 1
    start[last, 0] = end[last, 0] = 1
    losses, found = judged(kind, examples, start, end)
    told = kind.gather(examples, found, losses.double().numpy())
    assert told.predicted[0] == "forty-two" and told.predicted[2] == ""
    assert told.labels.tolist() == [["forty-two"], ["Ada Lovelace"], []]
    scores = kind.score(told)
    assert scores["exact_match"] == pytest.approx((1 + 0 + 1) / 3)
    assert told.units.tolist() == np.bincount(examples.rows).tolist()
    assert scores["loss"] == pytest.approx(losses.double().mean().item())
    # Without unanswerable questions, something is always said; with a high threshold, too.
    for always in (task(), task(unanswerable=True, null_threshold=5)):
        assert always.gather(examples, found, losses.double().numpy()).predicted[2] != ""
    assert task(unanswerable=True, null_threshold=-50).gather(examples, found, np.zeros(len(found))).predicted[0] == ""


def test_padding_is_no_place_for_an_answer(examples):
    """Losses of a window alone and of the same window padded are equal, bit for bit."""
    short = int(examples.lengths.argmin())
    batch = examples.batch(np.array([short, int(examples.lengths.argmax())]))
    logits = torch.randn(2, batch["input_ids"].shape[1], generator=torch.Generator().manual_seed(0))
    padded = task().losses(Fixed(logits, logits), batch)[0]
    width = examples.lengths[short]
    alone = task().losses(Fixed(logits[:1, :width], logits[:1, :width]), examples.batch(np.array([short])))[0]
    assert torch.equal(padded, alone)


# Runs


def test_clients_hold_whole_questions(tiny_config, tiny_models, tiny_rows):
    """Windows go where their question goes, in training and validation alike."""
    config = changed(
        tiny_config,
        task={"name": "question-answering", "stride": 2},
        data={"path": str(tiny_rows("question-answering")), "max_length": 20, "client": "author"},
        partition={"scheme": "natural"},
        server={"clients_per_round": 2},
        evaluation={"per_client": True},
    )
    experiment = build(config)
    assert len(experiment.train) > len(np.unique(experiment.train.rows)) > 100
    held = np.sort(np.concatenate(experiment.clients))
    assert np.array_equal(held, np.arange(len(experiment.train)))
    authors = experiment.corpus.train.clients
    for name, own in zip(experiment.partition.names, experiment.clients, strict=True):
        assert {authors[row] for row in experiment.train.rows[own]} == {name}
    assert not set(experiment.train.rows) & set(experiment.validation.rows)
    learner = experiment.learner
    told = experiment.task.predict(learner.model, experiment.test, 8, learner.device)
    assert len(told.predicted) == len(experiment.corpus.test) == sum(map(len, experiment.test_clients))
    scores = experiment.task.client_scores(told, experiment.test_clients)
    assert 0 <= scores["worst_client"] <= scores["mean_client"] <= 1
    again = experiment.task.predict(learner.model, experiment.test, 3, learner.device)
    assert again.predicted.tolist() == told.predicted.tolist()


# Sources


ROW = {"question": "Who?", "context": "Ada wrote it.", "answers": {"text": ["Ada"], "answer_start": [0]}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": {"text": ["Ada"], "answer_start": [4]}}, "data.answers must lie in the context at answer"),
        ({"answers": {"text": ["Ada"], "answer_start": [-13]}}, "must lie in the context at answer_start -13"),
        ({"answers": {"text": ["Ada", "x"], "answer_start": [0]}}, r"must hold {text: \[..\], answer_start"),
        ({"answers": "Ada"}, r"must hold {text: \[..\], answer_start: \[..\]} of one length, got 'Ada'"),
        ({"context": " ", "answers": {"text": [], "answer_start": []}}, "data.context must hold text, got ' '"),
        ({"question": None}, "data.question must hold strings, got null"),
        ({"answers": {"text": [], "answer_start": []}}, "must hold an answer unless task.unanswerable is true"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, row, message):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    mixed = isinstance((ROW | row)["answers"], str)  # a column has one type
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [ROW, ROW | row][mixed:]))
    with pytest.raises(InputError, match=message) as raised:
        load_corpus(DataConfig(path=str(tmp_path)), 0, task())
    assert f"in row {1 if mixed else 2} of test.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_questions_without_answers_may_be_asked_for(tmp_path):
    for name in ("train", "test"):
        rows = [ROW, ROW | {"answers": {"text": [], "answer_start": []}}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(DataConfig(path=str(tmp_path)), 0, task(unanswerable=True))
    assert [answers["text"] for answers in corpus.train.fields["answers"]] == [["Ada"], []]
    assert corpus.train.texts == ["Who? Ada", "Who?"] and corpus.label_names == [] and corpus.strata == ["question"]


def test_a_single_file_is_split_by_context(tmp_path):
    rows = [ROW | {"question": f"{i}?", "context": f"Ada {i % 12} wrote."} for i in range(60)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(DataConfig(path=str(tmp_path / "all.jsonl")), 0, task())
    train, test = (set(part.fields["context"]) for part in (corpus.train, corpus.test))
    assert train and test and not train & test


def test_squad(data_dir):
    """The subset's README: 2,000 and 500 questions, articles as natural clients."""
    corpus = load_corpus(DataConfig(path=str(data_dir / "squad_v1_1"), client="title"), 0, task())
    assert (len(corpus.train), len(corpus.test), len(set(corpus.train.clients))) == (2000, 500, 44)
