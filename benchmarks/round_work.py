"""What the benchmarks of whole rounds train: adapters on all linear layers, without dropout, of MiniLM on 20 Newsgroups
or of a random model of RoBERTa-base's size on made-up texts that are as long as may be.
"""

import json
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
TEXTS = 4000


BASE = "RoBERTa-base"  # the folder of the random model, beside its texts


def config_of(data: Path, tokens: int, batch: int, clients: int, /, **sections) -> Config:
    base = data / BASE
    config = load_config(
        {
            "model": {"name": str(base) if base.is_dir() else "sentence-transformers/all-MiniLM-L6-v2"},
            "data": {"path": str(data), "max_length": tokens, "max_train": TEXTS, "max_test": 64},
            "partition": {"scheme": "iid", "clients": clients},
            "method": {"rank": 8, "target_modules": TARGETS},
            "client": {"batch_size": batch, "lr": LR, "schedule": "constant"},
        }
    )
    return changed(config, **sections)


def make_base(folder: Path, tokens: int, **smaller: int) -> None:
    """Writes the random model, a tokenizer of numbered words and texts of `tokens` tokens. smaller: sizes for tests."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    settings = RobertaConfig(**{"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1} | smaller)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(4, settings.vocab_size))]
    numbered = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    numbered.pre_tokenizer, numbered.post_processor = Whitespace(), RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=numbered, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    RobertaModel(settings).save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    rng = np.random.default_rng(0)
    for split, count in (("train", TEXTS), ("test", 64)):
        rows = rng.integers(4, settings.vocab_size, (count, tokens - 2))
        lines = (json.dumps({"text": " ".join(f"w{number}" for number in row), "label": f"{i % 20}"})
                 for i, row in enumerate(rows))  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


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

    def __init__(self, data: Path, tokens: int, batch: int, clients: int, device: str = "cpu"):
        self.data, self.tokens, self.batch, self.clients = data, tokens, batch, clients
        self.few = max(1, SAMPLES // (batch * STEPS))  # clients of a turn where none shares a batch

        def make(**sections) -> Experiment:
            sections["model"] = {"device": device} | sections.get("model", {})
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
