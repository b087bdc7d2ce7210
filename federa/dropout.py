"""Hidden dropout by counters: a client draws the same masks alone, in any cohort, packed or padded, on any machine.

Every row of a batch, a token or an example, has a SplitMix64 stream of its own, seeded by (run seed, round, client,
step, batch of the step, number of the example among its client's, position in it). The n-th dropout of a forward reads
it from word n 2^20 on, 16 bits an element, so that rates are multiples of 2^-16.

SplitMix64: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federa.config import Config
from federa.randomness import Purpose, torch_seed
from federa_kernels import to_device

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = {30: 0xBF58476D1CE4E5B9 - 2**64, 27: 0x94D049BB133111EB - 2**64, 31: 1}  # by the shift before
_COPIES = 2**24 - 1  # stands for an example's number where rows are no example's


def step_keys(config: Config, round: int, clients: Sequence[int], step: int) -> list[int]:
    """What the masks of each client are keyed by in a step; none without dropout."""
    if config.model.dropout == config.model.attention_dropout == 0:
        return []
    return [torch_seed(config.seed, Purpose.DROPOUT, round=round, client=client, step=step) for client in clients]


class Counters:
    """What the masks of the running batch are functions of: a stream for each row of the tensors that modules see.

    Their leading shapes are (1, M) tokens without padding, (1, E) first tokens, (E, T) padded tokens or (E,) examples.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._streams: dict[tuple[int, ...], Tensor] = {}
        self._clients, self._calls = torch.empty(0, dtype=torch.int64), 0

    @contextmanager
    def counting(self, keys: Sequence[int], batch: int, counts: Sequence[int], lengths: np.ndarray) -> Iterator[None]:
        """One forward. keys: of each client's step; batch: its number in the step; counts: examples of each client;
        lengths (E,): tokens of each example, client after client.

        What is not drawn by counters (attention's masks) comes from torch's generator, seeded by the only client.
        """
        if not keys:
            yield
            return
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        numbers = torch.cat([torch.arange(count) for count in counts])
        clients = torch.tensor(keys) + _GAMMA * torch.tensor(batch << 44)
        starts = clients[owners] + _GAMMA * (numbers << 20)
        padded = starts[:, None] + _GAMMA * torch.arange(int(lengths.max()))
        real = torch.arange(padded.shape[1]) < torch.from_numpy(lengths)[:, None]
        streams = [starts, starts.unsqueeze(0), padded, padded[real].unsqueeze(0)]
        alone, devices = len(keys) == 1, [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=alone):
            if alone:
                torch.manual_seed((keys[0] + batch) % 2**63)
            mixed = {tuple(seeds.shape): _mixed(seeds.clone()) for seeds in streams}
            self._streams = {shape: to_device(seeds, self._device) for shape, seeds in mixed.items()}
            self._clients, self._calls = clients, 0
            try:
                yield
            finally:
                self._streams, self._clients = {}, self._clients[:0]

    def dropped(self, shape: torch.Size, p: float, copies: bool = False) -> Tensor | None:
        """True for the elements of a tensor (*rows, K) that the next dropout sets to zero; None if it is not one of the
        running batch's. copies: of rows (C, 1, n), or (n,) of an only client, that each client has its own of."""
        if copies and len(self._clients):
            places = torch.arange(shape[-2]) + (_COPIES << 20)
            seeds = _mixed(self._clients[:, None] + _GAMMA * places).view(shape[:-1])
            seeds = to_device(seeds, self._device)
        else:
            seeds = self._streams.get(tuple(shape[:-1]))
        if seeds is None:
            assert len(self._clients) <= 1, f"no client owns the rows of {tuple(shape)}"
            return None
        words = (torch.arange(-(-shape[-1] // 4), device=seeds.device) + (self._calls << 20)) * _GAMMA
        self._calls += 1
        bits = _mixed(seeds.unsqueeze(-1) + words).view(torch.int16)[..., : shape[-1]]
        return bits < _share(p) - 2**15

    def cover(self, model: nn.Module) -> bool:
        """Whether a model in training takes all its masks from here, and none from torch's generators."""
        ids, training = torch.ones(1, 4, dtype=torch.int64, device=self._device), model.training
        with torch.no_grad(), self.counting([0], 0, [1], np.array([4])):
            before = self._torch_state()
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids))
            drawn = not torch.equal(before, self._torch_state())
        model.train(training)
        return not drawn

    def _torch_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()


class Dropout(nn.Dropout):
    """nn.Dropout whose masks are those of `counters` while they are counting. copies: it sees DeBERTa's positions."""

    counters: Counters
    copies = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        dropped = self.counters.dropped(x.shape, self.p, self.copies)
        if dropped is None:
            return F.dropout(x, self.p)
        return x.masked_fill(dropped, 0).mul_(2**16 / (2**16 - _share(self.p)))


def count_dropout(model: nn.Module, device: torch.device) -> Counters:
    """Every nn.Dropout of a model draws by the counters that are returned from now on."""
    counters = Counters(device)
    for name, module in model.named_modules():
        if type(module) is nn.Dropout:
            module.__class__, module.counters = Dropout, counters
            module.copies = name.endswith("pos_dropout")
    return counters


def _share(p: float) -> int:
    """How many of the 2^16 values of an element mean that it is dropped."""
    return min(round(p * 2**16), 2**16 - 1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's output for a state x, int64, in its place. An int64's right shift copies the sign, which is cut."""
    shifted = torch.empty_like(x)
    for shift, factor in _FACTORS.items():
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return x
