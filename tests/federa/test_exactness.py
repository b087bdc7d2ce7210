"""What a round makes of the model, against the mean of the clients' weights in float64; the faults of public code."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federa.aggregate import AGGREGATORS, Mean, Stacked, Terms, moved, server_step
from federa.checkpoint import State
from federa.client import ClientUpdate, local_steps
from federa.config import ServerConfig, changed
from federa.experiment import Experiment, build
from federa.folder import RunFolder
from federa.methods import Pair, adapted_layers
from federa.randomness import Purpose, generator
from federa.rounds import run_rounds

EXAMPLES = (5, 40, 11)  # of clients 0, 2 and 3, which alone answer

EXACT = {
    "federa-fedex": {"method": {"name": "federa"}, "server": {"aggregation": "fedex"}},
    "minor-fedex": {"method": {"name": "federa", "band": "minor"}, "server": {"aggregation": "fedex"}},
    "orthogonal-refactor": {
        "method": {"name": "federa", "band": "orthogonal"},
        "server": {"aggregation": "refactor-exact"},
    },
    "federa-flora": {"method": {"name": "federa"}, "server": {"aggregation": "flora"}},
    "federa-refactor": {"method": {"name": "federa"}, "server": {"aggregation": "refactor-exact"}},
    "lora-fedex": {"method": {"name": "lora"}, "server": {"aggregation": "fedex"}},
    "lora-flora": {"method": {"name": "lora"}, "server": {"aggregation": "flora"}},
    "lora-flora-ranks": {"method": {"name": "lora", "client_ranks": [1, 3, 2, 4]}, "server": {"aggregation": "flora"}},
    "lora-refactor": {"method": {"name": "lora"}, "server": {"aggregation": "refactor-exact"}},
    "ffa-lora": {"method": {"name": "ffa-lora"}},
    "rolora": {"method": {"name": "rolora"}},
    "fedsvd": {"method": {"name": "fedsvd"}},
    "fed-sb": {"method": {"name": "fed-sb"}},
    "slora-stage-1": {"method": {"name": "slora", "density": 0.3, "sparse_rounds": 9}},
}
INEXACT = {
    "federa": {"method": {"name": "federa"}},
    "lora": {"method": {"name": "lora"}},
    "federa-flexlora": {"method": {"name": "federa"}, "server": {"aggregation": "flexlora"}},
    "lora-flexlora": {"method": {"name": "lora"}, "server": {"aggregation": "flexlora"}},
}


def effective(experiment: Experiment, tensors: Mapping[str, torch.Tensor], base=None) -> dict[str, torch.Tensor]:
    """Every adapted layer's residual + s B A in float64, of what the learner holds with `tensors` loaded."""
    experiment.learner.load(tensors, base)
    return {
        name: layer.residual.detach().double()
        + (layer.dense().detach().double() if hasattr(layer, "dense") else 0)
        + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        for name, layer in adapted_layers(experiment.learner.model).items()
    }


class Walk:
    """Rounds whose clients, three of five with unequal data, move every trained tensor far, and what they made of it:
    expected, the mean of their weights added up from the pretrained ones; found, those of the run; X, before."""

    def __init__(self, config, folder, rounds=3, **sections):
        sections["server"] = {"rounds": rounds, "clients_per_round": None} | sections.get("server", {})
        sections["method"] = {"alpha": 8.0, "rank": 4} | sections["method"]
        self.experiment = experiment = build(changed(config, evaluation={"every": 99}, **sections))
        self.states, self.expected, self.found, self.updates = [], [], [], []
        start = State(0, experiment.learner.state(), base=experiment.learner.base())
        self.reference = effective(experiment, start.tensors)
        self.folder = RunFolder(folder)
        self.state = run_rounds(experiment, self.folder, start, lambda event, facts: None, self.train)
        self.records = self.folder.metrics()

    def train(self, experiment, state, round, clients):
        self.states.append(state)
        if round > 1:
            self.found.append(effective(experiment, state.tensors, state.base))
        begun, mean, updates = effective(experiment, state.tensors, state.base), {}, []
        for client, examples in zip((0, 2, 3), EXAMPLES, strict=True):
            rng = torch.Generator().manual_seed(100 * round + client)
            sent, start = {}, experiment.learner.start_of(state.tensors, client)
            for name in experiment.learner.names_in(round):
                noise = torch.randn(start[name].shape, generator=rng) * 0.3 * state.tensors[name].std().clamp(min=0.1)
                rank = experiment.learner.rank_of(client)
                if name.endswith("lora_A"):
                    noise[rank:] = 0
                elif name.endswith("lora_B"):
                    noise[:, rank:] = 0
                sent[name] = start[name] + noise
            for name, weight in effective(experiment, {**start, **sent}).items():
                mean[name] = mean.get(name, 0) + examples / sum(EXAMPLES) * weight
            steps = local_steps(examples, experiment.config.client)
            updates.append(ClientUpdate(client, examples, steps, sent, {"loss": 1.0}))
        self.updates.append(updates)
        self.reference = {name: self.reference[name] + mean[name] - begun[name] for name in mean}
        self.expected.append(dict(self.reference))
        experiment.learner.load(state.tensors, state.base)
        answers = {update.client: update for update in updates}
        bad = replace(updates[0], examples=0)
        return iter([answers.get(client, replace(bad, client=client)) for client in clients])

    def finish(self):
        self.found.append(effective(self.experiment, self.state.tensors, self.state.base))
        return self


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def walk(tiny_config, tiny_models, tmp_path_factory):
    def walk(family, **sections):
        config = changed(tiny_config, model={"name": str(tiny_models(family))})
        return Walk(config, tmp_path_factory.mktemp("walk"), **sections).finish()

    return walk


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("sections", EXACT.values(), ids=EXACT)
def test_exact_methods_give_the_mean_of_the_weights(walk, family, sections):
    """Three rounds in a row, s = 2, 32 x 32, 64 x 32, 32 x 64 and GPT-2's Conv1D of 32 x 96; 1e-6 of the weights."""
    run = walk(family, **sections)
    before = run.states[0].tensors, run.states[0].base
    begun = effective(run.experiment, *before)
    for found, expected in zip(run.found, run.expected, strict=True):
        assert max(gap(found[name], expected[name]) for name in expected) < 1e-6
        assert min(gap(begun[name], expected[name]) for name in expected) > 0.005  # it moved
    assert all(record["drift"] is None for record in run.records)
    assert {one.fan_in_fan_out for one in adapted_layers(run.experiment.learner.model).values()} == {family == "gpt2"}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("sections", INEXACT.values(), ids=INEXACT)
def test_others_record_how_far_they_are_off(walk, family, sections):
    """drift, against dense float64 products: the gap over all layers relative to the exact change."""
    run = walk(family, rounds=1, **sections)
    begun = effective(run.experiment, run.states[0].tensors, run.states[0].base)
    off = sum(float((run.found[0][n] - w).square().sum()) for n, w in run.expected[0].items()) ** 0.5
    change = sum(float((begun[n] - w).square().sum()) for n, w in run.expected[0].items()) ** 0.5
    assert run.records[0]["drift"] == pytest.approx(off / change, rel=1e-4)
    assert off / change > 0.01


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 6),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    scaling=st.floats(0.1, 16),
    lr=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("aggregation", ["fedex", "flora", "refactor-exact"])
def test_moves_and_factors_add_up_whatever_the_shapes(aggregation, shape, rank, weights, scaling, lr, seed):
    """W + s B A of the next round is W + s ((1 - lr) X + lr sum_c p_c B_c A_c), to 1e-12 in float64."""
    (N, K), rank = shape, min(rank, *shape)
    lr = 1.0 if aggregation == "fedex" else lr
    rng = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, torch.Tensor]:
        return {"A": torch.randn(rank, K, generator=rng).double(), "B": torch.randn(N, rank, generator=rng).double()}

    current, restart, base = draw(), draw(), {"W": torch.randn(N, K, generator=rng).double()}
    config = ServerConfig(aggregation=aggregation, lr=lr)
    gathered = AGGREGATORS[aggregation](
        Terms(config, current, [Pair("A", "B", "W", scaling, (N, K))], restart=lambda: restart)
    )
    sent = [draw() for _ in weights]
    for client, (tensors, examples) in enumerate(zip(sent, weights, strict=True)):
        gathered.add(ClientUpdate(client, examples, 1, tensors, {"loss": 1.0}))
    result = gathered.result()
    after = result.mean | result.factors
    mean = sum(n * t["B"] @ t["A"] for n, t in zip(weights, sent, strict=True)) / sum(weights)
    expected = base["W"] + scaling * ((1 - lr) * current["B"] @ current["A"] + lr * mean)
    found = moved(base, result.moves)["W"] + scaling * after["B"] @ after["A"]
    assert (found - expected).norm() <= 1e-12 * (expected.norm() + scaling * mean.norm() + 1)
    assert result.ranks["W"] <= len(weights) * rank


def test_drift_is_seen_where_products_nearly_cancel():
    """A change of 1e-4 of factors of norm 1, a gap of 1e-8: what squares in float64 would lose."""
    rng = torch.Generator().manual_seed(0)
    pair = Pair("A", "B", "residual", 0.5, (30, 20))
    current = {"A": torch.randn(4, 20, generator=rng).double(), "B": torch.randn(30, 4, generator=rng).double()}
    mean = Mean(Terms(ServerConfig(), current, [pair], drift=True))
    shares, sent = (0.25, 0.75), []
    for client, examples in enumerate((1, 3)):
        sent.append({n: t + 1e-6 * torch.randn(t.shape, generator=rng).double() for n, t in current.items()})
        mean.add(ClientUpdate(client, examples, 1, sent[-1], {"loss": 1.0}))
    deviations = [{n: one[n] - sum(p * o[n] for p, o in zip(shares, sent, strict=True)) for n in one} for one in sent]
    covariance = sum(p * d["B"] @ d["A"] for p, d in zip(shares, deviations, strict=True))
    change = sum(p * one["B"] @ one["A"] for p, one in zip(shares, sent, strict=True)) - current["B"] @ current["A"]
    assert mean.result().drift == pytest.approx(float(covariance.norm() / change.norm()), rel=1e-3)


def test_the_tolerance_drops_no_more_than_it_may(walk):
    """refactor-exact with tolerance 0.001: at most that share of the squared change of each layer, in fewer ranks."""
    tight, loose = (
        walk("bert", rounds=1, method={"name": "federa"}, server={"aggregation": "refactor-exact", "tolerance": t})
        for t in (0.0, 0.001)
    )
    begun = effective(loose.experiment, loose.states[0].tensors, loose.states[0].base)
    for name, expected in loose.expected[0].items():
        lost = (loose.found[0][name] - expected).norm() ** 2 / (begun[name] - expected).norm() ** 2
        assert 1e-12 < lost <= 0.001
    ranks = [sum(run.state.moves[0].values()) for run in (tight, loose)]
    assert ranks[0] == 12 * 2 * 4 and 0 < ranks[1] < ranks[0]


@pytest.mark.parametrize("aggregation", ["flora", "flexlora", "refactor-exact"])
def test_a_server_rate_goes_part_of_the_way(walk, aggregation):
    """lr = 0.5: halfway between X and the mean product; flexlora as near as rank 4 allows."""
    run = walk("bert", rounds=1, method={"name": "lora"}, server={"aggregation": aggregation, "lr": 0.5})
    begun = effective(run.experiment, run.states[0].tensors, run.states[0].base)
    for name, expected in run.expected[0].items():
        halfway = (begun[name] + expected) / 2
        if aggregation == "flexlora":
            missed = torch.linalg.svdvals(halfway - begun[name])[4:].norm() / halfway.norm()
            assert gap(run.found[0][name], halfway) == pytest.approx(float(missed), rel=1e-3)
        else:
            assert gap(run.found[0][name], halfway) < 1e-6


def stacked_sums(run, name: str) -> tuple[float, list[tuple[float, torch.Tensor, torch.Tensor]]]:
    """(s, [(p_c, B_c, A_c), ...]) of the first round, float64."""
    shares = [examples / sum(EXAMPLES) for examples in EXAMPLES]
    sent = [update.tensors for update in run.updates[0]]
    factors = [
        (p, t[f"{name}.lora_B"].double(), t[f"{name}.lora_A"].double()) for p, t in zip(shares, sent, strict=True)
    ]
    return adapted_layers(run.experiment.learner.model)[name].scaling, factors


SQUARE = "bert.encoder.layer.0.attention.self.query"
WIDE = "bert.encoder.layer.0.output.dense"


def test_fault_1_residuals_added_transposed_or_unweighted(walk):
    """CERT-Lab/fedex-lora transposes for nn.Linear as for Conv1D (32 x 32: no shape error) and weighs clients alike."""
    run = walk("bert", rounds=1, method={"name": "federa"}, server={"aggregation": "fedex"})
    s, factors = stacked_sums(run, SQUARE)
    B, A = (sum(p * f[i] for p, *f in factors) for i in (0, 1))
    product = sum(p * b @ a for p, b, a in factors)
    base, exact = run.states[0].base[f"{SQUARE}.residual"].double(), run.expected[0][SQUARE]
    transposed = base + s * (product - B @ A).T + s * B @ A
    alike = base + s * sum(b @ a for _, b, a in factors) / 3
    plain = base + s * B @ A
    assert gap(run.found[0][SQUARE], exact) < 1e-6
    assert gap(transposed, exact) > gap(plain, exact) > 1e-3 and gap(alike, exact) > 1e-3


@pytest.mark.parametrize("aggregation", ["fedex", "flora"])
def test_fault_2a_scaling_left_out(walk, aggregation):
    """boyi-liu/FedLLM-Factory adds B A, or the residual, to the base without alpha / r."""
    run = walk("bert", rounds=1, method={"name": "lora"}, server={"aggregation": aggregation})
    s, factors = stacked_sums(run, WIDE)
    B, A = (sum(p * f[i] for p, *f in factors) for i in (0, 1))
    product, base = sum(p * b @ a for p, b, a in factors), run.states[0].base[f"{WIDE}.residual"].double()
    unscaled = base + product if aggregation == "flora" else base + product - B @ A + s * B @ A
    assert s == 2.0 and gap(run.found[0][WIDE], run.expected[0][WIDE]) < 1e-6
    assert gap(unscaled, run.expected[0][WIDE]) > 1e-3


@pytest.mark.parametrize("aggregation", ["flexlora", "refactor-exact"])
def test_fault_2b_half_a_square_root_lost(walk, aggregation):
    """boyi-liu/FedLLM-Factory returns B = U sqrt(S) / s, A = V^T: here B A is the best rank 4 of the mean product."""
    run = walk("bert", rounds=1, method={"name": "lora"}, server={"aggregation": aggregation})
    s, factors = stacked_sums(run, WIDE)
    U, S, Vh = torch.linalg.svd(sum(p * b @ a for p, b, a in factors), full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    A, B = (run.state.tensors[f"{WIDE}.lora_{factor}"].double() for factor in "AB")
    halved = (U[:, :4] * S[:4].sqrt() / s) @ Vh[:4]
    assert gap(B @ A, best) < 1e-5 < 0.2 < gap(halved, best)
    assert B.norm() == pytest.approx(float(A.norm()), rel=1e-5)  # both have the root


def test_fault_2c_slora_switches(walk):
    """boyi-liu/FedLLM-Factory crashes there. Here the factors are the best rank 4 of the sparse change over s, and the
    sparse part is gone."""
    run = walk("bert", rounds=2, method={"name": "slora", "density": 0.3, "sparse_rounds": 1})
    layer = adapted_layers(run.experiment.learner.model)[WIDE]
    shares = [examples / sum(EXAMPLES) for examples in EXAMPLES]
    sparse = sum(p * u.tensors[f"{WIDE}.sparse"].double() for p, u in zip(shares, run.updates[0], strict=True))
    change = torch.zeros(32 * 64).double().index_add(0, layer.index, sparse).view(32, 64)
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    A, B = (run.states[1].tensors[f"{WIDE}.lora_{factor}"].double() for factor in "AB")
    assert layer.scaling == 2.0 and gap(2 * B @ A, (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-5
    assert not run.states[1].tensors[f"{WIDE}.sparse"].any()
    assert {name.rpartition(".")[2] for name in run.updates[1][0].tensors if "encoder" in name} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("aggregation", ["fedavg", "fedex", "flora", "flexlora", "refactor-exact"])
def test_fault_2d_the_start_counted_twice(walk, aggregation):
    """boyi-liu/FedLLM-Factory's ILoRA trains on W - s B0 A0 but adds factors that hold B0 A0 to W. Clients that change
    nothing leave the weights as they were pretrained."""

    class Idle(Walk):
        def train(self, experiment, state, round, clients):
            sent = {name: state.tensors[name].clone() for name in experiment.learner.names_in(round)}
            steps = local_steps(7, experiment.config.client)
            return iter([ClientUpdate(client, 7, steps, sent, {"loss": 1.0}) for client in clients])

    run = walk("bert", rounds=1, method={"name": "federa"})
    (run.folder.path / "idle").mkdir()
    idle = Idle(run.experiment.config, run.folder.path / "idle", rounds=2, method={"name": "federa"},
                server={"aggregation": aggregation}).finish()  # fmt: skip
    pretrained = effective(run.experiment, run.states[0].tensors, run.states[0].base)
    s, base = 2.0, run.states[0].base[f"{WIDE}.residual"].double()
    A0, B0 = (tensor.double() for tensor in run.experiment.learner.broadcast.factors[WIDE])
    assert (
        gap(pretrained[WIDE] + s * B0 @ A0, pretrained[WIDE]) > 0.1 and gap(base + s * B0 @ A0, pretrained[WIDE]) < 1e-7
    )
    assert max(gap(idle.found[-1][name], weight) for name, weight in pretrained.items()) < 2e-6


def test_fault_3_partial_participation_and_a_layer_as_narrow_as_the_rank():
    """ATP-1010/FederatedLLM stacks to rank r times *all* clients and knows factors by shape[0] == r. Here 2 of many
    clients answer, and a layer of 4 outputs has a lora_B of 4 x 4."""
    rng = torch.Generator().manual_seed(0)
    pair = Pair("A", "B", "residual", 3.0, (4, 6))
    shapes = {"A": (4, 6), "B": (4, 4), "head": (4, 2)}
    current = {name: torch.zeros(shape) for name, shape in shapes.items()}
    restart = {"A": torch.ones(4, 6), "B": torch.zeros(4, 4)}
    stack = Stacked(Terms(ServerConfig(aggregation="flora"), current, [pair], restart=lambda: restart))
    sent = [{name: torch.randn(shape, generator=rng) for name, shape in shapes.items()} for _ in range(2)]
    for client, (tensors, examples) in enumerate(zip(sent, (1, 3), strict=True)):
        stack.add(ClientUpdate(client * 50, examples, 1, tensors, {"loss": 1.0}))
    result = stack.result()
    left, right = result.moves["residual"]
    expected = sum(3.0 * p * t["B"].double() @ t["A"].double() for p, t in zip((0.25, 0.75), sent, strict=True))
    assert gap(left @ right, expected) < 1e-14 and result.ranks == {"residual": 8}
    assert torch.allclose(result.mean["head"], 0.25 * sent[0]["head"] + 0.75 * sent[1]["head"])
    assert (
        result.mean.keys() == {"head"} and result.factors is not None and torch.equal(result.factors["A"], restart["A"])
    )


def test_fault_4_federa_is_an_initialisation_and_no_refactoring(walk):
    """FLoRGHE's "FeDeRA" factors the mean product anew: that is flexlora. Here the factors are averaged."""
    run = walk("bert", rounds=1, method={"name": "federa"})
    _, factors = stacked_sums(run, WIDE)
    B, A = (sum(p * f[i] for p, *f in factors) for i in (0, 1))
    assert gap(run.state.tensors[f"{WIDE}.lora_B"], B) < 1e-7 and gap(run.state.tensors[f"{WIDE}.lora_A"], A) < 1e-7
    other = walk("bert", rounds=1, method={"name": "federa"}, server={"aggregation": "flexlora"})
    assert gap(other.state.tensors[f"{WIDE}.lora_B"], B) > 0.01


def test_fedsvd_gives_orthonormal_rows(walk):
    run = walk("bert", method={"name": "fedsvd"})
    A, B = (run.state.tensors[f"{WIDE}.lora_{factor}"].double() for factor in "AB")
    assert torch.allclose(A @ A.T, torch.eye(4).double(), atol=1e-6)
    gram = B.T @ B
    assert (gram - gram.diag().diag()).norm() < 1e-5 * gram.norm()


def test_flora_draws_a_new_a_each_round_of_the_seed(walk):
    run = walk("bert", method={"name": "lora"}, server={"aggregation": "flora"})
    draws = [state.tensors[f"{WIDE}.lora_A"] for state in [*run.states, run.state]]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    assert not run.state.tensors[f"{WIDE}.lora_B"].any()
    assert torch.equal(run.experiment.learner.restart(3)[f"{WIDE}.lora_A"], draws[3])


def test_mixed_ranks_train_their_own_rows_and_are_weighed_by_norm(tiny_config, tmp_path):
    """HetLoRA: zero-padded factors, averaged with weights ||B_c A_c||; real training leaves the padding at zero."""
    from federa.client import train_client

    sections = {"method": {"name": "lora", "client_ranks": [1, 4]}, "client": {"weight_decay": 0.1}}
    run = Walk(tiny_config, tmp_path, rounds=1, **sections)
    learner, name = run.experiment.learner, f"{WIDE}.lora_"
    start = {n: t + 0.1 for n, t in run.state.tensors.items()}
    trained = [
        train_client(
            learner, run.experiment.train, run.experiment.clients[c], c, 1, start, run.experiment.config
        ).tensors
        for c in (0, 1)
    ]
    assert not trained[0][name + "A"][1:].any() and not trained[0][name + "B"][:, 1:].any()
    assert trained[0][name + "A"][0].all() and trained[1][name + "A"].all()
    layers = adapted_layers(learner.model)
    norms = [
        sum(float((2 * u.tensors[f"{n}.lora_B"].double() @ u.tensors[f"{n}.lora_A"].double()).square().sum())
            for n in layers) ** 0.5
        for u in run.updates[0]
    ]  # fmt: skip
    expected = sum(w * u.tensors[name + "A"].double() for w, u in zip(norms, run.updates[0], strict=True)) / sum(norms)
    assert gap(run.state.tensors[name + "A"], expected) < 1e-6


def test_momentum_steps_from_fedexs_mean(walk):
    """The base gets the correction of the mean; the factors the optimiser's step."""
    server = {"aggregation": "fedex", "optimizer": "fedavgm", "momentum": 0.5}
    run = walk("bert", rounds=1, method={"name": "federa"}, server=server)
    plain = walk("bert", rounds=1, method={"name": "federa"}, server={"aggregation": "fedex"})
    assert all(torch.equal(run.state.base[name], tensor) for name, tensor in plain.state.base.items())
    config = ServerConfig(optimizer="fedavgm", momentum=0.5)
    expected, _ = server_step(config, run.states[0].tensors, plain.state.tensors, {})
    assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
@pytest.mark.parametrize("aggregation", ["flora", "flexlora", "refactor-exact"])
def test_optimisers_step_along_the_change_of_products(walk, aggregation, optimizer):
    """Two rounds against the optimiser on dense weights: W <- W + step(the clients' mean - W); flexlora loses what
    rank 4 cannot hold, which the next round starts from."""
    server = {"aggregation": aggregation, "optimizer": optimizer, "lr": 0.5, "momentum": 0.5}
    run = walk("bert", rounds=2, method={"name": "lora"}, server=server)
    config, memory = ServerConfig(**server), {}
    begun = effective(run.experiment, run.states[0].tensors, run.states[0].base)
    pretrained = begun
    for round in (0, 1):
        mean = {n: run.expected[round][n] - (run.expected[round - 1] if round else pretrained)[n] for n in begun}
        zero = {n: torch.zeros_like(change) for n, change in mean.items()}
        step, memory = server_step(config, zero, mean, memory)
        for name, before in begun.items():
            full = before + step[name]
            if aggregation == "flexlora":
                missed = torch.linalg.svdvals(full - pretrained[name])[4:].norm()
                assert (run.found[round][name] - full).norm() == pytest.approx(float(missed), rel=1e-3)
            else:
                assert gap(run.found[round][name], full) < 1e-6
        begun = run.found[round]
    if aggregation != "flexlora":
        assert all(sum(move.values()) == 12 * 32 for move in run.state.moves)


def test_sparse_entries_are_the_seeds(tiny_config):
    """The common random mask of SLoRA: the same in every process, others by layer and seed."""
    config = changed(tiny_config, method={"name": "slora", "density": 0.1})
    layers = adapted_layers(build(config).learner.model)
    first = generator(config.seed, Purpose.ADAPTER, step=1).choice(32 * 32, 102, replace=False)
    assert layers[SQUARE].index.tolist() == sorted(first.tolist())
    assert len({tuple(layer.index.tolist()) for layer in layers.values()}) == 12
