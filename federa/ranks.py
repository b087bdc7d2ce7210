"""The cohorts of a round spread over the processes that torchrun started: rank 0 runs the run, the others train for it.

Rank 0 samples, aggregates, scores and writes as ever. The others hold the same experiment, built from the server's
factors, and train the cohorts they are told to. Updates reach rank 0's aggregator in id order, so that a run gives the
same bits on any number of ranks that compute alike.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from federa.client import ClientUpdate, local_steps
from federa.cohort import Cohorts
from federa.errors import InputError, RunError
from federa.experiment import Experiment, build

if TYPE_CHECKING:
    from federa.checkpoint import State


def count() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> int:
    """Meets the other ranks and takes the GPU of this one; its rank. Messages go over gloo, whatever the device."""
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")
    return dist.get_rank()


@contextmanager
def leading() -> Iterator[None]:
    """Around what rank 0 does: when it ends, the others go home, whether they were needed or not.

    After an error that no run ends by they may be amid a round and not listen: torchrun ends them with this process.
    """
    try:
        yield
    except (InputError, RunError):
        _send_home()
        raise
    _send_home()


def _send_home() -> None:
    if count() > 1:
        _tell(None)
        _part()


def _part() -> None:
    """Together: gloo's threads abort a process whose peer has gone before they were stopped."""
    dist.barrier()
    dist.destroy_process_group()


def serve() -> None:
    """What a rank above 0 does until rank 0 is done."""
    if (begun := _told()) is None:
        return _part()
    config, broadcast, device, threads, size = begun
    torch.set_num_threads(threads)
    experiment, cohorts = build(config, broadcast, device), Cohorts(size)
    while (message := _told()) is not None:
        state, round, shares = message
        experiment.learner.load(state.tensors, state.base)
        own = shares[dist.get_rank()]
        dist.gather_object([list(cohorts(experiment, state, round, group)) for group in own])
    _part()


class Ranks:
    """Trains a round's clients in cohorts of `size`, spread over all ranks by predicted work; begun on rank 0 alone.

    Memory on rank 0: all updates of a round.
    """

    def __init__(self, experiment: Experiment, size: int):
        self.size, self._cohorts = size, Cohorts(size)
        learner = experiment.learner
        _tell((experiment.config, learner.broadcast, learner.device.type, torch.get_num_threads(), size))

    def __call__(
        self, experiment: Experiment, state: "State", round: int, clients: Sequence[int]
    ) -> Iterator[ClientUpdate]:
        shares = share_out(experiment, clients, self.size, dist.get_world_size())
        _tell((state, round, shares))
        done = [list(self._cohorts(experiment, state, round, group)) for group in shares[0]]
        everyone: list[Any] = [None] * len(shares)
        dist.gather_object(done, everyone)
        updates = [update for groups in everyone for group in groups for update in group]
        yield from sorted(updates, key=lambda update: update.client)


def share_out(experiment: Experiment, clients: Sequence[int], size: int, ranks: int) -> list[list[list[int]]]:
    """For each rank its cohorts: groups of `size` clients in id order, the longest first to the rank with least work,
    which is predicted as steps times tokens of a step."""
    config, lengths = experiment.config.client, experiment.train.lengths
    groups = [list(clients[first : first + size]) for first in range(0, len(clients), size)]

    def work(group: Sequence[int]) -> float:
        own = [experiment.clients[client] for client in group]
        return sum(local_steps(len(indices), config) * float(lengths[indices].mean()) for indices in own)

    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for group in sorted(groups, key=lambda group: (-work(group), group[0])):
        rank = load.index(min(load))
        shares[rank].append(group)
        load[rank] += work(group)
    return shares


def _tell(message: Any) -> None:
    dist.broadcast_object_list([message], src=0)


def _told() -> Any:
    received = [None]
    dist.broadcast_object_list(received, src=0)
    return received[0]
