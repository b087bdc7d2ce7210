"""Labels or sizes -> one sorted index array per client: pure functions, every example exactly once, no client empty.

The schemes share one shape: shares over clients or labels become whole numbers of examples by largest remainder
(`_apportion`), the table of labels and clients is dealt out at random (`_deal`), and clients below the minimum size
are topped up from the largest (`_repair`). Equal alphas mean different things in different schemes, so a
`Partition` carries a one-line statement of its convention, to be recorded with every result.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from federa.config import PartitionConfig
from federa.errors import InputError
from federa.randomness import Purpose, generator


@dataclass(frozen=True, eq=False)
class Partition:
    """Who holds what: `indices[c]` are client c's examples; `names` only where clients have names of their own."""

    scheme: str
    convention: str
    indices: list[np.ndarray]
    names: list[str] | None = None


def make_partition(
    config: PartitionConfig,
    labels: np.ndarray,
    seed: int,
    *,
    names: Sequence | None = None,
    embeddings: np.ndarray | Callable[[], np.ndarray] | None = None,
) -> Partition:
    """The partition that a configuration asks for: a function of (config, labels, seed, names or embeddings).

    labels (n,) integers; names (n,) for scheme natural; embeddings (n, d) floats, or a function that computes them
    and is called for scheme kmeans only. Raises InputError, one line that names the key.
    """
    if config.scheme == "sites":
        empty = [np.arange(0) for _ in range(config.clients)]
        return Partition("sites", "sites: each client is a real site with its own data", empty)
    labels = _integers(labels)
    rng = generator(seed, Purpose.PARTITION)
    clients, alpha, min_size = config.clients, config.alpha, config.min_size
    if config.scheme not in ("natural", "pathological"):
        _check(len(labels), clients, alpha, min_size)
    repaired = f"min size {min_size} by repair"
    client_names = None

    match config.scheme:
        case "iid":
            indices = iid(len(labels), clients, rng)
            convention = "examples at random, sizes differ by at most one"
        case "dirichlet_label":
            indices = dirichlet_label(labels, clients, alpha, rng, min_size)
            convention = f"p_l ~ Dir_N({alpha:g}) per label over clients, {repaired}"
        case "dirichlet_client":
            indices = dirichlet_client(labels, clients, alpha, rng, min_size)
            convention = f"q_c ~ Dir_L({alpha:g}) per client over labels, equal sizes, exhausted labels refilled"
        case "fednlp":
            indices = fednlp(labels, clients, alpha, rng)
            convention = (
                f"q_c ~ Dir({alpha:g} p) per client, p the global label proportions (concentrations sum to {alpha:g}), "
                "equal sizes, exhausted labels refilled, leftovers to the last client"
            )
        case "quantity":
            indices = quantity(len(labels), clients, alpha, rng, min_size)
            convention = f"sizes ~ Dir_N({alpha:g}) over clients, labels at random, {repaired}"
        case "pathological":
            indices = pathological(labels, clients, config.labels_per_client, rng)
            convention = (
                f"{config.labels_per_client} labels per client (fewer only where their examples run out), "
                "each split evenly among its owners, min size 1"
            )
        case "natural":
            if names is None:
                raise InputError("partition.scheme natural must come with data.client, a column of names, got none")
            _check_rows("data.client", len(names), len(labels))
            indices, client_names = natural(names)
            convention = "one client per distinct value of data.client, in sorted order"
        case "kmeans":
            if embeddings is None:
                raise InputError("partition.scheme kmeans must come with embeddings of the examples, got none")
            embeddings = embeddings() if callable(embeddings) else embeddings
            _check_rows("partition.scheme kmeans: embeddings", len(embeddings), len(labels))
            indices = kmeans(embeddings, clients, config.clusters, alpha, rng, min_size)
            convention = (
                f"{config.clusters} k-means clusters of the embeddings, "
                f"p_k ~ Dir_N({alpha:g}) per cluster over clients, {repaired}"
            )
    return Partition(config.scheme, f"{config.scheme}: {convention}", indices, client_names)


def iid(size: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Examples at random; sizes differ by at most one."""
    _check(size, clients)
    return _per_client(rng.permutation(np.arange(size) % clients), clients)


def dirichlet_label(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, min_size: int = 1
) -> list[np.ndarray]:
    """Each label is shared over the N clients by p_l ~ Dir_N(alpha); sizes differ, at least min_size by repair.

    The convention of Hsu et al. 2019 as most code has it (FedLLM-Factory and others redraw instead of repairing).
    """
    _, codes = np.unique(_integers(labels), return_inverse=True)
    _check(len(codes), clients, alpha, min_size)
    totals = np.bincount(codes)
    shares = _dirichlet(np.full(clients, alpha), len(totals), rng)
    owners = _deal(codes, _apportion(shares, totals, rng), rng)
    return _per_client(_repair(owners, clients, min_size, rng), clients)


def dirichlet_client(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, min_size: int = 1
) -> list[np.ndarray]:
    """Each client has its labels by q_c ~ Dir_L(alpha), symmetric over the L labels; sizes differ by at most one.

    Clients are filled in turn; what an exhausted label lacks is drawn at random from all that is left.
    """
    _, codes = np.unique(_integers(labels), return_inverse=True)
    _check(len(codes), clients, alpha, min_size)
    shares = _dirichlet(np.full(codes.max() + 1, alpha), clients, rng)
    sizes = len(codes) // clients + (np.arange(clients) < len(codes) % clients)
    return _per_client(_deal(codes, _fill(shares, sizes, np.bincount(codes), rng), rng), clients)


def fednlp(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Each client has its labels by q_c ~ Dir(alpha p), p the global label proportions; sizes floor(n / N).

    The label skew of FedNLP (arXiv 2104.08815, niid_label.py at 27f3f97): clients are filled in turn, what an
    exhausted label lacks is drawn in proportion from all that is left, and the n mod N leftovers go to the last
    client. The concentrations sum to alpha, so alpha is not that of `dirichlet_client`: over 20 labels alpha = 1
    leaves a client 2.7 effective labels, exp(entropy), against 13.5 there.
    """
    _, codes = np.unique(_integers(labels), return_inverse=True)
    _check(len(codes), clients, alpha)
    totals = np.bincount(codes)
    shares = _dirichlet(alpha * (totals / len(codes)), clients, rng)
    sizes = np.full(clients, len(codes) // clients)
    sizes[-1] += len(codes) % clients
    return _per_client(_deal(codes, _fill(shares, sizes, totals, rng), rng), clients)


def quantity(size: int, clients: int, alpha: float, rng: np.random.Generator, min_size: int = 1) -> list[np.ndarray]:
    """Sizes by Dir_N(alpha) over the N clients, at least min_size by repair; labels at random."""
    _check(size, clients, alpha, min_size)
    return dirichlet_label(np.zeros(size, dtype=np.int64), clients, alpha, rng, min_size)


def pathological(
    labels: np.ndarray, clients: int, labels_per_client: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Every client owns k labels, and every label is split evenly among its owners.

    Labels have equally many owners, but never more than examples: an owner has at least one. Only where the labels
    have too few examples for k owners per client do some clients own fewer, never none.
    """
    _, codes = np.unique(_integers(labels), return_inverse=True)
    _check(len(codes), clients)
    totals = np.bincount(codes)
    if not 1 <= labels_per_client <= len(totals):
        raise InputError(
            f"partition.labels_per_client must be from 1 to {len(totals)}, the number of labels, "
            f"got {labels_per_client}"
        )
    if labels_per_client * clients < len(totals):
        raise InputError(
            f"partition.labels_per_client x partition.clients must be at least {len(totals)}, the number of labels, "
            f"got {labels_per_client} x {clients}"
        )
    most = np.minimum(totals, clients)
    owners = _level(most, min(labels_per_client * clients, most.sum()), rng)
    owned = _incidence(owners, clients, rng)
    return _per_client(_deal(codes, _apportion(owned.T / owners[:, None], totals, rng), rng), clients)


def natural(names: Sequence) -> tuple[list[np.ndarray], list[str]]:
    """One client per distinct name, in sorted order; returns the index arrays and the names as strings."""
    named = sum(name is not None and name == name for name in names)
    if not 0 < named == len(names):
        raise InputError(f"data.client must name the client of every example, got {named} of {len(names)}")
    try:
        distinct = sorted(set(names))
    except TypeError:
        kinds = ", ".join(sorted({type(name).__name__ for name in names}))
        raise InputError(f"data.client must have values of one type, got {kinds}") from None
    number = {name: client for client, name in enumerate(distinct)}
    owners = np.array([number[name] for name in names])
    return _per_client(owners, len(distinct)), [str(name) for name in distinct]


def kmeans(
    embeddings: np.ndarray, clients: int, clusters: int, alpha: float, rng: np.random.Generator, min_size: int = 1
) -> list[np.ndarray]:
    """Feature skew: k-means clusters of embeddings (n, d), shared over clients as labels are by `dirichlet_label`.

    So p_k ~ Dir_N(alpha) per cluster over clients. FedNLP clusters too, then uses its own convention (`fednlp`) with
    cluster ids as labels: its alphas are not these. K-means stops after 50 iterations: 3 s for 100,000 x 384 on a core.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not np.isfinite(embeddings).all():
        raise InputError(
            "partition.scheme kmeans: embeddings must be finite floats of shape (examples, dimensions), "
            f"got {embeddings.dtype} of shape {embeddings.shape}"
        )
    _check(len(embeddings), clients, alpha, min_size)
    if not 1 <= clusters <= len(embeddings):
        raise InputError(
            f"partition.clusters must be from 1 to {len(embeddings)}, the number of examples, got {clusters}"
        )
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # several threads add up the centres in no fixed order
        means = KMeans(clusters, n_init=1, max_iter=50, random_state=int(rng.integers(2**31)))
        ids = means.fit_predict(embeddings)
    return dirichlet_label(ids, clients, alpha, rng, min_size)


def partition_like(
    partition_indices: Sequence[np.ndarray], labels: np.ndarray, test_labels: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Test sets by the same partition: each label's test examples go to clients as its training examples did.

    Whole numbers by largest remainder; labels never seen in training are shared by client size. Every test example
    goes to exactly one client, and a client may get none. (FedNLP draws a second, unrelated partition for the test
    set.)
    """
    labels, test_labels = _integers(labels), _integers(test_labels)
    distinct, codes = np.unique(np.concatenate([labels, test_labels]), return_inverse=True)
    train, test = codes[: len(labels)], codes[len(labels) :]
    counts = label_counts(partition_indices, train, len(distinct)).T
    weights = np.where(counts.any(axis=1, keepdims=True), counts, counts.sum(axis=0))
    totals = np.bincount(test, minlength=len(distinct))
    table = _apportion(weights / weights.sum(axis=1, keepdims=True), totals, rng)
    return _per_client(_deal(test, table, rng), len(partition_indices))


def label_counts(indices: Sequence[np.ndarray], labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(C, L) integers: how many examples of each label every client holds; zeros where nobody's are here (sites)."""
    if not any(len(held) for held in indices):
        return np.zeros((len(indices), num_labels), np.int64)
    labels = _integers(labels)
    if labels.max() >= num_labels:
        raise InputError(f"partition: labels must be below {num_labels}, the number of labels, got {labels.max()}")
    clients = np.repeat(np.arange(len(indices)), [len(held) for held in indices])
    cells = clients * num_labels + labels[np.concatenate(indices)]
    return np.bincount(cells, minlength=len(indices) * num_labels).reshape(len(indices), num_labels)


def _dirichlet(concentration: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, len(concentration)) draws of Dir(concentration), for any positive concentration.

    In logarithms, log Gamma(a) = log Gamma(a + 1) + log(U) / a, because Gamma(1e-6) itself underflows to 0 / 0.
    """
    shape = (rows, len(concentration))
    logs = np.log(rng.standard_gamma(concentration + 1, shape))
    logs -= rng.standard_exponential(shape) / np.maximum(concentration, 1e-300)
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _apportion(shares: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Integers whose rows sum to totals, within one of shares * totals: largest remainder, ties at random."""
    exact = shares * totals[:, None]
    counts = np.floor(exact).astype(np.int64)
    order = np.lexsort((rng.random(exact.shape), (counts - exact).round(9)))
    missing = totals - counts.sum(axis=1)
    return counts + (order.argsort(axis=1) < missing[:, None])


def _fill(shares: np.ndarray, sizes: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(L, N) table: clients in turn take sizes * shares (N, L) from pool (L,), the rest at random from what is left."""
    pool = pool.copy()
    table = _apportion(shares, sizes, rng)
    for row, size in zip(table, sizes, strict=True):
        np.minimum(row, pool, out=row)
        pool -= row
        if missing := size - row.sum():
            refill = rng.multivariate_hypergeometric(pool, missing)
            row += refill
            pool -= refill
    return table.T


def _deal(codes: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The owner of every example: table[l, c] of label l's examples, at random, go to client c."""
    shuffled = rng.permutation(len(codes))
    by_label = shuffled[np.argsort(codes[shuffled], kind="stable")]
    owners = np.empty(len(codes), dtype=np.int64)
    owners[by_label] = np.repeat(np.tile(np.arange(table.shape[1]), len(table)), table.ravel())
    return owners


def _repair(owners: np.ndarray, clients: int, min_size: int, rng: np.random.Generator) -> np.ndarray:
    """Moves as few examples as it takes, at random, from the largest clients to those below min_size."""
    sizes = np.bincount(owners, minlength=clients)
    lacking = np.maximum(min_size - sizes, 0)
    surplus = sizes - _level(sizes, len(owners) - lacking.sum(), rng)
    order = rng.permutation(len(owners))
    order = order[np.argsort(owners[order], kind="stable")]
    place = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = rng.permutation(order[place < np.repeat(surplus, sizes)])
    repaired = owners.copy()
    repaired[moved] = np.repeat(np.arange(clients), lacking)
    return repaired


def _level(heights: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """heights cut off at one level so that they sum to total; ones that the level leaves over fall at random."""
    level = bisect_right(range(heights.max() + 1), total, key=lambda level: np.minimum(heights, level).sum()) - 1
    cut = np.minimum(heights, level)
    higher = rng.permutation(np.flatnonzero(heights > level))
    cut[higher[: total - cut.sum()]] += 1
    return cut


def _incidence(owners: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
    """(N, L) booleans with column sums owners (at most N each) and row sums that differ by at most one, at random.

    Rows take the labels that lack most owners (Gale 1957, Ryser 1957), which never runs into a dead end.
    """
    left = owners.copy()
    owned = np.zeros((clients, len(owners)), dtype=bool)
    degrees = owners.sum() // clients + (np.arange(clients) < owners.sum() % clients)
    for row, degree in zip(owned, degrees, strict=True):
        row[np.argsort(rng.random(len(left)) - left)[:degree]] = True
        left -= row
    return owned


def _per_client(owners: np.ndarray, clients: int) -> list[np.ndarray]:
    sizes = np.bincount(owners, minlength=clients)
    return np.split(np.argsort(owners, kind="stable"), np.cumsum(sizes)[:-1])


def _integers(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
        raise InputError(
            f"partition: labels must be a non-empty row of integers, got {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0:
        raise InputError(f"partition: labels must be at least 0, got {labels.min()}")
    return labels.astype(np.int64)


def _check(size: int, clients: int, alpha: float = 1.0, min_size: int = 1) -> None:
    if not 1 <= clients <= size:
        raise InputError(
            f"partition.clients must be at most {size}, the number of examples, and at least 1, got {clients}"
        )
    if clients * min_size > size:
        raise InputError(
            f"partition.clients x partition.min_size must be at most {size}, the number of examples, "
            f"got {clients} x {min_size}"
        )
    if not 0 < alpha < np.inf:
        raise InputError(f"partition.alpha must be a finite number above 0, got {alpha}")


def _check_rows(what: str, rows: int, size: int) -> None:
    if rows != size:
        raise InputError(f"{what} must have one row per example, {size}, got {rows}")
