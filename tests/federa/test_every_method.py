"""Every method on the real MiniLM: two rounds of training, bytes as docs/methods.md has them, and what it saves."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from federa.adapters import Bottleneck
from federa.catalogue import METHODS, methods_page
from federa.checkpoint import State, load_checkpoint
from federa.combinations import MOVES
from federa.config import MethodConfig, changed
from federa.errors import InputError
from federa.experiment import build
from federa.export import adapter_problem, export
from federa.folder import RunFolder
from federa.methods import adapted_layers
from federa.models import is_head
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


@pytest.fixture(scope="module")
def go(tiny_config, minilm_path, tmp_path_factory):
    """go(name) -> (experiment, state, records) of two rounds of two clients, a step each, s = 2."""

    def go(name):
        sections = RUNS[name]
        sections = {
            "model": {"name": str(minilm_path)},
            "data": {"max_length": 12, "max_train": 24, "max_test": 6},
            "partition": {"scheme": "iid", "clients": 2},
            "client": {"steps": 1, "batch_size": 4, "lr": 0.01},
            "evaluation": {"every": 2},
            "run": {"checkpoint_every": 9},
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


@pytest.mark.parametrize("name", RUNS)
def test_trains_counts_and_exports(go, name, tmp_path):
    """Two rounds change every tensor that trains and no other; bytes are the table's; PEFT and transformers load what is
    saved and give the evaluated logits."""
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

    learner.load(state.tensors, state.base)
    batch = experiment.test.batch(torch.arange(6).numpy())
    ours = logits(learner.model, batch)
    loaded = []
    if adapter_problem(experiment) is None:
        export(experiment, "peft", tmp_path / "peft")
        base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=4)
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


def test_the_page_is_current():
    assert PAGE.read_text() == methods_page(), "python -m federa.catalogue > docs/methods.md"
    assert table().keys() == METHODS.keys()


def test_the_configuration_knows_every_method():
    (names,) = [MethodConfig.model_fields["name"].annotation]
    assert set(names.__args__) == METHODS.keys()
