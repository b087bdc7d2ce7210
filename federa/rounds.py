"""The round loop: sample, train, aggregate, evaluate, record, save."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from federa import scaffold
from federa.aggregate import (
    AGGREGATORS,
    Mean,
    PrivateMean,
    Robust,
    Stacked,
    Terms,
    move_values,
    moved,
    problem_of,
    server_step,
    shortened,
    update_norm,
)
from federa.checkpoint import State, save_checkpoint
from federa.client import ClientUpdate, local_steps, rate_factor, train_client
from federa.combinations import MOVES
from federa.errors import RunError
from federa.experiment import Experiment
from federa.folder import RunFolder
from federa.memory import return_memory
from federa.privacy import draw_normal, epsilon, secret_generator
from federa.randomness import Purpose, generator
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
    seconds: float = 0.0  # that its clients trained

    def add(self, update: ClientUpdate) -> None:
        self.completed.append(update.client)
        self.examples += update.examples
        self.steps += update.steps
        self.loss += update.examples * update.metrics["loss"]


class Gathering:
    """One attempt's good updates on their way into the next model. Memory: the aggregator's, and with SCAFFOLD one
    variate a client."""

    def __init__(self, experiment: Experiment, state: State, round: int):
        learner, config = experiment.learner, experiment.config
        current = {name: state.tensors[name] for name in learner.names_in(round)}
        self._experiment, self._state, self._round, self.current = experiment, state, round, current
        pairs = [p for p in learner.pairs.values() if {p.lora_A, p.lora_B} <= current.keys()]
        rank_of = None if config.method.client_ranks is None else learner.rank_of
        restart = partial(learner.restart, round)
        terms = Terms(config.server, current, pairs, rank_of, restart, config.evaluation.drift, state.server)
        self.aggregator: Mean | Stacked | Robust | PrivateMean
        if config.privacy.clip is not None:
            self.aggregator = PrivateMean(terms, config.privacy, experiment.clients_per_round, draw_normal)
        else:
            self.aggregator = AGGREGATORS[config.server.aggregation](terms)
        self.variates: dict[int, dict[str, Any]] = {}

    def add(self, update: ClientUpdate) -> None:
        config, learner = self._experiment.config, self._experiment.learner
        if config.client.control_variates:
            self.variates[update.client] = scaffold.new_variate(
                self._state, update, config.client, self._round, config.server.rounds, learner.head
            )
        if config.server.clip_update is not None:
            update = replace(update, tensors=shortened(update.tensors, self.current, config.server.clip_update))
        self.aggregator.add(update)

    def next_state(self) -> tuple[State, float | None]:
        """(the state after the round, drift)."""
        config, learner, state = self._experiment.config, self._experiment.learner, self._state
        aggregate = self.aggregator.result()
        stepped = {name: self.current[name] for name in aggregate.mean}
        tensors, server = server_step(config.server, stepped, aggregate.mean, state.server)
        tensors = learner.renew(state.tensors | tensors | aggregate.factors, self._round)
        following = replace(state, round=self._round, tensors=tensors, server=state.server | server | aggregate.memory)
        if config.server.aggregation in MOVES:
            following.base = moved(state.base or learner.base(), aggregate.moves)
            following.moves = [*state.moves, aggregate.ranks]
        if config.client.control_variates:
            clients = len(self._experiment.clients)
            following.server, following.variates = scaffold.advance(following, self.variates, clients)
        return following, aggregate.drift


def train_in_turn(experiment: Experiment, state: State, round: int, clients: Sequence[int]) -> Iterator[ClientUpdate]:
    """Trains one client after another."""
    for client in clients:
        own, correction = experiment.clients[client], scaffold.correction(state, client)
        yield train_client(
            experiment.learner, experiment.train, own, client, round, state.tensors, experiment.config, correction
        )


def run_rounds(
    experiment: Experiment, folder: RunFolder, state: State, watch: Watch, train: Train = train_in_turn
) -> State:
    """Runs the rounds after state.round up to server.rounds; each is recorded before the next starts, and saved every
    run.checkpoint_every rounds, where validation improves, and at an interrupt.

    `watch(event, facts)` is told of "client" and "round" as they finish. Raises RunError when a round gets fewer than
    server.min_updates good updates in all its attempts; the rounds before it are saved.
    """
    config, saved = experiment.config, state.round
    if config.privacy.clip is not None:
        epsilon(config.privacy, len(experiment.clients), experiment.clients_per_round, 0)  # the accountant is there
    try:
        while state.round < config.server.rounds:
            following, record = _run_round(experiment, state, watch, train)
            folder.append_metrics(record)
            state = following
            improved = state.best is not None and state.best["round"] == state.round
            if improved or state.round % config.run.checkpoint_every == 0 or state.round == config.server.rounds:
                save_checkpoint(folder, state, experiment.digest)
                saved = state.round
            return_memory()
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
    experiment.learner.load(state.tensors, state.base)
    attempts, gathering = _collect(experiment, state, round, watch, train)
    attempt = attempts[-1]
    before = state
    state, drift = gathering.next_state()
    state.releases += len(attempts)
    state.previous = before.tensors | before.base
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
        "train_loss": attempt.loss / attempt.examples if attempt.examples else None,
        "lr": config.client.lr * rate_factor(config.client, (round - 0.5) / config.server.rounds),
        "update_norm": update_norm(before.tensors, state.tensors),
        "drift": drift,
        "cohort": getattr(train, "size", 1),
        "bytes": _count_bytes(experiment, state, attempts),
    }
    if config.privacy.clip is not None:
        spent = epsilon(config.privacy, len(experiment.clients), experiment.clients_per_round, state.releases)
        record["privacy"] = {"epsilon": spent, "delta": config.privacy.delta, "releases": state.releases}
    values = (before.previous, state.previous, state.tensors | state.base)
    record["update"] = update_geometry(experiment.learner, *values)
    aggregated = time.perf_counter()
    record |= evaluate_round(experiment, state)
    evaluated = time.perf_counter()
    trained = sum(one.seconds for one in attempts)
    record["seconds"] = {
        "train": trained,
        "aggregate": aggregated - started - trained,  # all else
        "evaluate": evaluated - aggregated,
    }
    state.seconds += evaluated - started
    return state, record


def evaluate_round(experiment: Experiment, state: State) -> dict[str, Any]:
    """The scores due after state.round; a better validation score makes it the best round so far."""
    config, task = experiment.config.evaluation, experiment.task
    last = state.round == experiment.config.server.rounds
    validate = len(experiment.validation) > 0 and (state.round % config.every == 0 or last)
    test = config.test_every is not None and (state.round % config.test_every == 0 or last)
    scores: dict[str, Any] = {"validation": None, "test": None}
    if not (validate or test):
        return scores
    experiment.learner.load(state.tensors, state.base)
    if validate:
        scores["validation"] = task.score(_predict(experiment, experiment.validation))
        before = None if state.best is None else task.metric.value(state.best["validation"])
        if task.metric.better(task.metric.value(scores["validation"]), before) and math.isfinite(
            scores["validation"]["loss"]
        ):
            state.best = {"round": state.round, "validation": scores["validation"]}
    if test:
        scores["test"] = test_scores(experiment)
    return scores


def test_scores(experiment: Experiment) -> dict[str, float]:
    """The loaded tensors on the test set, with the worst and the mean client where asked."""
    predictions = _predict(experiment, experiment.test)
    scores = experiment.task.score(predictions)
    if experiment.test_clients is not None:
        scores |= experiment.task.client_scores(predictions, experiment.test_clients)
    return scores


def _predict(experiment: Experiment, examples):
    learner = experiment.learner
    return learner.task.predict(learner.model, examples, experiment.config.evaluation.batch_size, learner.device)


def _collect(
    experiment: Experiment, state: State, round: int, watch: Watch, train: Train
) -> tuple[list[Attempt], Gathering]:
    """Trains the clients of a round in id order until an attempt, the last one returned, has enough good updates."""
    server = experiment.config.server
    attempts = []
    for number in range(server.retries + 1):
        attempt = _sample(experiment, round, number)
        attempts.append(attempt)
        gathering = Gathering(experiment, state, round)
        silent = {*attempt.dropped, *attempt.late}
        updates = train(experiment, state, round, [c for c in attempt.sampled if c not in silent])
        for position, client in enumerate(attempt.sampled, 1):
            if client not in silent:
                started = time.perf_counter()
                update = next(updates)
                attempt.seconds += time.perf_counter() - started
                if (problem := problem_of(update, gathering.current, experiment.config.client)) is None:
                    attempt.add(update)
                    gathering.add(update)
                else:
                    attempt.rejected.append({"client": client, "why": problem})
            watch("client", {"round": round, "client": client, "position": position, "of": len(attempt.sampled)})
        if len(attempt.completed) >= server.min_updates or not attempt.sampled:  # Poisson sampling may pick nobody
            return attempts, gathering
    raise RunError(
        f"round {round}: got {len(attempt.completed)} good updates in the last of {server.retries + 1} attempts, "
        f"server.min_updates is {server.min_updates}; {_reasons(attempt)}; the state after round {round - 1} is saved, "
        f"`federa resume DIR --set server.retries=N` tries more often"
    )


def _sample(experiment: Experiment, round: int, number: int) -> Attempt:
    """The clients of an attempt, in id order, and which of them fail: all functions of (seed, round, attempt), but for
    who is sampled under privacy, which nobody may know."""
    config, count, asked = experiment.config, len(experiment.clients), experiment.clients_per_round
    private = config.privacy.clip is not None
    rng = secret_generator() if private else generator(config.seed, Purpose.SAMPLING, round=round, step=number)
    if private and config.privacy.sampling == "poisson":
        chosen = np.flatnonzero(rng.random(count) < asked / count)
    else:
        chosen = rng.choice(count, asked, replace=False)
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
    """Traffic of a round, repeated attempts included: down to every sampled client what changed since it was sampled
    last (all, if it never was), up from every one that answered what it trained, and A0, B0 once to each client that
    had not had them. SCAFFOLD's correction goes down with the model. *_per_client: means over the round's clients."""
    learner, round = experiment.learner, state.round
    sampled = {client for attempt in attempts for client in attempt.sampled}
    down = {client: _bytes_down(experiment, state, client) for client in sampled}
    names = learner.names_in(round)
    answered = [client for one in attempts for client in (*one.completed, *(item["client"] for item in one.rejected))]
    up = [sum(learner.bytes_of(name, client) for name in names) for client in answered]
    fresh = sampled.difference(state.seen)
    state.seen = state.seen | dict.fromkeys(sampled, round)
    counts = {
        "up_per_client": sum(up) // max(1, len(up)),
        "down_per_client": sum(down.values()) // max(1, len(down)),
        "up": sum(up),
        "down": sum(down[client] for attempt in attempts for client in attempt.sampled),
        "broadcast": experiment.learner.broadcast.bytes * len(fresh),
    }
    state.bytes_total += counts["up"] + counts["down"] + counts["broadcast"]
    return counts | {"total": state.bytes_total}


def _bytes_down(experiment: Experiment, state: State, client: int) -> int:
    """What a client needs to begin state.round: of the round it was seen in last it does not know the outcome."""
    learner, config, round = experiment.learner, experiment.config, state.round
    method, last = learner.method, state.seen.get(client)
    missed = range(last, round) if last is not None else None  # the rounds whose outcome it has not
    restarted = {n for p in learner.pairs.values() for n in (p.lora_A, p.lora_B)} & {*learner.trainable}
    names = []
    for name in learner.trainable:
        if config.server.aggregation == "flora" and name in restarted:
            continue  # known to everyone: A0 and B0, or the seed's
        changed = missed is None or any(method.changes(name, r, learner.config) for r in missed)
        if name in learner.head or (changed and method.needs(name, round, learner.config)):
            names.append(name)
    size = sum(learner.bytes_of(name, client) for name in names)
    if config.client.control_variates and round > 1:
        size += sum(learner.bytes_of(name, client) for name in learner.names_in(round))
    if config.server.aggregation in MOVES:
        shapes = {pair.residual: pair.shape for pair in learner.pairs.values()}
        size += 4 * move_values(shapes, state.moves[(last or 1) - 1 : round - 1])
    return size


def _reasons(attempt: Attempt) -> str:
    parts = [f"{len(attempt.dropped)} dropped out", f"{len(attempt.late)} missed the deadline"]
    parts += [f"client {item['client']} was rejected ({item['why']})" for item in attempt.rejected[:3]]
    return ", ".join(parts)
