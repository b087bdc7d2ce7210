"""Which rows of a packed batch belong to which client."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from .._checks import failure
from ..transfer import to_device

ALL = 2**31 - 1  # a rank above every other: no component is left out
FLOAT32_MAX = torch.finfo(torch.float32).max


def _listed(values: Any) -> Any:
    """A tensor's or an array's numbers, any sequence as a list, a number as it is."""
    return values.tolist() if hasattr(values, "tolist") else list(values) if isinstance(values, Sequence) else values


def _integers(values: Sequence[Any], least: int) -> bool:
    return all(isinstance(value, int) and least <= value <= ALL for value in values)


class Segments:
    """Rows of C clients one after another in one batch, checked once on the host and then only read on the device.

    offsets   (C+1,)  int32, client c has the rows from offsets[c] to offsets[c+1]; a client may have none
    scalings  (C,)    float32, s of each client
    ranks     (C,)    int32, how many components of the stacked factors are the client's own
    sizes     rows per client, on the host; rows their sum, max_rank the greatest rank, None where none was given
    """

    def __init__(
        self,
        offsets: torch.Tensor,
        scalings: torch.Tensor,
        ranks: torch.Tensor,
        sizes: tuple[int, ...],
        max_rank: int | None,
    ):
        self.offsets, self.scalings, self.ranks, self.sizes = offsets, scalings, ranks, sizes
        self.rows, self.max_rank = sum(sizes), max_rank

    @classmethod
    def from_sizes(
        cls,
        sizes: Sequence[int],
        *,
        scalings: float | Sequence[float] = 1.0,
        ranks: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> "Segments":
        """Raises ValueError for counts that are no integers or negative, 2^31 rows or more, lists of unlike lengths,
        ranks below 1 and scalings that are not finite in float32.
        """
        sizes = tuple(_listed(sizes))
        if not sizes or not _integers(sizes, least=0):
            raise ValueError(failure("Segments", "sizes", "be one count >= 0 for each client", list(sizes)[:8]))
        if sum(sizes) > ALL:
            raise ValueError(failure("Segments", "sizes", "sum to less than 2^31 rows", sum(sizes)))
        scalings = _listed(scalings)
        scalings = scalings if isinstance(scalings, list) else [scalings] * len(sizes)
        if len(scalings) != len(sizes) or not all(abs(s) <= FLOAT32_MAX for s in scalings):
            expected = f"be finite, one or C={len(sizes)} of them"
            raise ValueError(failure("Segments", "scalings", expected, scalings[:8]))
        ranks = None if ranks is None else _listed(ranks)
        if ranks is not None and (len(ranks) != len(sizes) or not _integers(ranks, least=1)):
            raise ValueError(failure("Segments", "ranks", f"be C={len(sizes)} integers >= 1", ranks[:8]))
        fake = type(torch.empty(0)) is not torch.Tensor  # such cannot be copied to a GPU that is not there
        made = device if fake else None
        segments = cls(
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=made),
            torch.tensor(scalings, dtype=torch.float32, device=made),
            torch.tensor(ranks or [ALL] * len(sizes), dtype=torch.int32, device=made),
            sizes,
            None if ranks is None else max(ranks),
        )
        return segments if device == made else segments.to(device)

    @classmethod
    def from_offsets(cls, offsets: Sequence[int], **others) -> "Segments":
        """The same from offsets (C+1), which start at 0 and never decrease."""
        offsets = _listed(offsets)
        if not offsets or offsets[0] != 0 or any(b < a for a, b in pairwise(offsets)):
            raise ValueError(failure("Segments", "offsets", "start at 0 and never decrease", offsets[:8]))
        return cls.from_sizes([b - a for a, b in pairwise(offsets)], **others)

    def to(self, device: torch.device | str) -> "Segments":
        tensors = (to_device(t, device) for t in (self.offsets, self.scalings, self.ranks))
        return Segments(*tensors, self.sizes, self.max_rank)

    def __len__(self) -> int:
        return len(self.sizes)
