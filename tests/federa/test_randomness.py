"""Counter-based streams: pinned values, independence of the global generators, one stream for each set of arguments."""

import itertools
import random

import numpy as np
import torch

from federa.randomness import Purpose, generator, torch_seed


def draws(*args, **kwargs) -> tuple[int, ...]:
    return tuple(generator(*args, **kwargs).integers(2**63, size=2).tolist())


def test_streams_are_pinned():
    """Results of other versions and machines are compared with ours: these values never change."""
    assert draws(0, Purpose.PARTITION) == (839444080339196209, 1818991759866410794)
    assert draws(2**63 - 1, Purpose.BATCHES, round=3, client=7, step=1) == (8182489200058297292, 7386922834322428049)
    assert generator(5, Purpose.SAMPLING, round=2).choice(20, 5, replace=False).tolist() == [11, 18, 15, 14, 8]
    assert generator(5, Purpose.SPEED, client=4).lognormal(0.0, 0.5) == 2.339019250590827
    assert torch_seed(0, Purpose.HEAD) == 4246924549294885125
    assert torch_seed(1, Purpose.DROPOUT, round=3, client=7, step=1) == 6677433501304705032


def test_purposes_keep_their_numbers():
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "PARTITION": 1,
        "VALIDATION": 2,
        "SAMPLING": 3,
        "BATCHES": 4,
        "HEAD": 5,
        "DROPOUT": 6,
        "FAILURE": 7,
        "SPEED": 8,
        "ADAPTER": 9,
        "EVALUATION": 10,
    }


def test_every_argument_makes_another_stream():
    arguments = list(itertools.product((0, 1), (Purpose.BATCHES, Purpose.DROPOUT), (0, 1, 2), (0, 1, 2), (0, 1, 2)))
    streams = {draws(s, p, round=r, client=c, step=t) for s, p, r, c, t in arguments}
    seeds = {torch_seed(s, p, round=r, client=c, step=t) for s, p, r, c, t in arguments}
    assert len(streams) == len(seeds) == len(arguments) == 108
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_global_generators_are_neither_read_nor_moved():
    expected = draws(3, Purpose.BATCHES), torch_seed(3, Purpose.HEAD)
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert (draws(3, Purpose.BATCHES), torch_seed(3, Purpose.HEAD)) == expected
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_streams_of_neighbours_are_uncorrelated():
    """4096 normal numbers of each of 20 clients: no correlation beyond five standard errors."""
    samples = np.stack([generator(0, Purpose.BATCHES, round=1, client=c).standard_normal(4096) for c in range(20)])
    correlations = np.corrcoef(samples) - np.eye(20)
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)
