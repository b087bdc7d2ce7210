import copy
import pickle
import shutil
import threading
import weakref

import pytest
import torch
from torch import nn

from federa_kernels import FeDeRALinear, fuse_projections, projections, replace_linears

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.2, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32, "position_buckets": 8}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES, **NO_DROPOUT),
    "roberta": transformers.RobertaConfig(**SIZES, **NO_DROPOUT),
    "xlm-roberta": transformers.XLMRobertaConfig(**SIZES, **NO_DROPOUT),
    "deberta-v2": transformers.DebertaV2Config(**SIZES, **NO_DROPOUT, **RELATIVE),
    "deberta-v3": transformers.DebertaV2Config(**SIZES, **NO_DROPOUT, **RELATIVE, share_att_key=True),
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
}
PER_LAYER = {"llama": 2, "qwen2": 2, "qwen3": 2}
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def built(family="bert", targets="all-linear", layers=2):
    """A model that has trained a little: its factors have left where they started."""
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        replace_linears(model, targets, rank=4, alpha=6)
        with torch.no_grad():
            for layer in federa_layers(model).values():
                layer.lora_B += 0.1 * torch.randn(layer.lora_B.shape)
    return model


def fused(*arguments, **options):
    model = built(*arguments, **options)
    fuse_projections(model)
    return model


def federa_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FeDeRALinear)}


def tokens(rows=3, length=11):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def results(model, ids=None, autocast=False):
    """The output, and every gradient of a sum over it with weights of both signs."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(tokens() if ids is None else ids).last_hidden_state
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach()} | grads


def assert_as_good(ours, unfused, exact, eps):
    """Error within twice that of the unfused model plus rounding; entry `name` of each is a tensor."""
    assert ours.keys() == unfused.keys() == exact.keys()
    scale = sum(true.norm().item() for true in exact.values()) / len(exact)
    for name, true in exact.items():
        assert ours[name].dtype == unfused[name].dtype
        error, theirs = ((r[name].double() - true).norm().item() for r in (ours, unfused))
        assert error <= 2 * theirs + 4 * eps * (true.norm().item() + 1e-2 * scale), name


@pytest.fixture
def calls(monkeypatch):
    """How many projections each call of lora_linear_shared computed."""
    counts, real = [], projections.lora_linear_shared

    def counted(x, each):
        counts.append(len(each))
        return real(x, each)

    monkeypatch.setattr(projections, "lora_linear_shared", counted)
    return counts


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", CONFIGS)
def test_forward_and_every_gradient_as_good_as_unfused(family, training, calls):
    model = built(family).train(training)
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = fuse_projections(ours)
    assert len(report.fused) == 2 * PER_LAYER.get(family, 1)
    assert_as_good(results(ours), results(model), results(exact), torch.finfo(torch.float32).eps)
    assert calls == [len(children) for children in report.fused.values()]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_autocast(family, calls):
    model = built(family)
    ours = copy.deepcopy(model)
    fuse_projections(ours)
    pair = results(ours, autocast=True), results(model, autocast=True)
    assert_as_good(*pair, results(model.double()), torch.finfo(torch.bfloat16).eps)
    assert calls


def test_float16_and_bfloat16_models():
    for dtype in (torch.bfloat16, torch.float16):
        model, ours, exact = built().to(dtype), fused().to(dtype), built().to(dtype).double()
        assert_as_good(results(ours), results(model), results(exact), torch.finfo(dtype).eps)


def test_minilm(minilm_path, calls):
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    replace_linears(model, ["query", "key", "value"], rank=8)
    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))
    before = results(model, ids)
    exact = results(copy.deepcopy(model).double(), ids)
    assert len(fuse_projections(model).fused) == 6
    assert_as_good(results(model, ids), before, exact, torch.finfo(torch.float32).eps)
    assert calls == [3] * 6


def test_one_pass_over_x_keeps_one_h_for_all(calls):
    model = fused()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(tokens())
    assert kept.count((33, 12)) == 2
    assert calls == [3, 3]


def test_different_lengths_one_after_the_other():
    model, ours = built(), fused()
    for length in (11, 1, 7, 30):
        ids = tokens(2, length)
        assert_close(ours(ids).last_hidden_state, model(ids).last_hidden_state)


def test_state_dict_save_and_load(tmp_path):
    model, ours = built(), fused()
    assert ours.state_dict().keys() == model.state_dict().keys()
    for parameter in ours.parameters():
        parameter.data.add_(0.01)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    for other in (model, again := fused()):
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert_close(other(tokens()).last_hidden_state, ours(tokens()).last_hidden_state)
    assert again.state_dict().keys() == ours.state_dict().keys()


def test_copies_and_pickles_are_fused_and_independent(calls):
    ours = fused()
    expected = ours(tokens()).last_hidden_state
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        calls.clear()
        with torch.no_grad():
            assert torch.equal(twin(tokens()).last_hidden_state, expected)
            assert calls == [3, 3]
            for parameter in ours.parameters():
                parameter.mul_(2.0)
            assert torch.equal(twin(tokens()).last_hidden_state, expected)
            for parameter in ours.parameters():
                parameter.div_(2.0)


def test_a_layer_copies_and_pickles_without_its_siblings():
    ours = fused()
    ours(tokens())
    layer = ours.encoder.layer[0].attention.self.query
    assert len(pickle.dumps(layer)) < 1.5 * len(pickle.dumps(built().encoder.layer[0].attention.self.query))
    x = torch.randn(3, 32)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_another_dtype_and_a_merged_layer():
    ours, model = fused().double(), built().double()
    assert_close(ours(tokens()).last_hidden_state, model(tokens()).last_hidden_state)
    for each in (ours, model):
        attention = each.encoder.layer[0].attention.self
        attention.key = attention.key.merge()
    assert type(ours.encoder.layer[0].attention.self.key) is nn.Linear
    assert_close(ours(tokens()).last_hidden_state, model(tokens()).last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant, calls):
    ours = fused().train()
    plain = results(ours)
    calls.clear()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    for name, value in results(ours).items():
        assert torch.equal(value, plain[name]), name
    assert calls == [3] * 4


@needs_compiler
@pytest.mark.parametrize("family", ["bert", "deberta-v3", "llama"])
def test_pitfall_11_compiles_into_one_graph(family, calls):
    model, ours = built(family, layers=1), fused(family, layers=1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    plain = results(model)
    for name, value in results(compiled).items():
        torch.testing.assert_close(value, plain[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)
    assert len(graphs) == 1
    assert len(calls) == PER_LAYER.get(family, 1)
    assert {getattr(layer, "_call", None) for layer in federa_layers(ours).values()} == {None}


@needs_compiler
def test_pitfall_11_compiles_with_dynamic_lengths():
    model, ours = (each.encoder.layer[0].attention.self for each in (built(), fused()))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (11, 7, 20):
        x = torch.randn(2, length, 32)
        assert_close(compiled(x)[0], model(x)[0])


def test_pitfall_3_expanded_and_non_contiguous_gradients():
    model, ours = built(), fused()
    for result in (lambda y: y.sum(), lambda y: (y.transpose(0, 1) * y.detach().transpose(0, 1)).sum()):
        grads = []
        for each in (model, ours):
            each.zero_grad()
            result(each(tokens()).last_hidden_state).backward()
            grads.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5)


def test_pitfall_4_retain_graph_and_another_reader_of_x():
    attention, x = fused().encoder.layer[0].attention.self, torch.randn(2, 5, 32, requires_grad=True)
    loss = (attention(x)[0] * x).sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(x.grad, first)


def test_pitfall_15_new_parameters_are_seen_at_once():
    model, ours = built(), fused()
    optimisers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, ours)]
    for _ in range(2):
        for each, optimiser in zip((model, ours), optimisers, strict=True):
            results(each)
            optimiser.step()
    other = built("bert")
    for layer in federa_layers(other).values():
        layer.lora_A.data.mul_(-1.0)
    for each in (model, ours):
        assert (each(tokens())[0] - built()(tokens())[0]).norm() > 0.1
        each.load_state_dict(other.state_dict())
        assert_close(each(tokens())[0], other(tokens())[0])


def test_deberta_v3_projects_positions_the_ordinary_way(calls):
    ours, seen = fused("deberta-v3"), []
    attention = ours.encoder.layer[0].attention.self
    attention.key_proj.register_forward_hook(lambda layer, args, y: seen.append((args[0].shape, y.shape)))
    ours(tokens())
    assert [shape for shape, _ in seen] == [(3, 11, 32), (1, 16, 32)]
    assert calls == [3, 3]


def test_hooks_on_the_layers_fire_with_their_own_input_and_output(calls):
    ours, seen = fused(), {}
    attention = ours.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        hook = lambda layer, args, y, name=name: seen.update({name: (args[0], y)})  # noqa: E731
        getattr(attention, name).register_forward_hook(hook)
    with torch.no_grad():
        ours(tokens())
        for name, (x, y) in seen.items():
            assert x is seen["query"][0]
            assert_close(y, FeDeRALinear.forward(getattr(attention, name), x))
    assert list(seen) == ["query", "key", "value"]
    assert calls == [3, 3]
    attention.value.register_forward_hook(lambda layer, args, y: y * 0)
    assert not ours.encoder.layer[0].attention.self(torch.randn(1, 4, 32))[0].any()


def test_layers_whose_input_a_hook_may_change_compute_for_themselves(calls):
    model, ours = built(), fused()
    for each in (model, ours):
        attention = each.encoder.layer[0].attention.self
        attention.query.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
        attention.key.register_full_backward_hook(lambda layer, dx, dy: (dx[0] * 3,))
    pair = results(ours), results(model)
    for name, value in pair[1].items():
        torch.testing.assert_close(pair[0][name], value, rtol=1e-3, atol=1e-5)
    assert calls == [3]


class Twice(nn.Module):
    """Calls its projections in some way of its own."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = (FeDeRALinear.from_linear(nn.Linear(8, 8), 2) for _ in range(2))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def change_between(module, x):
    q = module.query(x)
    x.mul_(2)
    return q, module.key(x)


def no_grad_between(module, x):
    q = module.query(x)
    with torch.no_grad():
        return q, module.key(x)


def autocast_between(module, x):
    q = module.query(x)
    with torch.autocast("cpu", torch.bfloat16):
        return q, module.key(x)


def replaced_between(module, x):
    q = module.query(x)
    module.key = nn.Linear(8, 8)
    torch.nn.init.ones_(module.key.weight), torch.nn.init.zeros_(module.key.bias)
    return q, module.key(x)


def query_twice(module, x):
    return module.query(x), module.query(x)


BODIES = [change_between, no_grad_between, autocast_between, replaced_between, query_twice]
BODIES += [lambda m, x: (m.query(x), m.key(x.clone())), lambda m, x: (m.key(x), m.query(x), m.key(x + 1))]
NAMES = ["change", "no-grad", "autocast", "replaced", "twice", "another-tensor", "another-order"]


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_whoever_calls_otherwise_computes_for_itself(monkeypatch, body, calls):
    monkeypatch.setitem(projections._ONE_INPUT, f"{Twice.__module__}.Twice", ("query", "key"))
    plain, ours = Twice(body), Twice(body)
    assert fuse_projections(ours).fused == {"": ("query", "key")}
    x = torch.randn(3, 8)
    for got, want in zip(ours(x.clone()), plain(x.clone()), strict=True):
        assert_close(got, want)
        assert got.requires_grad == want.requires_grad
    assert calls == [2]


def test_nothing_outlives_a_call_not_even_after_an_error(monkeypatch):
    class Odd(Exception):
        pass

    def body(module, x):
        module.query(x)
        raise Odd

    monkeypatch.setitem(projections._ONE_INPUT, f"{Twice.__module__}.Twice", ("query", "key"))
    ours = Twice(body)
    fuse_projections(ours)
    x = torch.randn(3, 8)
    gone = weakref.ref(x)
    with pytest.raises(Odd):
        ours(x)
    assert ours.key._call is None
    del x
    assert gone() is None


def test_a_call_within_a_call(monkeypatch):
    def body(module, x, depth=0):
        q = module.query(x)
        inner = module(x + 1) if len(depths) < 2 and not depths.append(1) else 0
        return q + module.key(x) + inner

    monkeypatch.setitem(projections._ONE_INPUT, f"{Twice.__module__}.Twice", ("query", "key"))
    plain, ours, x, depths = Twice(body), Twice(body), torch.randn(3, 8), []
    fuse_projections(ours)
    expected = plain(x)
    depths.clear()
    assert_close(ours(x), expected)


def test_threads_that_share_a_model_get_their_own_outputs():
    ours, inputs = fused(), [torch.randn(2, 6, 32) for _ in range(4)]
    attention, wrong = ours.encoder.layer[0].attention.self, []
    expected = [attention(x)[0] for x in inputs]

    def work(x, y):
        for _ in range(30):
            if not torch.equal(attention(x)[0], y):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode(calls):
    ours = fused()
    expected = ours(tokens())[0]
    with torch.inference_mode():
        assert torch.equal(ours(tokens())[0], expected)
    assert calls == [3] * 4


def test_only_the_layers_with_an_adapter_share(calls):
    ours, model = built(targets=["query", "value"]), built(targets=["query", "value"])
    report = fuse_projections(ours)
    assert report.fused == {f"encoder.layer.{i}.attention.self": ("query", "value") for i in (0, 1)}
    assert report.skipped == {f"encoder.layer.{i}.attention.self.key": "is a Linear" for i in (0, 1)}
    assert "encoder.layer.0.attention.self  query, value" in str(report)
    assert_close(ours(tokens())[0], model(tokens())[0])
    assert calls == [2, 2]
    alone = fuse_projections(built(targets=["value"]))
    assert not alone.fused
    assert set(alone.skipped.values()) == {"has no other FeDeRALinear beside value"}


def test_cross_attention_and_unknown_modules_are_left_alone(calls):
    config = copy.deepcopy(CONFIGS["bert"])
    config.is_decoder, config.add_cross_attention = True, True
    model = transformers.BertModel(config)
    replace_linears(model, rank=2)
    report = fuse_projections(model)
    assert all(name.endswith("attention.self") and "cross" not in name for name in report.fused)
    reason = "is a BertCrossAttention, not known to give its projections one input"
    assert report.skipped == {f"encoder.layer.{i}.crossattention.self": reason for i in (0, 1)}
    model(tokens(), encoder_hidden_states=torch.randn(3, 5, 32)).last_hidden_state.sum().backward()
    assert calls == [3, 3]
    unknown = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"})
    replace_linears(unknown, rank=2)
    assert fuse_projections(unknown).skipped == {"": "is a ModuleDict, not known to give its projections one input"}
    assert {type(layer) for layer in unknown.values()} == {FeDeRALinear}
    assert not fuse_projections(nn.Linear(3, 3)).fused


def test_twice_is_once(calls):
    ours = fused()
    assert len(fuse_projections(ours).fused) == 2
    ours(tokens())
    assert calls == [3, 3]
    assert len(ours.encoder.layer[0].attention.self._forward_hooks) == 1
