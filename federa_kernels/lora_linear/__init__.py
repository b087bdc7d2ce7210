"""y = x W^T + s (x A^T) B^T + b, forward and backward: one adapter, many clients, shared inputs."""

from .op import lora_linear, lora_linear_clients, lora_linear_shared, path_for
from .segments import Segments

__all__ = ["Segments", "lora_linear", "lora_linear_clients", "lora_linear_shared", "path_for"]
