"""DeBERTa in cohorts, whose relative positions pass through layers that train: against transformers' own attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from federa.cohort import memory_of_client, train_cohort, why_alone
from federa.config import changed
from federa.experiment import build
from federa.positions import positions_by_client

from .as_alone import SGD, bytes_kept, check, moved, shares

FAMILIES = ("deberta-v2", "deberta-v3")
METHODS = ("federa", "bitfit", "adapter")  # what they train covers the other methods'


@pytest.fixture(scope="module")
def experiment_of(tiny_config, tiny_models):
    def experiment_of(family, **sections):
        return build(changed(tiny_config, model={"name": str(tiny_models(family))}, **sections))

    return experiment_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_clients_as_alone(experiment_of, family, method):
    """Projections of positions with and without layers of their own, layer norms and biases on the way to them."""
    experiment = experiment_of(family, method={"name": method}, client=SGD | {"steps": 3})
    assert why_alone(experiment.learner, experiment.config) is None
    check(experiment, moved(experiment), experiment.config)


@pytest.mark.parametrize("kinds", [["c2p"], ["p2c"], ["p2c", "c2p"]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_transformers_own(experiment_of, family, kinds):
    """In float64, for two clients of the same layers; distances reach beyond the buckets."""
    model = experiment_of(family).learner.model.double()
    encoder, H, D, T = model.deberta.encoder, 2, 16, 40
    attention = encoder.layer[1].attention.self
    attention.pos_att_type = kinds
    query, key = torch.randn(2, 5 * H, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distances = encoder.get_rel_pos(query)
    arguments = query, key, distances
    theirs = attention.disentangled_attention_bias(*arguments, encoder.get_rel_embedding(), 1 + len(kinds))
    with positions_by_client(model, lambda: [2, 3]):
        ours = attention.disentangled_attention_bias(*arguments, encoder.get_rel_embedding(), 1 + len(kinds))
    assert ours.shape == theirs.shape == (5 * H, T, T) and theirs.std() > 0.01
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, summed in another order


def test_the_model_is_left_as_it_was(experiment_of):
    experiment = experiment_of("deberta-v3")
    learner, before = experiment.learner, {}
    for name, module in learner.model.named_modules():
        before[name] = (module, set(vars(module)))
    train_cohort(learner, experiment.train, list(enumerate(shares())), 1, moved(experiment), experiment.config)
    after = {name: (module, set(vars(module))) for name, module in learner.model.named_modules()}
    assert before == after


def test_memory_is_as_predicted(experiment_of):
    """What the backward of a batch without padding keeps, counted, is 90 to 110 % of the formula."""
    experiment = experiment_of("deberta-v3", client={"batch_size": 16})
    longest = (experiment.train.lengths == experiment.train.lengths.max()).nonzero()[0][:16]
    experiment = replace(experiment, train=experiment.train.take(longest))
    parameters = 16 * sum(p.numel() for p in experiment.learner.trainable.values())
    assert 0.9 < bytes_kept(experiment, np.arange(16)) / (memory_of_client(experiment) - parameters) < 1.1
