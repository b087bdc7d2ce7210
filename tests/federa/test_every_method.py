"""Every method: two rounds on the real MiniLM, bytes as docs/methods.md has them, and what it saves."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from federa.adapters import Bottleneck
from federa.catalogue import METHODS, methods_page
from federa.checkpoint import State, load_checkpoint
from federa.combinations import MOVES
from federa.config import MethodConfig, ModelConfig, changed
from federa.errors import InputError
from federa.experiment import build
from federa.export import adapter_problem, export
from federa.folder import RunFolder
from federa.methods import adapted_layers, make_trainable
from federa.models import is_head, load_model, resolve_model
from federa.rounds import run_rounds

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
RUNS = {
    **{name: {"method": {"name": name}} for name in METHODS},
    "pfeiffer": {"method": {"name": "adapter", "adapter": "pfeiffer", "bottleneck": 8}},
    "lora-mixed": {"method": {"name": "lora", "client_ranks": [2, 4]}, "server": {"aggregation": "flexlora"}},
    "lora-flora": {"method": {"name": "lora"}, "server": {"aggregation": "flora"}},
    "federa-fedex": {"method": {"name": "federa"}, "server": {"aggregation": "fedex"}},
    "federa-refactor": {"method": {"name": "federa"}, "server": {"aggregation": "refactor-exact"}},
}
DEFAULT = (*METHODS, "federa-fedex")  # on MiniLM; exports of all of them are tested on small models


@pytest.fixture(scope="module")
def go(tiny_config, minilm_path, tmp_path_factory):
    """go(name) -> (experiment, state, records, start, folder) of two rounds of two clients, a step each, s = 2."""

    def go(name, model=minilm_path):
        sections = RUNS[name]
        sections = {
            "model": {"name": str(model)},
            "data": {"max_length": 12, "max_train": 24, "max_test": 6},
            "partition": {"scheme": "iid", "clients": 2},
            "client": {"steps": 1, "batch_size": 4, "lr": 0.01},
            "evaluation": {"every": 9},
            "method": {"rank": 4, "alpha": 8.0, "sparse_rounds": 1} | sections["method"],
            "server": {"rounds": 2, "clients_per_round": None} | sections.get("server", {}),
        }
        experiment, folder = build(changed(tiny_config, **sections)), RunFolder(tmp_path_factory.mktemp(name))
        moves = experiment.config.server.aggregation in MOVES
        start = State(0, experiment.learner.state(), base=experiment.learner.base() if moves else {})
        state = run_rounds(experiment, folder, start, lambda event, facts: None)
        return experiment, state, folder.metrics(), start, folder

    return go


def table() -> dict[str, tuple[str, str]]:
    """method -> the formulas of bytes up and down in docs/methods.md."""
    rows = re.findall(r"^\| `([a-z-]+)` \|.*?\| `(.+?)` \| `(.+?)` \|", PAGE.read_text(), re.MULTILINE)
    return {name: (up.replace("\\|", "|"), down.replace("\\|", "|")) for name, up, down in rows if name in METHODS}


def values(formula: str, round: int, config: MethodConfig, model, of_learner) -> int:
    """What a formula of the table comes to; in `A | B` A is for the odd round 1 and B for the even round 2."""
    kinds = formula.split("|")
    text = kinds[(round - 1) % len(kinds)]
    plain = {
        n: p.numel() for n, p in model.named_parameters() if not any(part in n for part in (".lora_", ".bottleneck"))
    }
    body = {n: count for n, count in plain.items() if not is_head(model, n)}
    shapes = [(layer.out_features, layer.in_features) for layer in adapted_layers(model).values()]
    if config.name == "adapter":
        shapes = [(m.bottleneck["up"].out_features, 0) for m in model.modules() if isinstance(m, Bottleneck)]
    symbols = {
        "R": config.rank,
        "q": config.density,
        "m": config.bottleneck,
        "H": sum(of_learner[n].numel() for n in of_learner if is_head(model, n)),
        "b": sum(count for n, count in body.items() if n.endswith(".bias")),
        "n": sum(count for n, count in body.items() if "LayerNorm" in n) * (config.adapter == "houlsby"),
        "P": sum(body.values()),
    }
    total = 0
    while "Σ(" in text:
        start = text.index("Σ(")
        depth, end = 1, start + 2
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        total += sum(eval(text[start + 1 : end], {"round": __builtins__["round"]}, symbols | {"N": N, "K": K})
                     for N, K in shapes)  # fmt: skip
        text = text[:start] + "0" + text[end:]
    return total + eval(text, {}, symbols)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.exhaustive) for name in RUNS]
)
def test_trains_and_counts(go, name):
    """Two rounds change every tensor that trains and no other; bytes are the table's; the state is saved whole."""
    experiment, state, records, start, folder = go(name)
    learner, config = experiment.learner, experiment.config
    trained = {n for round in (1, 2) for n in learner.names_in(round)}
    still = {n for n, tensor in state.tensors.items() if torch.equal(tensor, start.tensors[n])}
    silent = {n for n in trained if n.endswith("key.bias")}  # softmax does not feel them
    expected = {n for n in state.tensors if n.rpartition(".")[2] in ("sparse",)}
    if config.server.aggregation == "flora":
        expected = {n for n in state.tensors if n.endswith("lora_B")}
    assert still - silent - {n for n in state.tensors if "embeddings" in n} == expected
    assert all(record["train_loss"] > 0 for record in records)

    up, down = table()[config.method.name]
    count = [values(up, r, config.method, learner.model, state.tensors) for r in (1, 2)]
    received = values(down, 2, config.method, learner.model, state.tensors)
    head = values("H", 1, config.method, learner.model, state.tensors)
    shapes = [pair.shape for pair in learner.pairs.values()]
    if config.method.client_ranks:
        mixed = sum(r * (N + K) for N, K in shapes for r in (2, 4)) + 2 * head
        assert [record["bytes"]["up"] for record in records] == [4 * mixed] * 2 == [records[1]["bytes"]["down"]] * 2
    else:
        if config.server.aggregation == "flora":
            received = head + sum(min(2 * 4 * (N + K), N * K) for N, K in shapes)
        elif config.server.aggregation in MOVES:
            received += sum(min(1 * 4 * (N + K), N * K) for N, K in shapes)
        assert [record["bytes"]["up_per_client"] for record in records] == [4 * c for c in count]
        assert records[1]["bytes"]["down_per_client"] == 4 * received
        assert records[1]["bytes"]["up"] == 2 * 4 * count[1] and records[1]["bytes"]["down"] == 2 * 4 * received

    again = load_checkpoint(folder, 2, experiment.digest, learner.state())
    for group in ("tensors", "base"):
        assert getattr(again, group).keys() == getattr(state, group).keys()
        assert all(torch.equal(t, getattr(state, group)[n]) for n, t in getattr(again, group).items())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", RUNS)
def test_exports_are_the_evaluated_model(go, name, family, tiny_models, tmp_path):
    """PEFT and transformers load what is saved and give the evaluated logits; what PEFT cannot hold is refused."""
    experiment, state, *_ = go(name, tiny_models(family))
    learner, config = experiment.learner, experiment.config
    learner.load(state.tensors, state.base)
    batch = experiment.test.batch(torch.arange(6).numpy())
    ours = logits(learner.model, batch)
    loaded = []
    if adapter_problem(experiment) is None:
        export(experiment, "peft", tmp_path / "peft")
        settings = {"num_labels": 4, "pad_token_id": learner.model.config.pad_token_id}
        base = AutoModelForSequenceClassification.from_pretrained(config.model.name, **settings)
        loaded.append(PeftModel.from_pretrained(base, tmp_path / "peft"))
    else:
        with pytest.raises(InputError, match=r"--format: peft must have (adapters|a base)"):
            export(experiment, "peft", tmp_path / "peft")
    trust = {"trust_remote_code": True} if config.method.name == "adapter" else {}
    export(experiment, "merged", tmp_path / "merged")
    loaded.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", **trust))
    for model in loaded:
        theirs = logits(model, batch)
        assert (theirs - ours).norm() <= 1e-5 * ours.norm() and ours.std() > 0.01


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_as_the_pretrained_model(name, family, tiny_models):
    """In eval and train mode; what trains in a round gets a gradient, and nothing else does."""
    config = ModelConfig(name=str(tiny_models(family)))
    batch = {"input_ids": torch.tensor([[7, 80, 300, 41], [9, 10, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    model = load_model(config, resolve_model(config), ["a", "b"], 0, 0)
    before = logits(model, batch)
    learner = make_trainable(model, MethodConfig(name=name, rank=4, alpha=8.0), 0, torch.device("cpu"))
    assert (logits(learner.model, batch) - before).norm() <= 1e-5 * before.norm()
    for round in (1, 2):
        opened = learner.open(round)
        assert (
            set(opened) == set(learner.names_in(round)) == {n for n, p in model.named_parameters() if p.requires_grad}
        )
        learner.model.train()(**batch).logits.square().sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(opened)
        model.zero_grad(set_to_none=True)


def test_mean_pooled_backbones_with_bottlenecks_load(tiny_config, tiny_models, tmp_path):
    """AutoModel with the code beside it, and the head as a file."""
    model = {"name": str(tiny_models("bert")), "pooling": "mean"}
    experiment = build(changed(tiny_config, model=model, method={"name": "adapter"}))
    learner, rng = experiment.learner, torch.Generator().manual_seed(0)
    learner.load({n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in learner.state().items()})
    batch = experiment.test.batch(torch.arange(6).numpy())
    ours = logits(learner.model, batch)
    export(experiment, "merged", tmp_path / "merged")
    backbone = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    head = load_file(tmp_path / "merged" / "head.safetensors")
    with torch.no_grad():
        hidden = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    theirs = (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
    assert (theirs - ours).norm() <= 1e-5 * ours.norm()


def test_the_page_is_current():
    assert PAGE.read_text() == methods_page(), "python -m federa.catalogue > docs/methods.md"
    assert table().keys() == METHODS.keys()


def test_the_configuration_knows_every_method():
    (names,) = [MethodConfig.model_fields["name"].annotation]
    assert set(names.__args__) == METHODS.keys()
