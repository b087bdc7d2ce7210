"""Runs whose frozen weights or trained tensors change by the round: resumed, caught up with, scored and saved."""

import pytest
import torch

from federa import load_config, resume, run
from federa.checkpoint import State
from federa.config import changed
from federa.errors import InputError
from federa.experiment import build
from federa.export import export
from federa.folder import RunFolder
from federa.methods import adapted_layers
from federa.rounds import run_rounds
from federa.rounds import test_scores as final_scores
from federa.simulation import restore

RUNS = {
    "fedex": {"server": {"aggregation": "fedex"}},
    "fedex-momentum": {"server": {"aggregation": "fedex", "optimizer": "fedavgm"}},
    "flora": {"method": {"name": "lora"}, "server": {"aggregation": "flora"}},
    "refactor": {"server": {"aggregation": "refactor-exact", "tolerance": 0.01}},
    "fedsvd": {"method": {"name": "fedsvd"}},
    "rolora-adam": {"method": {"name": "rolora"}, "server": {"optimizer": "fedadam"}},
    "slora": {"method": {"name": "slora", "sparse_rounds": 2, "density": 0.2}},
    "fed-sb": {"method": {"name": "fed-sb"}},
    "adapter": {"method": {"name": "adapter"}},
    "scaffold": {"client": {"optimizer": "sgd", "lr": 0.1, "control_variates": True}},
}


def final_state(folder) -> bytes:
    files = RunFolder(folder)
    return (files.checkpoints / f"round-{files.result()['rounds']:05d}" / "state.safetensors").read_bytes()


ELSEWHERE = pytest.mark.exhaustive  # the others have all that these have
DEFAULT = ("fedex", "flora", "slora", "rolora-adam", "scaffold")


@pytest.mark.parametrize(
    "sections",
    [pytest.param(sections, id=name, marks=() if name in DEFAULT else ELSEWHERE) for name, sections in RUNS.items()],
)
def test_a_stopped_run_ends_as_one_never_stopped(tiny_config, tmp_path, sections):
    """Interrupted after round 2 of 3 and taken up in a fresh learner: the same tensors, records and scores."""
    config = changed(tiny_config, **sections)

    def stop(event, facts):
        if event == "round" and facts["round"] == 2:
            raise KeyboardInterrupt

    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", watch=stop)
    taken_up = resume(tmp_path / "stopped")
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "stopped")
    assert whole.test == taken_up.test and whole.best == taken_up.best
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in one.records] for one in (whole, taken_up)]
    assert strip[0] == strip[1]
    experiment, state = restore(tmp_path / "stopped")
    assert final_scores(experiment) == whole.test and state.round == 3
    moves = config.server.aggregation != "fedavg"
    assert (whole.adapter is None) == (moves or config.method.name == "adapter")
    assert bool(state.base) == bool(state.moves) == moves


def test_earlier_rounds_come_back_with_their_own_base(tiny_config, tmp_path):
    """Scores of a saved round are those it had, though the base has moved on; the layers really differ."""
    config = changed(tiny_config, server={"aggregation": "fedex"}, evaluation={"test_every": 1}, client={"lr": 0.05})
    finished = run(config, tmp_path / "run")
    weights = []
    for round in (2, 3):
        experiment, _ = restore(tmp_path / "run", round)
        scores = final_scores(experiment)
        assert scores == pytest.approx({key: finished.records[round]["test"][key] for key in scores})
        weights.append([layer.residual.clone() for layer in adapted_layers(experiment.learner.model).values()])
    assert not any(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def records_of(config, folder):
    experiment = build(config)
    start = State(0, experiment.learner.state(), base=experiment.learner.base())
    folder = RunFolder(folder)
    run_rounds(experiment, folder, start, lambda event, facts: None)
    return experiment, folder.metrics()


@pytest.mark.parametrize("aggregation", ["fedex", "flora"])
def test_absent_clients_receive_all_they_missed(tiny_config, tmp_path, aggregation):
    """Two of five clients a round for eight rounds, rank 4. A layer's moves since a client was there last come as the
    factors of each, rank (C - 1) R or C R, or as one dense change, whichever is smaller."""
    server = {"aggregation": aggregation, "rounds": 8, "clients_per_round": 2}
    config = changed(tiny_config, server=server, evaluation={"every": 99}, method={"name": "lora"})
    experiment, records = records_of(config, tmp_path)
    shapes = 2 * [(32, 32)] * 4 + 2 * [(64, 32), (32, 64)]
    head = 32 * 32 + 32 + 4 * 32 + 4
    factors = 4 * sum(N + K for N, K in shapes)
    size = head + factors
    last: dict[int, int] = {}
    for record in records:
        rank = 4 if aggregation == "fedex" else 8
        sent = 0
        for client in record["sampled"]:
            missed = record["round"] - last.get(client, 1)
            sent += (size if aggregation == "fedex" else head) + sum(
                min(missed * rank * (N + K), N * K) for N, K in shapes
            )
            last[client] = record["round"]
        assert record["bytes"]["down"] == 4 * sent and record["bytes"]["up"] == 2 * 4 * size
    assert len(last) > 2 and sum(pair.shape[0] for pair in experiment.learner.pairs.values()) == sum(
        N for N, _ in shapes
    )


def test_rolora_sends_the_halves_that_a_client_missed(tiny_config, tmp_path):
    """B changes in odd rounds and A in even ones: a client back after one round needs one of them, later both."""
    config = changed(tiny_config, server={"rounds": 8}, evaluation={"every": 99}, method={"name": "rolora"})
    _, records = records_of(config, tmp_path)
    shapes = 2 * [(32, 32)] * 4 + 2 * [(64, 32), (32, 64)]
    head, A, B = 32 * 32 + 32 + 4 * 32 + 4, 4 * sum(K for _, K in shapes), 4 * sum(N for N, _ in shapes)
    last: dict[int, int] = {}
    for record in records:
        sent = 0
        for client in record["sampled"]:
            rounds = range(last[client], record["round"]) if client in last else range(2)
            sent += head + B * any(r % 2 for r in rounds) + A * any(r % 2 == 0 for r in rounds)
            last[client] = record["round"]
        assert record["bytes"]["down"] == 4 * sent


@pytest.mark.parametrize(("method", "aggregation"), [("federa", "fedex"), ("slora", "fedavg")])
def test_what_no_adapter_can_hold_is_refused_and_saved_otherwise(
    tiny_config, tiny_models, tmp_path, method, aggregation
):
    """A moved base, or SLoRA's first stage: residual and merged exports give the evaluated logits."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = changed(
        tiny_config,
        method={"name": method, "sparse_rounds": 9},
        server={"aggregation": aggregation},
        client={"lr": 0.02},
    )
    run(config, tmp_path / "run")
    experiment, _ = restore(tmp_path / "run")
    batch = experiment.test.batch(torch.arange(6).numpy())
    del batch["labels"]
    with torch.no_grad():
        ours = experiment.learner.model.eval()(**batch).logits
    with pytest.raises(InputError, match="--format: peft must .*; use --format merged or residual"):
        export(experiment, "peft", tmp_path / "peft")
    export(experiment, "residual", tmp_path / "residual")
    export(restore(tmp_path / "run")[0], "merged", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "residual" / "base")
    for model in (merged, PeftModel.from_pretrained(base, tmp_path / "residual" / "adapter")):
        with torch.no_grad():
            assert (model.eval()(**batch).logits - ours).norm() <= 1e-5 * ours.norm()


FEDEX, SGD = {"aggregation": "fedex"}, {"optimizer": "sgd"}
BAD = {
    "products of one factor": ({"method": {"name": "ffa-lora"}, "server": FEDEX}, "must be fedavg or one of median"),
    "bfloat16 base": ({"method": {"residual_dtype": "bfloat16"}, "server": FEDEX}, "must be float32 for server.agg"),
    "rate of fedex": ({"server": FEDEX | {"lr": 0.5}}, "server.lr must be 1 for server.aggregation fedex"),
    "Adam over fedsvd": (
        {"method": {"name": "fedsvd"}, "server": {"optimizer": "fedavgm"}},
        "server.optimizer must be fedavg for method.name fedsvd, got fedavgm",
    ),
    "ranks of federa": ({"method": {"client_ranks": [2]}}, "method.client_ranks must be null for method.name federa"),
    "ranks too high": (
        {"method": {"name": "lora", "rank": 4, "client_ranks": [2, 8]}},
        "method.client_ranks must be at most method.rank = 4, got 8",
    ),
    "ranks and fedex": (
        {"method": {"name": "lora", "client_ranks": [2]}, "server": FEDEX},
        "method.client_ranks must be null for server.aggregation fedex",
    ),
    "variates with Adam": ({"client": {"control_variates": True}}, "client.optimizer must be sgd without momentum"),
    "variates that change meaning": (
        {"client": SGD | {"control_variates": True}, "method": {"name": "rolora"}},
        "client.control_variates must be false for method.name rolora",
    ),
    "variates at no rate": ({"client": SGD | {"control_variates": True, "lr": 0}}, "client.lr must be above 0"),
    "privacy of products": ({"privacy": {"clip": 1.0}, "server": FEDEX}, "privacy.clip must be null for server.aggreg"),
    "privacy and variates": (
        {"privacy": {"clip": 1.0}, "client": SGD | {"control_variates": True}},
        "privacy.clip must be null with client.control_variates",
    ),
    "unknown aggregation": ({"server": {"aggregation": "fedxe"}}, "got 'fedxe'; did you mean fedex?"),
    "unknown method": ({"method": {"name": "ffalora"}}, "got 'ffalora'; did you mean ffa-lora?"),
}


@pytest.mark.parametrize(("sections", "message"), BAD.values(), ids=BAD)
def test_combinations_that_cannot_work_say_why(sections, message):
    with pytest.raises(InputError) as caught:
        load_config(sections)
    assert message in str(caught.value) and str(caught.value).startswith("config: ") and "\n" not in str(caught.value)


def test_methods_without_a_place_in_a_model_say_so():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from federa.config import MethodConfig
    from federa.methods import make_trainable

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, **size))
    with pytest.raises(InputError, match="bitfit trains biases and this model has none"):
        make_trainable(model, MethodConfig(name="bitfit"), 0, torch.device("cpu"))
    learner = make_trainable(model, MethodConfig(name="adapter", bottleneck=4), 0, torch.device("cpu"))
    assert sum(".bottleneck.down.weight" in name for name in learner.trainable) == 2
    assert {name for name in learner.trainable if "norm" in name} == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }
