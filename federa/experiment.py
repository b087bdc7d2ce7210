"""Everything a run needs before its first round, built and validated from the configuration alone."""

import hashlib
import json
import time
from dataclasses import dataclass

import numpy as np
import torch

from federa.config import Config, changed, config_digest
from federa.data import Corpus, Examples, Texts, tokenise, validation_split
from federa.errors import InputError
from federa.methods import Broadcast, Learner, make_trainable
from federa.models import ModelSource, backbone_of, load_classifier, load_tokenizer, pick_device, resolve_model
from federa.partition import Partition, label_counts, make_partition, partition_like
from federa.randomness import Purpose, generator
from federa.sources import load_corpus
from federa.tasks import mean_features, predict


@dataclass(frozen=True)
class Experiment:
    """Data, partition and model of a run.

    clients: per client the indices of its examples in `train`; test_clients: the same for `test`, shared out as the
    training data are (None unless evaluation.per_client). adapt_seconds: what making the model trainable took, the SVDs
    of federa among it.
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
            for array in (part.input_ids, part.offsets, part.labels):
                digest.update(array.tobytes())
        for indices in (*self.clients, *(self.test_clients or ())):
            digest.update(f"{len(indices)}\n".encode() + indices.tobytes())
        return digest.hexdigest()


def build(config: Config, broadcast: Broadcast | None = None, device: str | None = None) -> Experiment:
    """Loads data and model, tokenises, partitions and attaches adapters. Raises InputError for anything unusable.

    With a `broadcast` (a resumed run, a remote site) its factors are attached and checked instead of computed;
    `device` (of a resumed run) takes the place of model.device.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    device = pick_device(device or config.model.device)
    corpus = load_corpus(config.data, config.seed)
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source)
    examples = tokenise(corpus.train, tokenizer, config.data.max_length, config.data.cache)
    test = tokenise(corpus.test, tokenizer, config.data.max_length, config.data.cache)
    chosen, held_out = validation_split(len(examples), config.data.validation, examples.labels, config.seed)
    train = examples.take(chosen)
    model = load_classifier(config.model, source, corpus.label_names, tokenizer.pad_token_id, config.seed)
    for part in (examples, test):
        _check_fit(model, part, source)

    def embed() -> np.ndarray:
        features = mean_features(model.to(device), train, config.evaluation.batch_size, device)
        model.to("cpu")
        return features

    partition = partition_texts(config, corpus.train, chosen, embed)
    test_clients = None
    if config.evaluation.per_client:
        rng = generator(config.seed, Purpose.EVALUATION)
        test_clients = partition_like(partition.indices, train.labels, test.labels, rng)
    if config.model.precision == "bfloat16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    started = time.perf_counter()
    learner = make_trainable(model, config.method, config.seed, device, broadcast)
    adapted = time.perf_counter() - started
    server, clients = config.server, len(partition.indices)
    for key, needed in (("clients_per_round", server.clients_per_round or 1), ("min_updates", server.min_updates)):
        if needed > clients:
            raise InputError(f"server.{key} must be at most the number of clients = {clients}, got {needed}")
    held_out = examples.take(held_out)
    return Experiment(config, corpus, source, learner, train, held_out, test, partition, test_clients, adapted)


def partition_of(config: Config) -> tuple[Corpus, Partition, np.ndarray]:
    """(corpus, partition, counts (clients, labels)) of a configuration, without its model unless kmeans needs it."""
    if config.partition.scheme == "kmeans":
        experiment = build(changed(config, method={"name": "head-only"}))
        corpus, partition, labels = experiment.corpus, experiment.partition, experiment.train.labels
    else:
        corpus = load_corpus(config.data, config.seed)
        chosen, _ = validation_split(len(corpus.train.labels), config.data.validation, corpus.train.labels, config.seed)
        partition, labels = partition_texts(config, corpus.train, chosen), corpus.train.labels[chosen]
    return corpus, partition, label_counts(partition.indices, labels, len(corpus.label_names))


def partition_texts(config: Config, texts: Texts, chosen: np.ndarray, embed=None) -> Partition:
    """The partition of texts[chosen] over clients that the configuration describes; `embed` serves kmeans."""
    names = None if texts.clients is None else [texts.clients[index] for index in chosen]
    return make_partition(config.partition, texts.labels[chosen], config.seed, names=names, embeddings=embed)


def _check_fit(model, examples: Examples, source: ModelSource) -> None:
    """Raises InputError for token ids that the model does not know and for a longest example that it cannot take."""
    if int(examples.input_ids.max()) >= backbone_of(model)[1].get_input_embeddings().num_embeddings:
        raise InputError(f"model.name: the tokenizer of {source.location} must fit its model, got ids outside it")
    longest = examples.take(examples.lengths.argmax(keepdims=True))
    try:
        predict(model, longest, 1, torch.device("cpu"))
    except (IndexError, RuntimeError) as error:
        length = int(longest.lengths[0])
        raise InputError(f"data.max_length must suit the model, got an example of {length} tokens: {error}") from None
