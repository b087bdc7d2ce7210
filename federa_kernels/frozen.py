"""A weight that never trains, the forms of it that a device multiplies fastest, and frozen layers that use them."""

import copy
from threading import RLock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ._checks import check_float, check_shape
from .lora_linear import cpu, lora_linear


class FrozenWeight:
    """One tensor W (N,K) and, made at first use, its packed forms for x W^T and dy W.

    The tensor stays the only truth: packed forms are never stored, copied or pickled, and are made again when it has
    moved, changed its dtype or been written to in place (a write through `.data` is not seen). Compiled graphs work
    without them.

    weight          (N,K)  float dtype, as given or cast to `dtype`; gradients never reach it
    fan_in_fan_out  the tensor given lies as (K,N), as transformers' Conv1D has it

    `release_canonical=True` lets go of the tensor once it is packed, where unpacking gives back every bit of it (not
    with infinities or parts below 1e-33 on tile units); `weight` is then unpacked anew at each read. It saves memory
    where nobody else holds the tensor; writes to it by others are no longer seen. Not for models that torch compiles.

    Memory beside the weight, for each of the two forms in use: on tile units (AMX) 6 bytes an entry for float32, 2 for
    bfloat16, with N and K rounded up to 32; with AVX-512 or AVX2 as much as the weight, with the outputs (N, or K for
    dy W) rounded up to 16 or 8; nothing where the device has no packed form (see `explain`). A thread that multiplies
    keeps about 2 MB to work in, and room for the adapters' packed forms.

    Packed float32 is as exact as float32, on tile units with two exceptions: an infinity, or a magnitude above 3.39e38,
    makes NaN, and parts of magnitudes below 1e-33 may be lost.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
        release_canonical: bool = False,
    ):
        check_shape("FrozenWeight", "weight", weight, N=None, K=None)
        check_float("FrozenWeight", "weight", weight)
        self._held = weight if dtype is None or dtype == weight.dtype else weight.detach().to(dtype)
        self.fan_in_fan_out = fan_in_fan_out
        self.release_canonical, self.released, self._lock = release_canonical, False, RLock()
        self._forms: dict[bool, Tensor] = {}
        self._rows: dict[torch.dtype, bool] = {}  # whether packed forms serve rows of this dtype
        self._made_of: tuple = ()
        self._storage: StorageWeakRef | None = None

    @property
    def source(self) -> Tensor:
        """The tensor given, or one of the same bits."""
        if not self.release_canonical:
            return self._held
        with self._lock:
            if not self.released:
                return self._held
            weight = cpu.unpack(self._forms[False], self.operand, self._made_of[0])
        return weight.t().contiguous() if self.fan_in_fan_out else weight

    @property
    def weight(self) -> Tensor:
        return self.source.t() if self.fan_in_fan_out else self.source

    @property
    def operand(self) -> Tensor:
        """The weight or, where it is released, one of its shape and dtype that must not be read."""
        return self._held.t() if self.fan_in_fan_out else self._held

    @property
    def shape(self) -> torch.Size:
        return self.operand.shape

    def forms(self, dtype: torch.dtype, backward: bool) -> tuple[Tensor | None, Tensor | None]:
        """The packed forms for x W^T and, where asked for, dy W with rows of `dtype`; None where there is none."""
        if torch.compiler.is_compiling():  # a compiled graph could not see the weight change
            return None, None
        with self._lock:
            return self._current(dtype, backward)

    def _current(self, dtype: torch.dtype, backward: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.released and self._made_of[0] != cpu.engine():
            self.drop()
        weight, forms = self.operand, self._forms
        # A subclass may hold no memory of its own; an inference tensor does not count its versions.
        if type(weight) not in (Tensor, nn.Parameter) or weight.is_inference():
            return None, None
        now = _identity(weight)
        if now != self._made_of:
            forms.clear()
            # The weak reference keeps the storage's name, so that no other storage gets it while the forms are there.
            self._made_of, self._storage = now, StorageWeakRef(weight.untyped_storage())
            self._rows = {}
        if dtype not in self._rows:
            self._rows[dtype] = cpu.packs(dtype, weight)
        if not self._rows[dtype]:
            return None, None
        for transposed in (False, True) if backward else (False,):
            if transposed not in forms:
                forms[transposed] = cpu.pack(self.weight.detach(), transposed)
        if self.release_canonical and not self.released:
            self._release()
        return forms[False], forms[True] if backward else None

    def _release(self) -> None:
        bits = torch.int32 if self._held.dtype == torch.float32 else torch.int16
        unpacked = cpu.unpack(self._forms[False], self.operand, cpu.engine())
        if not torch.equal(unpacked.view(bits), self.operand.detach().view(bits)):
            self.release_canonical = False
            return
        self._held = self._held.detach().new_empty(1).expand(self._held.shape)
        self._made_of = _identity(self.operand)
        self._storage, self.released = StorageWeakRef(self._held.untyped_storage()), True

    def packed_bytes(self) -> int:
        """What the packed forms hold at present."""
        return sum(form.numel() for form in self._forms.values())

    def drop(self) -> None:
        """Lets go of the packed forms; the next use makes them again."""
        with self._lock:
            self._held, self.released = self.source, False
            self._forms, self._rows, self._made_of, self._storage = {}, {}, (), None

    def __deepcopy__(self, memo: dict) -> "FrozenWeight":
        return _rebuilt(copy.deepcopy(self.source, memo), self.fan_in_fan_out, self.release_canonical)

    def __reduce__(self) -> tuple:
        return _rebuilt, (self.source, self.fan_in_fan_out, self.release_canonical)


def _rebuilt(source: Tensor, fan_in_fan_out: bool, release_canonical: bool) -> FrozenWeight:
    return FrozenWeight(source, fan_in_fan_out=fan_in_fan_out, release_canonical=release_canonical)


def _identity(weight: Tensor) -> tuple:
    """What changes where packed forms no longer belong to a weight."""
    place = (weight.untyped_storage()._cdata, weight.storage_offset())
    return (cpu.engine(), *place, weight._version, weight.dtype, weight.shape)


class PackedLinear(nn.Linear):
    """A frozen nn.Linear over packed forms of its weight, and an nn.Linear in all else; `pack_frozen` makes it.

    y = x W^T + b
    """

    _frozen: FrozenWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(x)
        if self._frozen is None or self._frozen.weight is not self.weight:
            self._frozen = FrozenWeight(self.weight)
        none = self.weight.new_empty(0)
        lora_A, lora_B = none.view(0, self.in_features), none.view(self.out_features, 0)
        return lora_linear(x, self._frozen, lora_A, lora_B, 1.0, self.bias)

    def _apply(self, fn, recurse=True):
        self._frozen = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._frozen = None


def pack_frozen(model: nn.Module) -> list[str]:
    """Lets every frozen nn.Linear of a model compute over packed forms of its weight; the names of those it changed.

    Layers that train, subclasses of nn.Linear and devices without packed forms are left alone. Nothing shows in
    state_dict, copies or pickles. A layer that is unfrozen later computes as nn.Linear does.
    """
    packed = []
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad and cpu.packs(layer.weight.dtype, layer.weight):
            layer.__class__ = PackedLinear
            packed.append(name)
    return packed
