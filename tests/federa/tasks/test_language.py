"""Conversations: what the model reads, which tokens it is asked for, perplexity."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from federa.config import DataConfig, TaskConfig, changed
from federa.data import IGNORED
from federa.errors import InputError
from federa.experiment import build
from federa.sources import load_corpus
from federa.tasks import make_task
from federa.tasks.language import TEMPLATE

TASK = make_task(TaskConfig(name="causal-lm"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Two and two is four."},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE as Qwen's, with its marks of turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([turn["content"] for turn in TALK], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=marks[0], eos_token=marks[2])


def corpus_of(tmp_path, rows, **data):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_corpus(DataConfig(path=str(tmp_path), **data), 0, TASK)


def examples(tokenizer, tmp_path, rows, max_length=512, **data):
    corpus = corpus_of(tmp_path, rows, **data)
    return TASK.examples(corpus.train, tokenizer, DataConfig(max_length=max_length, cache=str(tmp_path / "tokens")))


def test_the_answer_alone_is_asked_for(tokenizer, tmp_path):
    """The model reads what generation gives it; the last answer and the end of its turn are its targets."""
    tokenizer.chat_template = CHATML
    ours = examples(tokenizer, tmp_path, [{"messages": TALK}], messages="messages")
    prompt = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True)["input_ids"]
    assert ours.input_ids[: len(prompt)].tolist() == prompt
    assert (ours.targets[: len(prompt)] == IGNORED).all()
    assert (ours.targets[len(prompt) :] == ours.input_ids[len(prompt) :]).all()
    assert tokenizer.decode(ours.targets[len(prompt) :]) == "Two and two is four.<|im_end|>\n"
    assert ours.units.tolist() == [len(ours.input_ids) - len(prompt)]


def test_tokenizers_without_a_template_get_one(tokenizer, tmp_path):
    tokenizer.chat_template = None
    ours = examples(tokenizer, tmp_path, [{"prompt": "Hello?", "answer": "Yes."}])
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(ours.input_ids) == "### user:\nHello?\n\n### assistant:\nYes.<|im_end|>"
    assert tokenizer.decode(ours.targets[ours.targets != IGNORED]) == "Yes.<|im_end|>"


def test_what_is_too_long_loses_the_start_of_the_prompt(tokenizer, tmp_path):
    tokenizer.chat_template = CHATML
    rows = [{"prompt": "Hello? " * 30, "answer": "Yes."}, {"prompt": "Hello?", "answer": "Yes. " * 30}]
    whole, cut = (examples(tokenizer, tmp_path, rows, length) for length in (512, 24))
    assert cut.lengths.tolist() == [24, 24]
    assert cut.input_ids[:24].tolist() == whole.input_ids[: whole.offsets[1]][-24:].tolist()
    assert cut.units.tolist() == [whole.units[0], 23]
    prompt = whole.lengths[1] - whole.units[1]
    assert cut.input_ids[24:].tolist() == whole.input_ids[whole.offsets[1] :][prompt - 1 :][:24].tolist()


def test_templates_that_rewrite_the_prompt_are_refused(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(InputError, match="chat template must begin a conversation with its prompt, got '1\\?' and '2'"):
        examples(tokenizer, tmp_path, [{"prompt": "Hello?", "answer": "Yes."}])
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InputError, match="chat template refuses .*: no system turns"):
        examples(tokenizer, tmp_path, [{"prompt": "Hello?", "answer": "Yes."}])


@pytest.fixture(scope="module")
def experiment(tiny_config, tiny_models, tiny_rows):
    return build(
        changed(
            tiny_config,
            task={"name": "causal-lm"},
            model={"name": str(tiny_models("llama"))},
            data={"path": str(tiny_rows("causal-lm")), "max_length": 48},
            partition={"scheme": "quantity"},
        )
    )


def test_perplexity_is_that_of_the_whole_logits(experiment):
    """By transformers' own logits of every text alone, in float64, over the targets alone."""
    learner, test = experiment.learner, experiment.test
    total, right, count = 0.0, 0, 0
    for index in range(len(test)):
        batch = test.batch(np.array([index]))
        with torch.no_grad():
            logits = learner.model.eval()(batch["input_ids"], batch["attention_mask"]).logits[0, :-1].double()
        targets = batch["labels"][0, 1:]
        asked = targets != IGNORED
        total -= logits.log_softmax(-1)[asked, targets[asked]].sum().item()
        right += (logits.argmax(-1) == targets)[asked].sum().item()
        count += asked.sum().item()
    told = experiment.task.predict(learner.model, test, 7, learner.device)
    scores = experiment.task.score(told)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert scores["accuracy"] == right / count
    assert told.units.tolist() == test.units.tolist() and told.units.sum() == count


def test_the_highest_perplexity_is_the_worst_client(experiment):
    told = experiment.task.predict(experiment.learner.model, experiment.test, 16, experiment.learner.device)
    halves = np.array_split(np.arange(len(experiment.test)), 2)
    each = [experiment.task.score(told.take(half))["perplexity"] for half in halves]
    assert experiment.task.client_scores(told, halves) == {
        "worst_client": max(each),
        "mean_client": pytest.approx(np.mean(each)),
    }


def test_a_run_chooses_the_round_of_least_perplexity_and_generates(tiny_config, tiny_models, tiny_rows, tmp_path):
    """From the run's own folders: peft's adapter and the merged model say the same, token for token."""
    import federa
    from federa.export import export
    from federa.simulation import restore

    result = federa.run(
        changed(
            tiny_config,
            task={"name": "causal-lm"},
            model={"name": str(tiny_models("qwen3"))},
            data={"path": str(tiny_rows("causal-lm")), "max_length": 48},
            partition={"scheme": "iid", "clients": 2},
            client={"lr": 0.02},
        ),
        tmp_path / "run",
    )
    perplexities = [record["validation"]["perplexity"] for record in result.records]
    assert perplexities[-1] < perplexities[0]
    assert result.best["validation"]["perplexity"] == min(perplexities)
    assert result.score == result.test["perplexity"] and result.facts["metric"] == "perplexity"
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Perplexity over 3 rounds" in report and "ccuracy over" not in report
    assert f"test perplexity (token accuracy {100 * result.test['accuracy']:.1f}\xa0%)" in report

    experiment, _ = restore(tmp_path / "run")
    export(experiment, "merged", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = [{"role": "user", "content": "Return the current"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    prompt.pop("token_type_ids", None)  # the tiny tokenizer is BERT's
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    said = merged.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert said.shape[1] == prompt["input_ids"].shape[1] + 5

    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(result.adapter)
    assert torch.equal(adapted.generate(**prompt, max_new_tokens=5, do_sample=False), said)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TALK[:-1]}, "data.messages must hold lists of {role, content} that end with an assistant's"),
        ({"messages": [TALK[-1]]}, "that end with an assistant's answer, got"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "that end with an assistant's answer, got"),
        ({"messages": None}, "that end with an assistant's answer, got null"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message) as raised:
        corpus_of(tmp_path, [{"messages": TALK}, row], messages="messages")
    assert "in row 2 of train.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_empty_answers_are_named(tmp_path):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "\n"}]
    with pytest.raises(InputError, match=r"data.answer must hold text, got '\\n' in row 2 of train.jsonl"):
        corpus_of(tmp_path, rows)
