import copy
import io
import math
import pickle
import shutil
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from federa_kernels import accelerate_peft, pack_frozen, restore_peft
from federa_kernels import peft as accelerated

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.2, "num_labels": 3, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def bert(targets=("query", "value", "dense"), dtype=torch.float32, **options):
    """A peft model whose lora_B has left zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **NO_DROPOUT)).to(dtype)
        options = {"r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS"} | options
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), **options))
        moved(model)
    return model.eval()


def moved(model, adapter="default"):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                nn.init.normal_(parameter, std=0.1)


def quick(*arguments, **options):
    model = bert(*arguments, **options)
    accelerate_peft(model)
    return model


def pair(*arguments, **options):
    return bert(*arguments, **options), quick(*arguments, **options)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


def layer_of(
    in_features=13, out_features=9, bias=True, dtype=torch.float32, adapter_dtype=None, accelerate=True, **options
):
    """One LoRA layer, its (K,R) factors random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).to(dtype)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **{"r": 3, "lora_alpha": 6} | options))
        moved(model)
    if accelerate:
        accelerate_peft(model)
    layer = model.base_model.model[0].train()
    for factor in (layer.lora_A, layer.lora_B):
        factor.to(adapter_dtype or dtype)
    return layer


def factors(layer, adapter="default"):
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def batch(length=11):
    ids = torch.randint(1, 64, (3, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 2])}


def results(model, seed=1, autocast=False):
    """Loss and every gradient, with dropout drawn from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_as_good(ours, theirs, exact, eps):
    """Error within twice peft's plus rounding; entry `name` of each is a tensor."""
    assert ours.keys() == theirs.keys() == exact.keys()
    scale = sum(true.norm().item() for true in exact.values()) / len(exact)
    for name, true in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        error, bound = ((r[name].double() - true).norm().item() for r in (ours, theirs))
        assert error <= 2 * bound + 4 * eps * (true.norm().item() + 1e-2 * scale), name


@pytest.fixture
def paths(monkeypatch):
    """Which of lora_linear and add_dropped ran."""
    names = []
    for name in ("lora_linear", "add_dropped"):
        real = getattr(accelerated, name)
        spy = lambda *arguments, name=name, real=real: names.append(name) or real(*arguments)  # noqa: E731
        monkeypatch.setattr(accelerated, name, spy)
    return names


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"init_lora_weights": "olora"}], ids=str
)
def test_loss_and_every_gradient_as_good_as_pefts(training, dropout, options, paths):
    theirs, ours = pair(lora_dropout=dropout, **options)
    theirs.train(training), ours.train(training)
    exact = copy.deepcopy(theirs).double()
    assert_as_good(results(ours), results(theirs), results(exact), torch.finfo(torch.float32).eps)
    assert paths.count("lora_linear") == len(lora_layers(ours))
    assert paths.count("add_dropped") == (len(lora_layers(ours)) if training and dropout else 0)


def test_minilm(minilm_path, paths):
    model = transformers.AutoModel.from_pretrained(minilm_path)
    config = peft.LoraConfig(r=8, target_modules=["query", "key", "value"], lora_dropout=0.1)
    theirs = peft.get_peft_model(model, config)
    moved(theirs)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    assert len(accelerate_peft(ours).accelerated) == 18
    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))
    runs = []
    for each in (ours, theirs, exact):
        torch.manual_seed(0)
        y = each.train()(input_ids=ids).last_hidden_state
        y.square().mean().backward()
        runs.append({"y": y.detach()} | {n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert_as_good(*runs, torch.finfo(torch.float32).eps)
    assert paths.count("add_dropped") == 18


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["p0", "p0.3"])
def test_autocast(dropout):
    theirs, ours = pair(lora_dropout=dropout)
    theirs.train(), ours.train()
    exact = copy.deepcopy(theirs).double()
    runs = results(ours, autocast=True), results(theirs, autocast=True), results(exact)
    assert_as_good(*runs, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_pitfall_2_dtype_mixes(base, adapter, autocast, dropout):
    def run(layer, double=False):
        x = torch.randn(2, 5, 13, generator=torch.Generator().manual_seed(0)).to(base)
        x, layer = (x.double(), layer.double()) if double else (x, layer)
        x.requires_grad_()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and not double):
            y = layer(x)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(base)
        y.backward(dy.to(y.dtype))
        dA, dB = (factor.grad for factor in factors(layer))
        return {"y": y.detach(), "dx": x.grad, "dA": dA, "dB": dB}

    options = {"dtype": base, "adapter_dtype": adapter, "lora_dropout": dropout}
    ours, theirs = layer_of(**options), layer_of(**options, accelerate=False)
    exact = layer_of(**options, accelerate=False)
    eps = torch.finfo(torch.bfloat16 if autocast else base).eps
    assert_as_good(run(ours), run(theirs), run(exact, double=True), max(eps, torch.finfo(adapter).eps))


def test_state_dict_and_save_pretrained_are_pefts_to_the_byte(tmp_path):
    theirs, ours = pair(modules_to_save=["classifier"])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for model, folder in ((theirs, "theirs"), (ours, "ours")):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
        results(model), optimiser.step()
        model.save_pretrained(tmp_path / folder)
    names = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    again = peft.PeftModel.from_pretrained(bert().unload(), tmp_path / "ours").eval()
    accelerate_peft(again)
    torch.testing.assert_close(again(**batch()).loss, theirs(**batch()).loss)


def test_copies_and_pickles_are_accelerated_and_independent(paths):
    ours = quick()
    expected = results(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        paths.clear()
        for name, value in results(twin).items():
            assert torch.equal(value, expected[name])
        assert paths == ["lora_linear"] * 11
        for layer in lora_layers(twin):
            assert layer._frozen.weight is layer.base_layer.weight
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}


def test_report_twice_and_undo(paths):
    theirs, ours = pair()
    report = accelerate_peft(ours)
    assert len(report.accelerated) == 11
    assert "accelerated 11 LoRA layers" in str(report)
    assert "base_model.model.bert.encoder.layer.0.attention.self.query  32 x 32" in str(report)
    ours(**batch())
    assert paths == ["lora_linear"] * 11
    assert restore_peft(ours) == 11
    assert {type(layer) for layer in lora_layers(ours)} == {peft.tuners.lora.Linear}
    assert [vars(layer).keys() for layer in lora_layers(ours)] == [vars(layer).keys() for layer in lora_layers(theirs)]
    assert restore_peft(ours) == 0
    assert torch.equal(ours(**batch()).loss, theirs(**batch()).loss)
    assert len(paths) == 11


def second_adapter(model, targets=("query",), **options):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=list(targets), **options))
        moved(model, "other")


def activate(model, adapters):
    for layer in lora_layers(model):
        layer.set_adapter(adapters)


STATES = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "two-active": lambda model: (second_adapter(model), activate(model, ["default", "other"])),
    "none-here": lambda model: (second_adapter(model), model.set_adapter("other")),
    "dora-added": lambda model: (
        second_adapter(model, ["query", "value", "dense"], use_dora=True),
        model.set_adapter("other"),
    ),
    "watched": lambda model: [layer.base_layer.register_forward_hook(lambda *_: None) for layer in lora_layers(model)],
    "no-cast": lambda model: [setattr(layer, "cast_input_dtype_enabled", False) for layer in lora_layers(model)],
}
STILL_OURS = {"two-active": 9, "none-here": 2}  # of 11: where only one of the two adapters is


@pytest.mark.parametrize("state", STATES)
def test_pefts_own_forward_where_the_state_is_not_simple(state, paths):
    theirs, ours = pair()
    STATES[state](theirs), STATES[state](ours)
    torch.testing.assert_close(ours(**batch()).loss, theirs(**batch()).loss)
    assert len(paths) == STILL_OURS.get(state, 0)


def test_adapter_names_go_to_peft(paths):
    theirs, ours = pair()
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        got, want = (model(**batch(), adapter_names=names).logits for model in (ours, theirs))
    assert torch.equal(got, want)
    assert not paths


def test_pitfall_15_no_stale_weight_after_merging_and_switching(paths):
    theirs, ours = pair()
    for model in (theirs, ours):
        second_adapter(model, ["query", "value", "dense"])

    def same():
        torch.testing.assert_close(results(ours), results(theirs), rtol=1e-4, atol=1e-5)

    for change in (
        lambda model: model.set_adapter("other"),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: model.unmerge_adapter(),
        lambda model: model.set_adapter("default"),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.delete_adapter("other"),
        lambda model: [parameter.data.mul_(0.5) for parameter in factors(lora_layers(model)[0])],
        lambda model: [layer.scale_layer(2.0) for layer in lora_layers(model)],
        lambda model: model.load_state_dict({n: t * 0.9 for n, t in model.state_dict().items()}),
    ):
        change(theirs), change(ours)
        same()
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(**batch()).loss, theirs(**batch()).loss)
    paths.clear()
    same()
    assert len(paths) == 11
    torch.testing.assert_close(ours.merge_and_unload()(**batch()).loss, theirs.merge_and_unload()(**batch()).loss)


@pytest.mark.parametrize("prepare", [lambda layer: None, pack_frozen], ids=["linear", "packed"])
def test_merging_lets_go_of_packed_forms_since_it_writes_past_the_version(prepare):
    layer, x = layer_of(64, 64), torch.randn(40, 64)
    prepare(layer)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    with layer_disabled(layer):
        before = layer(x)
    layer(x)
    layer.lora_B["default"].weight.data.mul_(100.0)
    layer.merge()
    torch.testing.assert_close(layer(x), linear(x, weight, bias), rtol=1e-3, atol=1e-3)
    layer.lora_B["default"].weight.data.zero_()
    layer.unmerge()  # takes nothing off: what was merged stays in the weight
    torch.testing.assert_close(layer(x), linear(x, weight, bias), rtol=1e-3, atol=1e-3)
    assert (layer(x) - before).norm() > 1


@contextmanager
def layer_disabled(layer):
    layer.enable_adapters(False)
    yield
    layer.enable_adapters(True)


def test_a_tied_output_layer():
    def build():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.2))
        moved(model)
        return model.train()

    theirs, ours = build(), build()
    accelerate_peft(ours)
    runs = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        ids = batch()["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        runs.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-5)


def test_a_base_that_trains_or_is_packed_or_replaced(paths):
    theirs, ours = (layer_of(accelerate=accelerate) for accelerate in (False, True))
    x = torch.randn(4, 13)
    for change in (
        lambda layer: layer.base_layer.requires_grad_(True),
        lambda layer: layer.base_layer.requires_grad_(False),
        pack_frozen,
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(9, 13), requires_grad=False)),
        lambda layer: layer.double().float(),
    ):
        for layer in (theirs, ours):
            layer.zero_grad()
            change(layer)
            layer(x).square().sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert paths == ["lora_linear"] * 5


def test_modules_to_save_and_embeddings_stay_as_they_are():
    model = bert(["query", "word_embeddings"], modules_to_save=["classifier"])
    kinds = {n: type(m) for n, m in model.named_modules() if "classifier" in n or "word_embeddings" in n}
    report = accelerate_peft(model)
    assert report.skipped == {"base_model.model.bert.embeddings.word_embeddings": "is a lora.Embedding"}
    assert "skipped 1" in str(report)
    assert {n: type(m) for n, m in model.named_modules() if n in kinds} == kinds
    model(**batch()).loss.backward()


def quantised():
    model = bert(["query"])
    for layer in lora_layers(model)[:1]:
        layer.base_layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    return model


def gpt2(trainable_base=False, **options):
    """Its linear layers are Conv1D: weights (K,N)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "pad_token_id": 0, "num_labels": 3}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, **dropouts))
        options = {"r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS", "fan_in_fan_out": True} | options
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], **options))
        moved(model)
    for layer in lora_layers(model):
        layer.base_layer.weight.requires_grad_(trainable_base)
    return model


@pytest.mark.parametrize("trainable_base", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_conv1d_bases_give_peft_s_losses_and_gradients(trainable_base, p, paths):
    theirs, ours = (gpt2(trainable_base, lora_dropout=p) for _ in range(2))
    exact, report = gpt2(trainable_base, lora_dropout=p).double(), accelerate_peft(ours)
    assert sorted(report.accelerated.values()) == [(32, 32), (32, 32), (32, 128), (32, 128), (96, 32), (96, 32),
                                                   (128, 32), (128, 32)]  # fmt: skip
    assert_as_good(results(ours), results(theirs), results(exact), torch.finfo(torch.float32).eps)
    assert "lora_linear" in paths


def test_a_conv1d_base_merges_saves_and_moves_as_in_peft(tmp_path):
    theirs, ours = gpt2(), gpt2()
    accelerate_peft(ours)
    before = results(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    ours.merge_adapter()
    torch.testing.assert_close(results(ours)["loss"], before["loss"])
    ours.unmerge_adapter()
    torch.testing.assert_close(results(ours)["loss"], before["loss"])
    twin = copy.deepcopy(ours)
    half = results(ours.bfloat16().float())  # in other memory, and rounded
    for a, b in zip(half.values(), results(theirs.bfloat16().float()).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results(pickle.loads(pickle.dumps(twin)))["loss"], results(twin)["loss"])
    assert restore_peft(ours) == 8 and not any(hasattr(layer, "_frozen") for layer in lora_layers(ours))


REFUSED = {
    "dora": (lambda: bert(use_dora=True), r"Dora in \S+query, \S+value, \S+dense and 8 more"),
    "lora-bias": (lambda: bert(["key"], lora_bias=True), r"lora_bias in \S+0\.attention\.self\.key, \S+key"),
    "alora": (
        lambda: bert(["key"], alora_invocation_tokens=[1], task_type=None),
        r"ALora in \S+key, \S+key",
    ),
    "quantised": (quantised, r"a Linear4bit base in \S+layer\.0\S+query"),
    "not-peft": (lambda: nn.Linear(2, 2), "no such LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_by_name_before_changing_anything(kind):
    build, message = REFUSED[kind]
    model = build()
    kinds = [type(module) for module in model.modules()]
    expectation = "model must have LoRA on nn.Linear or Conv1D, and none that lora_linear does not compute"
    with pytest.raises(ValueError, match=f"^accelerate_peft: {expectation}, got {message}$"):
        accelerate_peft(model)
    assert [type(module) for module in model.modules()] == kinds


def masks(layer, x, seed=0):
    """What the layer dropped, told from outputs: with A and B the identity and no base, y = s x m / (1 - p)."""
    torch.manual_seed(seed)
    return layer(x) != 0


def transparent(p, K=64):
    layer = layer_of(K, K, bias=False, r=K, lora_alpha=K, lora_dropout=p)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for factor in factors(layer):
            factor.copy_(torch.eye(K))
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_pitfall_5_dropout_statistics(p):
    layer, x = transparent(p), torch.ones(512, 64)
    mask = masks(layer, x)
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(mask.float().mean() - (1 - p)) < 5 * deviation
    assert (mask.float().mean(0) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / 512)
    assert torch.equal(layer(x).unique(), torch.tensor([0.0, 1 / (1 - p)]))
    assert not torch.equal(masks(layer, x), layer(x) != 0)
    assert torch.equal(masks(layer, x), mask)
    assert torch.equal(layer.eval()(x), x)


def test_pitfall_5_on_the_cpu_the_draws_are_those_of_dropout():
    layer, x = transparent(0.3), torch.ones(5, 7, 64)
    mask = masks(layer, x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(nn.functional.dropout(x, 0.3) != 0, mask)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_pitfall_5_recomputation_draws_the_same_mask(reentrant, paths):
    ours = quick(lora_dropout=0.3).train()
    plain = results(ours)
    paths.clear()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    for name, value in results(ours).items():
        assert torch.equal(value, plain[name]), name
    assert paths.count("add_dropped") == 2 * 10 + 1  # all but the pooler's run again


@needs_compiler
def test_pitfall_11_compile_with_checkpointing_and_dropout():
    """<B, dB> = <dy, y - base> holds only where backward sees the h of forward, hence the same mask."""
    layer = layer_of(16, 9, lora_dropout=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True)
    x, dy = torch.randn(12, 16, requires_grad=True), torch.randn(12, 9)
    y = compiled(x)
    y.backward(dy)
    B = factors(layer)[1]
    low = y - linear(x, layer.base_layer.weight, layer.base_layer.bias)
    torch.testing.assert_close((B * B.grad).sum(), (dy * low).sum(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(compiled(x), y)


@needs_compiler
def test_pitfall_11_compiles_into_one_graph():
    theirs, ours = (model.get_base_model() for model in pair(["query", "key"]))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    plain = results(theirs)
    for name, value in results(compiled).items():
        torch.testing.assert_close(value, plain[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)


def test_pitfall_3_expanded_and_non_contiguous_gradients_and_inputs():
    theirs, ours = (layer_of(lora_dropout=0.3, accelerate=accelerate) for accelerate in (False, True))
    for shape in ((13,), (4, 13), (2, 3, 13), (0, 13), (2, 1, 3, 13)):
        x = torch.randn(shape)
        for dy in (torch.ones(()).expand(*shape[:-1], 9), torch.randn(9, *shape[:-1]).movedim(0, -1)):
            grads = []
            for layer in (theirs, ours):
                layer.zero_grad()
                leaf = x.clone().requires_grad_()
                torch.manual_seed(0)
                layer(leaf).backward(dy)
                grads.append([leaf.grad, *(factor.grad for factor in factors(layer))])
            for got, want in zip(grads[1], grads[0], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_pitfall_4_in_place_reuse_of_the_output_and_retain_graph():
    layer = layer_of(lora_dropout=0.3)
    x = torch.randn(2, 4, 13, requires_grad=True)
    y = layer(x)
    y += 1
    loss = (y * y).sum() + (x * x).sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(x.grad, first)


def test_pitfall_14_scaling_is_not_rounded_and_may_be_negative_or_zero():
    for scaling in (1 / 3, -2.0, 0.0):
        for dropout in (0.0, 0.3):
            theirs, ours = (layer_of(lora_dropout=dropout, accelerate=accelerate) for accelerate in (False, True))
            for layer in (theirs, ours):
                layer.scaling["default"] = scaling
                torch.manual_seed(0)
                layer(torch.linspace(-1, 1, 52).view(4, 13)).square().sum().backward()
            for got, want in zip(factors(ours), factors(theirs), strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)


def test_dropout_of_everything_and_of_nothing_go_where_they_should(paths):
    for p, count in ((1.0, 0), (0.0, 1)):
        theirs, ours = (layer_of(lora_dropout=0.5, accelerate=accelerate) for accelerate in (False, True))
        ours.lora_dropout["default"].p = theirs.lora_dropout["default"].p = p
        x = torch.randn(4, 13)
        torch.testing.assert_close(ours(x), theirs(x))
        assert len(paths) == count
