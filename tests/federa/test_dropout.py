"""Masks by counters: the words against SplitMix64 in Python's own integers, their statistics, and models in float64."""

import copy
import math
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from federa.client import train_client
from federa.config import changed
from federa.dropout import Counters, Dropout, count_dropout, step_keys
from federa.experiment import build
from federa.packing import pack_encoder

CPU = torch.device("cpu")
GAMMA = 0x9E3779B97F4A7C15
LENGTHS = np.array([3, 7, 1, 4, 4])
SIZE = {"vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3}
USUAL = {"hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {
    "bert": hf.BertConfig(**SIZE, **USUAL, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0),
    "roberta": hf.RobertaConfig(**SIZE, **USUAL, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0),
    "distilbert": hf.DistilBertConfig(
        **SIZE, dim=18, n_layers=2, n_heads=2, hidden_dim=24, dropout=0.3, attention_dropout=0.0
    ),
    "gpt2": hf.GPT2Config(**SIZE, n_embd=18, n_layer=2, n_head=2, attn_pdrop=0.0),
}


def splitmix64(state: int, output: int) -> int:
    """The generator's `output`-th number, counted from 1."""
    z = (state + output * GAMMA) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def dropped(p: float, key: int, batch: int, call: int, place: tuple[int, int], column: int) -> bool:
    """As the module's first lines have it; place: number of the example and position in it."""
    stream = splitmix64(key, (batch << 44) + (place[0] << 20) + place[1])
    bits = splitmix64(stream, (call << 20) + column // 4) >> 16 * (column % 4) & 0xFFFF
    return (bits ^ 0x8000) < round(p * 2**16)  # in the order of signed numbers


def model_of(family: str):
    """A small model in float64, in training, with attention's dropout off."""
    torch.manual_seed(0)
    return hf.AutoModelForSequenceClassification.from_config(SMALL[family]).double().train()


def batch_of(lengths=LENGTHS):
    mask = (torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]).long()
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def masks(shape, *where, p=0.5, calls=1) -> list[torch.Tensor]:
    """Of an only client, in the first calls of a forward over examples of 5 tokens."""
    counters = Counters(CPU)
    with counters.counting(*where, [shape[0]], np.full(shape[0], 5)):
        return [counters.dropped(torch.Size(shape), p) for _ in range(calls)]


def test_the_generator_is_splitmix64():
    """The published first numbers of seed 1234567."""
    assert [splitmix64(1234567, n) for n in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3),
    batch=st.integers(0, 1000),
    counts=st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any),
    width=st.integers(1, 9),
    p=st.floats(0.001, 0.999),
    data=st.data(),
)
def test_masks_are_the_formula(keys, batch, counts, width, p, data):
    """Of padded tokens, packed tokens and examples of several clients; and no element depends on the others."""
    counts = counts[: len(keys)] if any(counts[: len(keys)]) else [1] * len(keys)
    lengths = np.array(data.draw(st.lists(st.integers(1, 5), min_size=sum(counts), max_size=sum(counts))))
    places = [(key, number) for key, count in zip(keys, counts, strict=True) for number in range(count)]
    counters, (E, T) = Counters(CPU), (len(lengths), int(lengths.max()))

    def expected(call, rows):
        return torch.tensor([[dropped(p, k, batch, call, (n, t), j) for j in range(width)] for k, n, t in rows])

    with counters.counting(keys, batch, counts, lengths):
        padded, packed, examples = (
            counters.dropped(torch.Size(shape), p) for shape in [(E, T, width), (1, lengths.sum(), width), (E, width)]
        )
    real = [(key, number, t) for (key, number), length in zip(places, lengths, strict=True) for t in range(length)]
    own = torch.arange(T) < torch.from_numpy(lengths)[:, None]
    assert torch.equal(padded[own], expected(0, real))
    assert torch.equal(packed[0], expected(1, real))
    assert torch.equal(examples, expected(2, [(key, number, 0) for key, number in places]))


def test_rates_are_as_asked():
    """Within five standard errors, over all elements, over each row and over each column; what stays is scaled up."""
    for p in (0.1, 0.5, 0.9):
        (mask,) = masks((400, 5, 256), [3], 0, p=p)
        for share in (mask.double().mean(), mask.double().mean((0, 1)), mask.double().mean(2)):
            count = mask.numel() / share.numel()
            # five standard errors; six where the worst of two thousand shares is meant
            assert (share - p).abs().max() < (5 + (share.numel() > 1)) * math.sqrt(p * (1 - p) / count)
    layer = Dropout(0.25)
    layer.counters = Counters(CPU)
    x = torch.randn(400, 5, 64, dtype=torch.float64)
    with layer.counters.counting([3], 0, [400], np.full(400, 5)):
        y = layer(x)
    assert torch.equal(y[y != 0], x[y != 0] * (4 / 3)) and abs((y == 0).double().mean() - 0.25) < 0.006


def test_masks_are_independent(tiny_config):
    """Between seeds, rounds, clients, steps, batches of a step, calls, examples, positions and columns: no correlation
    beyond five standard errors, in any pair."""
    config = changed(tiny_config, model={"dropout": 0.5})
    shape = (100, 5, 64)
    key = step_keys(config, 1, [0], 0)
    others = [
        step_keys(config.model_copy(update={"seed": 1}), 1, [0], 0),
        step_keys(config, 2, [0], 0),
        step_keys(config, 1, [1], 0),
        step_keys(config, 1, [0], 1),
    ]
    first = masks(shape, key, 0, calls=4)
    everything = [*first, *masks(shape, key, 1), *(masks(shape, other, 0)[0] for other in others)]
    everything += [first[0].roll(1, dim) for dim in range(3)]
    signs = torch.stack([mask.flatten() for mask in everything]).double() * 2 - 1
    correlations = (signs @ signs.T) / signs.shape[1]
    worst = max(abs(correlations[i, j]) for i, j in combinations(range(len(signs)), 2))
    assert worst < 5 / math.sqrt(signs.shape[1])


class Explicit(nn.Module):
    """Dropout by masks that are given one after another."""

    def __init__(self, p: float, given: list[torch.Tensor]):
        super().__init__()
        self.p, self.given = p, given

    def forward(self, x):
        return x * self.given.pop(0) / (1 - round(self.p * 2**16) / 2**16)


@pytest.mark.parametrize("family", SMALL)
def test_gradients_are_those_of_explicit_masks(family):
    """Logits and every gradient, against transformers' padded model in which each nn.Dropout multiplies by a mask;
    packed and padded."""
    counted, batch, given = model_of(family), batch_of(), []
    plain, packed = copy.deepcopy(counted), copy.deepcopy(counted)
    for name, module in list(plain.named_modules()):
        if type(module) is nn.Dropout and module.p > 0:
            plain.set_submodule(name, Explicit(module.p, given))
    models = {"counted": counted} | ({"packed": packed} if pack_encoder(packed) else {})
    assert ("packed" in models) == (family != "gpt2")
    results = {}
    for name, model in models.items():
        counters = count_dropout(model, CPU)
        own = counters.dropped

        def record(shape, p, copies, own=own, keep=name == "counted"):
            mask = own(shape, p, copies)
            given.extend([(~mask).double()] * keep)
            return mask

        counters.dropped = record
        with counters.counting([11, 5, 8], 2, [2, 2, 1], LENGTHS):
            results[name] = model(**batch).logits
    assert len(given) >= 4
    exact = plain(**batch).logits
    assert not given
    exact.square().sum().backward()
    for name, logits in results.items():
        # float64, summed in another order; gradients pass through all layers
        assert torch.allclose(logits, exact, rtol=1e-11, atol=1e-11)
        logits.square().sum().backward()
        gradients = {n: p.grad for n, p in models[name].named_parameters() if p.grad is not None}
        for parameter, tensor in plain.named_parameters():
            if tensor.grad is not None:
                assert torch.allclose(gradients[parameter], tensor.grad, rtol=1e-9, atol=1e-11), parameter  # as above


@pytest.mark.parametrize("family", SMALL)
def test_evaluation_and_strangers_are_left_alone(family):
    """No mask in eval mode; torch's own where nobody counts; its generator is left where it was."""
    model = model_of(family)
    counters, batch = count_dropout(model, CPU), batch_of()
    state = torch.get_rng_state()
    with counters.counting([1], 0, [5], LENGTHS):
        evaluated = model.eval()(**batch).logits
        first = model.train()(**batch).logits
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(evaluated, model.eval()(**batch).logits) and not torch.equal(evaluated, first)
    once, again = (model.train()(**batch).logits for _ in range(2))
    assert not torch.equal(once, again)


@pytest.mark.parametrize("family", SMALL)
def test_families_that_draw_nothing_else(family):
    """No mask of theirs comes from torch's generator, unless attention's dropout is on."""
    model = model_of(family)
    counters = count_dropout(model, CPU)
    assert counters.cover(model) and model.training
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    assert not counters.cover(model.eval()) and not model.training


def test_functional_dropout_is_found_out():
    """OPT's is no module."""
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
        "word_embed_proj_dim": 16,
    }
    for rate in (0.0, 0.1):
        model = hf.OPTForSequenceClassification(hf.OPTConfig(**SIZE, **size, dropout=rate))
        assert count_dropout(model, CPU).cover(model) == (rate == 0)


def test_updates_follow_the_counters(tiny_config):
    """The same twice, with torch's generator elsewhere; another client, round or seed gets other masks on the same
    batches."""
    client = {"optimizer": "sgd", "lr": 0.5, "schedule": "constant", "steps": 1, "batch_size": 16}
    config = changed(tiny_config, model={"dropout": 0.3}, client=client)
    experiment = build(config)
    start = experiment.learner.state()

    def classifier(client=0, round=1, seed=0) -> torch.Tensor:
        used, indices = config.model_copy(update={"seed": seed}), np.arange(16)
        update = train_client(experiment.learner, experiment.train, indices, client, round, start, used)
        return update.tensors["classifier.weight"]

    torch.manual_seed(1)
    first = classifier()
    torch.manual_seed(2)
    assert torch.equal(first, classifier())
    for other in (classifier(client=1), classifier(round=2), classifier(seed=1)):
        assert (other - first).norm() > 0.05 * (first - start["classifier.weight"]).norm()
