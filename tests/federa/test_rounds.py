"""The round loop: whom it samples, what it makes of their updates, what it scores, counts and records."""

import gc
import weakref

import numpy as np
import pytest
import torch

from federa.checkpoint import State, checkpoint_rounds
from federa.client import ClientUpdate, train_client
from federa.config import changed, config_digest
from federa.experiment import build
from federa.folder import RunFolder
from federa.randomness import Purpose, generator
from federa.rounds import Gathering, client_durations, evaluate_round, run_rounds
from federa.rounds import test_scores as final_scores
from federa.tasks import Predictions, client_scores, mean_features, predict, score


def silent(event, facts):
    pass


@pytest.fixture(scope="module")
def go(tiny_config, tmp_path_factory):
    """go(**sections) -> (experiment, final state, records, start) of a run of the rounds alone."""

    def go(watch=silent, **sections):
        experiment = build(changed(tiny_config, **sections))
        folder = RunFolder(tmp_path_factory.mktemp("rounds"))
        start = experiment.learner.state()
        state = run_rounds(experiment, folder, State(0, start), watch)
        return experiment, state, folder.metrics(), start

    return go


@pytest.fixture(scope="module")
def usual(go):
    return go()


def test_one_round_is_the_weighted_mean_of_its_clients(go):
    """Each client trained again from the start, averaged here in float64: the same bits."""
    experiment, state, (record,), start = go(server={"rounds": 1, "clients_per_round": 3})
    assert record["sampled"] == record["completed"] == sorted(record["sampled"]) and len(record["sampled"]) == 3
    updates = [
        train_client(experiment.learner, experiment.train, experiment.clients[c], c, 1, start, experiment.config)
        for c in record["sampled"]
    ]
    sizes = [len(experiment.clients[c]) for c in record["sampled"]]
    assert [update.examples for update in updates] == sizes and len(set(sizes)) > 1
    for name, tensor in state.tensors.items():
        total = sum(n * u.tensors[name].double() for n, u in zip(sizes, updates, strict=True))
        assert torch.equal(tensor, (total / sum(sizes)).float()), name
    assert record["examples"] == sum(sizes) and record["steps"] == sum(update.steps for update in updates)
    mean_loss = np.average([update.metrics["loss"] for update in updates], weights=sizes)
    assert record["train_loss"] == pytest.approx(mean_loss, rel=1e-12)
    moved = torch.cat([(state.tensors[n].double() - start[n].double()).flatten() for n in start]).norm()
    assert record["update_norm"] == pytest.approx(moved.item(), rel=1e-12)
    assert record["lr"] == pytest.approx(1e-3 * 0.5)  # linear schedule, middle of the only round


def test_rounds_build_on_each_other(usual):
    """Three rounds, each client trained again from the mean of the round before."""
    experiment, state, records, start = usual
    tensors = start
    for record in records:
        updates = [
            train_client(experiment.learner, experiment.train, experiment.clients[c], c, record["round"], tensors,
                         experiment.config)
            for c in record["completed"]
        ]  # fmt: skip
        weight = sum(update.examples for update in updates)
        tensors = {
            name: (sum(u.examples * u.tensors[name].double() for u in updates) / weight).float() for name in tensors
        }
    assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)


def test_sampling_is_a_function_of_seed_and_round(usual):
    experiment, _, records, _ = usual
    for record in records:
        rng = generator(experiment.config.seed, Purpose.SAMPLING, round=record["round"], step=0)
        assert record["sampled"] == sorted(rng.choice(5, 2, replace=False).tolist())
    assert [record["round"] for record in records] == [1, 2, 3]


def test_all_clients_are_sampled_by_default(go):
    _, _, (record,), _ = go(server={"rounds": 1, "clients_per_round": None})
    assert record["sampled"] == [0, 1, 2, 3, 4]


def test_bytes_by_hand(usual):
    """Rank 4 on two blocks of tiny BERT, its pooler (32 * 32 + 32) and its classifier (4 * 32 + 4), four bytes each."""
    _, state, records, start = usual
    adapters = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    size = 4 * (adapters + 32 * 32 + 32 + 4 * 32 + 4)
    assert sum(tensor.nbytes for tensor in start.values()) == size
    seen, total = set(), 0
    for record in records:
        fresh = set(record["sampled"]) - seen
        seen |= fresh
        expected = {"up_per_client": size, "down_per_client": size, "up": 2 * size, "down": 2 * size}
        expected["broadcast"] = 4 * adapters * len(fresh)
        total += 4 * size + expected["broadcast"]
        assert record["bytes"] == expected | {"total": total}
    last = {client: max(r["round"] for r in records if client in r["sampled"]) for client in seen}
    assert state.seen == last and state.bytes_total == total


def test_dropped_clients_get_the_tensors_and_send_nothing(go):
    experiment, state, records, _ = go(
        server={"rounds": 4, "clients_per_round": 4}, failures={"dropout": 0.4}, method={"name": "head-only"}
    )
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    assert any(record["dropped"] for record in records)
    for record in records:
        assert sorted(record["completed"] + record["dropped"]) == record["sampled"] or record["attempts"] > 1
        if record["attempts"] == 1:
            assert record["bytes"]["up"] == size * len(record["completed"])
            assert record["bytes"]["down"] == size * 4 and record["bytes"]["broadcast"] == 0
        rng = [generator(0, Purpose.FAILURE, round=record["round"], client=c, step=0) for c in record["sampled"]]
        if record["attempts"] == 1:
            assert record["dropped"] == [c for c, r in zip(record["sampled"], rng, strict=True) if r.random() < 0.4]
    assert experiment.clients_per_round == 4


def test_slow_clients_miss_the_deadline(go):
    """Expected time: local steps times exp(0.5 z) with the client's own z; the limit is the median client's."""
    experiment, _, records, _ = go(
        server={"rounds": 2, "clients_per_round": 5}, failures={"deadline": 1.0}, client={"batch_size": 4}
    )
    steps = [-(-len(own) // 4) for own in experiment.clients]
    slowness = [np.exp(0.5 * generator(0, Purpose.SPEED, client=c).standard_normal()) for c in range(5)]
    durations = np.array(steps) * np.array(slowness)
    assert np.allclose(client_durations(experiment), durations)
    late = [c for c in range(5) if durations[c] > np.median(durations)]
    assert len(late) == 2
    for record in records:
        assert record["late"] == late and record["completed"] == [c for c in range(5) if c not in late]


def test_deadlines_draw_nothing_that_other_streams_need(go, usual):
    """A deadline that nobody misses changes no tensor."""
    _, state, _, _ = go(failures={"deadline": 1000.0})
    assert all(torch.equal(tensor, usual[1].tensors[name]) for name, tensor in state.tensors.items())


def test_evaluation_every_second_round_and_at_the_end(go):
    sections = {"evaluation": {"every": 2, "test_every": 4}, "server": {"rounds": 5, "clients_per_round": 2}}
    _, state, records, _ = go(**sections)
    assert [record["round"] for record in records if record["validation"]] == [2, 4, 5]
    assert [record["round"] for record in records if record["test"]] == [4, 5]
    assert state.best["round"] in (2, 4, 5)


def test_evaluation_changes_no_training(go, usual):
    _, state, _, _ = go(evaluation={"every": 3, "test_every": 1, "per_client": True, "batch_size": 7})
    assert all(torch.equal(tensor, usual[1].tensors[name]) for name, tensor in state.tensors.items())


def test_without_validation_nothing_is_best(go):
    experiment, state, records, _ = go(data={"validation": 0.0})
    assert state.best is None and all(record["validation"] is None for record in records)
    assert sum(map(len, experiment.clients)) == len(experiment.train) == 160


def test_the_best_round_is_the_first_of_equals(tiny_config):
    experiment = build(tiny_config)
    state = State(1, experiment.learner.state())
    first = evaluate_round(experiment, state)["validation"]
    state.round = 2
    assert evaluate_round(experiment, state)["validation"] == first
    assert state.best == {"round": 1, "validation": first}


def test_scores_are_the_last_states(usual):
    """The record's validation scores, from the final tensors through transformers' logits."""
    experiment, state, records, _ = usual
    experiment.learner.load(state.tensors)
    batch = experiment.validation.batch(np.arange(len(experiment.validation)))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = experiment.learner.model.eval()(**batch).logits.double()
    scores = records[-1]["validation"]
    assert scores["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_worst_and_mean_client(go):
    experiment, state, records, _ = go(evaluation={"per_client": True, "test_every": 3})
    assert sorted(np.concatenate(experiment.test_clients)) == list(range(len(experiment.test)))
    experiment.learner.load(state.tensors)
    predictions = predict(experiment.learner.model, experiment.test, 64, experiment.learner.device)
    right = predictions.predicted == predictions.labels
    own = [right[indices].mean() for indices in experiment.test_clients if len(indices)]
    assert records[-1]["test"]["worst_client"] == min(own)
    assert records[-1]["test"]["mean_client"] == pytest.approx(np.mean(own))
    assert records[-1]["test"] == final_scores(experiment)


def test_scores_by_hand():
    """Predicted 0 0 1 2 of 0 1 1 1: F1 of 0 is 2/3, of 1 is 1/2, of 2 is 0."""
    predictions = Predictions(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), np.array([1.0, 2.0, 3.0, 6.0]))
    assert score(predictions) == {"loss": 3.0, "accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 3)}
    clients = [np.array([0, 2]), np.array([1, 2, 3]), np.array([], np.int64)]
    assert client_scores(predictions, clients) == {
        "worst_client": pytest.approx(1 / 3),
        "mean_client": pytest.approx(2 / 3),
    }


def test_predictions_do_not_depend_on_the_batch_size(usual):
    """One example at a time without padding against batches of all: the order is kept, losses agree."""
    experiment = usual[0]
    learner = experiment.learner
    alone, together = (predict(learner.model, experiment.test, size, learner.device) for size in (1, 48))
    assert np.allclose(alone.losses, together.losses, atol=1e-5) and (alone.predicted == together.predicted).all()
    assert (together.labels == experiment.test.labels).all()
    features = [mean_features(learner.model, experiment.test, size, learner.device) for size in (1, 48)]
    assert np.allclose(*features, atol=1e-5) and features[0].shape == (48, 32)


def test_evaluation_takes_the_longest_first_without_padding_or_gradients(usual):
    """What the encoder's first layer sees: all real tokens of a batch, in inference mode, and never more of them."""
    experiment, seen = usual[0], []
    model, lengths = experiment.learner.model, np.sort(experiment.test.lengths)[::-1]

    def look(layer, args):
        seen.append((args[0].shape[:2], torch.is_inference_mode_enabled(), layer.training))

    handle = model.get_submodule("bert.encoder.layer.0").register_forward_pre_hook(look)
    predict(model.train(), experiment.test, 20, experiment.learner.device)
    handle.remove()
    assert seen == [((1, lengths[first : first + 20].sum()), True, False) for first in (0, 20, 40)]
    assert model.training and len(set(lengths)) > 1


def test_the_watch_is_told_in_order(go):
    told = []
    _, _, records, _ = go(watch=lambda event, facts: told.append((event, facts["round"], facts.get("client"))))
    expected = []
    for record in records:
        expected += [("client", record["round"], client) for client in record["sampled"]]
        expected.append(("round", record["round"], None))
    assert told == expected


def test_checkpoints_fall_due(tiny_config, tmp_path):
    """Every third round, each better one and the last."""
    config = changed(tiny_config, server={"rounds": 4, "clients_per_round": 2}, run={"checkpoint_every": 3})
    experiment, folder, saved = build(config), RunFolder(tmp_path), []

    def watch(event, facts):
        if event == "round":
            saved.append(max(checkpoint_rounds(folder), default=0))

    state = run_rounds(experiment, folder, State(0, experiment.learner.state()), watch)
    improved = [r["round"] for r in folder.metrics() if r["validation"]["accuracy"] > max(
        (p["validation"]["accuracy"] for p in folder.metrics() if p["round"] < r["round"]), default=-1.0)]  # fmt: skip
    due = sorted({3, 4, *improved})
    assert saved == [max((round for round in due if round <= now), default=0) for now in range(1, 5)]
    assert improved[-1] == state.best["round"] and len(config_digest(config)) == 64


def test_gathering_keeps_no_updates(usual):
    """Without drift, what a round holds on to is one running sum, however many clients it has."""
    from dataclasses import replace

    experiment, state, _, _ = usual
    experiment = replace(experiment, config=changed(experiment.config, evaluation={"drift": False}))
    gathering, alive = Gathering(experiment, state, 1), []
    for client in range(2):
        tensors = {name: torch.full_like(tensor, float(client)) for name, tensor in state.tensors.items()}
        alive += [weakref.ref(tensor) for tensor in tensors.values()]
        gathering.add(ClientUpdate(client, 1, 1, tensors, {"loss": 1.0}))
        del tensors
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    following, drift = gathering.next_state()
    assert drift is None and all((tensor == 0.5).all() for tensor in following.tensors.values())
