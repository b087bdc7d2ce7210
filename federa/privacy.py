"""Client-level differential privacy: secret randomness, and the epsilon of the sampling that was really used."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from federa.config import PrivacyConfig
from federa.errors import InputError


def secret_generator() -> np.random.Generator:
    """Draws that nobody can make again: keyed by the operating system, never by a run's seed, and never stored."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(secrets.randbits(256))))


def draw_normal(shape: torch.Size) -> torch.Tensor:
    """Standard normal float64 from a secret generator of its own."""
    return torch.from_numpy(secret_generator().standard_normal(tuple(shape)))


def epsilon(privacy: PrivacyConfig, clients: int, per_round: int, releases: int) -> float:
    """Epsilon at privacy.delta after `releases` attempts at rounds, each with newly sampled clients.

    fixed: per_round of the clients without replacement; neighbours differ in one client's data, so that the sum changes
    by up to 2 S and z S is z / 2 of it (arXiv 1808.00087). poisson: each client by itself with probability
    per_round / clients; neighbours differ by one client, and the sum by up to S. With all clients in every round
    nothing is amplified. Renyi accountant of dp-accounting; InputError where that is missing.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise InputError(f'privacy.clip: needs dp-accounting, pip install "federa[dp]", got {error}') from None
    if not releases:
        return 0.0
    replace = privacy.sampling == "fixed"
    relation = dp_accounting.NeighboringRelation
    gaussian = dp_accounting.GaussianDpEvent(privacy.noise / 2 if replace else privacy.noise)
    if per_round == clients:
        event = gaussian
    elif replace:
        event = dp_accounting.SampledWithoutReplacementDpEvent(clients, per_round, gaussian)
    else:
        event = dp_accounting.PoissonSampledDpEvent(per_round / clients, gaussian)
    accountant = RdpAccountant(neighboring_relation=relation.REPLACE_ONE if replace else relation.ADD_OR_REMOVE_ONE)
    with _quiet_accountant():
        accountant.compose(event, releases)
        return float(accountant.get_epsilon(privacy.delta))


@contextmanager
def _quiet_accountant() -> Iterator[None]:
    """Without a line for every order that does not converge: the bound is the least of the others', so still one."""
    logger = logging.getLogger("absl")

    def matters(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger.addFilter(matters)
    try:
        yield
    finally:
        logger.removeFilter(matters)
