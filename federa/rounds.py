"""The round loop: sample, train, aggregate, evaluate, record, save."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from federa.aggregate import WeightedMean, problem_of, server_step, update_norm
from federa.checkpoint import State, save_checkpoint
from federa.client import ClientUpdate, local_steps, rate_factor, train_client
from federa.errors import RunError
from federa.experiment import Experiment
from federa.folder import RunFolder
from federa.randomness import Purpose, generator
from federa.tasks import client_scores, predict, score
from federa.variation import update_geometry

Watch = Callable[[str, dict[str, Any]], None]
# (experiment, state before the round, round, clients in id order) -> their updates, in that order
Train = Callable[[Experiment, State, int, Sequence[int]], Iterator[ClientUpdate]]


@dataclass
class Attempt:
    """What became of the clients of one attempt at a round."""

    sampled: list[int]
    dropped: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    examples: int = 0
    steps: int = 0
    loss: float = 0.0
    mean: WeightedMean = field(default_factory=WeightedMean)

    def add(self, update: ClientUpdate) -> None:
        self.completed.append(update.client)
        self.examples += update.examples
        self.steps += update.steps
        self.loss += update.examples * update.metrics["loss"]
        self.mean.add(update.tensors, update.examples)


def train_in_turn(experiment: Experiment, state: State, round: int, clients: Sequence[int]) -> Iterator[ClientUpdate]:
    """Trains one client after another."""
    for client in clients:
        own = experiment.clients[client]
        yield train_client(experiment.learner, experiment.train, own, client, round, state.tensors, experiment.config)


def run_rounds(
    experiment: Experiment, folder: RunFolder, state: State, watch: Watch, train: Train = train_in_turn
) -> State:
    """Runs the rounds after state.round up to server.rounds; each is recorded before the next starts, and saved every
    run.checkpoint_every rounds, where validation improves, and at an interrupt.

    `watch(event, facts)` is told of "client" and "round" as they finish. Raises RunError when a round gets fewer than
    server.min_updates good updates in all its attempts; the rounds before it are saved.
    """
    config, saved = experiment.config, state.round
    try:
        while state.round < config.server.rounds:
            following, record = _run_round(experiment, state, watch, train)
            folder.append_metrics(record)
            state = following
            improved = state.best is not None and state.best["round"] == state.round
            if improved or state.round % config.run.checkpoint_every == 0 or state.round == config.server.rounds:
                save_checkpoint(folder, state, experiment.digest)
                saved = state.round
            watch("round", record)
    except (RunError, KeyboardInterrupt):
        if state.round > saved:
            save_checkpoint(folder, state, experiment.digest)
        raise
    return state


def _run_round(experiment: Experiment, state: State, watch: Watch, train: Train) -> tuple[State, dict[str, Any]]:
    """The state after the next round and the round's record; `state` itself stays as it is."""
    config = experiment.config
    started = time.perf_counter()
    round = state.round + 1
    attempts = _collect(experiment, state, round, watch, train)
    attempt = attempts[-1]
    trained = time.perf_counter()
    current = state.tensors
    tensors, server = server_step(config.server, current, attempt.mean.result(current), state.server)
    previous = state.previous
    state = replace(state, round=round, tensors=tensors, server=server, previous=dict(current))
    aggregated = time.perf_counter()
    record = {
        "round": round,
        "attempts": len(attempts),
        "sampled": attempt.sampled,
        "completed": attempt.completed,
        "dropped": attempt.dropped,
        "late": attempt.late,
        "rejected": [item for one in attempts for item in one.rejected],
        "examples": attempt.examples,
        "steps": attempt.steps,
        "train_loss": attempt.loss / attempt.examples,
        "lr": config.client.lr * rate_factor(config.client, (round - 0.5) / config.server.rounds),
        "update_norm": update_norm(current, state.tensors),
        "bytes": _count_bytes(experiment, state, attempts),
    }
    record |= evaluate_round(experiment, state)
    evaluated = time.perf_counter()
    record["seconds"] = {
        "train": trained - started,
        "aggregate": aggregated - trained,
        "evaluate": evaluated - aggregated,
    }
    record["update"] = update_geometry(experiment.learner, previous, current, state.tensors)
    state.seconds += evaluated - started
    return state, record


def evaluate_round(experiment: Experiment, state: State) -> dict[str, Any]:
    """The scores due after state.round; a better validation accuracy makes it the best round so far."""
    config = experiment.config.evaluation
    last = state.round == experiment.config.server.rounds
    validate = len(experiment.validation) > 0 and (state.round % config.every == 0 or last)
    test = config.test_every is not None and (state.round % config.test_every == 0 or last)
    scores: dict[str, Any] = {"validation": None, "test": None}
    if not (validate or test):
        return scores
    experiment.learner.load(state.tensors)
    if validate:
        scores["validation"] = score(_predict(experiment, experiment.validation))
        better = state.best is None or scores["validation"]["accuracy"] > state.best["validation"]["accuracy"]
        if better and math.isfinite(scores["validation"]["loss"]):
            state.best = {"round": state.round, "validation": scores["validation"]}
    if test:
        scores["test"] = test_scores(experiment)
    return scores


def test_scores(experiment: Experiment) -> dict[str, float]:
    """The loaded tensors on the test set, with the worst and the mean client where asked."""
    predictions = _predict(experiment, experiment.test)
    scores = score(predictions)
    if experiment.test_clients is not None:
        scores |= client_scores(predictions, experiment.test_clients)
    return scores


def _predict(experiment: Experiment, examples):
    learner = experiment.learner
    return predict(learner.model, examples, experiment.config.evaluation.batch_size, learner.device)


def _collect(experiment: Experiment, state: State, round: int, watch: Watch, train: Train) -> list[Attempt]:
    """Trains the clients of a round in id order until an attempt, the last one returned, has enough good updates."""
    server = experiment.config.server
    attempts = []
    for number in range(server.retries + 1):
        attempt = _sample(experiment, round, number)
        attempts.append(attempt)
        silent = {*attempt.dropped, *attempt.late}
        updates = train(experiment, state, round, [c for c in attempt.sampled if c not in silent])
        for position, client in enumerate(attempt.sampled, 1):
            if client not in silent:
                update = next(updates)
                if (problem := problem_of(update, state.tensors)) is None:
                    attempt.add(update)
                else:
                    attempt.rejected.append({"client": client, "why": problem})
            watch("client", {"round": round, "client": client, "position": position, "of": len(attempt.sampled)})
        if len(attempt.completed) >= server.min_updates:
            return attempts
        attempt.mean = WeightedMean()
    raise RunError(
        f"round {round}: got {len(attempt.completed)} good updates in the last of {server.retries + 1} attempts, "
        f"server.min_updates is {server.min_updates}; {_reasons(attempt)}; the state after round {round - 1} is saved, "
        f"`federa resume DIR --set server.retries=N` tries more often"
    )


def _sample(experiment: Experiment, round: int, number: int) -> Attempt:
    """The clients of an attempt, in id order, and which of them fail: all functions of (seed, round, attempt)."""
    config = experiment.config
    rng = generator(config.seed, Purpose.SAMPLING, round=round, step=number)
    chosen = rng.choice(len(experiment.clients), experiment.clients_per_round, replace=False)
    attempt = Attempt(sorted(int(client) for client in chosen))
    for client in attempt.sampled:
        stream = generator(config.seed, Purpose.FAILURE, round=round, client=client, step=number)
        if stream.random() < config.failures.dropout:
            attempt.dropped.append(client)
    if config.failures.deadline is not None:
        durations = client_durations(experiment)
        limit = config.failures.deadline * float(np.median(durations))
        attempt.late = [c for c in attempt.sampled if c not in attempt.dropped and durations[c] > limit]
    return attempt


def client_durations(experiment: Experiment) -> np.ndarray:
    """Expected round time of every client: its local steps times a log-normal slowness drawn once per client."""
    config = experiment.config
    spread = config.failures.speed_spread
    streams = (generator(config.seed, Purpose.SPEED, client=client) for client in range(len(experiment.clients)))
    steps = (local_steps(len(own), config.client) for own in experiment.clients)
    return np.array([count * rng.lognormal(0.0, spread) for count, rng in zip(steps, streams, strict=True)])


def _count_bytes(experiment: Experiment, state: State, attempts: list[Attempt]) -> dict[str, int]:
    """Traffic of a round, repeated attempts included: the trainable tensors down to every sampled client and up from
    every one that answered, and A0, B0 once to each client that had not had them."""
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    sampled = {client for attempt in attempts for client in attempt.sampled}
    fresh = sampled.difference(state.seen)
    state.seen = sorted({*state.seen, *fresh})
    counts = {
        "up_per_client": size,
        "down_per_client": size,
        "up": size * sum(len(attempt.completed) + len(attempt.rejected) for attempt in attempts),
        "down": size * sum(len(attempt.sampled) for attempt in attempts),
        "broadcast": experiment.learner.broadcast.bytes * len(fresh),
    }
    state.bytes_total += counts["up"] + counts["down"] + counts["broadcast"]
    return counts | {"total": state.bytes_total}


def _reasons(attempt: Attempt) -> str:
    parts = [f"{len(attempt.dropped)} dropped out", f"{len(attempt.late)} missed the deadline"]
    parts += [f"client {item['client']} was rejected ({item['why']})" for item in attempt.rejected[:3]]
    return ", ".join(parts)
