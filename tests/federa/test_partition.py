import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federa import partition
from federa.config import PartitionConfig
from federa.errors import InputError
from federa.partition import label_counts, make_partition, partition_like

SCHEMES = ["iid", "dirichlet_label", "dirichlet_client", "fednlp", "quantity", "pathological", "natural", "kmeans"]
DIRICHLET = ["dirichlet_label", "dirichlet_client", "fednlp", "quantity"]
REPAIRED = ["dirichlet_label", "quantity", "kmeans"]


def rng(seed=0):
    return np.random.default_rng(seed)


def sizes(indices):
    return [len(held) for held in indices]


def assert_partition(indices, size):
    assert np.array_equal(np.sort(np.concatenate(indices)), np.arange(size))
    assert all(held.dtype == np.int64 and (np.diff(held) > 0).all() for held in indices)


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def split(scheme, labels, seed=0, *, clients=4, **keys):
    """The split of any scheme, with names and embeddings that follow from the labels."""
    config = PartitionConfig(scheme=scheme, clients=clients, **keys)
    names = [f"n{i % clients}" for i in range(len(labels))]
    embeddings = np.stack([labels, np.arange(len(labels)) % 7], axis=1).astype(np.float32)
    return make_partition(config, labels, seed, names=names, embeddings=embeddings)


@st.composite
def cases(draw):
    """(labels, keys of a PartitionConfig that fits them)."""
    labels = np.array(draw(st.lists(st.sampled_from([0, 1, 2, 5, 900]), min_size=1, max_size=60)))
    labels.setflags(write=False)
    number = len(np.unique(labels))
    labels_per_client = draw(st.integers(1, number))
    clients = draw(st.integers(-(-number // labels_per_client), len(labels)))
    return labels, {
        "clients": clients,
        "alpha": draw(st.floats(1e-6, 1e6)),
        "min_size": draw(st.integers(1, len(labels) // clients)),
        "labels_per_client": labels_per_client,
        "clusters": draw(st.integers(1, min(3, number))),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_example_once_and_nobody_empty(scheme):
    @settings(max_examples=20 if scheme == "kmeans" else 100, deadline=None)
    @given(cases(), st.integers(0, 2**63 - 1))
    def check(case, seed):
        labels, keys = case
        result = split(scheme, labels, seed, **keys)
        assert_partition(result.indices, len(labels))
        assert len(result.indices) == keys["clients"]
        assert min(sizes(result.indices)) >= (1 if scheme in ("pathological", "natural") else keys["min_size"])
        assert_same(result.indices, split(scheme, labels, seed, **keys).indices)

    check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_global_generator_is_neither_read_nor_moved(scheme):
    labels = np.arange(60) % 5
    results = []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        results.append(split(scheme, labels).indices)
        assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert_same(*results)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "natural"])
def test_another_seed_gives_another_split(scheme):
    labels = np.arange(60) % 5
    first, second = (split(scheme, labels, seed).indices for seed in (1, 2))
    assert any(not np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@given(cases(), st.integers(0, 2**32))
def test_sizes_of_schemes_with_equal_sizes(case, seed):
    labels, keys = case
    clients, alpha = keys["clients"], keys["alpha"]
    share, left = divmod(len(labels), clients)
    assert sizes(partition.fednlp(labels, clients, alpha, rng(seed))) == [share] * (clients - 1) + [share + left]
    even = [share] * (clients - left) + [share + 1] * left
    assert sorted(sizes(partition.dirichlet_client(labels, clients, alpha, rng(seed)))) == even
    assert sorted(sizes(partition.iid(len(labels), clients, rng(seed)))) == even


@given(cases(), st.integers(0, 2**32))
def test_pathological_clients_own_k_labels_where_examples_allow(case, seed):
    labels, keys = case
    clients, k = keys["clients"], keys["labels_per_client"]
    counts = label_counts(partition.pathological(labels, clients, k, rng(seed)), labels, labels.max() + 1)
    owned = (counts > 0).sum(axis=1)
    possible = min(k * clients, np.minimum(counts.sum(axis=0), clients).sum())
    assert owned.sum() == possible
    assert owned.max() - owned.min() <= 1
    for label in np.unique(labels):
        held = counts[:, label][counts[:, label] > 0]
        assert held.max() - held.min() <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ten_thousand_clients(scheme):
    labels = rng().integers(0, 20, 100_000)
    assert_partition(split(scheme, labels, clients=10_000).indices, 100_000)


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-6, 1e12, 1e308])
@pytest.mark.parametrize("scheme", DIRICHLET)
def test_extreme_alpha(scheme, alpha):
    labels = np.arange(200) % 10
    assert_partition(split(scheme, labels, alpha=alpha, clients=20, min_size=10).indices, 200)


@pytest.mark.parametrize("scheme", DIRICHLET)
def test_huge_alpha_is_even(scheme):
    labels = np.arange(48) % 3
    indices = split(scheme, labels, alpha=1e300, min_size=1).indices
    assert sizes(indices) == [12] * 4
    if scheme != "quantity":
        assert (label_counts(indices, labels, 3) == 4).all()


def test_tiny_alpha_gives_each_label_to_one_client_and_repair_takes_no_more_than_it_must():
    indices = partition.dirichlet_label(np.arange(100) % 2, 5, 1e-6, rng(3), min_size=4)
    assert sorted(sizes(indices)) in ([4, 4, 4, 44, 44], [4, 4, 4, 4, 84])


def test_tiny_alpha_client_gets_one_label_or_the_one_that_is_left():
    for seed in range(10):
        indices = partition.dirichlet_client(np.array([0, 0, 0, 1, 1, 1]), 2, 1e-6, rng(seed))
        assert sorted(label_counts(indices, np.array([0, 0, 0, 1, 1, 1]), 2).tolist()) == [[0, 3], [3, 0]]


def test_repair_levels_the_largest():
    owners = np.repeat([0, 1], [6, 3])
    repaired = partition._repair(owners, 3, 2, rng())
    assert np.bincount(repaired).tolist() == [4, 3, 2]
    assert (repaired != owners).sum() == 2
    assert np.array_equal(partition._repair(owners, 2, 3, rng()), owners)


def test_largest_remainder():
    shares = np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]])
    assert partition._apportion(shares, np.array([4, 4]), rng()).tolist() == [[2, 1, 1], [3, 1, 0]]


def test_iid_by_hand():
    indices = partition.iid(7, 3, rng())
    assert_partition(indices, 7)
    assert sorted(sizes(indices)) == [2, 2, 3]
    assert partition.iid(3, 1, rng())[0].tolist() == [0, 1, 2]


def test_pathological_by_hand():
    labels = np.repeat(np.arange(4), 10)
    counts = label_counts(partition.pathological(labels, 4, 2, rng()), labels, 4)
    assert np.sort(counts, axis=1).tolist() == [[0, 0, 5, 5]] * 4
    assert np.sort(counts, axis=0).T.tolist() == [[0, 0, 5, 5]] * 4


def test_pathological_label_with_fewer_examples_than_its_share_of_owners():
    labels = np.array([0] + [1] * 10)
    counts = label_counts(partition.pathological(labels, 4, 1, rng()), labels, 2)
    assert sorted(counts.tolist()) == [[0, 3], [0, 3], [0, 4], [1, 0]]
    counts = label_counts(partition.pathological(labels, 4, 2, rng()), labels, 2)
    assert sorted(counts[:, 0]) == [0, 0, 0, 1]
    assert sorted(counts[:, 1]) == [2, 2, 3, 3]


def test_natural_sorts_values_by_their_own_order():
    indices, names = partition.natural(["b", "a", "b"])
    assert [held.tolist() for held in indices] == [[1], [0, 2]]
    assert names == ["a", "b"]
    assert partition.natural([10, 9, 10])[1] == ["9", "10"]


def test_kmeans_keeps_clusters_together():
    clusters = np.repeat([0, 1, 2], 20)
    embeddings = np.eye(3)[clusters] * 100 + rng().normal(size=(60, 3))
    counts = label_counts(partition.kmeans(embeddings, 3, 3, 1e-6, rng(5)), clusters, 3)
    # Tiny alpha: whole clusters, but for the one example that each empty client was given.
    assert (np.sort(counts, axis=0)[-1] >= 18).all()


def effective_labels(indices, labels):
    """exp(entropy) of every client's labels."""
    shares = label_counts(indices, labels, labels.max() + 1) / np.array(sizes(indices))[:, None]
    return np.exp(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1))


@pytest.mark.parametrize(
    ("scheme", "alpha", "expected"),
    [
        ("fednlp", 0.1, 1.2),
        ("fednlp", 1.0, 2.7),
        ("fednlp", 10.0, 10.3),
        ("dirichlet_client", 0.1, 4.1),
        ("dirichlet_client", 1.0, 13.5),
        ("dirichlet_client", 10.0, 19.1),
    ],
)
def test_effective_labels_of_the_conventions(scheme, alpha, expected):
    """The table of the design notes: 20 equal labels, mean of exp(entropy) over 20,000 draws, one decimal.

    The first quarter of the clients is measured: it uses a quarter of every label give or take 6 % (alpha 0.1), so
    nothing is exhausted yet. Tolerance: the table's rounding and four standard errors.
    """
    labels = np.arange(300_000) % 20
    found = effective_labels(getattr(partition, scheme)(labels, 1200, alpha, rng(0))[:300], labels)
    assert found.mean() == pytest.approx(expected, abs=0.05 + 4 * found.std() / np.sqrt(300))


@pytest.mark.parametrize(("scheme", "expected"), [("fednlp", 0.8), ("dirichlet_client", 0.5)])
def test_fednlp_follows_the_global_proportions(scheme, expected):
    labels = (np.arange(100_000) % 5 == 0).astype(int)  # 80 % of label 0
    indices = getattr(partition, scheme)(labels, 1000, 1.0, rng(0))[:200]
    shares = label_counts(indices, labels, 2)[:, 0] / 100
    assert shares.mean() == pytest.approx(expected, abs=4 * shares.std() / np.sqrt(200))


def test_dirichlet_over_clients_has_its_second_moment():
    """p ~ Dir_N(a) has E[sum p^2] = (a + 1) / (N a + 1); at N = 1000, a = 0.5 one draw of 20 strays by 10 %."""
    expected = pytest.approx(1.5 / 501, rel=4 * 0.1 / np.sqrt(20))
    labels = np.arange(400_000) % 20
    counts = label_counts(partition.dirichlet_label(labels, 1000, 0.5, rng(0)), labels, 20)
    assert ((counts / 20_000) ** 2).sum(axis=0).mean() == expected
    shares = [np.array(sizes(partition.quantity(20_000, 1000, 0.5, rng(seed)))) / 20_000 for seed in range(20)]
    assert (np.array(shares) ** 2).sum(axis=1).mean() == expected


def test_partition_like_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1])
    held = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    test_labels = np.array([0, 0, 0, 0, 1, 1, 7, 7])
    indices = partition_like(held, labels, test_labels, rng())
    assert_partition(indices, 8)
    assert label_counts(indices, test_labels, 8)[:, [0, 1, 7]].tolist() == [[3, 0, 1], [1, 2, 1]]
    assert sizes(partition_like(held, labels, np.array([1]), rng())) == [0, 1]


@given(cases(), st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 2**32))
def test_partition_like_is_within_one_of_proportional(case, test_labels, seed):
    labels, keys = case
    test_labels = np.array(test_labels)
    held = partition.dirichlet_label(labels, keys["clients"], keys["alpha"], rng(seed))
    indices = partition_like(held, labels, test_labels, rng(seed))
    assert_partition(indices, len(test_labels))
    assert len(indices) == len(held)
    train, test = label_counts(held, labels, 901), label_counts(indices, test_labels, 901)
    for label in np.unique(test_labels):
        weights = train[:, label] if train[:, label].any() else train.sum(axis=1)
        assert (abs(test[:, label] - test[:, label].sum() * weights / weights.sum()) < 1).all()


def test_label_counts_by_hand():
    counts = label_counts([np.array([0, 3]), np.array([], dtype=int), np.array([1, 2])], [0, 2, 2, 0], 4)
    assert counts.tolist() == [[2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]]


def test_conventions_are_stated():
    labels = np.arange(60) % 5
    conventions = {scheme: split(scheme, labels, alpha=0.3, min_size=3).convention for scheme in SCHEMES}
    assert (
        conventions["dirichlet_label"]
        == "dirichlet_label: p_l ~ Dir_N(0.3) per label over clients, min size 3 by repair"
    )
    for scheme, convention in conventions.items():
        assert convention.startswith(f"{scheme}: ")
        assert "\n" not in convention
        assert ("0.3" in convention) == (scheme in [*DIRICHLET, "kmeans"])
        assert ("min size 3" in convention) == (scheme in REPAIRED)


def test_only_natural_has_names_and_only_kmeans_computes_embeddings():
    labels = np.arange(12) % 3
    calls = []

    def embeddings():
        calls.append(1)
        return np.eye(3)[labels]

    for scheme in SCHEMES:
        config = PartitionConfig(scheme=scheme, clients=3, clusters=3)
        result = make_partition(config, labels, 0, names=list("abcdabcdabcd"), embeddings=embeddings)
        assert result.scheme == scheme
        assert result.names == (list("abcd") if scheme == "natural" else None)
        assert len(result.indices) == (4 if scheme == "natural" else 3)
    assert calls == [1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clients": 13}, r"^partition\.clients must be at most 12, the number of examples, .*got 13$"),
        ({"clients": 5, "min_size": 3}, r"^partition\.clients x partition\.min_size must be at most 12, .*got 5 x 3$"),
    ],
)
@pytest.mark.parametrize("scheme", ["iid", *DIRICHLET, "kmeans"])
def test_more_clients_than_examples_can_serve(scheme, keys, message):
    with pytest.raises(InputError, match=message):
        split(scheme, np.arange(12) % 3, **keys)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", DIRICHLET)
def test_alpha_is_finite_and_positive(scheme, alpha):
    labels = 12 if scheme == "quantity" else np.arange(12) % 3
    with pytest.raises(InputError, match=rf"^partition\.alpha must be a finite number above 0, got {alpha}$"):
        getattr(partition, scheme)(labels, 3, alpha, rng())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], r"labels must be a non-empty row of integers, got float64 of shape \(0,\)"),
        ([0.0, 1.0], r"labels must be a non-empty row of integers, got float64 of shape \(2,\)"),
        ([[0, 1]], r"labels must be a non-empty row of integers, got int64 of shape \(1, 2\)"),
        (["a"], r"labels must be a non-empty row of integers, got <U1"),
        ([0, -1], r"labels must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize(
    "scheme",
    [
        lambda labels: make_partition(PartitionConfig(scheme="iid", clients=1), labels, 0),
        lambda labels: partition.dirichlet_label(labels, 1, 1.0, rng()),
        lambda labels: partition.dirichlet_client(labels, 1, 1.0, rng()),
        lambda labels: partition.fednlp(labels, 1, 1.0, rng()),
        lambda labels: partition.pathological(labels, 1, 1, rng()),
        lambda labels: partition_like([np.array([0])], [0], labels, rng()),
        lambda labels: label_counts([np.array([0])], labels, 2),
    ],
    ids=["iid", "dirichlet_label", "dirichlet_client", "fednlp", "pathological", "partition_like", "label_counts"],
)
def test_labels_are_integers_from_zero(scheme, labels, message):
    with pytest.raises(InputError, match=f"^partition: {message}"):
        scheme(labels)


@pytest.mark.parametrize(
    ("clients", "labels_per_client", "message"),
    [
        (3, 5, r"^partition\.labels_per_client must be from 1 to 4, the number of labels, got 5$"),
        (3, 1, r"^partition\.labels_per_client x partition\.clients must be at least 4, .*got 1 x 3$"),
        (13, 1, r"^partition\.clients must be at most 12, .*got 13$"),
    ],
)
def test_pathological_needs_labels_to_go_round(clients, labels_per_client, message):
    with pytest.raises(InputError, match=message):
        partition.pathological(np.arange(12) % 4, clients, labels_per_client, rng())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, r"^partition\.scheme natural must come with data\.client, .*got none$"),
        (["a"], r"^data\.client must have one row per example, 3, got 1$"),
        (["a", None, "b"], r"^data\.client must name the client of every example, got 2 of 3$"),
        (["a", float("nan"), "b"], r"^data\.client must name the client of every example, got 2 of 3$"),
        (["a", 1, "b"], r"^data\.client must have values of one type, got int, str$"),
    ],
)
def test_natural_needs_names(names, message):
    with pytest.raises(InputError, match=message):
        make_partition(PartitionConfig(scheme="natural"), [0, 1, 0], 0, names=names)


@pytest.mark.parametrize(
    ("embeddings", "clusters", "message"),
    [
        (None, 2, r"^partition\.scheme kmeans must come with embeddings .*got none$"),
        (np.eye(3), 4, r"^partition\.clusters must be from 1 to 3, the number of examples, got 4$"),
        (np.eye(2), 2, r"^partition\.scheme kmeans: embeddings must have one row per example, 3, got 2$"),
        (np.ones(3), 2, r"embeddings must be finite floats of shape \(examples, dimensions\), got float64 of shape"),
        (np.eye(3, dtype=int), 2, r"embeddings must be finite floats .*got int64"),
        (np.full((3, 2), np.nan), 2, r"embeddings must be finite floats"),
    ],
)
def test_kmeans_needs_embeddings(embeddings, clusters, message):
    config = PartitionConfig(scheme="kmeans", clients=3, min_size=1, clusters=clusters)
    with pytest.raises(InputError, match=message):
        make_partition(config, [0, 1, 0], 0, embeddings=embeddings)


def test_label_counts_needs_labels_below_their_number():
    with pytest.raises(InputError, match=r"^partition: labels must be below 2, the number of labels, got 2$"):
        label_counts([np.array([0])], [2], 2)


GOLDEN = {
    "iid": "0e0681297a95",
    "dirichlet_label": "6b793403086a",
    "dirichlet_client": "787668830f08",
    "fednlp": "8267305dab35",
    "quantity": "53b8c1545954",
    "pathological": "b7a0a3f393cd",
    "natural": "d96859ef4e13",
    "kmeans": "b28a77de004d",
    "partition_like": "445f6183f7a2",
}


@pytest.mark.parametrize("scheme", [*SCHEMES, "partition_like"])
def test_arrays_pinned(scheme):
    """A convention or the order of draws that changes, changes every result: it has to show here."""
    labels = np.arange(90) ** 2 % 7
    source = "dirichlet_label" if scheme == "partition_like" else scheme
    indices = split(source, labels, 7, clients=6, clusters=4).indices
    if scheme == "partition_like":
        indices = partition_like(indices, labels, np.arange(50) % 8, rng(7))
    text = " | ".join(" ".join(map(str, held)) for held in indices)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == GOLDEN[scheme]
