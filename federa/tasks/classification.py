"""One label for a text, for a pair of texts, or for the relation of two marked entities."""

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from federa.columns import Rows, Table, read_labels
from federa.config import DataConfig
from federa.data import TOKENISE_AT_ONCE, Examples, Texts, cached, flat, pad_id_of, tokenise
from federa.errors import InputError
from federa.tasks.task import Batch, Predictions, Task, check_fast, inputs_of, separator

MARKS = ("<e1>", "</e1>", "<e2>", "</e2>")


class Classification(Task):
    """The label of a text: columns data.text and data.label."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def read(self, table: Table, config: DataConfig) -> Rows:
        texts = table.strings("data.text", config.text)
        labels = read_labels(table, config.label)
        return Rows(table.where, texts, labels, table.clients(config.client), table.names(config.label))

    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        return tokenise(texts, tokenizer, config.max_length, config.cache)

    def losses(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(**inputs_of(model, batch)).logits.float(), batch["labels"], reduction="none")

    def judge(self, model: Any, batch: Batch, examples: Examples) -> tuple[torch.Tensor, np.ndarray]:
        logits = model(**inputs_of(model, batch)).logits.float()
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        return losses, logits.argmax(-1).cpu().numpy()

    def gather(self, examples: Examples, said: list[Any], losses: np.ndarray) -> Predictions:
        return Predictions(np.array(said, np.int64), examples.labels, losses)

    def score(self, predictions: Predictions) -> dict[str, float]:
        """{"loss", "accuracy", "macro_f1"}; macro-F1 is the mean over the labels that occur, true or predicted."""
        from sklearn.metrics import f1_score

        macro_f1 = f1_score(predictions.labels, predictions.predicted, average="macro", zero_division=0)
        return {"loss": predictions.loss, "accuracy": self.value(predictions), "macro_f1": float(macro_f1)}

    def value(self, predictions: Predictions) -> float:
        return float((predictions.predicted == predictions.labels).mean())


class PairClassification(Classification):
    """The label of two texts: columns data.text, data.pair and data.label. The longer one is cut first."""

    name = "pair-classification"

    def read(self, table: Table, config: DataConfig) -> Rows:
        first = table.strings("data.text", config.text)
        second = table.strings("data.pair", config.pair)
        return Rows(
            table.where,
            [f"{one} {other}" for one, other in zip(first, second, strict=True)],
            read_labels(table, config.label),
            table.clients(config.client),
            table.names(config.label),
            fields={"first": first, "second": second},
        )

    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        pairs, between, pad_id = texts.fields, separator(tokenizer), pad_id_of(tokenizer)

        def tokens() -> dict[str, np.ndarray]:
            ids, types = [], []
            for start in range(0, len(texts), TOKENISE_AT_ONCE):
                encoded = tokenizer(
                    [text + between for text in pairs["first"][start : start + TOKENISE_AT_ONCE]],
                    pairs["second"][start : start + TOKENISE_AT_ONCE],
                    truncation="longest_first",
                    max_length=config.max_length,
                    return_token_type_ids=True,
                    return_attention_mask=False,
                )
                ids += (np.array(row or [pad_id], np.int32) for row in encoded["input_ids"])
                types += (np.array(row or [0], np.int8) for row in encoded["token_type_ids"])
            input_ids, offsets = flat(ids)
            return {"input_ids": input_ids, "offsets": offsets, "types": flat(types, np.int8)[0]}

        inputs = [self.name, config.max_length, pairs["first"], pairs["second"]]
        arrays = cached(config.cache, tokenizer, inputs, tokens)
        return Examples(**arrays, labels=texts.labels, pad_id=pad_id)


class EntityClassification(Classification):
    """The relation of two entities that a text marks as <e1>..</e1> and <e2>..</e2>: columns data.text and data.label.

    The marks stay in the text, as the plain tokens that the tokenizer makes of them: added tokens would need rows of
    the embedding, which no adapter holds. Texts too long are cut around the two entities, never inside.
    """

    name = "entity-classification"

    def read(self, table: Table, config: DataConfig) -> Rows:
        rows = super().read(table, config)
        for row, text in enumerate(rows.texts):
            if any(text.count(mark) != 1 for mark in MARKS) or not all(
                text.index(f"<e{i}>") < text.index(f"</e{i}>") for i in (1, 2)
            ):
                table.refuse("data.text", "mark one <e1>..</e1> and one <e2>..</e2>", text, row)
        return rows

    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        check_fast(tokenizer, self.name)
        room = config.max_length - tokenizer.num_special_tokens_to_add(pair=False)
        kept = [self._around_entities(row, text, tokenizer, room) for row, text in enumerate(texts.texts, 1)]
        return tokenise(Texts(kept, texts.labels, None), tokenizer, config.max_length, config.cache)

    def _around_entities(self, row: int, text: str, tokenizer: Any, room: int) -> str:
        """The text, cut to about `room` tokens with both entities among them."""
        if len(text) <= room:  # a token has at least one character
            return text
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(spans) <= room:
            return text
        marks = [match.span() for match in re.finditer("|".join(MARKS), text)]
        first = next(index for index, (_, end) in enumerate(spans) if end > marks[0][0])
        last = max(index for index, (start, _) in enumerate(spans) if start < marks[-1][1])
        needed = last + 1 - first
        if needed > room:
            raise InputError(
                f"data.max_length must leave room for both entities and what lies between, {needed} tokens in text "
                f"{row} ({text[:40]!r}...), got room for {room}; raise it"
            )
        start = min(max(0, first - (room - needed) // 2), len(spans) - room)
        begin, end = spans[start][0], spans[start + room - 1][1]
        # Cut between words, so that no piece changes.
        if begin > 0 and text[begin - 1] != " ":
            begin = min(text.find(" ", begin) + 1 or begin, marks[0][0])
        if end < len(text) and text[end] != " ":
            end = max(text.rfind(" ", 0, end), marks[-1][1])
        return text[begin:end]
