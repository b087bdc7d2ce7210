"""Causal language models tuned on instructions: a conversation in its chat template, loss on the answer only."""

import inspect
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from federa.columns import Rows, Table, without_labels
from federa.config import DataConfig
from federa.data import IGNORED, TOKENISE_AT_ONCE, Examples, Texts, cached, flat, pad_id_of
from federa.errors import InputError
from federa.tasks.task import Batch, Predictions, Task

# For tokenizers that bring none; exported with the tokenizer, so that whoever loads it asks in the same words.
TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


class CausalLM(Task):
    """The last answer of a conversation: column data.messages, lists of {role, content} that end with the assistant's,
    or columns data.prompt and data.answer.

    A text is the prompt exactly as generation will see it and then the answer, tokenised apart; what is too long for
    data.max_length is cut at the start of the prompt, and only then at the end of the answer.
    """

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    unlabelled = "conversation"

    def read(self, table: Table, config: DataConfig) -> Rows:
        if config.messages is None:
            prompts, answers = table.strings("data.prompt", config.prompt), table.strings("data.answer", config.answer)
            for row, answer in enumerate(answers):
                if not answer.strip():
                    table.refuse("data.answer", "hold text", answer, row)
            messages = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        else:
            expected = "hold lists of {role, content} that end with an assistant's answer"
            messages = table.checked("data.messages", config.messages, expected, _is_conversation)
            messages = [[{key: turn[key] for key in ("role", "content")} for turn in turns] for turns in messages]
        texts = [" ".join(turn["content"] for turn in turns) for turns in messages]
        return Rows(table.where, texts, clients=table.clients(config.client), fields={"messages": messages})

    def encode(self, train: Rows, test: Rows, names: list[str] | None) -> tuple[Texts, Texts, list[str]]:
        return without_labels(train), without_labels(test), []

    def prepare(self, tokenizer: Any) -> Any:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = TEMPLATE
        return tokenizer

    def examples(self, texts: Texts, tokenizer: Any, config: DataConfig) -> Examples:
        conversations, template = texts.fields["messages"], self.prepare(tokenizer).get_chat_template()
        arrays = cached(
            config.cache,
            tokenizer,
            [self.name, config.max_length, template, tokenizer.special_tokens_map, conversations],
            lambda: _tokenise(conversations, tokenizer, config.max_length),
        )
        rows, truth = np.arange(len(texts)), [turns[-1]["content"] for turns in conversations]
        return Examples(**arrays, labels=texts.labels, pad_id=pad_id_of(tokenizer), rows=rows, truth=truth)

    def losses(self, model: Any, batch: Batch) -> torch.Tensor:
        return _losses(*_answers(model, batch))

    def judge(self, model: Any, batch: Batch, examples: Examples) -> tuple[torch.Tensor, np.ndarray]:
        logits, targets = _answers(model, batch)
        return _losses(logits, targets), (logits.argmax(-1) == targets).sum(1).cpu().numpy()

    def gather(self, examples: Examples, said: list[Any], losses: np.ndarray) -> Predictions:
        return Predictions(np.array(said, np.int64), examples.units, losses, examples.units)

    def score(self, predictions: Predictions) -> dict[str, float]:
        """{"loss", "perplexity", "accuracy"}: mean cross entropy of an answer's token, its exponential, and the
        share of tokens that the model would have chosen, given those before."""
        loss = predictions.loss
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": float(predictions.predicted.sum() / predictions.units.sum()),
        }


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
        and all(isinstance(turn[key], str) for turn in value for key in ("role", "content"))
        and value[-1]["role"] == "assistant"
        and bool(value[-1]["content"].strip())
    )


def _answers(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits (E, A, V) and targets (E, A) of the A positions at which any text of the batch asks for a token."""
    targets = batch["labels"][:, 1:]
    asked = (targets != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "logits_to_keep" in inspect.signature(_forward_of(model)).parameters:
        logits = model(**inputs, logits_to_keep=asked).logits
    else:
        logits = model(**inputs).logits[:, asked]
    return logits.float(), targets[:, asked]


def _forward_of(model: Any) -> Any:
    """The forward of transformers' model, also of one inside peft's."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none").sum(1)


def _tokenise(conversations: list[list[dict[str, str]]], tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    """input_ids, offsets, and targets: the tokens of the answer."""
    ids, targets = [], []
    for start in range(0, len(conversations), TOKENISE_AT_ONCE):
        pairs = [_split(turns, tokenizer) for turns in conversations[start : start + TOKENISE_AT_ONCE]]
        sides = zip(*pairs, strict=True)
        encoded = (tokenizer(list(side), add_special_tokens=False, verbose=False)["input_ids"] for side in sides)
        for prompt, answer in zip(*encoded, strict=True):
            answer = answer[: max_length - 1]
            prompt = prompt[-(max_length - len(answer)) :]
            ids.append(np.array(prompt + answer, np.int32))
            targets.append(np.array([IGNORED] * len(prompt) + answer, np.int32))
            targets[-1][:1] = IGNORED  # nothing stands before a text's first token to predict it from
    input_ids, offsets = flat(ids)
    return {"input_ids": input_ids, "offsets": offsets, "targets": flat(targets)[0]}


def _split(turns: list[dict[str, str]], tokenizer: Any) -> tuple[str, str]:
    """What the model is given, and what it is to say, in the words of the chat template."""
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise InputError(f"data.messages: the tokenizer's chat template refuses {turns!r:.60}: {error}") from error
    if not whole.startswith(prompt) or whole == prompt:
        raise InputError(
            f"model.name: the tokenizer's chat template must begin a conversation with its prompt, got {prompt!r:.60} "
            f"and {whole!r:.60}"
        )
    return prompt, whole[len(prompt) :]
