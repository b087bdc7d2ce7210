"""Token classification: a tag for every word, entities by BIO tags."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from federa.columns import Rows, Table, shown
from federa.config import DataConfig
from federa.data import IGNORED, TOKENISE_AT_ONCE, Examples, Texts, cached, flat, pad_id_of
from federa.errors import InputError
from federa.tasks.task import Batch, Predictions, Task, check_fast, inputs_of, objects

_TAG = re.compile(r"O|[BIES]-.+")


class TokenClassification(Task):
    """Tags of words: columns data.tokens and data.tags, lists of one length. A word's first piece is asked for its tag;
    words that data.max_length cuts off count as O."""

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    unlabelled = "sentence"

    def read(self, table: Table, config: DataConfig) -> Rows:
        def words(value: Any) -> bool:
            return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)

        tokens = table.checked("data.tokens", config.tokens, "hold lists of words", words)
        tags = table.column("data.tags", config.tags)
        for row, (sentence, value) in enumerate(zip(tokens, tags, strict=True)):
            if not isinstance(value, list) or len(value) != len(sentence):
                table.refuse("data.tags", f"hold a tag for each of {len(sentence)} words", value, row)
            if not all(type(tag) in (int, str) for tag in value):
                table.refuse("data.tags", "hold lists of strings or of ids", value, row)
        return Rows(
            table.where,
            [" ".join(sentence) for sentence in tokens],
            clients=table.clients(config.client),
            names=table.names(config.tags),
            fields={"tokens": tokens, "tags": tags},
        )

    def encode(self, train: Rows, test: Rows, names: list[str] | None) -> tuple[Texts, Texts, list[str]]:
        held = {tag for rows in (train, test) for tags in rows.fields["tags"] for tag in tags}
        names = names or train.names or sorted(map(str, held), key=lambda tag: (tag != "O", tag[2:], tag))
        for rows in (train, test):
            _check_tags(rows, names)
        if "O" not in names or not all(_TAG.fullmatch(name) for name in names):
            raise InputError(
                f"data.tags must be O or B-, I-, E-, S- and an entity's type, got {shown(names)} in {train.where}; "
                "ids want labels.json beside the files"
            )
        ids = {name: index for index, name in enumerate(names)}
        return _with_tag_ids(train, ids), _with_tag_ids(test, ids), names

    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        check_fast(tokenizer, self.name)
        sentences, tags = texts.fields["tokens"], texts.fields["tags"]
        arrays = cached(
            config.cache,
            tokenizer,
            [self.name, config.max_length, sentences, tags],
            lambda: _tokenise(sentences, tags, tokenizer, config.max_length),
        )
        truth, rows = texts.fields["names"], np.arange(len(texts))
        return Examples(**arrays, labels=texts.labels, pad_id=pad_id_of(tokenizer), rows=rows, truth=truth)

    def losses(self, model: Any, batch: Batch) -> torch.Tensor:
        return _losses(model(**inputs_of(model, batch)).logits, batch["labels"])

    def judge(self, model: Any, batch: Batch, examples: Examples) -> tuple[torch.Tensor, list[list[str]]]:
        logits = model(**inputs_of(model, batch)).logits
        names, asked = model.config.id2label, (batch["labels"] != IGNORED).cpu().numpy()
        best = logits.argmax(-1).cpu().numpy()
        found = [[names[int(tag)] for tag in row[mask]] for row, mask in zip(best, asked, strict=True)]
        return _losses(logits, batch["labels"]), found

    def gather(self, examples: Examples, said: list[Any], losses: np.ndarray) -> Predictions:
        truth = [examples.truth[row] for row in examples.rows]
        whole = [found + ["O"] * (len(tags) - len(found)) for found, tags in zip(said, truth, strict=True)]
        return Predictions(objects(whole), objects(truth), losses, examples.units)

    def score(self, predictions: Predictions) -> dict[str, float]:
        """{"loss", "entity_f1", "precision", "recall", "accuracy"}: seqeval's, micro-averaged over whole entities (its
        default reading, which is conlleval's), and the share of words tagged right. No entity anywhere scores 1."""
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

        truth, predicted = list(predictions.labels), list(predictions.predicted)
        precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
        if all(tag == "O" for tags in (*truth, *predicted) for tag in tags):
            precision = recall = f1 = 1.0
        right = sum(
            a == b for one, other in zip(truth, predicted, strict=True) for a, b in zip(one, other, strict=True)
        )
        return {
            "loss": predictions.loss,
            "entity_f1": float(f1),
            "precision": float(precision),
            "recall": float(recall),
            "accuracy": right / sum(map(len, truth)),
        }


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none").sum(1)


def _check_tags(rows: Rows, names: list[str]) -> None:
    known = set(names)
    for row, tags in enumerate(rows.fields["tags"], 1):
        for tag in tags:
            if not (tag in known if isinstance(tag, str) else 0 <= tag < len(names)):
                raise InputError(
                    f"data.tags must be among {len(names)} tags ({shown(names)}), "
                    f"got {shown(tag)} in row {row} of {rows.where}"
                )


def _with_tag_ids(rows: Rows, ids: dict[str, int]) -> Texts:
    names = list(ids)
    tags = [[ids[tag] if isinstance(tag, str) else tag for tag in row] for row in rows.fields["tags"]]
    fields = {"tokens": rows.fields["tokens"], "tags": tags, "names": [[names[tag] for tag in row] for row in tags]}
    return Texts(rows.texts, np.zeros(len(tags), np.int64), rows.clients, fields)


def _tokenise(sentences: list[list[str]], tags: list[list[int]], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """input_ids, offsets and targets: a word's tag at its first piece.

    Words are joined by single spaces and found again by their characters, which every fast tokenizer tells.
    """
    unknown, ids, targets = tokenizer.unk_token or "?", [], []
    for start in range(0, len(sentences), TOKENISE_AT_ONCE):
        part, own = (rows[start : start + TOKENISE_AT_ONCE] for rows in (sentences, tags))
        for sentence, asked, (row, first) in zip(part, own, _align(part, tokenizer, max_length), strict=True):
            if len(first) < len(sentence) and len(row) < max_length:  # words of characters that the tokenizer drops
                whole = [word if index in first else unknown for index, word in enumerate(sentence)]
                [(row, first)] = _align([whole], tokenizer, max_length)
            target = np.full(len(row), IGNORED, np.int32)
            target[list(first.values())] = [asked[word] for word in first]
            ids.append(np.array(row, np.int32))
            targets.append(target)
    input_ids, offsets = flat(ids)
    return {"input_ids": input_ids, "offsets": offsets, "targets": flat(targets)[0]}


def _align(sentences: list[list[str]], tokenizer: Any, max_length: int) -> Iterator[tuple[list[int], dict[int, int]]]:
    """Token ids of each sentence, and word -> its first token."""
    texts = [" ".join(sentence) for sentence in sentences]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    for sentence, text, ids, spans in zip(
        sentences, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        starts = np.cumsum([0] + [len(word) + 1 for word in sentence[:-1]])
        first: dict[int, int] = {}
        for token, (start, end) in enumerate(spans):
            while start < end and text[start] == " ":  # some tokenizers count the space before a word as its part
                start += 1
            if start < end:
                first.setdefault(int(np.searchsorted(starts, start, side="right")) - 1, token)
        yield ids, first
