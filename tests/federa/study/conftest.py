"""A small study of the tiny BERT."""

import pytest


@pytest.fixture(scope="session")
def tiny_study(tiny_config):
    """tiny_study(**changes) -> values of a study: federa and lora, one alpha, two seeds, two rates."""

    def values(**changes):
        sections = ("model", "data", "partition", "method", "client", "server", "run")
        base = {name: value for name, value in tiny_config.model_dump(mode="json").items() if name in sections}
        base["server"] |= {"rounds": 2}
        base["evaluation"] = {"per_client": True}
        return {
            "base": base,
            "datasets": {"docs": {"target": 0.3}},
            "methods": {"federa": {"method": {"name": "federa"}}, "lora": {"method": {"name": "lora"}}},
            "alphas": [1.0],
            "seeds": [0, 1],
            "sweep": {"over": {"client.lr": [0.003, 0.01]}},
            "baselines": ["pooled", "local"],
        } | changes

    return values
