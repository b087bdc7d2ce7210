"""DeBERTa's relative positions in cohorts: rows that no example owns, which every client projects by its own layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from federa.models import backbone_of


class _Copies(nn.Module):
    """An embedding table (n, K) as its readers see it in a cohort: `weight` (C, 1, n, K), a copy for each client."""

    def __init__(self, table: nn.Embedding, counts: Callable[[], Sequence[int]]):
        super().__init__()
        self._one, self._counts = (table,), counts

    @property
    def weight(self) -> Tensor:
        return self._one[0].weight.expand(len(self._counts()), 1, -1, -1)


def is_deberta(backbone: nn.Module) -> bool:
    """Whether it is a DeBERTa of the second or third version that has relative positions."""
    return backbone.config.model_type == "deberta-v2" and backbone.config.relative_attention


def memory_of_positions(backbone: nn.Module, examples: int, length: float) -> float:
    """Bytes that its backward keeps for them and for what attention makes of them, over examples of this length T.

        4 E L (k n (H T + K) + H T^2 + T K)

    k terms (c2p, p2c), each with its scores against all n positions and its projections of them; T K: the scaled keys.
    """
    if not is_deberta(backbone):
        return 0.0
    facts, n = backbone.config, backbone.encoder.rel_embeddings.num_embeddings
    H, terms = facts.num_attention_heads, len(facts.pos_att_type)
    width = facts.hidden_size
    an_example = terms * n * (H * length + width) + H * length**2 + length * width
    return 4 * examples * facts.num_hidden_layers * an_example


@contextmanager
def positions_by_client(model: nn.Module, counts: Callable[[], Sequence[int]]) -> Iterator[None]:
    """Meanwhile a DeBERTa of the second or third version scores each example's positions by its own client's layers.

    counts: examples of each client in the running batch. Other models are left as they are.
    """
    backbone = backbone_of(model)[1]
    if not is_deberta(backbone):
        yield
        return
    encoder, table = backbone.encoder, backbone.encoder.rel_embeddings
    attentions = [layer.attention.self for layer in encoder.layer]
    try:
        encoder.rel_embeddings = _Copies(table, counts)
        for attention in attentions:
            attention.disentangled_attention_bias = partial(_bias, attention, counts)
        yield
    finally:
        encoder.rel_embeddings = table
        for attention in attentions:
            vars(attention).pop("disentangled_attention_bias", None)


def _bias(
    attention: nn.Module,
    counts: Callable[[], Sequence[int]],
    query: Tensor,
    key: Tensor,
    distances: Tensor,
    positions: Tensor,
    terms: int,
) -> Tensor:
    """What positions add to the scores (E H, T, T) of disentangled attention (arXiv 2006.03654):

        (q_i . K_d(i,j) + k_j . Q_d(i,j)) / sqrt(terms D)

    query, key (E H, T, D); distances d (1, T, T); positions (C, 1, n, K), of which a client's layers make its own K and
    Q (n, H D).
    """
    kinds, shared = attention.pos_att_type, attention.share_att_key
    H, D, span = attention.num_attention_heads, query.shape[-1], attention.pos_ebd_size
    places = (distances.squeeze(0).long() + span).clamp(0, 2 * span - 1)
    scale = torch.tensor(float(terms * D)).sqrt().item()  # of float32, whatever the rows are

    def against(rows: Tensor, layer: nn.Module, places: Tensor) -> Tensor:
        """rows (E H, T, D) times what a layer makes of the positions at `places` (T, T)."""
        own = layer(positions).view(len(positions), -1, H, D).transpose(1, 2)
        each = [one.expand(count, -1, -1, -1) for one, count in zip(own.unbind(0), counts(), strict=True)]
        scores = rows @ torch.cat(each).flatten(0, 1).transpose(1, 2)
        return scores.gather(-1, places.expand(len(rows), -1, -1)) / scale

    bias = query.new_zeros(())
    if "c2p" in kinds:
        bias = bias + against(query, attention.key_proj if shared else attention.pos_key_proj, places)
    if "p2c" in kinds:
        layer = attention.query_proj if shared else attention.pos_query_proj
        bias = bias + against(key, layer, places.T).transpose(1, 2)
    return bias
