"""SCAFFOLD: its formulas by hand, and what it does to clients that pull apart."""

import pytest
import torch

from federa import scaffold
from federa.checkpoint import State
from federa.client import ClientUpdate, rate_sums, train_client
from federa.config import ClientConfig, changed
from federa.experiment import build
from federa.folder import RunFolder
from federa.rounds import run_rounds

SGD = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "clip_norm": None, "control_variates": True}


def test_two_rounds_by_hand():
    """Clients with losses (w - 0)^2 / 2 and (w - 4)^2 / 2, one step of rate 0.5 a round, from w = 8, ten clients known.

    Round 1: gradients 8 and 4: y = 4 and 6; c_1 = (8 - 4) / 0.5 = 8, c_2 = 4; c = 12 / 10.
    Round 2 from w = 5: corrections 1.2 - 8 and 1.2 - 4; gradients 5 and 1, y = 5 - 0.5 (5 - 6.8) and 5 - 0.5 (1 - 2.8);
    new c_i are the gradients, 5 and 1; c = 1.2 + (5 - 8 + 1 - 4) / 10.
    """
    config = ClientConfig(**SGD | {"lr": 0.5})
    state = State(1, {"w": torch.tensor([8.0])})
    assert scaffold.correction(state, 1) is None

    def send(client, value):
        return ClientUpdate(client, 1, 1, {"w": torch.tensor([value])}, {"loss": 1.0})

    fresh = {c: scaffold.new_variate(state, send(c, y), config, 1, 5, frozenset()) for c, y in ((1, 4.0), (2, 6.0))}
    assert [fresh[c]["w"].item() for c in (1, 2)] == [8.0, 4.0]
    server, variates = scaffold.advance(state, fresh, 10)
    state = State(2, {"w": torch.tensor([5.0])}, server, variates=variates)
    assert scaffold.correction(state, 1)["w"].item() == pytest.approx(1.2 - 8)
    assert scaffold.correction(state, 2)["w"].item() == pytest.approx(1.2 - 4)
    assert scaffold.correction(state, 3)["w"].item() == pytest.approx(1.2)  # never seen: c_i = 0
    sent = {1: 5 - 0.5 * (5 - 6.8), 2: 5 - 0.5 * (1 - 2.8)}
    fresh = {c: scaffold.new_variate(state, send(c, y), config, 2, 5, frozenset()) for c, y in sent.items()}
    assert fresh[1]["w"].item() == pytest.approx(5, abs=1e-5) and fresh[2]["w"].item() == pytest.approx(1, abs=1e-5)
    server, _ = scaffold.advance(state, fresh, 10)
    assert server["c.w"].item() == pytest.approx(1.2 - 0.6)


def test_rates_add_up_over_the_schedule():
    """Linear from 1 over two rounds, four steps each: the second round's factors are 0.4375, 0.3125, 0.1875, 0.0625."""
    config = ClientConfig(lr=2.0, head_lr=3.0)
    assert rate_sums(config, 2, 2, 4) == pytest.approx((2.0, 3.0))


def test_a_correction_is_added_to_every_gradient(tiny_config):
    """One step of plain SGD: y moves by - lr times the correction; a second step's gradient is another one."""
    config = changed(tiny_config, client={k: v for k, v in SGD.items() if k != "control_variates"} | {"steps": 1})
    experiment = build(config)
    learner, start = experiment.learner, experiment.learner.state()
    rng = torch.Generator().manual_seed(0)
    correction = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in start.items()}
    plain, moved = (
        train_client(learner, experiment.train, experiment.clients[0], 0, 1, start, config, shift).tensors
        for shift in (None, correction)
    )
    for name, tensor in plain.items():
        assert torch.allclose(moved[name], tensor - 0.1 * correction[name], atol=1e-6)


def test_variates_are_the_mean_gradients_and_survive_the_disk(tiny_config, tmp_path):
    """After one round c_i is (x - y_i) / sum of rates; the correction costs as much again downwards from round 2 on."""
    config = changed(tiny_config, client=SGD, server={"rounds": 2, "clients_per_round": None})
    experiment, folder = build(config), RunFolder(tmp_path)
    start = State(0, experiment.learner.state())
    state = run_rounds(experiment, folder, start, lambda event, facts: None)
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    down = [record["bytes"]["down_per_client"] for record in folder.metrics()]
    up = [record["bytes"]["up_per_client"] for record in folder.metrics()]
    assert down == [size, 2 * size] and up == [size, size]
    assert state.variates.keys() == set(range(5))
    mean = sum(state.variates[client]["classifier.weight"] for client in range(5)) / 5
    assert torch.allclose(state.server["c.classifier.weight"], mean, atol=1e-6)


@pytest.mark.parametrize("variates", [False, True])
def test_many_local_steps_reach_the_common_optimum(variates):
    """Losses h_i (w - t_i)^2 / 2 with h = 1, 9 and t = 0, 1: the best w of both is 0.9. Thirty local steps a round
    bring each client to its own: averages settle at 1 / (1 + 1 - 0.95^30) = 0.56. With variates they reach 0.9."""
    config, h, t = ClientConfig(**SGD | {"lr": 0.05}), {0: 1.0, 1: 9.0}, {0: 0.0, 1: 1.0}
    state = State(0, {"w": torch.tensor([3.0]).double()})
    for round in range(1, 101):
        sent, fresh = {}, {}
        for client in (0, 1):
            shift = scaffold.correction(state, client) if variates else None
            w = state.tensors["w"].clone()
            for _ in range(30):
                w -= 0.05 * (h[client] * (w - t[client]) + (shift["w"] if shift else 0.0))
            sent[client] = ClientUpdate(client, 1, 30, {"w": w}, {"loss": 1.0})
            fresh[client] = scaffold.new_variate(state, sent[client], config, round, 100, frozenset())
        server, known = scaffold.advance(state, fresh, 2)
        mean = (sent[0].tensors["w"] + sent[1].tensors["w"]) / 2
        state = State(round, {"w": mean}, server if variates else {}, variates=known)
    assert state.tensors["w"].item() == pytest.approx(0.9 if variates else 0.56, abs=0.02 if not variates else 1e-6)
