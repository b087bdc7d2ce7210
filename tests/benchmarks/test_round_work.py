"""What rounds on a GPU are measured with, in small and on the CPU."""

import math

import pytest

from benchmarks.federated_round import judged, on_cuda, samples_of
from benchmarks.round_work import STEPS, Work, make_base

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder, 12, **SMALL)
    return Work(folder, 12, batch=16, clients=2)


def test_texts_are_as_long_as_may_be(work):
    assert set(work.experiment.train.lengths) == {12} and len(work.experiment.corpus.label_names) == 20


def test_everyone_begins_where_the_model_does(work):
    turns = on_cuda(work, (2,))
    assert judged(work, turns) == {}
    assert math.isnan(turns["floor 2 bf16"](0))
    assert samples_of("cohort 2 bf16 all", work) == samples_of("floor 2 bf16", work) == 2 * 16 * STEPS
