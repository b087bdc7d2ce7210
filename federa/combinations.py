"""Methods, aggregations and settings that cannot work together, and why."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from federa.config import Config

MOVES = ("fedex", "flora", "refactor-exact")  # aggregations that change the frozen weights
PRODUCTS = (*MOVES, "flexlora")  # aggregations of the products B_c A_c
ROBUST = ("median", "trimmed-mean", "krum")
BOTH_TRAIN = ("federa", "lora")


def check_combinations(config: "Config") -> None:
    """Raises ValueError, one line that names the key, for a method with an aggregation or setting it cannot serve."""
    for problem in (_aggregation(config), _ranks(config), _variates(config), _privacy(config)):
        if problem is not None:
            raise ValueError(problem)


def _aggregation(config: "Config") -> str | None:
    method, server = config.method, config.server
    aggregation = server.aggregation
    if method.name == "fedsvd" and server.optimizer != "fedavg":
        return (
            f"server.optimizer must be fedavg for method.name fedsvd, got {server.optimizer}: its "
            "factors have another basis each round, so that steps by coordinate mean nothing"
        )
    if aggregation not in PRODUCTS:
        return None
    if method.name not in BOTH_TRAIN:
        return (
            f"server.aggregation must be fedavg or one of {', '.join(ROBUST)} for method.name {method.name}: "
            f"{aggregation} averages products of two factors that both train in every round, as those of "
            f"{' and '.join(BOTH_TRAIN)} do"
        )
    if method.residual_dtype != "float32" and aggregation in MOVES:
        return f"method.residual_dtype must be float32 for server.aggregation {aggregation}, which moves the base"
    if aggregation == "fedex" and server.optimizer == "fedavg" and server.lr != 1.0:
        return (
            f"server.lr must be 1 for server.aggregation fedex, whose correction is that of the mean, got {server.lr}"
        )
    return None


def _ranks(config: "Config") -> str | None:
    method, ranks = config.method, config.method.client_ranks
    if ranks is None:
        return None
    if method.name != "lora":
        return f"method.client_ranks must be null for method.name {method.name}: lora alone is whole at any rank"
    if config.server.aggregation not in ("fedavg", "flora", "flexlora"):
        return f"method.client_ranks must be null for server.aggregation {config.server.aggregation}, got {ranks}"
    if max(ranks) > method.rank:
        return f"method.client_ranks must be at most method.rank = {method.rank}, got {max(ranks)}"
    return None


def _variates(config: "Config") -> str | None:
    client, method = config.client, config.method
    if not client.control_variates:
        return None
    if client.optimizer != "sgd" or client.momentum or client.weight_decay:
        return "client.optimizer must be sgd without momentum and weight decay for client.control_variates (SCAFFOLD)"
    if not client.lr:
        return "client.lr must be above 0 for client.control_variates (SCAFFOLD), got 0"
    unfit = method.name in ("rolora", "slora", "fedsvd") or method.client_ranks is not None
    if unfit or config.server.aggregation in PRODUCTS:
        return (
            f"client.control_variates must be false for method.name {method.name} with server.aggregation "
            f"{config.server.aggregation} and client_ranks {method.client_ranks}: tensors change meaning by the round"
        )
    return None


def _privacy(config: "Config") -> str | None:
    if config.privacy.clip is None:
        return None
    if config.server.aggregation != "fedavg" or config.method.client_ranks is not None:
        return (
            f"privacy.clip must be null for server.aggregation {config.server.aggregation} and client_ranks "
            f"{config.method.client_ranks}: only the plain mean of one rank has a bounded sensitivity here"
        )
    if config.client.control_variates:
        return "privacy.clip must be null with client.control_variates, which keep what clients sent without noise"
    return None
