"""Pure functions from client updates to the next global tensors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from federa.client import ClientUpdate, local_steps
from federa.config import ClientConfig, PrivacyConfig, ServerConfig
from federa.methods import Pair
from federa_kernels import TruncatedSVD, factored_svd, truncated_svd

Tensors = Mapping[str, torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]  # left (N, L), right (L, K)


def problem_of(update: ClientUpdate, template: Tensors, config: ClientConfig | None = None) -> str | None:
    """Why an update must not be averaged (names, shapes, dtypes, NaN or Inf, no examples, or with a configuration other
    steps than so many examples take), or None if it may."""
    if update.problem is not None:
        return update.problem
    if type(update.examples) is not int or not 1 <= update.examples < 2**31:
        return f"examples must be an integer from 1 to 2**31 - 1, got {update.examples!r}"
    if config is not None and update.steps != (steps := local_steps(update.examples, config)):
        return f"steps must be {steps} for {update.examples} examples, got {update.steps!r}"
    for name, tensor in update.tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"{name} must be a tensor, got {type(tensor).__name__}"
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return f"{name} must be dense and hold data, got {tensor.layout} on {tensor.device}"
    if (problem := mismatch(update.tensors, template)) is not None:
        return problem
    for name, tensor in update.tensors.items():
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or Inf"
    loss = update.metrics.get("loss")
    if not isinstance(loss, float):
        return f"the training loss must be a number, got {loss!r}"
    return None if update.finite and math.isfinite(loss) else "the training loss was NaN or Inf"


def mismatch(tensors: dict[str, torch.Tensor], template: dict[str, torch.Tensor]) -> str | None:
    """None if `tensors` has the names, shapes and dtypes of `template`, else the first difference in words."""
    if missing := sorted(template.keys() - tensors.keys()):
        return f"{missing[0]} is missing"
    if unknown := sorted(tensors.keys() - template.keys()):
        return f"{unknown[0]} is not a trainable tensor of this run"
    for name, expected in template.items():
        got = tensors[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{name} must be {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}"
    return None


class WeightedMean:
    """FedAvg: sum_c n_c x_c / sum_c n_c, as a running sum in float64; memory does not grow with clients.

    Add updates in client-id order: the result is then the same bits wherever they come from.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weight: float = 0

    def add(self, tensors: Tensors, weight: float) -> None:
        """Adds one client's tensors with its number of examples. Raises ValueError unless it is above 0."""
        if not weight > 0:
            raise ValueError(f"WeightedMean: weight must be a positive number of examples, got {weight}")
        for name, tensor in tensors.items():
            if name in self._sums:
                self._sums[name].add_(tensor.double(), alpha=weight)
            else:
                self._sums[name] = tensor.double() * weight
        self._weight += weight

    def result(self, like: Tensors) -> dict[str, torch.Tensor]:
        """The mean, in the dtypes of `like`."""
        return {name: (total / self._weight).to(like[name].dtype) for name, total in self._sums.items()}


@dataclass(frozen=True)
class Aggregate:
    """What the updates of a round make.

    mean     what the server's optimiser steps towards
    factors  what is final as it is
    moves    name of a frozen weight -> (left, right) float64: left @ right (N, K) is added to it; or that as it is
    ranks    name -> rank of its move as it is sent
    memory   of a server's optimiser that has stepped already
    drift    ||s (sum_c p_c B_c A_c - B A)|| / ||s (sum_c p_c B_c A_c - X)|| over all layers, B A the product of what
             the server's optimiser steps towards and X the one before; None where it is not measured or zero by
             construction
    """

    mean: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    moves: dict[str, Factors | torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    drift: float | None = None


@dataclass(frozen=True)
class Terms:
    """What an aggregator needs of the round it serves.

    current: the tensors that train in it, as they were sent out. pairs: the layers whose two factors are among them.
    rank_of: client -> rank. restart: the factors that flora begins anew from. memory: the server's optimiser's.
    """

    config: ServerConfig
    current: Tensors
    pairs: Sequence[Pair] = ()
    rank_of: Callable[[int], int] | None = None
    restart: Callable[[], Tensors] = dict
    drift: bool = False
    memory: Tensors = field(default_factory=dict)


class Products:
    """The products of a round, sum_c p_c B_c A_c with p_c = n_c / sum n, kept as factors.

    Memory: one adapter a client, which is what the exact product needs; the dense sum of a layer never exists.
    """

    def __init__(self, terms: Terms):
        self.terms = terms
        self.clients: list[int] = []
        self._weights: list[int] = []
        self._factors: list[Tensors] = []

    def add(self, update: ClientUpdate) -> None:
        names = [name for pair in self.terms.pairs for name in (pair.lora_A, pair.lora_B)]
        self.clients.append(update.client)
        self._weights.append(update.examples)
        self._factors.append({name: update.tensors[name] for name in names})

    def weighted(self, pair: Pair, lr: float = 1.0) -> tuple[list[Factors], list[float]]:
        """[(B_c, A_c), ...] and their weights; with lr != 1 those of (1 - lr) X + lr sum_c p_c B_c A_c."""
        total, current = sum(self._weights), self.terms.current
        products = [(tensors[pair.lora_B], tensors[pair.lora_A]) for tensors in self._factors]
        weights = [lr * weight / total for weight in self._weights]
        if lr != 1.0:
            products.append((current[pair.lora_B], current[pair.lora_A]))
            weights.append(1.0 - lr)
        return products, weights

    def minus(self, pair: Pair, B: torch.Tensor, A: torch.Tensor, lr: float = 1.0) -> Factors:
        """s (sum_c p_c B_c A_c - B A) as one pair of factors in float64."""
        products, weights = self.weighted(pair, lr)
        lefts = [pair.scaling * weight * left.double() for (left, _), weight in zip(products, weights, strict=True)]
        rights = [right.double() for _, right in products]
        return torch.cat([*lefts, -pair.scaling * B.double()], 1), torch.cat([*rights, A.double()])

    def distance(self, tensors: Tensors) -> float:
        """||s (sum_c p_c B_c A_c - B A)|| over all layers, B A of `tensors`."""
        norms = [_norm(*self.minus(pair, tensors[pair.lora_B], tensors[pair.lora_A])) for pair in self.terms.pairs]
        return math.hypot(*norms)

    def drift(self, following: Tensors) -> float | None:
        """See `Aggregate`."""
        change = self.distance(self.terms.current)
        return self.distance(following) / change if change > 0 else None


def _norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm of left @ right, to the last digits: no squares of what nearly cancels."""
    return float(torch.linalg.vector_norm(torch.linalg.qr(left, mode="r").R @ right))


class Mean:
    """fedavg: means by examples; with mixed ranks, factors weighted by ||s B_c A_c|| (HetLoRA, arXiv 2401.06432).
    fedex: the same, and W gets s (sum_c p_c B_c A_c - B A) more (arXiv 2410.09432).

    Memory: a running sum, and one adapter a client where products are asked for (fedex, drift).
    """

    def __init__(self, terms: Terms):
        self.terms, self._mean, self._by_norm = terms, WeightedMean(), WeightedMean()
        self._products = Products(terms)
        self._moving = terms.config.aggregation == "fedex"

    def add(self, update: ClientUpdate) -> None:
        pairs = self.terms.pairs
        self._mean.add(update.tensors, update.examples)
        if self._moving or self.terms.drift:
            self._products.add(update)
        if self.terms.rank_of is not None:
            own = [(p.scaling * update.tensors[p.lora_B].double(), update.tensors[p.lora_A].double()) for p in pairs]
            norm = math.fsum(_norm(*factors) ** 2 for factors in own) ** 0.5
            if norm > 0:
                names = [name for pair in pairs for name in (pair.lora_A, pair.lora_B)]
                self._by_norm.add({name: update.tensors[name] for name in names}, norm)

    def result(self) -> Aggregate:
        current = self.terms.current
        mean = self._mean.result(current) | self._by_norm.result(current)
        if not self._moving:
            return Aggregate(mean, drift=self._products.drift(mean) if self.terms.drift else None)
        moves, ranks, others = {}, {}, len(self._products.clients) - 1
        for pair in self.terms.pairs:
            moves[pair.residual] = self._products.minus(pair, mean[pair.lora_B], mean[pair.lora_A])
            ranks[pair.residual] = others * current[pair.lora_A].shape[0]  # sum_c p_c (B_c - B) = 0 spares one client
        return Aggregate(mean, moves=moves, ranks=ranks)


class Stacked:
    """flora: W gets s sum_c p_c B_c A_c, stacked, and factors begin anew (arXiv 2409.05976).
    flexlora: B A is the best of rank R: B = U sqrt(S), A = sqrt(S) V^T (arXiv 2402.11505).
    refactor-exact: the same, and W gets the part that was cut (arXiv 2603.08014), but for the smallest singular values
    whose squares add up to at most config.tolerance of the round's squared change.

    Memory: one adapter a client. With config.lr != 1 the product is (1 - lr) X + lr sum_c p_c B_c A_c. FedAvgM and
    FedAdam step from s X along its change, since factors have another basis each round: they keep one or two dense
    tensors (N, K) a layer, and moves are dense.
    """

    def __init__(self, terms: Terms):
        self.terms, self._rest, self._products = terms, WeightedMean(), Products(terms)
        self._names = {name for pair in terms.pairs for name in (pair.lora_A, pair.lora_B)}

    def add(self, update: ClientUpdate) -> None:
        self._rest.add({n: t for n, t in update.tensors.items() if n not in self._names}, update.examples)
        self._products.add(update)

    def result(self) -> Aggregate:
        if self.terms.config.optimizer != "fedavg":
            return self._stepped()
        terms, lr = self.terms, self.terms.config.lr
        factors, moves, ranks = {}, {}, {}
        begun = terms.restart() if terms.config.aggregation == "flora" else {}
        for pair in terms.pairs:
            if begun:
                factors |= {name: begun[name] for name in (pair.lora_A, pair.lora_B)}
                moves[pair.residual] = self._products.minus(pair, begun[pair.lora_B], begun[pair.lora_A], lr)
                ranks[pair.residual] = sum(self._rank(client, pair) for client in self._products.clients)
            else:
                (B, A), moves[pair.residual], ranks[pair.residual] = self._refactored(pair, lr)
                factors |= {pair.lora_B: B, pair.lora_A: A}
        if terms.config.aggregation == "flexlora":
            drift = self._products.drift(factors) if terms.drift and lr == 1.0 else None
            return Aggregate(self._rest.result(terms.current), factors, drift=drift)
        return Aggregate(self._rest.result(terms.current), factors, moves, ranks)

    def _stepped(self) -> Aggregate:
        terms, kind = self.terms, self.terms.config.aggregation
        factors, moves, ranks, memory = {}, {}, {}, {}
        begun = terms.restart() if kind == "flora" else {}
        for pair in terms.pairs:
            B, A = terms.current[pair.lora_B], terms.current[pair.lora_A]
            left, right = self._products.minus(pair, B, A)
            change = {pair.residual: (left @ right).to(A.dtype)}
            start = {pair.residual: torch.zeros_like(change[pair.residual])}
            step, kept = server_step(terms.config, start, change, terms.memory)
            memory |= kept
            product = B.double() @ A.double() + step[pair.residual].double() / pair.scaling
            if begun:
                factors |= {name: begun[name] for name in (pair.lora_A, pair.lora_B)}
            else:
                if product.any():  # zeros would never train again
                    B, A = _halves(truncated_svd(product, A.shape[0]), A.shape[0], A.dtype)
                factors |= {pair.lora_B: B, pair.lora_A: A}
            if kind != "flexlora":
                rest = product - factors[pair.lora_B].double() @ factors[pair.lora_A].double()
                moves[pair.residual], ranks[pair.residual] = pair.scaling * rest, min(pair.shape)
        return Aggregate(self._rest.result(terms.current), factors, moves, ranks, memory)

    def _rank(self, client: int, pair: Pair) -> int:
        return self.terms.rank_of(client) if self.terms.rank_of else self.terms.current[pair.lora_A].shape[0]

    def _refactored(self, pair: Pair, lr: float) -> tuple[Factors, Factors, int]:
        current, tolerance = self.terms.current, self.terms.config.tolerance
        B, A = current[pair.lora_B], current[pair.lora_A]
        R, dtype = A.shape[0], A.dtype
        products, weights = self._products.weighted(pair, lr)
        inner = min(*pair.shape, sum(right.shape[0] for _, right in products))
        found = factored_svd(products, weights, max(R, inner) if tolerance else R)
        if not found.S.any():  # zeros would never train again
            return (B, A), self._products.minus(pair, B, A, lr), 0
        B, A = _halves(found, R, dtype)
        if not tolerance:
            return (B, A), self._products.minus(pair, B, A, lr), max(0, inner - R)
        change = _norm(*self._products.minus(pair, current[pair.lora_B], current[pair.lora_A], lr)) / pair.scaling
        lost = found.S.double().square().flip(0).cumsum(0).flip(0)  # of all from one index on
        kept = max(R, int((lost > tolerance * change**2).sum()))
        left = pair.scaling * (found.U * found.S)[:, R:kept].double()
        return (B, A), (left, found.Vh[R:kept].double()), kept - R


def _halves(found: TruncatedSVD, rank: int, dtype: torch.dtype) -> Factors:
    """B = U sqrt(S), A = sqrt(S) V^T of the first `rank` triplets."""
    root = found.S[:rank].sqrt()
    return (found.U[:, :rank] * root).to(dtype), (root[:, None] * found.Vh[:rank]).to(dtype)


class Robust:
    """Against hostile clients; every one counts alike, whatever number of examples it claims. C updates, f hostile.

    median: by coordinate, the mean of the middle two of an even number (arXiv 1803.01498)
    trimmed-mean: by coordinate, without the f least and the f greatest (arXiv 1803.01498)
    krum: the update with the least sum of squared distances to its C - f - 2 nearest (arXiv 1703.02757)

    f = floor(config.hostile C). Memory: all updates of the round.
    """

    def __init__(self, terms: Terms):
        self.terms = terms
        self._updates: list[Tensors] = []

    def add(self, update: ClientUpdate) -> None:
        self._updates.append(update.tensors)

    def result(self) -> Aggregate:
        count, kind = len(self._updates), self.terms.config.aggregation
        hostile = math.floor(self.terms.config.hostile * count + 1e-9)  # 0.29 * 100 is a little less than 29
        if kind == "krum":
            return Aggregate(dict(self._updates[self._closest(hostile)]))
        cut = (count - 1) // 2 if kind == "median" else hostile
        mean = {}
        for name, like in self.terms.current.items():
            ordered = torch.stack([tensors[name].double() for tensors in self._updates]).sort(0).values
            mean[name] = ordered[cut : count - cut].mean(0).to(like.dtype)
        return Aggregate(mean)

    def _closest(self, hostile: int) -> int:
        flat = [torch.cat([t[name].flatten() for name in self.terms.current]).double() for t in self._updates]
        near = max(1, len(flat) - hostile - 2)
        scores = [
            math.fsum(sorted(float((one - other).square().sum()) for j, other in enumerate(flat) if j != i)[:near])
            for i, one in enumerate(flat)
        ]
        return scores.index(min(scores))


class PrivateMean:
    """current + (sum_c clip(x_c - current, S) + noise) / count: client-level privacy (arXiv 1710.06963).

    count is fixed beforehand, whoever answers; noise has deviation z S by coordinate, of `draw(shape)`, standard normal
    in float64. Memory: a running sum.
    """

    def __init__(self, terms: Terms, privacy: PrivacyConfig, count: int, draw: Callable[[torch.Size], torch.Tensor]):
        self.terms, self._privacy, self._count, self._draw = terms, privacy, count, draw
        self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in terms.current.items()}

    def add(self, update: ClientUpdate) -> None:
        current = self.terms.current
        scale = shortening(update.tensors, current, self._privacy.clip)
        for name, total in self._sums.items():
            total.add_(update.tensors[name].double() - current[name].double(), alpha=scale)

    def result(self) -> Aggregate:
        deviation, mean = self._privacy.noise * self._privacy.clip, {}
        for name, value in self.terms.current.items():
            noisy = self._sums[name] + deviation * self._draw(value.shape)
            mean[name] = (value.double() + noisy / self._count).to(value.dtype)
        return Aggregate(mean)


AGGREGATORS = {
    "fedavg": Mean,
    "fedex": Mean,
    "flora": Stacked,
    "flexlora": Stacked,
    "refactor-exact": Stacked,
    "median": Robust,
    "trimmed-mean": Robust,
    "krum": Robust,
}


def shortening(tensors: Tensors, current: Tensors, longest: float) -> float:
    """min(1, longest / ||tensors - current||), the norm over all tensors together, in float64."""
    norm = update_norm({name: current[name] for name in tensors}, tensors)
    return min(1.0, longest / norm) if norm > 0 else 1.0


def shortened(tensors: Tensors, current: Tensors, longest: float) -> dict[str, torch.Tensor]:
    """An update whose change is at most `longest` long."""
    scale = shortening(tensors, current, longest)
    if scale == 1.0:
        return dict(tensors)
    return {
        n: (current[n].double() + scale * (t.double() - current[n].double())).to(t.dtype) for n, t in tensors.items()
    }


def moved(base: Tensors, moves: Mapping[str, Factors | torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frozen weights after a round: each in float64, rounded once."""
    following = dict(base)
    for name, move in moves.items():
        dense = move if isinstance(move, torch.Tensor) else move[0] @ move[1]
        following[name] = (base[name].double() + dense).to(base[name].dtype)
    return following


def move_values(shapes: Mapping[str, tuple[int, int]], rounds: Iterable[Mapping[str, int]]) -> int:
    """Values that the moves of some rounds take to send: a layer's factors of all of them, or its dense change."""
    totals: dict[str, int] = {}
    for ranks in rounds:
        for name, rank in ranks.items():
            totals[name] = totals.get(name, 0) + rank
    return sum(min(rank * sum(shapes[name]), math.prod(shapes[name])) for name, rank in totals.items())


def server_step(
    config: ServerConfig, current: Tensors, mean: Tensors, memory: Tensors
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(next global tensors, next optimiser memory) from the clients' mean, with delta = mean - current.

    fedavg:  w + lr delta (lr = 1: the mean itself, bit for bit)
    fedavgm: v <- momentum v + delta; w + lr v                                    (arXiv 1909.06335)
    fedadam: m <- b1 m + (1 - b1) delta; v <- b2 v + (1 - b2) delta^2; w + lr m / (sqrt(v) + tau)  (arXiv 2003.00295)
    """
    if config.optimizer == "fedavg" and config.lr == 1.0:
        return dict(mean), {}
    following: dict[str, torch.Tensor] = {}
    updated: dict[str, torch.Tensor] = {}
    for name, value in current.items():
        delta = mean[name] - value
        if config.optimizer == "fedavg":
            step = delta
        elif config.optimizer == "fedavgm":
            step = delta + config.momentum * memory.get(f"v.{name}", torch.zeros_like(delta))
            updated[f"v.{name}"] = step
        else:
            first, second = config.betas
            m = first * memory.get(f"m.{name}", torch.zeros_like(delta)) + (1 - first) * delta
            v = second * memory.get(f"v.{name}", torch.full_like(delta, config.tau**2)) + (1 - second) * delta**2
            updated[f"m.{name}"], updated[f"v.{name}"] = m, v
            step = m / (v.sqrt() + config.tau)
        following[name] = value + config.lr * step
    return following, updated


def update_norm(current: Tensors, following: Tensors) -> float:
    """Euclidean norm of the whole change of the global tensors."""
    squares = [float((following[name].double() - value.double()).square().sum()) for name, value in current.items()]
    return math.fsum(squares) ** 0.5  # exact, so the tensors' order, which a resumed run may change, is no matter
