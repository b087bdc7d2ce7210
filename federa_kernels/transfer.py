"""From the host to a device."""

import torch
from torch import Tensor

GPUS = ("cuda",)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, which the host does not wait for: of ordinary memory a copy to a GPU begins
    when all its work before is done, and the host stands still until then."""
    copied = tensor.device.type == "cpu" and torch.device(device).type in GPUS
    if copied and not torch.compiler.is_compiling():  # a traced tensor has no memory to pin
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
