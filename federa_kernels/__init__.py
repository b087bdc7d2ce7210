"""Kernels and the layer of FeDeRA; knows nothing of federated learning.

lora_linear       y = x W^T + s (x A^T) B^T + b, forward and backward; lora_linear_clients for many adapters over the
                  rows of one batch (Segments), lora_linear_shared for projections of one x
FrozenWeight      a weight that never trains, with packed forms that multiply faster
truncated_svd     leading singular triplets, a TruncatedSVD per matrix
lora_init         weights -> starting factors and residuals, a LoraInit each
derive_residual   W - s B0 A0, the one formula
fingerprint       SHA-256 over W, A0, B0 and s
FeDeRALinear      the layer that takes the place of nn.Linear or Conv1D
replace_linears   puts it into a model, tells what it did in a ReplaceReport
load_extension    the compiled module or None; why_no_extension tells why
"""

from ._extension import load_extension, why_no_extension
from .frozen import FrozenWeight
from .linear import FeDeRALinear, LoraInit, derive_residual, fingerprint, lora_init
from .lora_linear import Segments, lora_linear, lora_linear_clients, lora_linear_shared
from .replace import ReplaceReport, replace_linears
from .truncated_svd import TruncatedSVD, truncated_svd

__all__ = [
    "FeDeRALinear",
    "FrozenWeight",
    "LoraInit",
    "ReplaceReport",
    "Segments",
    "TruncatedSVD",
    "derive_residual",
    "fingerprint",
    "load_extension",
    "lora_init",
    "lora_linear",
    "lora_linear_clients",
    "lora_linear_shared",
    "replace_linears",
    "truncated_svd",
    "why_no_extension",
]
