"""An encoder's layers over the real tokens of a batch alone, one row a token, instead of over its padding too.

The embeddings and the task head see padded tensors (E, T, K) as transformers made them; between the two, the encoder's
layers see (1, M, K), M the number of real tokens, and attention stays within each example.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from federa.models import backbone_of
from federa_kernels import packed_attention

NAME = "federa_packed"
# model_type -> the child of the backbone that holds all of its layers and takes attention_mask
ENCODERS = {
    "bert": "encoder",
    "roberta": "encoder",
    "xlm-roberta": "encoder",
    "camembert": "encoder",
    "electra": "encoder",
    "distilbert": "transformer",
}


@dataclass(frozen=True)
class Packing:
    """Where the M real tokens of a padded batch (E, T) are.

    places (M,) among its E T rows, in order; lengths of the examples, on the host.
    """

    places: Tensor
    lengths: tuple[int, ...]
    padded: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """mask (E, T) bool, True for real tokens, which stand before the padding."""
        return cls(mask.flatten().nonzero().squeeze(1), tuple(mask.sum(1).tolist()), tuple(mask.shape))

    def pack(self, padded: Tensor) -> Tensor:
        """(E, T, K) -> (1, M, K)."""
        return padded.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, M, K) -> (E, T, K), zero where there is no token."""
        E, T = self.padded
        rows = packed.new_zeros(E * T, packed.shape[-1]).index_copy(0, self.places, packed.squeeze(0))
        return rows.view(E, T, -1)


def pack_encoder(model: nn.Module) -> bool:
    """Lets a model's encoder work on packed tokens from now on; False, and nothing done, for one not of ENCODERS."""
    backbone = backbone_of(model)[1]
    child = ENCODERS.get(backbone.config.model_type)
    if child is None or getattr(backbone.config, "is_decoder", False):
        return False
    backbone.set_attn_implementation(NAME)
    encoder = backbone.get_submodule(child)
    encoder.register_forward_pre_hook(_enter, with_kwargs=True)
    encoder.register_forward_hook(_leave, with_kwargs=True)
    return True


def _enter(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    packing = Packing.of(mask)
    return (packing.pack(hidden), *others), kwargs | {"attention_mask": packing}


def _leave(encoder: nn.Module, args: tuple, kwargs: dict, output):
    output.last_hidden_state = kwargs["attention_mask"].unpack(output.last_hidden_state)
    return output


def _mask(attention_mask: Tensor | None = None, **facts) -> Tensor | None:
    """The padding mask (E, T) itself: `_enter` makes a Packing of it."""
    return attention_mask


def _attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout: float = 0.0, **kwargs):
    """softmax(q k^T scaling) v within each example. query, key, value (1, H, M, D) -> (1, M, H, D)."""
    if not isinstance(attention_mask, Packing):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)
    rows = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
    return packed_attention(*rows, attention_mask.lengths, kwargs.get("scaling"), dropout).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
