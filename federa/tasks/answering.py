"""Extractive question answering: the span of a context that answers a question, or none."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from federa.columns import Rows, Table, without_labels
from federa.config import DataConfig
from federa.data import TOKENISE_AT_ONCE, Examples, Texts, cached, flat, pad_id_of
from federa.tasks import squad
from federa.tasks.task import Batch, Predictions, Task, check_fast, inputs_of, objects, separator


class Span(NamedTuple):
    """The best answer of one window: characters of the context, its score, and the score of "no answer"."""

    start: int
    end: int
    score: float
    null: float


class QuestionAnswering(Task):
    """Spans of contexts: columns data.question, data.context and data.answers, {text: [..], answer_start: [..]}.

    A question and its context make one example, or several windows of the context that share task.stride tokens. A
    window without the (first) answer is taught position 0, "no answer". An answer is the best span of at most
    task.max_answer tokens over all windows of its question.
    """

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    peft_type = None  # peft 0.21's own class for questions drops token_type_ids on the way to the model
    unlabelled = "question"

    def read(self, table: Table, config: DataConfig) -> Rows:
        questions = table.strings("data.question", config.question)
        contexts = table.strings("data.context", config.context)
        answers = table.column("data.answers", config.answers)
        for row, (context, value) in enumerate(zip(contexts, answers, strict=True)):
            if not context.strip():
                table.refuse("data.context", "hold text", context, row)
            if not _is_answers(value):
                table.refuse("data.answers", "hold {text: [..], answer_start: [..]} of one length", value, row)
            for text, start in zip(value["text"], value["answer_start"], strict=True):
                if start < 0 or not text or context[start : start + len(text)] != text:
                    table.refuse("data.answers", f"lie in the context at answer_start {start}", text, row)
            if not value["text"] and not self.config.unanswerable:
                table.refuse("data.answers", "hold an answer unless task.unanswerable is true", value, row)
        texts = [" ".join([q, *answer["text"][:1]]) for q, answer in zip(questions, answers, strict=True)]
        fields = {"question": questions, "context": contexts, "answers": answers}
        return Rows(table.where, texts, clients=table.clients(config.client), split_by=contexts, fields=fields)

    def encode(self, train: Rows, test: Rows, names: list[str] | None) -> tuple[Texts, Texts, list[str]]:
        return without_labels(train), without_labels(test), []

    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        check_fast(tokenizer, self.name)
        questions, contexts, answers = (texts.fields[name] for name in ("question", "context", "answers"))
        first = [[*answer["text"][:1], *answer["answer_start"][:1]] for answer in answers]
        arrays = cached(
            config.cache,
            tokenizer,
            [self.name, config.max_length, self.config.stride, questions, contexts, first],
            lambda: _windows(questions, contexts, answers, tokenizer, config.max_length, self.config.stride),
        )
        truth = [{"context": c, "answers": list(answer["text"])} for c, answer in zip(contexts, answers, strict=True)]
        return Examples(**arrays, labels=texts.labels[arrays["rows"]], pad_id=pad_id_of(tokenizer), truth=truth)

    def losses(self, model: Any, batch: Batch) -> torch.Tensor:
        return _losses(*_logits(model, batch), batch["labels"])

    def judge(self, model: Any, batch: Batch, examples: Examples) -> tuple[torch.Tensor, list[Span]]:
        start, end = _logits(model, batch)
        width = start.shape[1]
        inside = np.zeros(start.shape, bool)
        for window, (a, b) in enumerate(pairwise(examples.offsets)):
            inside[window, : b - a] = examples.spans[a:b, 0] >= 0
        context = torch.from_numpy(inside).to(start.device)
        # scores[:, d, i]: the span of tokens i to i + d, both in the context, which is one stretch
        scores = start.new_full((len(start), min(self.config.max_answer, width), width), -torch.inf)
        for d in range(scores.shape[1]):
            pairs = start[:, : width - d] + end[:, d:]
            scores[:, d, : width - d] = pairs.masked_fill(~(context[:, : width - d] & context[:, d:]), -torch.inf)
        best, where = scores.flatten(1).max(1)
        length, first = np.divmod(where.cpu().numpy(), width)
        found = []
        for window, (a, d, i) in enumerate(zip(examples.offsets[:-1], length, first, strict=True)):
            characters = int(examples.spans[a + i, 0]), int(examples.spans[a + i + d, 1])
            found.append(Span(*characters, best[window].item(), (start[window, 0] + end[window, 0]).item()))
        return _losses(start, end, batch["labels"]), found

    def gather(self, examples: Examples, said: list[Any], losses: np.ndarray) -> Predictions:
        """One answer a question: the best span of its windows, or "" where "no answer" beats it in every window."""
        rows, first = np.unique(examples.rows, return_index=True)
        groups = np.searchsorted(rows, examples.rows)
        windows: list[list[Span]] = [[] for _ in first]
        for group, span in zip(groups, said, strict=True):
            windows[group].append(span)
        answers = []
        for row, spans in zip(rows, windows, strict=True):
            best, null = max(spans, key=lambda span: span.score), min(span.null for span in spans)
            silent = self.config.unanswerable and null - best.score > self.config.null_threshold
            answers.append("" if silent else examples.truth[row]["context"][best.start : best.end])
        truth = objects([examples.truth[row]["answers"] for row in rows])
        units = np.bincount(groups)
        return Predictions(objects(answers), truth, np.bincount(groups, losses), units)

    def score(self, predictions: Predictions) -> dict[str, float]:
        """{"loss", "f1", "exact_match"}: SQuAD's, from 0 to 1, each question by its best reference."""
        pairs = list(zip(predictions.predicted, predictions.labels, strict=True))
        return {
            "loss": predictions.loss,
            "f1": float(np.mean([squad.f1(answer, references) for answer, references in pairs])),
            "exact_match": float(np.mean([squad.exact_match(answer, references) for answer, references in pairs])),
        }


def _is_answers(value: Any) -> bool:
    if not isinstance(value, dict) or not {"text", "answer_start"} <= value.keys():
        return False
    texts, starts = value["text"], value["answer_start"]
    return (
        isinstance(texts, list)
        and isinstance(starts, list)
        and len(texts) == len(starts)
        and all(isinstance(text, str) for text in texts)
        and all(type(start) is int for start in starts)
    )


def _logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end logits (E, T) in fp32, minus infinity on padding, so that batches do not change losses."""
    outputs, padding = model(**inputs_of(model, batch)), batch["attention_mask"] == 0
    start, end = (logits.float() for logits in (outputs.start_logits, outputs.end_logits))
    return start.masked_fill(padding, -torch.inf), end.masked_fill(padding, -torch.inf)


def _losses(start: torch.Tensor, end: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of the cross entropies of an answer's two ends."""
    first, last = (F.cross_entropy(x, targets[:, i], reduction="none") for i, x in enumerate((start, end)))
    return (first + last) / 2


def _windows(
    questions: list[str],
    contexts: list[str],
    answers: list[dict[str, list]],
    tokenizer: Any,
    max_length: int,
    stride: int,
) -> dict[str, np.ndarray]:
    """Windows of max_length tokens: the question, then a stretch of the context that shares `stride` tokens with the
    one before. A question of more than half of that is cut, so that every window moves on."""
    between, limit = separator(tokenizer), max_length // 2 - 4
    ids, types, spans, targets, rows = [], [], [], [], []
    for start in range(0, len(questions), TOKENISE_AT_ONCE):
        part = [_cut(question.strip(), tokenizer, limit) + between for question in questions[start:][:TOKENISE_AT_ONCE]]
        encoded = tokenizer(
            part,
            contexts[start : start + TOKENISE_AT_ONCE],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            ids.append(np.array(encoded["input_ids"][window], np.int32))
            types.append(np.array(encoded["token_type_ids"][window], np.int8))
            pairs = zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
            own = [span if side == 1 and span[0] < span[1] else (-1, -1) for span, side in pairs]
            spans.append(np.array(own, np.int32))
            targets.append(_target(spans[-1], answers[start + row]))
            rows.append(start + row)
    input_ids, offsets = flat(ids)
    return {
        "input_ids": input_ids,
        "offsets": offsets,
        "types": flat(types, np.int8)[0],
        "spans": np.concatenate([np.empty((0, 2), np.int32), *spans]),
        "targets": np.array(targets, np.int64).reshape(-1, 2),
        "rows": np.array(rows, np.int64),
    }


def _cut(question: str, tokenizer: Any, limit: int) -> str:
    if len(question) <= limit:  # a token has at least one character
        return question
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    return question if len(spans) <= limit else question[: spans[limit - 1][1]]


def _target(spans: np.ndarray, answers: dict[str, list]) -> tuple[int, int]:
    """First and last token of the first answer in a window whose tokens have these characters; (0, 0) if it is not
    wholly inside."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    touched = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > begin))
    if not len(touched) or spans[touched[0], 0] > begin or spans[touched[-1], 1] < end:
        return 0, 0
    return int(touched[0]), int(touched[-1])
