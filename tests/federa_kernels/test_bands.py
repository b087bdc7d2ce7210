import itertools

import pytest
import torch
from torch import nn

from federa_kernels import FeDeRALinear, lora_init, replace_linears
from federa_kernels.bands import CHUNK, starting_factors
from federa_kernels.truncated_svd import smallest_svd


def weights(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


SHAPES = [(40, 24), (24, 40), (30, 30)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("band", ["principal", "minor", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_residual_and_pair_give_the_weight_back(shape, band, dtype):
    (W,) = weights(shape, dtype=dtype)
    (init,) = lora_init([W], 4, 2.0, band, torch.float32)
    assert init.lora_A.shape == (4, shape[1]) and init.lora_B.shape == (shape[0], 4)
    assert init.lora_A.dtype == init.lora_B.dtype == torch.float32
    back = init.residual.double() + 2.0 * init.lora_B.double() @ init.lora_A.double()
    assert (back - W.double()).abs().max() == pytest.approx(init.rounding, rel=1e-9)
    assert init.rounding < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_minor_takes_the_smallest_triplets(shape):
    (W,) = weights(shape)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    (init,) = lora_init([W], 3, 0.5, "minor")
    product = 0.5 * init.lora_B.double() @ init.lora_A.double()
    torch.testing.assert_close(product, (U[:, -3:] * S[-3:]) @ Vh[-3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(init.lora_B.norm(dim=0), init.lora_A.norm(dim=1))


def test_minor_of_the_greatest_numbers():
    U, S, Vh = smallest_svd(torch.diag(torch.tensor([1.7e308, 1.5e308], dtype=torch.float64)), 1)
    assert S.tolist() == pytest.approx([1.5e308]) and U[1, 0] == Vh[0, 1] == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonal_is_the_start_of_a_qr(shape):
    (W,) = weights(shape)
    (init,) = lora_init([W], 3, 0.5, "orthogonal")
    Q, T = torch.linalg.qr(W.double())
    signs = T.diagonal().sign()[:3]
    torch.testing.assert_close(init.lora_B.double(), Q[:, :3] * signs, atol=1e-6, rtol=0)
    torch.testing.assert_close(0.5 * init.lora_A.double(), T[:3] * signs[:, None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("band", ["principal", "minor", "orthogonal"])
def test_zero_and_rank_deficient_weights(band):
    low = weights((20, 1))[0] @ weights((1, 16))[0]
    for W in (torch.zeros(20, 16), low, low * 1e-30, low * 1e30):
        (init,) = lora_init([W], 4, 1.0, band)
        assert init.lora_A.isfinite().all() and init.lora_B.isfinite().all()
        assert init.rounding <= 1e-6 * W.abs().max()


@pytest.mark.parametrize("band", ["principal", "minor", "orthogonal"])
def test_a_layer_starts_from_each_band(band):
    layer = nn.Linear(24, 40)
    ours = FeDeRALinear.from_linear(layer, 4, band=band)
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), layer(x))
    ours.load_state_dict({"weight": layer.weight.detach() * 2, "bias": layer.bias})
    torch.testing.assert_close(ours.weight, layer.weight.detach() * 2)


def test_a_model_of_many_shapes_and_its_progress():
    model = nn.Sequential(*[nn.Linear(n % 7 + 9, n % 5 + 9) for n in range(2 * CHUNK + 3)])
    before = [layer.weight.detach().clone() for layer in model]
    seen = []
    replace_linears(model, rank=3, band="minor", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(CHUNK, len(model)), (2 * CHUNK, len(model)), (len(model), len(model))]
    for layer, weight in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight, weight)


def test_an_interrupted_factorisation_leaves_the_model_as_it_was():
    model = nn.Sequential(*[nn.Linear(9, 9) for _ in range(CHUNK + 1)])

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_linears(model, rank=3, progress=interrupt)
    assert all(type(layer) is nn.Linear for layer in model)


def test_weights_are_factored_as_the_factors_are_asked_for():
    several = weights(*[(8, 6)] * (CHUNK + 1))
    seen = []
    factors = starting_factors(several, 2, 1.0, "principal", progress=lambda *counts: seen.append(counts))
    assert len(list(itertools.islice(factors, CHUNK))) == CHUNK and not seen
    assert len(list(factors)) == 1 and seen == [(CHUNK, CHUNK + 1), (CHUNK + 1, CHUNK + 1)]
