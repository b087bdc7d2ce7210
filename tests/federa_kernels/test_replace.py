import copy

import pytest
import torch
from torch import nn

from federa_kernels import FeDeRALinear, replace_linears

transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 64, "num_labels": 3}


def tiny_bert(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**TINY, **sizes, initializer_range=0.2, **options)
    return transformers.BertForSequenceClassification(config).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(**TINY, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, initializer_range=0.2)
    return transformers.GPT2ForSequenceClassification(config).eval()


def batch(seed=0):
    ids = torch.randint(1, 64, (4, 11), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def federa_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, FeDeRALinear)}


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
@pytest.mark.parametrize("alpha", [None, 16], ids=["s1", "s4"])
def test_logits_stay_in_train_and_eval_mode(build, alpha):
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = copy.deepcopy(model)
    report = replace_linears(ours, rank=4, alpha=alpha)
    assert len(report.replaced) == {"tiny_bert": 12, "tiny_gpt2": 8}[build.__name__]
    for training in (False, True):
        model.train(training), ours.train(training)
        torch.testing.assert_close(ours(**batch()).logits, model(**batch()).logits, rtol=1e-4, atol=1e-5)


def test_minilm_embeddings_stay(minilm_path):
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        report = replace_linears(model, rank=8)
        after = model(ids).last_hidden_state
    assert len(report.replaced) == 36
    assert report.skipped == {"pooler.dense": "belongs to the task head"}
    assert max(layer.rounding for layer in report.replaced.values()) < 1e-6
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            ["query", "value"],
            {f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")},
        ),
        (["output.dense"], {f"bert.encoder.layer.{i}.{n}output.dense" for i in (0, 1) for n in ("", "attention.")}),
        (r".*layer\.1\..*\.key", {"bert.encoder.layer.1.attention.self.key"}),
        (["bert.encoder.layer.0.intermediate.dense"], {"bert.encoder.layer.0.intermediate.dense"}),
    ],
    ids=["suffixes", "dotted-suffix", "regex", "whole-name"],
)
def test_selection_is_pefts(target, expected):
    model = tiny_bert()
    report = replace_linears(model, target, rank=2)
    assert federa_names(model) == report.replaced.keys() == expected
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=target, r=2)).base_model.model
    adapted = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert expected == {name for name in adapted if "pooler" not in name and name != "classifier"}


def test_head_pooler_and_output_embeddings_stay():
    skipped = replace_linears(tiny_bert(), rank=2).skipped
    assert skipped == {"bert.pooler.dense": "belongs to the task head", "classifier": "belongs to the task head"}
    assert replace_linears(tiny_gpt2(), rank=2).skipped == {"score": "belongs to the task head"}
    lm = transformers.GPT2LMHeadModel(tiny_gpt2().config)
    assert replace_linears(lm, rank=2).skipped == {"lm_head": "belongs to the task head"}


def test_what_cannot_be_replaced_is_skipped_with_its_reason():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    layers = {name: nn.Linear(16, 16) for name in ("weight-normed", "spectral-normed", "tied", "twin", "last")}
    nn.utils.parametrizations.weight_norm(layers["weight-normed"])
    nn.utils.spectral_norm(layers["spectral-normed"])
    layers["twin"].weight = layers["tied"].weight
    model = nn.ModuleDict({"encoder": encoder} | layers)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = encoder(x)
        report = replace_linears(model, rank=2, exclude_modules=["last"])
        torch.testing.assert_close(encoder(x), before, rtol=1e-4, atol=1e-5)
    assert report.replaced.keys() == {"encoder.linear1", "encoder.linear2"}
    assert report.skipped == {
        "encoder.self_attn.out_proj": "is a NonDynamicallyQuantizableLinear, not nn.Linear itself",
        "weight-normed": "is a ParametrizedLinear, not nn.Linear itself",
        "spectral-normed": "computes its weight from other parameters",
        "tied": "shares its weight with twin",
        "twin": "shares its weight with tied",
        "last": "is excluded",
    }
    assert "replaced 2 linear layers" in str(report)
    assert "encoder.linear1  32 x 16" in str(report)
    assert "last  is excluded" in str(report)
    with pytest.raises(ValueError, match=r"\(last\), got \['linear1'\]; encoder\.linear1 is a FeDeRALinear already"):
        replace_linears(model, ["linear1"], rank=2)


def test_a_module_reached_under_two_names_is_left_alone():
    shared = nn.Linear(8, 8)
    report = replace_linears(nn.ModuleList([shared, shared, nn.Linear(8, 8)]), rank=2)
    assert report.replaced.keys() == {"2"}
    assert report.skipped == {"0": "shares its weight with 1", "1": "shares its weight with 0"}


def test_nothing_else_changes_its_requires_grad():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters() if "layer" not in n}
    replace_linears(model, rank=2)
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in before} == before


def test_received_factors_give_the_same_model():
    server, client = tiny_bert(), tiny_bert()
    replace_linears(server, rank=4, alpha=8)
    factors = {n: (m.lora_A0, m.lora_B0) for n, m in server.named_modules() if isinstance(m, FeDeRALinear)}
    replace_linears(client, rank=4, alpha=8, factors=factors)
    for name, tensor in server.state_dict().items():
        assert torch.equal(client.state_dict()[name], tensor), name


def test_zero_band_draws_from_the_generator_only():
    state = torch.get_rng_state()
    first, second = tiny_bert(), tiny_bert()
    state = torch.get_rng_state()
    for model in (first, second):
        replace_linears(model, rank=2, band="zero", generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


FACTORS = {"bert.encoder.layer.1.attention.self.key": (torch.zeros(2, 32), torch.zeros(32, 2))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj"]},
            r"target_modules must match a linear layer that can be replaced \(query, key, value, dense\), "
            r"got \['q_proj'\]",
        ),
        (
            {"target_modules": ["classifier"]},
            r"target_modules must match .*, got \['classifier'\]; classifier belongs to the task head",
        ),
        ({"target_modules": "query|("}, r"target_modules must be a valid regular expression, got 'query\|\(': .*"),
        ({"exclude_modules": "["}, r"exclude_modules must be a valid regular expression, got '\[': .*"),
        ({"rank": 33}, r"rank for bert\.encoder\.layer\.0\.attention\.self\.query must be between 1 and 32 .*, got 33"),
        ({"band": "middle"}, r"band must be one of principal, minor, orthogonal, zero, got 'middle'"),
        (
            {"factors": FACTORS | {"odd": ()}, "target_modules": ["key"], "rank": 2},
            r"factors must name exactly the selected layers, "
            r"got 1 missing: bert\.encoder\.layer\.0\.attention\.self\.key; 1 unknown: odd",
        ),
        (
            {"factors": FACTORS, "target_modules": r".*1\.attention\.self\.key", "rank": 3},
            r"lora_A0 of bert\.encoder\.layer\.1\.attention\.self\.key must have shape \(R, K\) with R=3, K=32, "
            r"got \(2, 32\)",
        ),
    ],
    ids=["no-match", "head-only", "regex", "exclude-regex", "rank", "band", "factor-names", "factor-shapes"],
)
def test_errors_leave_the_model_untouched(options, message):
    model = tiny_bert()
    with pytest.raises(ValueError, match=f"^replace_linears: {message}$"):
        replace_linears(model, **options)
    assert not federa_names(model)


def test_a_weight_that_is_not_finite_is_named():
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight must be finite"):
        replace_linears(model)
    assert not federa_names(model)


def test_the_original_checkpoint_loads_strictly_into_a_replaced_model():
    model, other = tiny_bert(), tiny_bert(seed=1)
    replace_linears(model, rank=4)
    result = model.load_state_dict(other.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(model(**batch()).logits, other(**batch()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_delta_is_a_peft_adapter_for_the_original_model(build):
    peft = pytest.importorskip("peft")
    original, ours = build(), build()
    report = replace_linears(ours, rank=2, alpha=6)
    layers = {name: ours.get_submodule(name) for name in report.replaced}
    for layer in layers.values():
        layer.lora_A.data += 0.1
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(layers))
    theirs = peft.get_peft_model(original, config).base_model.model
    for name, layer in layers.items():
        adapter = theirs.get_submodule(name)
        adapter.lora_A.default.weight.data, adapter.lora_B.default.weight.data = layer.delta()
    torch.testing.assert_close(theirs.eval()(**batch()).logits, ours(**batch()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer_changes_the_factors_and_the_head_only(tmp_path, checkpointing):
    model = tiny_bert()
    replace_linears(model, rank=2)
    learned = {n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B")) or n.startswith("classifier")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{k: v[0] for k, v in batch(i).items()} | {"labels": i % 3} for i in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned
    trainer.save_model(tmp_path / "saved")
    saved = pytest.importorskip("safetensors.torch").load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == after.keys()
    assert all(torch.equal(saved[name], after[name]) for name in saved)
