"""Exports, loaded by PEFT and transformers themselves: the model that was evaluated, logit for logit."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from federa.config import changed
from federa.errors import InputError
from federa.experiment import build
from federa.export import check_export, export, export_peft
from federa.tasks import predict

families = pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2"])
methods = pytest.mark.parametrize("method", ["federa", "lora"])


@pytest.fixture(scope="module")
def trained(tiny_config, tiny_models):
    """trained(family, method, ...) -> an experiment whose trainable tensors are all far from where they started."""

    def trained(family="bert", method="federa", pooling="default", **settings):
        model = {"name": str(tiny_models(family)), "pooling": pooling}
        experiment = build(changed(tiny_config, model=model, method={"name": method, **settings}))
        rng = torch.Generator().manual_seed(1)
        state = experiment.learner.state()
        noisy = {
            n: t + 0.3 * t.abs().mean().clamp(min=0.1) * torch.randn(t.shape, generator=rng) for n, t in state.items()
        }
        experiment.learner.load(noisy)
        return experiment

    return trained


def tokens(experiment) -> dict[str, torch.Tensor]:
    """Six test examples of different lengths, padded."""
    batch = experiment.test.batch(torch.arange(6).numpy())
    del batch["labels"]
    return batch


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and expected.std() > 0.01
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def run_readme(folder, **names) -> dict:
    """Executes the Python block of a README.md."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(compile(code, str(folder / "README.md"), "exec"), names)
    return names


@families
@methods
def test_peft_loads_the_adapter(trained, family, method, tmp_path):
    """By the code in its README; alpha is twice the rank, and the adapter's own rank is 2R for federa."""
    experiment = trained(family, method)
    batch, ours = tokens(experiment), logits(experiment.learner.model, tokens(experiment))
    export(experiment, "peft", tmp_path / "adapter")
    model = run_readme(tmp_path / "adapter")["model"]
    assert isinstance(model, PeftModel)
    assert_same(logits(model, batch), ours)
    settings = model.peft_config["default"]
    assert settings.r == (8 if method == "federa" else 4) and settings.lora_alpha / settings.r == 2.0
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] == settings.fan_in_fan_out == (family == "gpt2")  # PEFT would mend it and warn
    with model.disable_adapter():
        assert (logits(model, batch) - ours).norm() > 0.05 * ours.norm()


def test_peft_loads_the_adapter_of_minilm(tiny_config, minilm_path, tmp_path):
    """The real one, after a real step of training with alpha = 2 rank."""
    from federa.client import train_client

    config = changed(
        tiny_config, model={"name": str(minilm_path)}, method={"alpha": 8.0}, client={"lr": 0.01, "steps": 1}
    )
    experiment = build(config)
    learner = experiment.learner
    update = train_client(learner, experiment.train, experiment.clients[0], 0, 1, learner.state(), config)
    learner.load(update.tensors)
    batch, ours = tokens(experiment), logits(learner.model, tokens(experiment))
    export_peft(experiment, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(minilm_path, num_labels=4)
    before = logits(base, batch)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same(logits(model, batch), ours)
    assert (before - ours).norm() > 0.1 * ours.norm()


@pytest.mark.parametrize("method", ["federa", "lora", "head-only", "full"])
@families
def test_transformers_loads_the_merged_model(trained, family, method, tmp_path):
    """With its tokenizer and label names; logits are checked on a text, not on our own token ids."""
    experiment = trained(family, method)
    text = experiment.corpus.test.texts[:6]
    ours = logits(experiment.learner.model, tokens(experiment))
    export(experiment, "merged", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(
        text, truncation=True, max_length=24, padding=True, return_tensors="pt", return_token_type_ids=False
    )
    assert torch.equal(batch["input_ids"], tokens(experiment)["input_ids"])
    assert_same(logits(model, batch), ours)
    assert [model.config.id2label[i] for i in range(4)] == experiment.corpus.label_names
    assert {p.name for p in (tmp_path / "merged").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@families
@methods
def test_peft_loads_the_residual_base_with_its_adapter(trained, family, method, tmp_path):
    """base/ holds W - s B0 A0 and the adapter has the run's own rank."""
    experiment = trained(family, method)
    batch, ours = tokens(experiment), logits(experiment.learner.model, tokens(experiment))
    export(experiment, "residual", tmp_path / "out")
    model = run_readme(tmp_path / "out" / "adapter")["model"]
    assert_same(logits(model, batch), ours)
    assert model.peft_config["default"].r == 4
    AutoTokenizer.from_pretrained(tmp_path / "out" / "base")


@families
@methods
def test_mean_pooling_loads_by_its_readme(trained, family, method, tmp_path):
    experiment = trained(family, method, "mean")
    batch, ours = tokens(experiment), logits(experiment.learner.model, tokens(experiment))
    export(experiment, "peft", tmp_path / "adapter")
    assert_same(run_readme(tmp_path / "adapter", batch=batch)["logits"].detach(), ours)


@pytest.mark.parametrize("method", ["federa", "full"])
def test_mean_pooling_merges(trained, method, tmp_path):
    """A backbone for AutoModel and head.safetensors beside it."""
    from transformers import AutoModel

    experiment = trained("bert", method, "mean")
    batch, ours = tokens(experiment), logits(experiment.learner.model, tokens(experiment))
    export(experiment, "merged", tmp_path / "merged")
    hidden = AutoModel.from_pretrained(tmp_path / "merged").eval()(**batch).last_hidden_state
    head = load_file(tmp_path / "merged" / "head.safetensors")
    mask = batch["attention_mask"].unsqueeze(-1)
    assert_same(((hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]).detach(), ours)


@methods
def test_mean_pooling_keeps_its_residual_base(trained, method, tmp_path):
    experiment = trained("bert", method, "mean")
    batch, ours = tokens(experiment), logits(experiment.learner.model, tokens(experiment))
    export(experiment, "residual", tmp_path / "out")
    assert_same(run_readme(tmp_path / "out" / "adapter", batch=batch)["logits"].detach(), ours)


@pytest.mark.parametrize("format", ["merged", "residual"])
def test_bfloat16_residuals_export_the_model_that_was_evaluated(trained, format, tmp_path):
    experiment = trained(residual_dtype="bfloat16")
    batch, ours = tokens(experiment), logits(experiment.learner.model, tokens(experiment))
    export(experiment, format, tmp_path / "out")
    if format == "merged":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        model = run_readme(tmp_path / "out" / "adapter")["model"]
    assert_same(logits(model, batch), ours)


def test_predictions_of_an_export_are_ours(trained, tmp_path):
    experiment = trained()
    learner = experiment.learner
    ours = predict(learner.model, experiment.test, 16, learner.device)
    export(experiment, "merged", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (predict(model, experiment.test, 16, learner.device).predicted == ours.predicted).all()


def test_the_readme_names_the_labels(trained, tmp_path):
    export(trained(), "peft", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text().endswith("0. email\n1. logging\n2. unittest\n3. urllib\n")


@pytest.mark.parametrize("method", ["head-only", "full"])
@pytest.mark.parametrize("format", ["peft", "residual"])
def test_methods_without_adapters_export_merged_alone(trained, method, format, tmp_path):
    with pytest.raises(InputError, match=f"--format: {format} must have adapters to export, got method {method}; use "):
        export(trained(method=method), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_formats_and_taken_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="--format: must be one of peft, merged, residual, got 'onnx'"):
        check_export("onnx", tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="--output: must be a new or empty folder"):
            check_export("peft", taken)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_may_be_the_output(trained, tmp_path):
    (tmp_path / "out").mkdir()
    assert export(trained(), "peft", tmp_path / "out") == tmp_path / "out"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
