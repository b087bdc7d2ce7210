"""Updates of clients trained in one batch, compared with those of each trained alone, and the memory it takes."""

import numpy as np
import pytest
import torch

from federa.client import ClientUpdate, train_client
from federa.cohort import train_cohort

CUTS = (37, 5, 61, 16, 1)  # examples of each client
SGD = {
    "batch_size": 8,
    "optimizer": "sgd",
    "lr": 0.2,
}  # its steps do not blow up rounding, as AdamW's of tiny gradients
ZERO = ("key.bias",)  # softmax does not see them: their true gradient is zero, and AdamW makes steps of its rounding


def shares(cuts=CUTS):
    return np.split(np.arange(sum(cuts)), np.cumsum(cuts)[:-1])


def distance(alone: ClientUpdate, together: ClientUpdate, start) -> float:
    """Of the whole updates, relative to the one alone."""
    names = [name for name in alone.tensors if not name.endswith(ZERO)]
    change, other = (
        torch.cat([(update.tensors[name] - start[name]).double().flatten() for name in names])
        for update in (alone, together)
    )
    return float((other - change).norm() / change.norm())


def check(experiment, start, config, round=1, corrections=None, within=2e-5):
    learner, own = experiment.learner, shares()
    alone = [
        train_client(learner, experiment.train, own[c], c, round, start, config, corrections and corrections[c])
        for c in range(len(own))
    ]
    together = train_cohort(learner, experiment.train, list(enumerate(own)), round, start, config, corrections)
    for one, other in zip(alone, together, strict=True):
        assert (one.client, one.examples, one.steps, one.finite) == (
            other.client,
            other.examples,
            other.steps,
            other.finite,
        )
        assert one.tensors.keys() == other.tensors.keys()
        assert distance(one, other, start) <= within
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)


def moved(experiment):
    """Global tensors of some later round: none of them is where training began."""
    rng = torch.Generator().manual_seed(0)
    return {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in experiment.learner.state().items()}


def bytes_kept(experiment, indices) -> int:
    """By the backward of a batch, but for the model's own tensors."""
    kept: dict[int, int] = {}
    model = experiment.learner.model
    frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = experiment.task.losses(model, experiment.train.batch(indices)).sum()
    count = sum(kept.values())
    del total
    return count
