"""Every method: what it trains in which round, what it sends, and whether the mean of its updates is exact."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from federa.config import MethodConfig
from federa.errors import InputError


@dataclass(frozen=True)
class Method:
    """How a backbone is made trainable; its task head always trains, in full.

    formula   what an adapted layer, or the model, computes and what of it trains
    source    the paper
    up, down  values that a client sends and receives in a round, four bytes each, "|" between the kinds of round;
              down is for a client that took part in the round before, and one that did not receives all it missed
    exact     whether the clients' mean is the model W + s sum_c p_c B_c A_c (or the mean weights where nothing is low
              rank), with the reason
    private   what client-level clipping and noise do to it
    band      where FeDeRALinear starts, None for a method without it; federa takes config.band
    leaves    the last parts of the names of the backbone's tensors that train
    fixed     the same of tensors that clients never train but the server changes
    cohort    whether its tensors can be stacked over clients: factors, biases, norms and plain linear layers can
    """

    name: str
    title: str
    formula: str
    source: str
    up: str
    down: str
    exact: str
    private: str
    band: str | None = None
    leaves: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    cohort: bool = True

    def carried(self, model: nn.Module, config: MethodConfig) -> set[str]:
        """Names of the backbone's tensors that the global state holds: what trains or is changed by the server."""
        return {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in (*self.leaves, *self.fixed)}

    def trains(self, name: str, round: int, config: MethodConfig) -> bool:
        """Whether a carried tensor of the backbone trains in a round, counted from 1."""
        return name.rpartition(".")[2] not in self.fixed

    def changes(self, name: str, round: int, config: MethodConfig) -> bool:
        """Whether a carried tensor of the backbone is another one after a round, so that clients need it."""
        return self.trains(name, round, config)

    def needs(self, name: str, round: int, config: MethodConfig) -> bool:
        """Whether a client that trains in a round needs a carried tensor of the backbone at all."""
        return True


@dataclass(frozen=True)
class Alternating(Method):
    """B in odd rounds, A in even ones."""

    def trains(self, name: str, round: int, config: MethodConfig) -> bool:
        return name.endswith("lora_B" if round % 2 else "lora_A")


@dataclass(frozen=True)
class Refactored(Method):
    """The server turns the mean into new factors after every round: see `methods.renew`."""

    def changes(self, name: str, round: int, config: MethodConfig) -> bool:
        return True


@dataclass(frozen=True)
class TwoStage(Method):
    """Sparse changes for the first config.sparse_rounds rounds, then low-rank factors that start from them."""

    def trains(self, name: str, round: int, config: MethodConfig) -> bool:
        return name.endswith("sparse") == (round <= config.sparse_rounds)

    def changes(self, name: str, round: int, config: MethodConfig) -> bool:
        return name.endswith("sparse") == (round < config.sparse_rounds)  # the last of stage 1 makes the factors

    def needs(self, name: str, round: int, config: MethodConfig) -> bool:
        return self.trains(name, round, config)


@dataclass(frozen=True)
class Biases(Method):
    def carried(self, model: nn.Module, config: MethodConfig) -> set[str]:
        names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
        if not names:
            raise InputError("method.name: bitfit trains biases and this model has none; use federa, lora or adapter")
        return names


@dataclass(frozen=True)
class Bottlenecks(Method):
    """Houlsby's variant trains the layer norms too, as its paper does."""

    def carried(self, model: nn.Module, config: MethodConfig) -> set[str]:
        norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
        chosen = norms if config.adapter == "houlsby" else set()
        return {
            name for name, _ in model.named_parameters() if ".bottleneck." in name or name.rpartition(".")[0] in chosen
        }


@dataclass(frozen=True)
class Everything(Method):
    def carried(self, model: nn.Module, config: MethodConfig) -> set[str]:
        return {name for name, _ in model.named_parameters()}


FACTORS = ("lora_A", "lora_B")
BOTH = "Σ(R*(N + K)) + H"
PRODUCT = "noise in B and in A meets in B A and grows with its square: prefer ffa-lora"
LINEAR = "one factor trains, so noise enters linearly: the methods of choice are ffa-lora, fedsvd and fed-sb"

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="federa",
            title="FeDeRA",
            formula="y = (W - s B0 A0) x + s B A x; B0 = U_R sqrt(S_R/s), A0 = sqrt(S_R/s) V_R^T of W = U S V^T, or "
            "its minor or orthogonal band; A and B train",
            source="arXiv 2404.18848; bands: arXiv 2406.09044, 2406.01775",
            up=BOTH,
            down=BOTH,
            exact="no: off by the covariance of B_c and A_c; fedex and refactor-exact mend it",
            private=PRODUCT,
            band="principal",
            leaves=FACTORS,
        ),
        Method(
            name="lora",
            title="LoRA",
            formula="y = W x + s B A x; B0 = 0, A0 Kaiming-uniform; A and B train (FedIT, FedLR)",
            source="arXiv 2106.09685, 2305.05644",
            up=BOTH,
            down=BOTH,
            exact="no: off by the covariance of B_c and A_c; fedex, flora and refactor-exact mend it",
            private=PRODUCT,
            band="zero",
            leaves=FACTORS,
        ),
        Method(
            name="ffa-lora",
            title="FFA-LoRA",
            formula="y = W x + s B A x; B0 = 0, A fixed at a Kaiming-uniform draw; B trains",
            source="arXiv 2403.12313",
            up="Σ(R*N) + H",
            down="Σ(R*N) + H",
            exact="yes: linear in B",
            private=LINEAR,
            band="zero",
            leaves=("lora_B",),
        ),
        Alternating(
            name="rolora",
            title="RoLoRA",
            formula="y = W x + s B A x; B0 = 0, A0 Kaiming-uniform; B trains in odd rounds, A in even ones",
            source="arXiv 2502.01755",
            up="Σ(R*N) + H | Σ(R*K) + H",
            down="Σ(R*K) + H | Σ(R*N) + H",
            exact="yes: linear in the factor that trains",
            private=LINEAR,
            band="zero",
            leaves=FACTORS,
        ),
        TwoStage(
            name="slora",
            title="SLoRA",
            formula="stage 1: y = (W + D) x, D zero but on a random share q of its entries, which train; then "
            "B0 = U_R sqrt(S_R/s), A0 = sqrt(S_R/s) V_R^T of D = U S V^T, the rest of D dropped, and y = W x + s B A x",
            source="arXiv 2308.06522",
            up="Σ(round(q*N*K)) + H | " + BOTH,
            down="Σ(round(q*N*K)) + H | " + BOTH,
            exact="stage 1 yes: linear in D; stage 2 no, as lora",
            private=PRODUCT,
            band="zero",
            leaves=("sparse", *FACTORS),
            cohort=False,
        ),
        Refactored(
            name="fedsvd",
            title="FedSVD",
            formula="y = W x + s B A x; B trains, then the server factors the mean B A = U S V^T: B = U S, A = V^T",
            source="arXiv 2505.12805",
            up="Σ(R*N) + H",
            down=BOTH,
            exact="yes: linear in B, and B A has rank R, so that nothing is cut",
            private=LINEAR,
            band="zero",
            leaves=("lora_B",),
            fixed=("lora_A",),
        ),
        Method(
            name="fed-sb",
            title="Fed-SB",
            formula="y = (W - s B A) x + s B C A x; B and A fixed at FeDeRA's factors of W (not at those of a first "
            "gradient, as LoRA-SB's), C (R, R) starts at the identity and trains",
            source="arXiv 2502.15436",
            up="Σ(R*R) + H",
            down="Σ(R*R) + H",
            exact="yes: linear in C",
            private=LINEAR,
            band="principal",
            leaves=("core",),
            cohort=False,
        ),
        Biases(
            name="bitfit",
            title="BitFit",
            formula="all biases train, those of layer norms too (FedBF)",
            source="arXiv 2106.10199, 2212.10025",
            up="b + H",
            down="b + H",
            exact="yes: the weights themselves are averaged",
            private="few tensors, no product: suits noise",
        ),
        Bottlenecks(
            name="adapter",
            title="Adapter",
            formula="y = f(x) + U gelu(D f(x) + d) + u behind the output layers f of attention and feed-forward "
            "(houlsby, layer norms train too) or of feed-forward alone (pfeiffer); D (m, N) Kaiming-uniform, U0 = 0 "
            "(FedAP)",
            source="arXiv 1902.00751, 2005.00247, 2212.10025",
            up="Σ(2*m*N + m + N) + n + H",
            down="Σ(2*m*N + m + N) + n + H",
            exact="yes: the weights themselves are averaged",
            private="suits noise as any small set of weights",
        ),
        Everything(
            name="full",
            title="Full fine-tuning",
            formula="every weight trains (FFT)",
            source="arXiv 1602.05629",
            up="P + H",
            down="P + H",
            exact="yes: the weights themselves are averaged",
            private="noise grows with the root of the number of weights: a low-rank method needs less",
        ),
        Method(
            name="head-only",
            title="Head only",
            formula="the backbone is frozen",
            source="",
            up="H",
            down="H",
            exact="yes: the weights themselves are averaged",
            private="suits noise: few weights",
        ),
    )
}


def methods_page() -> str:
    """docs/methods.md: one row a method, from METHODS alone."""
    lines = [
        "# Methods",
        "",
        "Written by `python -m federa.catalogue`; a test keeps it current.",
        "",
        "Values up and down are those of one client in one round, four bytes each: R the rank, (N, K) the shape of an "
        "adapted layer, Σ the sum over adapted layers (for adapters: over the layers they stand behind), H the task "
        "head, b the backbone's biases, n its layer norms (houlsby; else 0), m the bottleneck, q the density, P the "
        "backbone. `a | b` are the two kinds of round: odd and even, or first and second stage. A client that missed "
        "rounds also receives what changed in them; A0 and B0 come once, before a client's first round.",
        "",
        "| method | what it computes and trains | up | down | mean exact? | with privacy | cohorts | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in METHODS.values():
        up, down = (f"`{text}`".replace("|", "\\|") for text in (m.up, m.down))
        cells = [f"`{m.name}`", m.formula.replace("|", "\\|"), up, down, m.exact, m.private]
        lines.append("| " + " | ".join([*cells, "yes" if m.cohort else "no", m.source or "-"]) + " |")
    return "\n".join(lines) + "\n" + AGGREGATION


AGGREGATION = """
# Aggregation

`server.aggregation` decides how updates (A_c, B_c) with weights p_c (shares of the examples) become the next model. The
head, and all of a method without factors, is averaged. C clients answered; X is the product the round began from.

| aggregation | next factors | frozen weight | down, beside the table above | exact? | source |
|---|---|---|---|---|---|
| `fedavg` | sum p_c B_c, sum p_c A_c | stays | | no for A and B both training; the gap is `drift` | arXiv 1602.05629 |
| `fedex` | as fedavg | + s (sum p_c B_c A_c - B A) | min((C-1) R (N+K), N K) a layer | yes | arXiv 2410.09432 |
| `flora` | lora: B = 0, A drawn anew; federa: A0, B0 | + s (sum p_c B_c A_c - B A) | min(sum R_c (N+K), N K) \
in the place of R (N+K) | yes | arXiv 2409.05976 |
| `flexlora` | U sqrt(S), sqrt(S) V^T of sum p_c B_c A_c, cut to R | stays | | no: the cut part is lost, `drift` | \
arXiv 2402.11505 |
| `refactor-exact` | as flexlora | + s (the cut part), but for at most `server.tolerance` of the update's energy | \
min((C-1) R (N+K), N K), less with a tolerance | yes, up to the tolerance | arXiv 2603.08014 |
| `median` | median by coordinate, clients unweighted | stays | | no: robust | arXiv 1803.01498 |
| `trimmed-mean` | mean by coordinate without the f least and the f greatest | stays | | no: robust | \
arXiv 1803.01498 |
| `krum` | the update closest to its C - f - 2 nearest | stays | | no: robust | arXiv 1703.02757 |

f is the floor of `server.hostile` times C. `server.clip_update` shortens longer updates before any of them.
`method.client_ranks` gives client c the rank client_ranks[c mod length] (HetLoRA, arXiv 2401.06432, without its
pruning): it gets the first rows of A and columns of B, zero-padded they come back; fedavg weighs them by
||s B_c A_c||, flora stacks them, flexlora cuts to them. `drift` is ||s (sum p_c B_c A_c - B A)|| over
||s (sum p_c B_c A_c - X)||, over all layers, with the factors that the aggregation gives, before FedAvgM, FedAdam or a
`server.lr` steps towards them.

A client that missed rounds receives all moves it missed, a layer as factors or as one dense change, whichever is
smaller. Moved weights are kept in each checkpoint, and exports of such a run are merged or residual.

FedAvgM and FedAdam step by coordinate of the tensors towards fedavg's, fedex's or a robust mean. With flora, flexlora
and refactor-exact, whose factors have another basis each round, they step from the product X along its change, keep one
or two dense tensors a layer, and moves are dense; `server.lr` alone mixes X and the clients' mean as products. FedSVD
takes neither. FedProx goes with everything.

`client.control_variates` is SCAFFOLD (arXiv 1910.06378, option II): the server computes the clients' variates from
their updates and keeps one copy of the trained tensors for every client that has taken part; the correction goes down
with the model, so that down doubles and up does not grow.

# Privacy

`privacy.clip` turns on client-level differential privacy: the change of every client, over all it trained, is clipped
to norm S, Gaussian noise of deviation z S is added to the sum, which is divided by the fixed number of clients a round
asks for; clients count alike whatever their data. Sampling and noise come from the operating system's secret source, so
that no published seed reproduces them and reruns differ. `federa[dp]` brings the accountant; every attempt at a round
counts, and the record's `privacy` has epsilon for `privacy.delta` after each round.

It holds for one who sees the models of all rounds, but not who was sampled: metrics.jsonl lists that, and unprotected
means such as losses and numbers of examples, so do not publish it. Validation examples are held out of the clients'
data; the choice of the best round by them is outside the guarantee. Floating-point noise is not proof against attacks
on its low bits.
"""

if __name__ == "__main__":
    print(methods_page(), end="")
