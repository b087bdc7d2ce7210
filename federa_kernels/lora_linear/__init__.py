"""y = x W^T + s (x A^T) B^T + b, forward and backward."""

from .op import lora_linear

__all__ = ["lora_linear"]
