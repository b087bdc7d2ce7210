"""One validated run configuration: the only place with defaults.

A configuration is a YAML mapping of the sections below, changed by dotted `key=value` overrides. Unknown keys, wrong
types and impossible values raise `InputError` with one line that names the key and what was expected.
"""

import difflib
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from federa import strict_yaml
from federa.combinations import PRODUCTS, check_combinations
from federa.errors import InputError

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # YAML has lists


FREE_KEYS = (
    "data.cache",
    "server.min_updates",
    "server.retries",
    "sites.timeout",
    "sites.wait",
)  # may change between a run's sessions


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class ModelConfig(Section):
    """Any transformers model that has the head of the task, by hub name or local folder."""

    name: Text = "sentence-transformers/all-MiniLM-L6-v2"
    revision: Text | None = None
    trust_remote_code: bool = False
    pooling: Literal["default", "mean"] = "default"  # default: transformers' own head; mean: masked mean + linear
    dropout: Fraction = 0.0  # of hidden states; principal components want none
    attention_dropout: Fraction = 0.0  # of attention's weights; clients then train one at a time
    precision: Literal["float32", "bfloat16"] = "float32"  # of activations; bfloat16 is autocast
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class TaskConfig(Section):
    """What the model learns to predict."""

    name: Literal[
        "classification",
        "pair-classification",
        "entity-classification",
        "token-classification",
        "question-answering",
        "causal-lm",
    ] = "classification"
    stride: Count = 32  # question-answering: tokens that neighbouring windows of a context share
    max_answer: Count = 30  # question-answering: tokens of the longest answer
    unanswerable: bool = False  # question-answering: questions may have no answer
    # question-answering: "no answer" wins where its score is higher than the best span's by more than this
    null_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class DataConfig(Section):
    """Where the text comes from: `path` (local files) if it is given, else `name` (hub, or "stdlib-docs")."""

    name: Text = "stdlib-docs"
    path: Text | None = None  # a file, or a folder with train.* and test.*
    subset: Text | None = None  # the hub's configuration name
    train_split: Text = "train"
    test_split: Text = "test"
    text: Text = "text"  # column
    label: Text = "label"  # column: ids 0..L-1 or strings
    pair: Text = "pair"  # column of the second text: pair-classification
    tokens: Text = "tokens"  # column of lists of words: token-classification
    tags: Text = "tags"  # column of lists of BIO tags or their ids: token-classification
    question: Text = "question"  # columns of question-answering
    context: Text = "context"
    answers: Text = "answers"  # {text: [..], answer_start: [..]}
    prompt: Text = "prompt"  # columns of causal-lm, unless messages names one of whole conversations
    answer: Text = "answer"
    messages: Text | None = None  # lists of {role, content}
    client: Text | None = None  # column that names the client, for partition.scheme natural
    max_length: Annotated[int, Field(ge=4, le=32768)] = 128  # tokens
    validation: Fraction = 0.1  # share of the training data held out for everything that is chosen
    max_train: Count | None = None  # keep the first examples of a seeded shuffle
    max_test: Count | None = None
    cache: Text | None = None  # folder of tokenised data; default: the user's cache folder


class PartitionConfig(Section):
    """Who holds what. The scheme's name is part of every result: equal alphas differ between schemes."""

    scheme: Literal[
        "iid", "dirichlet_label", "dirichlet_client", "fednlp", "quantity", "pathological", "natural", "kmeans", "sites"
    ] = "dirichlet_label"
    # natural: the number of distinct values is used instead; sites: real sites, which hold one client's data each
    clients: Count = 20
    alpha: Positive = 0.5
    min_size: Count = 2  # examples, reached by repair
    labels_per_client: Count = 2  # pathological
    clusters: Count = 10  # kmeans


class MethodConfig(Section):
    """How the backbone is made trainable."""

    name: Literal[
        "federa", "lora", "ffa-lora", "rolora", "slora", "fedsvd", "fed-sb", "bitfit", "adapter", "full", "head-only"
    ] = "federa"
    band: Literal["principal", "minor", "orthogonal"] = "principal"  # federa: which part of W = U S V^T trains
    rank: Count = 8
    alpha: Positive | None = None  # None: alpha = rank, so that the scaling s = alpha / rank is 1
    # suffixes, one regular expression, or "all-linear"
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    # mixed ranks (HetLoRA): client c has client_ranks[c mod length], at most rank
    client_ranks: Annotated[list[Count], Field(min_length=1)] | None = None
    adapter: Literal["houlsby", "pfeiffer"] = "houlsby"  # adapter: where bottlenecks stand
    bottleneck: Count = 16  # adapter: their width
    density: Annotated[float, Field(gt=0, le=1)] = 0.01  # slora: share of the weights that train in stage 1
    sparse_rounds: Count = 1  # slora: rounds of stage 1


class ClientConfig(Section):
    """One client's local training."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: NonNegative = 1e-3
    head_lr: NonNegative | None = None  # None: lr
    weight_decay: NonNegative = 0.0
    momentum: Fraction = 0.0  # sgd
    betas: Betas = (0.9, 0.999)  # adamw
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # over all rounds
    warmup: Fraction = 0.0  # share of all rounds
    batch_size: Count = 16
    accumulate: Count = 1  # batches per optimiser step
    epochs: Count = 1
    steps: Count | None = None  # optimiser steps a round; overrides epochs
    clip_norm: Positive | None = 1.0
    proximal_mu: NonNegative = 0.0  # FedProx
    control_variates: bool = False  # SCAFFOLD; sgd only


class ServerConfig(Section):
    """Rounds, sampling and the server's optimiser."""

    rounds: Count = 10
    clients_per_round: Count | None = None  # None: all
    aggregation: Literal["fedavg", "fedex", "flora", "flexlora", "refactor-exact", "median", "trimmed-mean", "krum"] = (
        "fedavg"
    )
    tolerance: Fraction = 0.0  # refactor-exact: share of a round's squared change that may be dropped
    hostile: Annotated[float, Field(ge=0, lt=0.5)] = 0.2  # trimmed-mean, krum: share of clients that may be hostile
    clip_update: Positive | None = None  # longest change of a client; longer ones are shortened to it
    optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    lr: Positive = 1.0
    momentum: Fraction = 0.9  # fedavgm
    betas: Betas = (0.9, 0.99)  # fedadam
    tau: Positive = 1e-3  # fedadam's adaptivity
    min_updates: Count = 1  # good updates a round needs
    retries: Annotated[int, Field(ge=0, le=100)] = 2  # of a round with too few


class PrivacyConfig(Section):
    """Client-level differential privacy; off while clip is null."""

    clip: Positive | None = None  # S: longest change of a client
    noise: Positive = 1.0  # z: the sum of the changes gets Gaussian noise of deviation z S
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    # fixed: clients_per_round exactly; poisson: each client by itself, with that mean
    sampling: Literal["fixed", "poisson"] = "fixed"


class FailureConfig(Section):
    """Simulated failures, so that users see what a deployment will do."""

    dropout: Fraction = 0.0  # probability that a sampled client never answers
    deadline: Positive | None = None  # in units of the median client's expected round time; slower ones are cut
    speed_spread: NonNegative = 0.5  # sigma of the log-normal spread of client speeds (used with a deadline)


class EvaluationConfig(Section):
    """The validation split is scored every few rounds; the test set once, at the end."""

    every: Count = 1  # rounds
    batch_size: Count = 64
    test_every: Count | None = None  # rounds; for curves only, nothing is chosen by it
    per_client: bool = False  # worst and mean client on per-client test sets
    drift: bool = True  # how far averaged factors are off the mean of products; keeps the round's factors until its end


class RunSection(Section):
    cohort: Literal["auto"] | Count = "auto"  # clients trained in one batch; 1: one after another
    threads: Count | None = None  # CPU threads; None: torch's own choice
    checkpoint_every: Count = 1  # rounds


class SitesConfig(Section):
    """A run over real sites (federa.flower); the simulator sends nothing and reads none of it."""

    timeout: Positive = 3600.0  # seconds that a round waits for its sites
    wait: NonNegative = 600.0  # seconds that a run waits, before its first round, for sites that are not there
    wire: Literal["float32", "bfloat16"] = "float32"  # how tensors are sent; float32 gives the simulator's bits


class Config(Section):
    """Everything a run depends on."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    method: MethodConfig = MethodConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    failures: FailureConfig = FailureConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunSection = RunSection()
    sites: SitesConfig = SitesConfig()

    @model_validator(mode="after")
    def _cross_checks(self):
        per_round, clients = self.server.clients_per_round, self.partition.clients
        if self.partition.scheme != "natural":
            if per_round is not None and per_round > clients:
                raise ValueError(
                    f"server.clients_per_round must be at most partition.clients = {clients}, got {per_round}"
                )
            if self.server.min_updates > (per_round or clients):
                raise ValueError(
                    f"server.min_updates must be at most the clients of a round = {per_round or clients}, "
                    f"got {self.server.min_updates}"
                )
        if self.partition.scheme == "sites" and (self.evaluation.per_client or self.failures.deadline is not None):
            key = "evaluation.per_client" if self.evaluation.per_client else "failures.deadline"
            raise ValueError(f"{key} must be off for partition.scheme sites: the server does not see the sites' data")
        if self.partition.scheme == "natural" and self.data.client is None:
            raise ValueError("data.client must name the column of the client for partition.scheme natural, got null")
        check_combinations(self)
        self._check_task()
        return self

    def _check_task(self):
        task, scheme = self.task.name, self.partition.scheme
        one_label = task in ("classification", "pair-classification", "entity-classification")
        if not one_label and scheme in ("dirichlet_label", "dirichlet_client", "fednlp", "pathological"):
            raise ValueError(
                f"partition.scheme must be iid, quantity, natural or kmeans for task.name {task}, whose examples have "
                f"no one label each, got {scheme}"
            )
        if not one_label and self.model.pooling != "default":
            raise ValueError(
                f"model.pooling must be default for task.name {task}, which predicts more than one label of a whole "
                f"text, got {self.model.pooling}"
            )
        if task == "causal-lm" and self.method.name == "head-only":
            raise ValueError(
                "method.name must train more than a head for task.name causal-lm, whose head is pretrained and stays "
                "frozen, got head-only"
            )
        room = self.data.max_length // 2 - 4
        if task == "question-answering" and self.task.stride >= room:
            raise ValueError(
                f"task.stride must be below data.max_length / 2 - 4 = {room}, so that windows beside the question move "
                f"on, got {self.task.stride}"
            )


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """A validated `Config` from a YAML file, a mapping or a `Config`, with "section.key=value" overrides on top.

    Values of overrides are YAML ("null", "0.5", "[query, value]"). Raises InputError, one line that names the key.
    """
    try:
        return Config.model_validate(read_values(source, overrides))
    except ValidationError as error:
        raise InputError(_one_line(error)) from None


def read_values(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values that `load_config` validates."""
    if isinstance(source, Config):
        values = source.model_dump(mode="json")
    elif isinstance(source, Mapping):
        values = _plain(source)
    else:
        values = _read_yaml(Path(source))
    for override in overrides:
        _apply_override(values, override)
    return values


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A copy of `config` with some keys of some sections changed, validated again."""
    values = config.model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    return load_config(values)


def without_adapters(config: Config, method: str = "head-only") -> Config:
    """The same run by a method that has none, and what only adapters allow set back."""
    aggregation = "fedavg" if config.server.aggregation in PRODUCTS else config.server.aggregation
    return changed(config, method={"name": method, "client_ranks": None}, server={"aggregation": aggregation})


def anchored(config: Config) -> Config:
    """`config` with its local paths made absolute, so that a run can be taken up from any folder."""
    sections = {}
    if config.data.path is not None:
        sections["data"] = {"path": os.path.abspath(Path(config.data.path).expanduser())}
    if (model := Path(config.model.name).expanduser()).is_dir():
        sections["model"] = {"name": os.path.abspath(model)}
    return changed(config, **sections)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal `Config`."""
    return strict_yaml.render(config.model_dump(mode="json"))


def config_digest(config: Config) -> str:
    """SHA-256 of everything in the configuration that finished rounds depend on: all keys but FREE_KEYS."""
    values = config.model_dump(mode="json")
    for key in FREE_KEYS:
        section, _, name = key.partition(".")
        del values[section][name]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that holds what YAML could: mappings, lists, strings, numbers, booleans and null."""
    try:
        return json.loads(json.dumps(dict(source)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"config: must hold plain values only, got: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config: no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"config: cannot read {path}: {error}") from None
    try:
        values = strict_yaml.parse(text)
    except ValueError as error:
        raise InputError(f"config: {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"config: {path} must hold a mapping of sections, got {_shorten(values)}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set: must be section.key=value, got {_shorten(override)}")
    try:
        value = strict_yaml.parse(text)
    except ValueError:
        raise InputError(f"--set: {key} must have a YAML value, got {_shorten(text)}") from None
    *sections, name = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise InputError(f"--set: {key} is not a key, {section} holds {_shorten(inner)}")
        values = inner
    values[name] = value


_EXPECTED = {  # where pydantic's words would not say what may be written
    "method.target_modules": "must be a string or a list of strings",
    "client.betas": "must be a list of 2 numbers in [0, 1)",
    "server.betas": "must be a list of 2 numbers in [0, 1)",
    "run.cohort": "must be auto or a number of clients",
}
_WORDS = {
    "model_type": "must be a mapping of keys",
    "string_pattern_mismatch": "must hold no NUL character",
    "string_too_short": "must not be empty",
    "string_unicode": "must be valid Unicode",
}


def _one_line(error: ValidationError) -> str:
    """The first problem of a pydantic error as "config: key must ..., got ..."."""
    first = error.errors()[0]
    # A union's error path ends in the name of the branch that failed; keys of ours hold no such names.
    location = [str(part) for part in first["loc"]]
    keys = _known_keys()
    while len(location) > 1 and first["type"] != "extra_forbidden" and ".".join(location) not in keys:
        location.pop()
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"config: {_shown_key(key)} is not a key; {_hint(location, keys)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("Input should", "must")
    if not key:
        return f"config: {message}"
    words = f"config: {key} {_EXPECTED.get(key) or _WORDS.get(first['type'], message)}, got {_shorten(first['input'])}"
    choices = re.findall(r"'([^']+)'", message) if first["type"] == "literal_error" else ()
    near = difflib.get_close_matches(str(first["input"]), choices, n=1, cutoff=0.5)
    return words + "".join(f"; did you mean {choice}?" for choice in near)


def _known_keys() -> dict[str, None]:
    keys: dict[str, None] = {}
    for name, field in Config.model_fields.items():
        keys[name] = None
        inner = getattr(field.annotation, "model_fields", {})
        keys.update({f"{name}.{key}": None for key in inner})
    return keys


def _hint(location: list[str], keys: Mapping[str, None]) -> str:
    """What may have been meant by an unknown key: the nearest key of its section, of any section, or their list."""
    if ".".join(location) in keys:
        return f"write {location[-1].rpartition('.')[2]} inside the section {location[0].partition('.')[0]}"
    section = ".".join(location[:-1])
    same_section = [key for key in keys if key.rpartition(".")[0] == section]
    for candidates in (same_section, list(keys)):
        by_leaf = {key.rpartition(".")[2]: key for key in candidates}
        if match := difflib.get_close_matches(location[-1], by_leaf, n=1, cutoff=0.6):
            return f"did you mean {by_leaf[match[0]]}?"
    return f"{section or 'a configuration'} has {', '.join(key.rpartition('.')[2] for key in same_section)}"


def _shown_key(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 60 else _shorten(key)


def _shorten(value: Any) -> str:
    """A value as YAML's user wrote it, in at most 60 characters however deep or long it is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of more than 4300 digits
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = 60
