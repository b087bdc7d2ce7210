"""Everything a run needs before its first round, built and validated from the configuration alone."""

import hashlib
import json
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from federa.config import Config, config_digest, without_adapters
from federa.data import Corpus, Examples, Texts, validation_split
from federa.errors import InputError
from federa.methods import Broadcast, Learner, make_trainable
from federa.models import ModelSource, backbone_of, load_model, load_tokenizer, pick_device, resolve_model
from federa.partition import Partition, label_counts, make_partition, partition_like
from federa.randomness import Purpose, generator
from federa.sources import load_corpus
from federa.tasks import Task, make_task
from federa.tasks.task import text_features


@dataclass(frozen=True)
class Experiment:
    """Data, partition and model of a run.

    clients: per client the indices of its examples in `train`; test_clients: the same for `test`, shared out as the
    training data are (None unless evaluation.per_client), by the rows of the source that predictions are of.
    adapt_seconds: what making the model trainable took, the SVDs of federa among it.
    """

    config: Config
    corpus: Corpus
    source: ModelSource
    learner: Learner
    train: Examples
    validation: Examples
    test: Examples
    partition: Partition
    test_clients: list[np.ndarray] | None
    adapt_seconds: float = 0.0

    @property
    def task(self) -> Task:
        return self.learner.task

    @property
    def clients(self) -> list[np.ndarray]:
        return self.partition.indices

    @property
    def clients_per_round(self) -> int:
        return self.config.server.clients_per_round or len(self.clients)

    @property
    def digest(self) -> str:
        """SHA-256 of what a checkpoint's tensors mean nothing without: the configuration and the initial factors."""
        facts = [config_digest(self.config), dict(self.learner.broadcast.fingerprints)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def data_digest(self) -> str:
        """SHA-256 of all tokens, labels and who holds them: tells a resumed run that its data are still the same."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for piece in part.pieces():
                digest.update(piece.tobytes())
            if part.truth is not None:
                digest.update(json.dumps(part.truth).encode())
        for indices in (*self.clients, *(self.test_clients or ())):
            digest.update(f"{len(indices)}\n".encode() + indices.tobytes())
        return digest.hexdigest()


def build(
    config: Config, broadcast: Broadcast | None = None, device: str | None = None, at_site: bool = False
) -> Experiment:
    """Loads data and model, tokenises, partitions and attaches adapters. Raises InputError for anything unusable.

    With a `broadcast` (a resumed run, a remote site) its factors are attached and checked instead of computed;
    `device` (of a resumed run) takes the place of model.device. With partition.scheme sites all texts are for choosing,
    except `at_site`, where all are for training.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    device = pick_device(device or config.model.device)
    task = make_task(config.task)
    corpus = load_corpus(config.data, config.seed, task, at_site)
    source = resolve_model(config.model)
    tokenizer = task.prepare(load_tokenizer(source))
    examples = task.examples(corpus.train, tokenizer, config.data)
    test = task.examples(corpus.test, tokenizer, config.data)
    labels = corpus.train.labels
    chosen, held_out = validation_split(len(labels), config.data.validation, labels, config.seed)
    if config.partition.scheme == "sites":
        everything, nothing = np.arange(len(labels)), np.arange(0)
        chosen, held_out = (everything, nothing) if at_site else (nothing, everything)
    train = examples.part(examples.of_rows(chosen))
    pad_id = tokenizer.pad_token_id
    model = load_model(config.model, source, corpus.label_names, pad_id, config.seed, task.auto_class)
    for part in (examples, test):
        _check_fit(task, model, part, source)

    def embed() -> np.ndarray:
        texts, batch_size = corpus.train.take(chosen), config.evaluation.batch_size
        features = text_features(model.to(device), texts, tokenizer, config.data, batch_size, device)
        model.to("cpu")
        return features

    partition = partition_texts(config, corpus.train, chosen, embed)
    test_clients = None
    if config.evaluation.per_client:
        rng = generator(config.seed, Purpose.EVALUATION)
        test_clients = partition_like(partition.indices, labels[chosen], corpus.test.labels, rng)
    if train.rows is not None:  # clients hold examples, of which a row may give several
        partition = replace(partition, indices=[train.of_rows(chosen[own]) for own in partition.indices])
    if config.model.precision == "bfloat16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    started = time.perf_counter()
    learner = replace(make_trainable(model, config.method, config.seed, device, broadcast), task=task)
    adapted = time.perf_counter() - started
    server, clients = config.server, len(partition.indices)
    for key, needed in (("clients_per_round", server.clients_per_round or 1), ("min_updates", server.min_updates)):
        if needed > clients:
            raise InputError(f"server.{key} must be at most the number of clients = {clients}, got {needed}")
    validation = examples.part(examples.of_rows(held_out))
    return Experiment(config, corpus, source, learner, train, validation, test, partition, test_clients, adapted)


def partition_of(config: Config) -> tuple[Corpus, Partition, np.ndarray]:
    """(corpus, partition, counts (clients, labels)) of a configuration, without its model unless kmeans needs it."""
    if config.partition.scheme == "sites":
        raise InputError("partition.scheme: sites has its data at real sites, and nothing of them is here to show")
    if config.partition.scheme == "kmeans":
        experiment = build(cheapest(config))
        corpus, partition, labels = experiment.corpus, experiment.partition, experiment.train.labels
    else:
        corpus = load_corpus(config.data, config.seed, make_task(config.task))
        chosen, _ = validation_split(len(corpus.train.labels), config.data.validation, corpus.train.labels, config.seed)
        partition, labels = partition_texts(config, corpus.train, chosen), corpus.train.labels[chosen]
    return corpus, partition, label_counts(partition.indices, labels, len(corpus.strata))


def cheapest(config: Config) -> Config:
    """`config` with the method that is built fastest, where the method does not matter."""
    return without_adapters(config, "full" if config.task.name == "causal-lm" else "head-only")


def partition_texts(config: Config, texts: Texts, chosen: np.ndarray, embed=None) -> Partition:
    """The partition of texts[chosen] over clients that the configuration describes; `embed` serves kmeans."""
    names = None if texts.clients is None else [texts.clients[index] for index in chosen]
    return make_partition(config.partition, texts.labels[chosen], config.seed, names=names, embeddings=embed)


def _check_fit(task: Task, model, examples: Examples, source: ModelSource) -> None:
    """Raises InputError for token ids that the model does not know and for a longest example that it cannot take."""
    if int(examples.input_ids.max()) >= backbone_of(model)[1].get_input_embeddings().num_embeddings:
        raise InputError(f"model.name: the tokenizer of {source.location} must fit its model, got ids outside it")
    longest = examples.take(examples.lengths.argmax(keepdims=True))
    try:
        task.predict(model, longest, 1, torch.device("cpu"))
    except (IndexError, RuntimeError) as error:
        length = int(longest.lengths[0])
        raise InputError(f"data.max_length must suit the model, got an example of {length} tokens: {error}") from None
