"""Every family of models on every task it serves: one round of a client, exported, loaded by peft and transformers."""

import re

import pytest
import torch
import transformers
from peft import PeftModel

from federa.client import train_client
from federa.cohort import train_cohort
from federa.config import changed
from federa.experiment import build
from federa.export import export
from federa.models import head_modules, is_head

ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2")
DECODERS = ("gpt2", "llama", "qwen3")
HEADS = {"token-classification": "classifier", "question-answering": "qa_outputs"}
COMBINATIONS = [(family, task) for family in (*ENCODERS, *DECODERS) for task in HEADS]
COMBINATIONS += [(family, "causal-lm") for family in DECODERS]
COMBINATIONS += [
    (family, task) for family in ("bert", "qwen3") for task in ("pair-classification", "entity-classification")
]


@pytest.fixture(scope="module")
def config_of(tiny_config, tiny_models, tiny_rows):
    def config_of(family, task, **sections):
        return changed(
            tiny_config,
            task={"name": task, "stride": 2},
            model={"name": str(tiny_models(family))},
            data={"path": str(tiny_rows(task)), "max_length": 40},
            partition={"scheme": "iid", "clients": 2},
            client={"lr": 0.01, "steps": 4},
            **sections,
        )

    return config_of


def trained(config):
    """An experiment after a client's round, with the loss that the round began and ended with on that client."""
    experiment = build(config)
    learner, own = experiment.learner, experiment.clients[0]
    start, before = learner.state(), loss_on(experiment, own)
    update = train_client(learner, experiment.train, own, 0, 1, start, config)
    assert update.finite and update.tensors.keys() == start.keys()
    assert all(not torch.equal(update.tensors[name], start[name]) for name in start)
    learner.load(update.tensors)
    return experiment, before, loss_on(experiment, own)


def loss_on(experiment, indices) -> float:
    task, learner = experiment.task, experiment.learner
    with torch.no_grad():
        losses = task.losses(learner.model.eval(), experiment.train.batch(indices))
    return losses.sum().item() / experiment.train.units[indices].sum()


@torch.no_grad()
def outputs(model, batch) -> torch.Tensor:
    """Logits where there are tokens; both kinds of a question's side by side."""
    found = model.eval()(**batch)
    logits = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], -1)
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits


def inputs(experiment) -> dict[str, torch.Tensor]:
    batch = experiment.test.batch(torch.arange(6).numpy())
    types = getattr(experiment.learner.model.config, "type_vocab_size", 0) > 1
    names = ["input_ids", "attention_mask", *["token_type_ids"] * (types and "token_type_ids" in batch)]
    return {name: batch[name] for name in names}


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and expected.std() > 0.01
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("family", "task"), COMBINATIONS)
def test_a_round_trains_and_what_it_exports_is_the_model(config_of, family, task, tmp_path):
    experiment, before, after = trained(config_of(family, task))
    model, batch = experiment.learner.model, inputs(experiment)
    assert after < before
    ours = outputs(model, batch)

    export(experiment, "peft", tmp_path / "peft")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "peft" / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["model"], PeftModel)
    assert_same(outputs(names["model"], batch), ours)

    export(experiment, "merged", tmp_path / "merged")
    auto = getattr(transformers, experiment.task.auto_class)
    loaded = auto.from_pretrained(tmp_path / "merged")
    assert type(loaded).__name__ == type(model).__name__
    assert_same(outputs(loaded, batch), ours)
    if names := experiment.corpus.label_names:
        assert [loaded.config.id2label[i] for i in range(len(names))] == names


@pytest.mark.parametrize(("family", "task"), [(f, t) for f, t in COMBINATIONS if t in (*HEADS, "causal-lm")])
def test_the_head_is_what_the_task_brings(config_of, family, task):
    """New heads train in full, none is adapted; a language model's output embeddings are frozen and no head."""
    learner = build(config_of(family, task, method={"rank": 2})).learner
    heads = head_modules(learner.model)
    if task == "causal-lm":
        assert heads == [] and not learner.head
        output = learner.model.get_output_embeddings()
        assert not any(p.requires_grad for p in output.parameters())
        assert not [name for name in learner.trainable if ".lora_" not in name]
    else:
        assert heads == ["score" if family in ("llama", "qwen3") and task == "token-classification" else HEADS[task]]
        assert {name for name in learner.trainable if ".lora_" not in name} == learner.head
        assert all(is_head(learner.model, name) for name in learner.head) and learner.head
    assert not [name for name in learner.broadcast.factors if name.split(".")[0] in (*heads, "lm_head")]


@pytest.mark.parametrize(
    ("family", "task"),
    [*(("bert", task) for task in HEADS), ("deberta-v2", "question-answering"), ("llama", "causal-lm")],
)
def test_clients_of_a_cohort_train_as_alone(config_of, family, task):
    """Targets of tokens, of spans and of answers, over packed rows and padded ones: within 2e-5 of the whole update.

    By SGD: Adam makes steps of rounding where a gradient is nearly zero."""
    config = changed(config_of(family, task), client={"optimizer": "sgd", "lr": 0.1})
    experiment = build(config)
    learner, start = experiment.learner, experiment.learner.state()
    clients = list(enumerate(experiment.clients))
    together = train_cohort(learner, experiment.train, clients, 1, start, config)
    for update, (client, own) in zip(together, clients, strict=True):
        alone = train_client(learner, experiment.train, own, client, 1, start, config)
        assert (update.client, update.steps) == (client, alone.steps)
        assert update.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
        moved = sum((alone.tensors[name] - start[name]).square().sum() for name in start) ** 0.5
        apart = sum((alone.tensors[name] - update.tensors[name]).square().sum() for name in start) ** 0.5
        assert apart <= 2e-5 * moved


@pytest.mark.parametrize("task", [*HEADS, "causal-lm"])
def test_residual_bases_export_too(config_of, task, tmp_path):
    experiment, _, _ = trained(config_of("gpt2", task))
    ours = outputs(experiment.learner.model, inputs(experiment))
    export(experiment, "residual", tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/adapter/README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert_same(outputs(names["model"], inputs(experiment)), ours)


@pytest.mark.parametrize("task", [*HEADS, "causal-lm", "pair-classification"])
def test_losses_do_not_depend_on_the_batch(config_of, task):
    """Each example's loss alone is that of the batch; their sum over units is transformers' own mean."""
    experiment = build(config_of("gpt2" if task == "causal-lm" else "bert", task))
    model, train = experiment.learner.model.eval(), experiment.train
    indices = torch.arange(5).numpy()
    with torch.no_grad():
        together = experiment.task.losses(model, train.batch(indices))
        alone = torch.cat([experiment.task.losses(model, train.batch(indices[i : i + 1])) for i in range(5)])
    assert together.shape == (5,) and together.dtype == torch.float32
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    batch = train.batch(indices)
    labels = batch.pop("labels")
    batch.pop("token_type_ids", None) if task == "causal-lm" else None
    asked = (
        {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
        if labels.shape[1:] == (2,)
        else {"labels": labels}
    )
    if task == "question-answering":  # transformers' loss counts padding in; of examples of one length it is ours
        first = indices[train.lengths[indices] == train.lengths[0]]
        batch = {name: tensor[first][:, : train.lengths[0]] for name, tensor in batch.items()}
        asked = {name: tensor[first] for name, tensor in asked.items()}
        together, indices = together[first], first
    with torch.no_grad():
        theirs = model(**batch, **asked).loss
    assert together.sum().item() / train.units[indices].sum() == pytest.approx(theirs.item(), rel=1e-5)
