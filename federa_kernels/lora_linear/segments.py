"""Which rows of a packed batch belong to which client."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from .._checks import failure

ALL = 2**31 - 1  # a rank above every other: no component is left out


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
        """Raises ValueError for negative sizes, 2^31 rows or more, lists of unlike lengths, ranks below 1."""
        sizes = tuple(int(size) for size in sizes)
        if not sizes or min(sizes) < 0:
            raise ValueError(failure("Segments", "sizes", "be one count >= 0 for each client", list(sizes)[:8]))
        if sum(sizes) > ALL:
            raise ValueError(failure("Segments", "sizes", "sum to less than 2^31 rows", sum(sizes)))
        scalings = [float(s) for s in scalings] if isinstance(scalings, Sequence) else [float(scalings)] * len(sizes)
        if len(scalings) != len(sizes) or not all(map(math.isfinite, scalings)):
            expected = f"be finite, one or C={len(sizes)} of them"
            raise ValueError(failure("Segments", "scalings", expected, scalings[:8]))
        if ranks is not None and (len(ranks) != len(sizes) or not all(1 <= R <= ALL for R in ranks)):
            raise ValueError(failure("Segments", "ranks", f"be C={len(sizes)} integers >= 1", list(ranks)[:8]))
        offsets = [0, *accumulate(sizes)]
        return cls(
            torch.tensor(offsets, dtype=torch.int32, device=device),
            torch.tensor(scalings, dtype=torch.float32, device=device),
            torch.tensor(ranks or [ALL] * len(sizes), dtype=torch.int32, device=device),
            sizes,
            None if ranks is None else max(ranks),
        )

    @classmethod
    def from_offsets(cls, offsets: Sequence[int], **others) -> "Segments":
        """The same from offsets (C+1), which start at 0 and never decrease."""
        offsets = [int(offset) for offset in offsets]
        if not offsets or offsets[0] != 0 or any(b < a for a, b in zip(offsets, offsets[1:], strict=False)):
            raise ValueError(failure("Segments", "offsets", "start at 0 and never decrease", offsets[:8]))
        return cls.from_sizes([b - a for a, b in zip(offsets, offsets[1:], strict=False)], **others)

    def to(self, device: torch.device | str) -> "Segments":
        tensors = (t.to(device) for t in (self.offsets, self.scalings, self.ranks))
        return Segments(*tensors, self.sizes, self.max_rank)

    def __len__(self) -> int:
        return len(self.sizes)
