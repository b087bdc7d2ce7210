"""Many clients trained in one batch over one frozen backbone, each as if it had trained alone.

Every tensor that trains exists once a client, stacked (C, ...); a step's batch holds all clients' examples, client
after client, and each row meets its own client's tensors. Losses, clipping, optimiser and schedule are per client.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from federa import scaffold
from federa.client import ClientUpdate, LocalOptimizer, local_steps, micro_batches
from federa.config import Config
from federa.data import Examples
from federa.dropout import step_keys
from federa.methods import Learner
from federa.models import backbone_of
from federa.positions import memory_of_positions, positions_by_client
from federa_kernels import FeDeRALinear, Segments, lora_linear_clients, to_device

if TYPE_CHECKING:
    from federa.checkpoint import State
    from federa.experiment import Experiment

TOKENS_A_STEP = {"cpu": 4096, "cuda": 65536}  # what `auto` fills a step with: more makes no kernel faster
MEMORY_SHARE = 0.5  # of the free memory that `auto` plans with
Client = tuple[int, np.ndarray]  # id, indices of its examples


class Rows:
    """Which rows of the tensors of the running step belong to which client.

    Modules see tensors of the leading shapes (1, M) tokens without padding, (1, E) first tokens, (E, T) padded tokens,
    (E,) examples or (C, 1, n) rows that every client has a copy of.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.counts: list[int] = []
        self._sizes: dict[tuple[int, ...], list[int]] = {}
        self._segments: dict[tuple, Segments] = {}

    def set(self, counts: Sequence[int], lengths: np.ndarray) -> None:
        """counts: examples of each client; lengths (E,): tokens of each example, client after client."""
        self.counts = list(counts)
        ends = np.cumsum(counts)
        tokens = [int(part.sum()) for part in np.split(lengths, ends[:-1])]
        E, T = len(lengths), int(lengths.max())
        self._sizes = {(1, E): self.counts, (E,): self.counts, (1, sum(tokens)): tokens}
        self._sizes[E, T] = [count * T for count in counts]
        self._segments = {}

    def sizes(self, lead: Sequence[int]) -> list[int]:
        """Rows of each client in a tensor (*lead, K)."""
        if len(lead) == 3 and tuple(lead[:2]) == (len(self.counts), 1):
            return [lead[2]] * lead[0]
        return self._sizes[tuple(lead)]

    def segments(self, lead: Sequence[int], scaling: float) -> Segments:
        key = (*lead, scaling)
        if key not in self._segments:
            self._segments[key] = Segments.from_sizes(self.sizes(lead), scalings=scaling, device=self._device)
        return self._segments[key]


class Stacked(nn.Module):
    """A module of whose trainable parameters there is one for each client: `stacks`, name -> (C, ...).

    Acts on each row alone, as all that `_row_wise` lets through do: a row needs the parameters of its client only.
    """

    def __init__(self, module: nn.Module, stacks: Mapping[str, Tensor], rows: Rows):
        super().__init__()
        self._one = (module,)  # in a tuple: no part of this module's parameters
        self._rows, self._stacks = rows, dict(stacks)
        self.activate(len(next(iter(stacks.values()))))

    def activate(self, clients: int) -> None:
        """Only the first `clients` take part from now on; the others' tensors are not touched."""
        for name, stack in self._stacks.items():
            leaf = nn.Parameter(stack[:clients])
            self.register_parameter(name, leaf)
        self._shared: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        module, rows = self._one[0], x.reshape(-1, x.shape[-1])
        own = {name: getattr(self, name).unbind(0) for name in self._stacks}
        parts = rows.split(self._rows.sizes(x.shape[:-1]))
        results = [
            functional_call(module, {name: tensors[client] for name, tensors in own.items()}, part)
            for client, part in enumerate(parts)
            if len(part)
        ]
        y = torch.cat(results)
        return y.view(*x.shape[:-1], y.shape[-1])


class StackedAdapters(Stacked):
    """A FeDeRALinear with one adapter a client: one pass over the frozen residual for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        layer: FeDeRALinear = self._one[0]
        segments = self._rows.segments(x.shape[:-1], layer.scaling)
        lora_A, lora_B = (self._of("lora_A", len(segments)), self._of("lora_B", len(segments)))
        bias = self.bias if "bias" in self._stacks else layer.bias
        y = lora_linear_clients(x.reshape(-1, x.shape[-1]), layer.frozen, lora_A, lora_B, segments, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _of(self, name: str, clients: int) -> Tensor:
        """One a client; a factor that does not train is the same for all."""
        if name in self._stacks:
            return getattr(self, name)
        if name not in self._shared:
            own = getattr(self._one[0], name).detach()
            self._shared[name] = own.expand(clients, *own.shape).contiguous()
        return self._shared[name]


def _row_wise(module: nn.Module) -> bool:
    kind = type(module).__name__
    return isinstance(module, nn.Linear | nn.LayerNorm | FeDeRALinear) or kind == "Conv1D" or kind.endswith("RMSNorm")


def why_alone(learner: Learner, config: Config) -> str | None:
    """Why the clients of a run can only be trained one at a time, or None if they can share a batch."""
    if config.model.attention_dropout > 0:
        return "model.attention_dropout is on, and its masks are drawn for a whole batch"
    kind = backbone_of(learner.model)[1].config.model_type
    if kind == "deberta":
        return f"{kind} sends relative positions, which belong to no client, through layers that train"
    if not learner.method.cohort:
        return f"method {learner.method.name} trains tensors that cannot be stacked over clients"
    if learner.method.name == "full":
        return "method full trains the whole backbone, so that clients share no frozen weight"
    for name in learner.trainable:
        module = learner.model.get_submodule(name.rpartition(".")[0])
        if not _row_wise(module):
            return f"{name} trains, and a {type(module).__name__} cannot be stacked over clients"
    if config.model.dropout > 0 and not learner.dropout.cover(learner.model):
        return f"model.dropout is on, and a {kind} draws masks for a whole batch"
    return None


@contextmanager
def _stacked(learner: Learner, stacks: Mapping[str, Tensor], rows: Rows) -> Iterator[list[Stacked]]:
    """Puts stacked modules in the place of all that hold trainable parameters, and the old ones back after."""
    owners: dict[str, dict[str, Tensor]] = {}
    for name, stack in stacks.items():
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, {})[leaf] = stack
    model, originals, placed = learner.model, {}, []
    try:
        for owner, own in owners.items():
            module = originals[owner] = model.get_submodule(owner)
            kind = StackedAdapters if isinstance(module, FeDeRALinear) else Stacked
            placed.append(kind(module, own, rows))
            model.set_submodule(owner, placed[-1])
        with positions_by_client(model, lambda: rows.counts):
            yield placed
    finally:
        for owner, module in originals.items():
            model.set_submodule(owner, module)


def train_cohort(
    learner: Learner,
    examples: Examples,
    clients: Sequence[Client],
    round: int,
    start: Mapping[str, Tensor],
    config: Config,
    corrections: Sequence[Mapping[str, Tensor] | None] | None = None,
) -> list[ClientUpdate]:
    """What `train_client` does, for several clients at once; their updates in the order given.

    Equal to training each alone but for rounding: within 2e-5 of the whole update in float32. A client that has taken
    all its steps is not touched while others go on.
    """
    work = [(local_steps(len(own), config.client), client, own) for client, own in clients]
    order = sorted(range(len(work)), key=lambda position: -work[position][0])  # who is active comes first
    totals = np.array([work[position][0] for position in order])
    streams = [micro_batches(examples, work[p][2], work[p][1], round, config, work[p][0]) for p in order]
    device, C = learner.device, len(work)
    learner.load(start)
    begins = [learner.start_of(start, work[position][1]) for position in order]
    stacks = {name: torch.stack([begin[name] for begin in begins]) for name in learner.open(round)}
    stacks = {name: to_device(stack, device) for name, stack in stacks.items()}
    own = [{name: nn.Parameter(stack[place]) for name, stack in stacks.items()} for place in range(C)]
    optimizers = [
        LocalOptimizer(
            own[place], learner.head, config, round, int(totals[place]), corrections and corrections[position]
        )
        for place, position in enumerate(order)
    ]
    rows, loss, seen = Rows(device), torch.zeros(C, dtype=torch.float64, device=device), np.zeros(C, np.int64)
    learner.model.train()
    with _stacked(learner, stacks, rows) as modules:
        active, leaves = C, {name: learner.model.get_parameter(name) for name in stacks}
        for step in range(int(totals[0])):
            if (still := int((totals > step).sum())) < active:
                active = still
                for module in modules:
                    module.activate(active)
                leaves = {name: learner.model.get_parameter(name) for name in stacks}
            batches = [next(stream) for stream in streams[:active]]
            units = [sum(int(examples.units[part].sum()) for part in batch) for batch in batches]
            seen[:active] += units
            keys = step_keys(config, round, [work[position][1] for position in order[:active]], step)
            for number, micro in enumerate(zip_longest(*batches, fillvalue=np.arange(0))):
                loss[:active] += _backward(learner, examples, micro, number, keys, units, rows)
            for name, parameter in leaves.items():
                for client in range(active if parameter.grad is not None else 0):
                    own[client][name].grad = parameter.grad[client]
                parameter.grad = None
            for optimizer in optimizers[:active]:
                optimizer.step()
    means = (loss.cpu().numpy() / seen).tolist()
    updates, found = {}, {name: stack.cpu() for name, stack in stacks.items()}
    for place, position in enumerate(order):
        steps, client, indices = work[position]
        tensors = {name: stack[place].clone() for name, stack in found.items()}
        mean = means[place]
        updates[position] = ClientUpdate(client, len(indices), steps, tensors, {"loss": mean}, math.isfinite(mean))
    return [updates[position] for position in range(C)]


def _backward(
    learner: Learner,
    examples: Examples,
    micro: Sequence[np.ndarray],
    number: int,
    keys: Sequence[int],
    units: Sequence[int],
    rows: Rows,
) -> Tensor:
    """Adds the gradients of one batch of every client, its loss divided by the client's units; the sums of losses.

    number: of the batch in the step; keys: of the clients' masks.
    """
    counts = [len(own) for own in micro]
    indices = np.concatenate(micro)
    lengths = examples.lengths[indices]
    rows.set(counts, lengths)
    batch = examples.batch_on(learner.device, indices)
    with learner.dropout.counting(keys, number, counts, lengths):
        each = learner.task.losses(learner.model, batch)
    shares = torch.tensor(np.repeat(1 / np.array(units), counts), dtype=each.dtype)
    (each * to_device(shares, each.device)).sum().backward()
    return torch.stack([part.sum() for part in each.detach().split(counts)]).double()


def memory_of_client(experiment: "Experiment") -> int:
    """Bytes that one more client of a cohort takes in a step, predicted.

        4 t L (9 K + 2 F)  +  16 P

    t: tokens of a full batch of the mean length; L layers of width K and inner width F, whose inputs the backward
    keeps in float32; P trained parameters, each with its gradient and two moments. DeBERTa's positions come on top.
    """
    config, learner = experiment.config, experiment.learner
    backbone = backbone_of(learner.model)[1]
    facts = backbone.config
    width = facts.hidden_size
    inner = getattr(facts, "intermediate_size", None) or 4 * width
    length = float(experiment.train.lengths.mean())
    tokens = config.client.batch_size * length
    parameters = sum(parameter.numel() for parameter in learner.trainable.values())
    positions = memory_of_positions(backbone, config.client.batch_size, length)
    return int(4 * tokens * facts.num_hidden_layers * (9 * width + 2 * inner) + positions + 16 * parameters)


def choose_size(experiment: "Experiment", processes: int = 1) -> int:
    """The cohort of `run.cohort`: as asked; with auto, as many clients as fill a step and fit into memory, and no more
    than leave each of the processes its share of a round; 1 where `why_alone` says so, and with auto on a CPU for a
    model that computes padding, of which cohorts have more."""
    from federa.packing import is_packed  # needs transformers, which the model brings along

    config, device = experiment.config, experiment.learner.device
    if why_alone(experiment.learner, config) is not None:
        return 1
    if config.run.cohort != "auto":
        return config.run.cohort
    if device.type == "cpu" and not is_packed(experiment.learner.model):
        return 1  # four clients of a small DeBERTa or GPT-2 took twice as long together, 2026-11-23
    tokens = config.client.batch_size * float(experiment.train.lengths.mean())
    filling = round(TOKENS_A_STEP.get(device.type, TOKENS_A_STEP["cpu"]) / tokens)
    fitting = int(MEMORY_SHARE * free_memory(device) / memory_of_client(experiment))
    return max(1, min(filling, fitting, math.ceil(experiment.clients_per_round / processes)))


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


class Cohorts:
    """Trains a round's clients in cohorts of `size`, in id order; after running out of memory, of half that size."""

    def __init__(self, size: int):
        self.size = size

    def __call__(
        self, experiment: "Experiment", state: "State", round: int, clients: Sequence[int]
    ) -> Iterator[ClientUpdate]:
        done = 0
        while done < len(clients):
            group = [(client, experiment.clients[client]) for client in clients[done : done + self.size]]
            corrections = [scaffold.correction(state, client) for client, _ in group]
            try:
                updates = train_cohort(
                    experiment.learner, experiment.train, group, round, state.tensors, experiment.config, corrections
                )
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if len(group) == 1 or not _out_of_memory(error):
                    raise
                self.size = max(1, len(group) // 2)
                for parameter in experiment.learner.trainable.values():
                    parameter.grad = None
                continue
            yield from updates
            done += len(group)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
