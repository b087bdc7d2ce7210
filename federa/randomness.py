"""Counter-based randomness: every stream is a function of (run seed, purpose, round, client, step).

Nothing here or elsewhere in federa draws from a global generator, so a client's batches are the same alone, in a
cohort, after a resume and on a remote site. Streams are numpy's Philox keyed through `SeedSequence` spawn keys.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of every result: add new ones, never renumber."""

    PARTITION = 1
    VALIDATION = 2
    SAMPLING = 3
    BATCHES = 4
    HEAD = 5
    DROPOUT = 6
    FAILURE = 7
    SPEED = 8
    ADAPTER = 9
    EVALUATION = 10


def _sequence(seed: int, purpose: Purpose, round: int, client: int, step: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), round, client, step))


def generator(seed: int, purpose: Purpose, *, round: int = 0, client: int = 0, step: int = 0) -> np.random.Generator:
    """A numpy generator (Philox) for one (seed, purpose, round, client, step); equal arguments give equal draws."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, round, client, step)))


def torch_seed(seed: int, purpose: Purpose, *, round: int = 0, client: int = 0, step: int = 0) -> int:
    """A 63-bit seed for `torch.Generator.manual_seed`, from the same streams as `generator`."""
    state = _sequence(seed, purpose, round, client, step).generate_state(1, np.uint64)[0]
    return int(state) & (2**63 - 1)
