"""An encoder's layers over the real tokens of a batch alone, one row a token, instead of over its padding too.

The embeddings and the task head see padded tensors (E, T, K) as transformers made them; between the two, the encoder's
layers see (1, M, K), M the number of real tokens, and attention stays within each example. Where the head reads nothing
but an example's first token, the last layer's attention leads to those tokens' rows alone, (1, E, K).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from federa.models import backbone_of
from federa_kernels import packed_attention, to_device

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
# Those of them whose sequence classifiers read hidden[:, 0] alone, and whose layers have attention.output
READ_FIRST = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


@dataclass(frozen=True)
class Packing:
    """Where the M real tokens of a padded batch (E, T) are.

    places (M,) among its E T rows, in order; lengths of the examples, on the host.
    """

    places: Tensor
    lengths: tuple[int, ...]
    padded: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor, lengths: tuple[int, ...] | None = None) -> "Packing":
        """mask (E, T) bool, True for real tokens, which stand before the padding; without `lengths` it is read, and the
        host waits for its device."""
        if lengths is None:
            return cls(mask.flatten().nonzero().squeeze(1), tuple(mask.sum(1).tolist()), tuple(mask.shape))
        real = np.arange(mask.shape[1]) < np.array(lengths)[:, None]
        return cls(to_device(torch.from_numpy(np.flatnonzero(real)), mask.device), lengths, tuple(mask.shape))

    @cached_property
    def firsts(self) -> Tensor:
        """(E,) places of the first tokens among the M; no example may be empty."""
        return to_device(torch.tensor([0, *accumulate(self.lengths)][:-1]), self.places.device)

    def pack(self, padded: Tensor) -> Tensor:
        """(E, T, K) -> (1, M, K)."""
        return padded.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, M, K) -> (E, T, K), zero where there is no token; the first tokens alone, (1, E, K) -> (E, 1, K)."""
        E, T = self.padded
        if packed.shape[1] != len(self.places):
            return packed.transpose(0, 1)
        rows = packed.new_zeros(E * T, packed.shape[-1]).index_copy(0, self.places, packed.squeeze(0))
        return rows.view(E, T, -1)


class FirstTokens:
    """A model whose head reads each example's first token alone: in the last layer only they ask, and the others go no
    further. Not where the backbone is called by itself."""

    def __init__(self, model: nn.Module, encoder: nn.Module):
        self._called, self._packing = False, None
        attention = encoder.layer[-1].attention
        self._attention, self._all = attention.self, attention.self.forward
        attention.self.forward = self._attend
        attention.output.register_forward_pre_hook(self._cut)
        encoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._called = True

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        self._called, self._packing = False, None

    def _enter(self, encoder: nn.Module, args: tuple, kwargs: dict) -> None:
        packing = kwargs["attention_mask"]
        self._packing = packing if self._called and min(packing.lengths, default=0) > 0 else None

    def _attend(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """(1, M, K) -> (1, E, N)."""
        module, packing = self._attention, self._packing
        if packing is None:
            return self._all(hidden_states, *args, **kwargs)
        first = module.query(hidden_states.index_select(1, packing.firsts))
        rows = (
            x.squeeze(0).unflatten(1, (-1, module.attention_head_size))
            for x in (first, module.key(hidden_states), module.value(hidden_states))
        )
        dropout = module.dropout.p if module.training else 0.0
        out = packed_attention(*rows, packing.lengths, module.scaling, dropout, [1] * len(packing.lengths))
        return out.flatten(1).unsqueeze(0), None

    def _cut(self, output: nn.Module, args: tuple) -> tuple | None:
        """args: the attention's result (1, E, N) and what its projection is added to, (1, M, K) -> (1, E, K)."""
        attended, hidden = args
        return None if self._packing is None else (attended, hidden.index_select(1, self._packing.firsts))


def _reads_first(model: nn.Module) -> bool:
    kind = type(model)
    of_transformers = kind.__module__.startswith("transformers.models.")
    classifies = of_transformers and kind.__name__.endswith("ForSequenceClassification")
    return classifies and model.config.model_type in READ_FIRST


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
    if _reads_first(model):
        FirstTokens(model, encoder)
    return True


def is_packed(model: nn.Module) -> bool:
    return backbone_of(model)[1].config._attn_implementation == NAME


def _enter(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    packing = Packing.of(mask, kwargs.pop("lengths", None))
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
