"""Which tensors train, how they start, and the broadcast that makes every client's model the server's."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from federa.config import MethodConfig, ModelConfig
from federa.errors import InputError
from federa.methods import Broadcast, adapted_layers, make_trainable
from federa.models import load_model, resolve_model

CPU = torch.device("cpu")
# Per family: the linear layers of one block, the place of a block, and the head.
FAMILIES = {
    "bert": (
        "attention.self.query attention.self.key attention.self.value attention.output.dense "
        "intermediate.dense output.dense",
        "bert.encoder.layer.{}",
        "bert.pooler.dense.weight bert.pooler.dense.bias classifier.weight classifier.bias",
    ),
    "roberta": (
        "attention.self.query attention.self.key attention.self.value attention.output.dense "
        "intermediate.dense output.dense",
        "roberta.encoder.layer.{}",
        "classifier.dense.weight classifier.dense.bias classifier.out_proj.weight classifier.out_proj.bias",
    ),
    "distilbert": (
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2",
        "distilbert.transformer.layer.{}",
        "pre_classifier.weight pre_classifier.bias classifier.weight classifier.bias",
    ),
    "deberta-v2": (
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.self.pos_key_proj "
        "attention.self.pos_query_proj attention.output.dense intermediate.dense output.dense",
        "deberta.encoder.layer.{}",
        "pooler.dense.weight pooler.dense.bias classifier.weight classifier.bias",
    ),
    "gpt2": ("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "transformer.h.{}", "score.weight"),
}
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", ["federa", "lora"])
TOKENS = {
    "input_ids": torch.tensor([[7, 80, 300, 41, 599, 12], [9, 10, 11, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


@pytest.fixture(scope="module")
def load(tiny_models):
    def load(family="bert", **settings):
        config = ModelConfig(name=str(tiny_models(family)), **settings)
        return load_model(config, resolve_model(config), ["a", "b", "c"], 0, 0)

    return load


def learner_of(model, name="federa", seed=0, broadcast=None, **settings):
    return make_trainable(model, MethodConfig(name=name, **{"rank": 4, **settings}), seed, CPU, broadcast)


def layers_of(family: str) -> list[str]:
    layers, block, _ = FAMILIES[family]
    return [f"{block.format(index)}.{layer}" for index in range(2) for layer in layers.split()]


@families
@methods
def test_adapters_and_head_train(load, family, method):
    learner = learner_of(load(family), method)
    factors = [f"{layer}.{factor}" for layer in layers_of(family) for factor in ("lora_A", "lora_B")]
    head = FAMILIES[family][2].split()
    assert sorted(learner.trainable) == sorted(factors + head) and learner.head == set(head)
    assert set(learner.trainable) == {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert sorted(learner.broadcast.factors) == sorted(learner.broadcast.fingerprints) == sorted(layers_of(family))


@families
def test_head_only_trains_the_head(load, family):
    learner = learner_of(load(family), "head-only")
    assert sorted(learner.trainable) == sorted(FAMILIES[family][2].split()) and learner.head == set(learner.trainable)
    assert (
        not adapted_layers(learner.model)
        and learner.broadcast == Broadcast({}, {}, learner.broadcast.base)
        and learner.broadcast.bytes == 0
    )


@families
def test_full_trains_every_parameter(load, family, tiny_models):
    learner = learner_of(load(family), "full")
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_models(family))
    assert list(learner.trainable) == [name for name, _ in plain.named_parameters()]
    assert learner.head == set(FAMILIES[family][2].split())


@pytest.mark.parametrize("method", ["federa", "lora", "head-only", "full"])
def test_mean_pooling_leaves_the_pooler_out(load, method):
    """It gets no gradient, so it is neither trained nor sent."""
    learner = learner_of(load("bert", pooling="mean"), method)
    assert learner.head == {"classifier.weight", "classifier.bias"}
    assert not [name for name in learner.trainable if "pooler" in name]
    learner.model(**TOKENS).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in learner.trainable.values())


@families
@pytest.mark.parametrize("method", ["federa", "lora", "head-only", "full"])
def test_every_trainable_tensor_gets_a_gradient(load, family, method):
    learner = learner_of(load(family), method)
    learner.model(**TOKENS).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in learner.trainable.values())


@families
@methods
@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_adapters_change_no_logit_at_the_start(load, family, method, pooling):
    model = load(family, pooling=pooling)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score")):
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        before = [model.train(mode)(**TOKENS).logits for mode in (True, False)]
        learner = learner_of(model, method, alpha=7.0)
        after = [learner.model.train(mode)(**TOKENS).logits for mode in (True, False)]
    assert len(adapted_layers(model)) == len(layers_of(family))
    for one, other in zip(before, after, strict=True):
        assert one.std() > 0.01
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_rank_8_on_all_linear_layers_is_one_percent_of_roberta_base():
    """12 layers of four 768 x 768 and two 768 x 3072: 12 * 8 * (4 * 1536 + 2 * 3840) = 1,327,104 of 125 million."""
    settings = {"max_position_embeddings": 514, "type_vocab_size": 1}
    with torch.device("meta"):
        whole = RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, **settings))
    one_layer = RobertaForSequenceClassification(RobertaConfig(vocab_size=8, num_hidden_layers=1, **settings))
    learner = learner_of(one_layer, "lora", rank=8)
    adapters = 12 * sum(p.numel() for name, p in learner.trainable.items() if "lora_" in name)
    assert adapters == 1_327_104
    assert 0.0105 < adapters / sum(p.numel() for p in whole.parameters()) < 0.011


def test_lora_starts_at_zero_and_federa_at_the_principal_components(load):
    """B A s is the best rank-4 approximation of W: what it misses are the other singular values (Eckart, Young)."""
    model = load()
    weights = {name: module.weight.detach().double() for name, module in model.named_modules() if name in LAYERS}
    federa = adapted_layers(learner_of(model, "federa", alpha=2.0).model)
    for name, weight in weights.items():
        low_rank = 0.5 * federa[name].lora_B.double() @ federa[name].lora_A.double()
        missed = torch.linalg.svdvals(weight)[4:]
        assert torch.linalg.norm(weight - low_rank).item() == pytest.approx(missed.norm().item(), rel=1e-5)
    for layer in adapted_layers(learner_of(load(), "lora").model).values():
        assert not layer.lora_B.any() and layer.lora_A.abs().max() <= layer.in_features**-0.5
        assert layer.lora_A.std() > 0.4 * layer.in_features**-0.5


LAYERS = [f"bert.encoder.layer.{i}.{layer}" for i in range(2) for layer in FAMILIES["bert"][0].split()]


def test_lora_draws_depend_on_the_seed_alone(load):
    def first(seed, noise):
        torch.manual_seed(noise)
        return learner_of(load(), "lora", seed=seed).broadcast.factors[LAYERS[0]][0]

    assert torch.equal(first(0, 1), first(0, 2)) and not torch.equal(first(0, 1), first(1, 1))


def test_broadcast_bytes_by_hand(load):
    """Rank 4, per block of width 32 and 64: four 32 x 32, one 32 x 64 and one 64 x 32 layer, four bytes a number."""
    assert learner_of(load()).broadcast.bytes == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64)) * 4


def test_state_and_load(load):
    learner = learner_of(load())
    start = learner.state()
    changed = {name: tensor + 1 for name, tensor in start.items()}
    learner.load(changed)
    assert all(torch.equal(p, start[name] + 1) for name, p in learner.trainable.items())
    learner.state()["classifier.weight"].zero_()
    assert learner.trainable["classifier.weight"].any()
    learner.load(start)
    assert all(torch.equal(p, start[name]) for name, p in learner.trainable.items())


@methods
def test_broadcasts_survive_a_file_bit_for_bit(load, method, tmp_path):
    broadcast = learner_of(load(), method).broadcast
    broadcast.save(tmp_path / "init.safetensors")
    again = Broadcast.load(tmp_path / "init.safetensors")
    assert again.fingerprints == broadcast.fingerprints and again.base == broadcast.base
    assert again.factors.keys() == broadcast.factors.keys()
    for name, pair in broadcast.factors.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, again.factors[name], strict=True))


def test_an_empty_broadcast_survives_a_file(tmp_path):
    Broadcast({}, {}, "base").save(tmp_path / "init.safetensors")
    assert Broadcast.load(tmp_path / "init.safetensors") == Broadcast({}, {}, "base")


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\x02\0\0\0\0\0\0\0{}"], ids=str)
def test_broken_broadcasts_are_refused(tmp_path, content):
    file = tmp_path / "init.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="must hold the initial factors of a run"):
        Broadcast.load(file)


@families
@methods
@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
def test_a_model_built_from_the_broadcast_is_the_servers(load, family, method, residual_dtype, tmp_path):
    """Every tensor of it, bit for bit, though the client's seed for adapters is another."""
    settings = {"alpha": 7.0, "residual_dtype": residual_dtype}
    server = learner_of(load(family), method, **settings)
    server.broadcast.save(tmp_path / "init.safetensors")
    client = learner_of(load(family), method, 1, Broadcast.load(tmp_path / "init.safetensors"), **settings)
    ours, theirs = server.model.state_dict(), client.model.state_dict()
    assert ours.keys() == theirs.keys() and list(server.trainable) == list(client.trainable)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert client.broadcast.fingerprints == server.broadcast.fingerprints


@pytest.fixture(scope="module")
def broadcast(load):
    return learner_of(load()).broadcast


def test_another_base_weight_is_noticed(load, broadcast):
    """One bit of one weight."""
    model = load()
    weight = model.get_parameter(f"{LAYERS[7]}.weight").data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    with pytest.raises(InputError, match=f"^{LAYERS[7]}: the hash of its weight, factors and scaling must be the serv"):
        learner_of(model, broadcast=broadcast)


@pytest.mark.parametrize("method", ["federa", "lora", "head-only", "full"])
def test_another_embedding_is_noticed(load, method):
    """A weight that no adapter pins, whatever the method; the head, which is sent anyway, may differ."""
    broadcast = learner_of(load(), method).broadcast
    model = load()
    model.classifier.weight.data.zero_()
    assert learner_of(model, method, broadcast=broadcast).broadcast.base == broadcast.base
    model = load()
    model.bert.embeddings.word_embeddings.weight.data[3, 5] += 1e-6
    with pytest.raises(InputError, match="^model.name: must be the base model that the run began with"):
        learner_of(model, method, broadcast=broadcast)


def test_another_scaling_is_noticed(load, broadcast):
    with pytest.raises(InputError, match=f"^{LAYERS[0]}: the hash of its weight"):
        learner_of(load(), broadcast=broadcast, alpha=5.0)


def test_flipped_signs_are_noticed(load, broadcast):
    """(-B) (-A) = B A leaves the residual as it is; averaged with other clients' it would be nonsense."""
    A0, B0 = broadcast.factors[LAYERS[2]]
    flipped = replace(broadcast, factors={**broadcast.factors, LAYERS[2]: (-A0, -B0)})
    with pytest.raises(InputError, match=f"^{LAYERS[2]}: the hash of its weight"):
        learner_of(load(), broadcast=flipped)


def test_another_rank_is_noticed(load, broadcast):
    with pytest.raises(InputError, match="lora_A0 of .* must have shape .* with R=2"):
        learner_of(load(), broadcast=broadcast, rank=2)


def test_other_layers_are_noticed(load, broadcast):
    with pytest.raises(InputError, match="factors must name exactly the selected layers"):
        learner_of(load(), broadcast=broadcast, target_modules=["query"])


def test_a_method_without_adapters_refuses_factors(load, broadcast):
    with pytest.raises(InputError, match="the hash of its weight"):
        learner_of(load(), "head-only", broadcast=broadcast)


@pytest.mark.parametrize("target", [["query", "value"], r".*\.(query|value)"], ids=["suffixes", "expression"])
def test_targets_are_chosen_as_peft_chooses(load, target):
    layers = adapted_layers(learner_of(load(), target_modules=target).model)
    assert list(layers) == [
        f"bert.encoder.layer.{i}.attention.self.{kind}" for i in range(2) for kind in ("query", "value")
    ]


@pytest.mark.parametrize("method", ["federa", "head-only"])
def test_another_backbone_is_noticed_even_where_nothing_is_adapted(load, method):
    broadcast = learner_of(load(), method).broadcast
    other = load()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[7, 0] += 1
    with pytest.raises(InputError, match=r"^model\.name: must be the base model that the run began with"):
        learner_of(other, method, broadcast=broadcast)
    assert learner_of(load(), method, broadcast=broadcast).broadcast.base == broadcast.base
