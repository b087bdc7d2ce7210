"""A weight that never trains, and the forms of it that a device multiplies fastest."""

import copy
from typing import Any

import torch
from torch import Tensor

from ._checks import check_float, check_shape
from .lora_linear import cpu


class FrozenWeight:
    """One tensor W (N,K) and, made at first use, its packed forms for x W^T and dy W.

    The tensor stays the only truth: packed forms are never stored, copied or pickled, and are made again when it
    has moved, changed its dtype or been written to in place. (A write through `.data` is not seen.)

    weight  (N,K)  float dtype, as given or cast to `dtype`; gradients never reach it

    Memory beside the weight, for each form in use: 6 bytes an entry for float32, 2 for bfloat16, with N and K rounded up
    to 32; nothing where the device has no packed form (see `explain`).
    """

    def __init__(self, weight: Tensor, *, dtype: torch.dtype | None = None):
        check_shape("FrozenWeight", "weight", weight, N=None, K=None)
        check_float("FrozenWeight", "weight", weight)
        self.weight = weight if dtype is None or dtype == weight.dtype else weight.detach().to(dtype)
        self._forms: dict[bool, Tensor] = {}
        self._made_of: Any = None

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def forms(self, dtype: torch.dtype, backward: bool) -> tuple[Tensor | None, Tensor | None]:
        """The packed forms for x W^T and, where asked for, dy W with rows of `dtype`; None where there is none."""
        if not cpu.packs(dtype, self.weight):
            return None, None
        if torch.compiler.is_compiling():  # what is there is used; `pack_frozen` or a first call makes it
            return self._forms.get(False), self._forms.get(True) if backward else None
        version = 0 if self.weight.is_inference() else self.weight._version
        now = (self.weight.data_ptr(), version, self.weight.dtype, tuple(self.weight.shape))
        if now != self._made_of:
            self._forms, self._made_of = {}, now
        for transposed in (False, True) if backward else (False,):
            if transposed not in self._forms:
                self._forms[transposed] = cpu.pack(self.weight.detach(), transposed)
        return self._forms[False], self._forms.get(True) if backward else None

    def packed_bytes(self) -> int:
        """What the packed forms hold at present."""
        return sum(form.numel() for form in self._forms.values())

    def drop(self) -> None:
        """Lets go of the packed forms; the next use makes them again."""
        self._forms, self._made_of = {}, None

    def __deepcopy__(self, memo: dict) -> "FrozenWeight":
        return FrozenWeight(copy.deepcopy(self.weight, memo))

    def __reduce__(self) -> tuple:
        return FrozenWeight, (self.weight,)
