"""Encoders over packed tokens, against transformers' own forward over padded ones, in float64."""

import copy

import pytest
import torch
import transformers as hf

from federa.packing import Packing, pack_encoder

SIZE = {"vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3}
USUAL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {
    "bert": hf.BertConfig(**SIZE, **USUAL),
    "roberta": hf.RobertaConfig(**SIZE, **USUAL),
    "xlm-roberta": hf.XLMRobertaConfig(**SIZE, **USUAL),
    "camembert": hf.CamembertConfig(**SIZE, **USUAL),
    "electra": hf.ElectraConfig(**SIZE, **USUAL, embedding_size=8),
    "distilbert": hf.DistilBertConfig(**SIZE, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
}


def model_of(config):
    torch.manual_seed(0)
    return hf.AutoModelForSequenceClassification.from_config(copy.deepcopy(config)).double().eval()


def batch_of(lengths):
    rng = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 50, mask.shape, generator=rng) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [[3, 3, 7, 1], [5, 5], [9], [2, 9, 4, 4, 4]], ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_packed_is_padded(family, lengths):
    """Logits and every gradient, whatever the padding; in float64, where another order of sums shows in 1e-11."""
    plain = model_of(SMALL[family])
    packed = copy.deepcopy(plain)
    assert pack_encoder(packed)
    batch = batch_of(lengths)
    for model in (plain, packed):
        model(**batch).logits.square().sum().backward()
    # float64, summed in another order; gradients pass through all layers
    assert torch.allclose(packed(**batch).logits, plain(**batch).logits, rtol=1e-11, atol=1e-11)
    gradients = {name: p.grad for name, p in packed.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11), name  # as above


def test_layers_see_no_padding():
    model = model_of(SMALL["bert"])
    pack_encoder(model)
    shapes = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    hidden = model.bert(**batch_of([2, 7, 3])).last_hidden_state
    assert shapes == [(1, 12, 16)] * 2
    assert hidden.shape == (3, 7, 16) and not hidden[0, 2:].any() and hidden[1].any(1).all()


@pytest.mark.parametrize("family", SMALL)
def test_only_first_tokens_leave_the_last_attention(family):
    """Where the classifier reads no others. A backbone by itself gives all, before, after and after an error."""
    model = model_of(SMALL[family])
    plain = copy.deepcopy(model)
    pack_encoder(model)
    model, rows = copy.deepcopy(model), []  # the hooks of a copy are its own
    backbone = model.base_model
    last = backbone.transformer.layer[-1].ffn if family == "distilbert" else backbone.encoder.layer[-1].output
    last.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    batch = batch_of([2, 7, 3])
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 100, attention_mask=batch["attention_mask"])
    for _ in range(2):
        hidden = [own.base_model(**batch).last_hidden_state for own in (model, plain)]
        real = batch["attention_mask"].bool()
        assert torch.allclose(hidden[0][real], hidden[1][real], rtol=1e-11, atol=1e-11)  # float64, other order
        assert torch.allclose(model(**batch).logits, plain(**batch).logits, rtol=1e-11, atol=1e-11)  # the same
    assert rows == ([12, 12] if family == "distilbert" else [12, 3]) * 2


@pytest.mark.parametrize("head", ["AutoModelForTokenClassification", "AutoModelForQuestionAnswering"])
def test_heads_that_read_all_tokens_get_them(head):
    torch.manual_seed(0)
    model = getattr(hf, head).from_config(hf.BertConfig(**SIZE | {"num_labels": 2}, **USUAL)).double().eval()
    packed = copy.deepcopy(model)
    pack_encoder(packed)
    batch = batch_of([2, 7, 3])
    real = batch["attention_mask"].bool()
    for found, wanted in zip(packed(**batch).to_tuple(), model(**batch).to_tuple(), strict=True):
        assert torch.allclose(found[real], wanted[real], rtol=1e-11, atol=1e-11)  # float64


@pytest.mark.parametrize("family", ["deberta-v2", "gpt2"])
def test_other_models_are_left_alone(tiny_models, family):
    model = hf.AutoModelForSequenceClassification.from_pretrained(tiny_models(family))
    before = model.config._attn_implementation
    assert not pack_encoder(model) and model.config._attn_implementation == before


def test_packing_by_hand():
    packing = Packing.of(torch.tensor([[True, True, False], [True, False, False]]))
    assert packing.places.tolist() == [0, 1, 3] and packing.lengths == (2, 1)
    rows = torch.arange(12.0).view(2, 3, 2)
    packed = packing.pack(rows)
    assert packed.tolist() == [[[0, 1], [2, 3], [6, 7]]]
    assert packing.unpack(packed).tolist() == [[[0, 1], [2, 3], [0, 0]], [[6, 7], [0, 0], [0, 0]]]
    assert packing.firsts.tolist() == [0, 2] and packing.unpack(packed[:, :2]).tolist() == [[[0, 1]], [[2, 3]]]
    lonely = Packing.of(torch.tensor([[True, True], [False, False]]))  # as many tokens as examples
    assert lonely.unpack(packed[:, :2]).tolist() == [[[0, 1], [2, 3]], [[0, 0], [0, 0]]]
