"""What the benchmarks of whole rounds train: MiniLM on 20 Newsgroups, adapters on all linear layers, no dropout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from federa.config import Config, changed, load_config
from federa.data import length_grouped_batches
from federa.experiment import Experiment, build
from federa.models import quiet_transformers

STEPS = 4  # of a client
SAMPLES = 64  # of a turn of those who train clients one after another
TARGETS = r".*encoder.*\.(query|key|value|dense)"  # federa's default, all linear layers, in words that PEFT knows
LR = 1e-3


def config_of(data: Path, tokens: int, batch: int, clients: int, /, **sections) -> Config:
    config = load_config(
        {
            "model": {"name": "sentence-transformers/all-MiniLM-L6-v2"},
            "data": {"path": str(data), "max_length": tokens, "max_train": 4000, "max_test": 64},
            "partition": {"scheme": "iid", "clients": clients},
            "method": {"rank": 8, "target_modules": TARGETS},
            "client": {"batch_size": batch, "lr": LR, "schedule": "constant"},
        }
    )
    return changed(config, **sections)


def with_clients(experiment: Experiment, indices: Sequence[np.ndarray]) -> Experiment:
    return replace(experiment, partition=replace(experiment.partition, indices=list(indices)))


def dealt(experiment: Experiment, clients: int) -> list[np.ndarray]:
    """Each client's examples, STEPS batches of them, dealt out by length: all clients have as many tokens."""
    lengths, size = experiment.train.lengths, experiment.config.client.batch_size * STEPS * clients
    chosen = np.sort(np.random.default_rng(0).permutation(len(lengths))[:size])
    by_length = chosen[np.argsort(lengths[chosen], kind="stable")]
    return [by_length[client::clients] for client in range(clients)]


def peft_model(work: "Work") -> nn.Module:
    """The classifier under PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=["pooler"])
    return get_peft_model(work.plain_model(), settings)


def train_plain_client(
    work: "Work", model: nn.Module, client: int, turn: int, grouped: bool = False, autocast: bool = False
) -> float:
    """One client's steps in plain PyTorch, from where the model stands; the mean of their losses."""
    device, examples, total = work.experiment.learner.device, work.experiment.train, 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    model.train()
    for indices in work.batches(client, turn, grouped):
        batch = {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
    return total / STEPS


class Work:
    """What a turn does: every client once through its STEPS batches of examples, the same for all providers."""

    def __init__(self, data: Path, tokens: int, batch: int, clients: int):
        self.data, self.tokens, self.batch, self.clients = data, tokens, batch, clients
        self.few = max(1, SAMPLES // (batch * STEPS))  # clients of a turn where none shares a batch

        def make(**sections) -> Experiment:
            experiment = build(config_of(data, tokens, batch, clients, **sections))
            return with_clients(experiment, dealt(experiment, clients))

        self.make = make
        self.experiment = make()

    def plain_model(self) -> nn.Module:
        """The unadapted classifier with the same head."""
        from transformers import AutoModelForSequenceClassification

        source, learner = self.experiment.source, self.experiment.learner
        settings = {"num_labels": len(self.experiment.corpus.label_names)}
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        with quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(source.location, **settings)
        with torch.no_grad():
            for name in learner.head:
                model.get_parameter(name).copy_(learner.trainable[name])
        return model.to(learner.device)

    def batches(self, client: int, turn: int, grouped: bool) -> list[np.ndarray]:
        """A client's batches: at random, or of like length."""
        own, rng = self.experiment.clients[client], np.random.default_rng([client, turn])
        if grouped:
            return length_grouped_batches(self.experiment.train.lengths, own, self.batch, rng)
        return np.split(rng.permutation(own), range(self.batch, len(own), self.batch))
