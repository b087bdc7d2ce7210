"""Kernels and the layer of FeDeRA; knows nothing of federated learning.

lora_linear       y = x W^T + s (x A^T) B^T + b, forward and backward; lora_linear_clients for many adapters over the
                  rows of one batch (Segments), lora_linear_shared for projections of one x
FrozenWeight      a weight that never trains, with packed forms that multiply faster
packed_attention  attention within each of many examples, without padding
truncated_svd     leading singular triplets, a TruncatedSVD per matrix
factored_svd      the same of a weighted sum of products, from its factors; svd_memory_needed predicts its peak
lora_init         weights -> starting factors and residuals, a LoraInit each
derive_residual   W - s B0 A0, the one formula
fingerprint       SHA-256 over W, A0, B0 and s
FeDeRALinear      the layer that takes the place of nn.Linear or Conv1D
replace_linears   puts it into a model, tells what it did in a ReplaceReport
fuse_projections  query, key and value, gate and up of transformers models in one lora_linear_shared; a FuseReport
accelerate_peft   lora_linear under the LoRA of a peft model, an AccelerateReport; restore_peft takes it back
pack_frozen       frozen nn.Linears without an adapter over packed forms, too
explain           which path each layer takes, and why
load_extension    the compiled module or None; why_no_extension tells why
to_device         a tensor of the host on a device, which the host does not wait for
"""

from ._extension import load_extension, why_no_extension
from .attention import packed_attention
from .explain import explain
from .frozen import FrozenWeight, pack_frozen
from .linear import FeDeRALinear, LoraInit, derive_residual, fingerprint, lora_init
from .lora_linear import Segments, lora_linear, lora_linear_clients, lora_linear_shared
from .peft import AccelerateReport, accelerate_peft, restore_peft
from .projections import FuseReport, fuse_projections
from .replace import ReplaceReport, replace_linears
from .transfer import to_device
from .truncated_svd import TruncatedSVD, factored_svd, svd_memory_needed, truncated_svd

__all__ = [
    "AccelerateReport",
    "FeDeRALinear",
    "FrozenWeight",
    "FuseReport",
    "LoraInit",
    "ReplaceReport",
    "Segments",
    "TruncatedSVD",
    "accelerate_peft",
    "derive_residual",
    "explain",
    "factored_svd",
    "fingerprint",
    "fuse_projections",
    "load_extension",
    "lora_init",
    "lora_linear",
    "lora_linear_clients",
    "lora_linear_shared",
    "pack_frozen",
    "packed_attention",
    "replace_linears",
    "restore_peft",
    "svd_memory_needed",
    "to_device",
    "truncated_svd",
    "why_no_extension",
]
