"""Client updates to global tensors, against numbers worked out by hand and sums in float64."""

import gc
import weakref

import pytest
import torch

from federa.aggregate import WeightedMean, problem_of, server_step, update_norm
from federa.client import ClientUpdate
from federa.config import ServerConfig


def vector(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values)}


def mean_of(*weighted: tuple[dict[str, torch.Tensor], int]) -> dict[str, torch.Tensor]:
    mean = WeightedMean()
    for tensors, weight in weighted:
        mean.add(tensors, weight)
    return mean.result(weighted[0][0])


def test_fedavg_of_two_clients_by_hand():
    """(10 * 1 + 30 * 3) / 40 = 2.5 and (10 * -2 + 30 * 6) / 40 = 4; McMahan et al., arXiv 1602.05629."""
    assert mean_of((vector(1.0, -2.0), 10), (vector(3.0, 6.0), 30))["w"].tolist() == [2.5, 4.0]


def test_running_sum_is_the_float64_weighted_mean_in_order():
    """Against one sum a coordinate in Python's floats, client by client: the same bits, not only close."""
    rng = torch.Generator().manual_seed(0)
    clients = [{"a": torch.randn(3, 5, generator=rng), "b": torch.randn(7, generator=rng) * 1e6} for _ in range(50)]
    weights = torch.randint(1, 5000, (50,), generator=rng).tolist()
    result = mean_of(*zip(clients, weights, strict=True))
    for name, tensor in result.items():
        total = [0.0] * tensor.numel()
        for client, weight in zip(clients, weights, strict=True):
            total = [s + weight * x for s, x in zip(total, client[name].flatten().tolist(), strict=True)]
        expected = torch.tensor([s / sum(weights) for s in total], dtype=torch.float64).float()
        assert torch.equal(tensor.flatten(), expected)
        assert tensor.dtype == torch.float32


def test_float64_keeps_what_float32_would_lose():
    """1e8 + 1 - 1e8: a float32 sum forgets the 1."""
    assert mean_of((vector(1e8), 1), (vector(1.0), 1), (vector(-1e8), 2))["w"].item() == pytest.approx(
        (1e8 + 1 - 2e8) / 4
    )
    assert mean_of((vector(1e8), 1), (vector(1.0), 1), (vector(-1e8), 1))["w"].item() == pytest.approx(1 / 3)


def test_one_client_is_its_own_mean_bit_for_bit():
    tensors = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1))}
    assert torch.equal(mean_of((tensors, 1234))["w"], tensors["w"])


def test_result_has_the_dtype_of_the_run():
    mean = WeightedMean()
    mean.add({"w": torch.ones(2, dtype=torch.bfloat16)}, 3)
    assert mean.result({"w": torch.zeros(2, dtype=torch.bfloat16)})["w"].dtype == torch.bfloat16


def test_updates_are_not_kept():
    """Memory does not grow with clients: each update's tensors die as soon as the client is done."""
    mean, alive = WeightedMean(), []
    for client in range(20):
        tensors = {"w": torch.full((100,), float(client))}
        alive.append(weakref.ref(tensors["w"]))
        mean.add(tensors, 1)
        del tensors
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert mean.result(vector(0.0))["w"].unique().tolist() == [9.5]


def test_adding_leaves_the_update_alone():
    first, second = vector(1.0, 2.0), vector(3.0, 4.0)
    mean_of((first, 2), (second, 2))
    assert first["w"].tolist() == [1.0, 2.0] and second["w"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("weight", [0, -1])
def test_weights_below_one_are_refused(weight):
    with pytest.raises(ValueError, match=f"WeightedMean: weight must be a positive number of examples, got {weight}"):
        WeightedMean().add(vector(1.0), weight)


def test_fedavg_with_rate_one_is_the_mean_bit_for_bit():
    rng = torch.Generator().manual_seed(2)
    current, mean = ({"w": torch.randn(1000, generator=rng)} for _ in range(2))
    following, memory = server_step(ServerConfig(), current, mean, {})
    assert torch.equal(following["w"], mean["w"]) and memory == {}


def test_fedavg_with_half_the_rate_goes_half_the_way():
    following, memory = server_step(ServerConfig(lr=0.5), vector(1.0, 4.0), vector(3.0, 0.0), {})
    assert following["w"].tolist() == [2.0, 2.0] and memory == {}


def test_fedavgm_two_rounds_by_hand():
    """momentum 0.5, rate 2. Round 1: delta = 1, v = 1, w = 0 + 2. Round 2: delta = 3 - 2 = 1, v = 0.5 + 1, w = 2 + 3.

    Hsu et al., arXiv 1909.06335.
    """
    config = ServerConfig(optimizer="fedavgm", momentum=0.5, lr=2.0)
    first, memory = server_step(config, vector(0.0), vector(1.0), {})
    assert first["w"].item() == 2.0 and memory["v.w"].item() == 1.0
    second, memory = server_step(config, first, vector(3.0), memory)
    assert second["w"].item() == 5.0 and memory["v.w"].item() == 1.5


def test_fedadam_two_rounds_by_hand():
    """beta1 = beta2 = 0.5, tau = 0.5, rate 1, no bias correction, v starts at tau^2 (Reddi et al., arXiv 2003.00295).

    Round 1: delta = 1    m = 0.5    v = 0.5 * 0.25 + 0.5 * 1 = 0.625              w = 0.5 / (sqrt 0.625 + 0.5)
    Round 2: delta = 2 - w, m = 0.25 + 0.5 delta, v = 0.3125 + 0.5 delta^2, w + m / (sqrt v + 0.5)
    """
    config = ServerConfig(optimizer="fedadam", betas=(0.5, 0.5), tau=0.5)
    first, memory = server_step(config, vector(0.0), vector(1.0), {})
    assert memory["m.w"].item() == 0.5 and memory["v.w"].item() == 0.625
    assert first["w"].item() == pytest.approx(0.387426, abs=1e-6)
    second, memory = server_step(config, first, vector(2.0), memory)
    assert memory["m.w"].item() == pytest.approx(1.056287, abs=1e-6)
    assert memory["v.w"].item() == pytest.approx(1.612697, abs=1e-6)
    assert second["w"].item() == pytest.approx(0.984225, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
def test_server_steps_are_pure(optimizer):
    config = ServerConfig(optimizer=optimizer, lr=0.5)
    current, mean = vector(0.0, 1.0), vector(1.0, 3.0)
    _, memory = server_step(config, current, mean, {})
    before = {name: tensor.clone() for name, tensor in memory.items()}
    one, two = (server_step(config, current, mean, memory) for _ in range(2))
    assert current["w"].tolist() == [0.0, 1.0] and mean["w"].tolist() == [1.0, 3.0]
    assert all(torch.equal(memory[name], tensor) for name, tensor in before.items())
    assert torch.equal(one[0]["w"], two[0]["w"])


def test_update_norm_by_hand():
    """3-4-5 over two tensors."""
    zero = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}
    assert update_norm(zero, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}) == 5.0


def test_good_updates_have_no_problem():
    assert problem_of(ClientUpdate(0, 1, 1, vector(1.0), {"loss": 1.0}), vector(0.0)) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"examples": 0}, "examples must be an integer from 1 to 2**31 - 1, got 0"),
        ({"tensors": {}}, "w is missing"),
        ({"tensors": {"w": torch.zeros(1), "x": torch.zeros(1)}}, "x is not a trainable tensor of this run"),
        ({"tensors": {"w": torch.zeros(2)}}, "w must be torch.float32 (1,), got torch.float32 (2,)"),
        ({"tensors": {"w": torch.zeros(1).double()}}, "w must be torch.float32 (1,), got torch.float64 (1,)"),
        ({"tensors": vector(float("nan"))}, "w holds NaN or Inf"),
        ({"tensors": vector(float("-inf"))}, "w holds NaN or Inf"),
        ({"finite": False}, "the training loss was NaN or Inf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_problems_are_named(changes, problem):
    facts = {"client": 0, "examples": 1, "steps": 1, "tensors": vector(1.0), "metrics": {"loss": 1.0}} | changes
    assert problem_of(ClientUpdate(**facts), vector(0.0)) == problem


def test_update_norm_does_not_depend_on_the_order_of_tensors():
    rng = torch.Generator().manual_seed(3)
    zero, one = ({str(i): torch.randn(9, generator=rng) * scale for i in range(40)} for scale in (0.0, 1.0))
    backwards = {name: zero[name] for name in sorted(zero, reverse=True)}
    assert update_norm(zero, one) == update_norm(backwards, one)
