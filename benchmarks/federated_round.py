"""Samples a second of a round's local training: MiniLM on 20 Newsgroups, adapters on all linear layers, no dropout.

Every provider trains clients of one kind, each once through its own examples with a fresh optimiser. Examples are dealt
out by length, so that all clients have as many tokens; turns repeat the same work.

  peft            transformers and PEFT's LoRA, clients in turn, batches at random padded to their longest, fp32
  peft bf16       the same with autocast and batches of like length: the peer at its best
  plain           FeDeRA as the paper reads, in plain PyTorch, batches at random
  alone           federa, one client after another (run.cohort 1)
  cohort C        federa, C clients in one batch
  ... bf16        with a bfloat16 residual (fp32 activations); "... bf16 all": activations too (model.precision)
  floor           the same tokens through the frozen encoder and back to its inputs: no adapter, head or optimiser

--data names a folder with train.jsonl.gz and test.jsonl.gz of 20 Newsgroups.
"""

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import records as store
from benchmarks.clock import eager, interleave, percentiles
from benchmarks.harness import arguments, prepare
from federa.client import train_client
from federa.cohort import train_cohort
from federa.config import Config, load_config
from federa.data import Examples, length_grouped_batches
from federa.experiment import Experiment, build
from federa.models import quiet_transformers
from federa.simulation import reuse_memory
from federa_kernels import FeDeRALinear

SUBJECT = "federated_round"
CASES = {  # tokens, batch, cohorts
    "cpu": ((256, 16, (2, 4)), (128, 16, (2, 4)), (128, 4, (4, 16))),
    "cuda": ((128, 16, (8, 32)),),
}
STEPS = 4  # of a client
SAMPLES = 64  # of a turn of those who train clients one after another
TARGETS = r".*encoder.*\.(query|key|value|dense)"  # federa's default, all linear layers, in words that PEFT knows
ROUNDS = (3, 7)
LR = 1e-3


def config_of(data: Path, tokens: int, batch: int, clients: int, **sections) -> Config:
    return load_config(
        {
            "model": {"name": "sentence-transformers/all-MiniLM-L6-v2"} | sections.get("model", {}),
            "data": {"path": str(data), "max_length": tokens, "max_train": 4000, "max_test": 64},
            "partition": {"scheme": "iid", "clients": clients},
            "method": {"rank": 8, "target_modules": TARGETS} | sections.get("method", {}),
            "client": {"batch_size": batch, "lr": LR, "schedule": "constant"},
        }
    )


class Work:
    """What a turn does: every client once through its STEPS batches of examples, the same for all providers."""

    def __init__(self, data: Path, tokens: int, batch: int, clients: int):
        self.batch, self.clients = batch, clients
        self.few = max(1, SAMPLES // (batch * STEPS))  # clients of a turn where none shares a batch

        def make(**sections) -> Experiment:
            experiment = build(config_of(data, tokens, batch, clients, **sections))
            lengths, size = experiment.train.lengths, batch * STEPS * clients
            chosen = np.sort(np.random.default_rng(0).permutation(len(lengths))[:size])
            by_length = chosen[np.argsort(lengths[chosen], kind="stable")]
            dealt = [by_length[client::clients] for client in range(clients)]
            return replace(experiment, partition=replace(experiment.partition, indices=dealt))

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


def train_plainly(work: Work, model: nn.Module, grouped: bool, autocast: bool) -> Callable[[int], float]:
    """A turn of clients one after another in plain PyTorch; the mean of their losses."""
    device, examples = work.experiment.learner.device, work.experiment.train
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    model.train()

    def turn(number: int) -> float:
        total = 0.0
        for client in range(work.few):
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
            for indices in work.batches(client, number, grouped):
                batch = {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.item()
        return total / (work.few * STEPS)

    return turn


def peft(work: Work, grouped: bool = False, autocast: bool = False) -> Callable[[int], float]:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=["pooler"])
    return train_plainly(work, get_peft_model(work.plain_model(), settings), grouped, autocast)


class PlainFeDeRA(nn.Module):
    """y = x (W - s B0 A0)^T + b + s (x A^T) B^T, three products of plain torch."""

    def __init__(self, layer: FeDeRALinear):
        super().__init__()
        self.residual, self.bias, self.scaling = layer.residual, layer.bias, layer.scaling
        self.lora_A, self.lora_B = (nn.Parameter(t.detach().clone()) for t in (layer.lora_A, layer.lora_B))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.residual, self.bias) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


def plain(work: Work) -> Callable[[int], float]:
    model = work.plain_model().requires_grad_(False)
    for name, module in work.experiment.learner.model.named_modules():
        if isinstance(module, FeDeRALinear):
            model.set_submodule(name, PlainFeDeRA(module))
    for name in work.experiment.learner.head:
        model.get_parameter(name).requires_grad_(True)
    return train_plainly(work, model, grouped=False, autocast=False)


def ours(work: Work, cohort: int, experiment: Experiment) -> Callable[[int], float]:
    """Clients one after another (cohort 1) or as one cohort."""
    learner, config, start = experiment.learner, experiment.config, experiment.learner.state()

    def turn(number: int) -> float:
        group = [(c, experiment.clients[c]) for c in range(max(cohort, work.few if cohort == 1 else 1))]
        if cohort == 1:
            updates = [train_client(learner, experiment.train, own, c, number + 1, start, config) for c, own in group]
        else:
            updates = train_cohort(learner, experiment.train, group, number + 1, start, config)
        return float(np.mean([update.metrics["loss"] for update in updates]))

    return turn


def floor(work: Work, grouped_examples: Examples) -> Callable[[int], float]:
    """All clients' tokens, packed, through the frozen layers forward and to the gradient of their inputs."""
    from federa.packing import pack_encoder
    from federa_kernels import pack_frozen

    model = work.plain_model().requires_grad_(False)
    pack_frozen(model)
    pack_encoder(model)
    backbone, device = model.base_model, work.experiment.learner.device

    def turn(number: int) -> float:
        for client in range(work.few):
            for indices in work.batches(client, number, True):
                batch = {name: tensor.to(device) for name, tensor in grouped_examples.batch(indices).items()}
                embedded = backbone.get_input_embeddings()(batch["input_ids"]).requires_grad_()
                hidden = backbone(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).last_hidden_state
                hidden.backward(torch.ones_like(hidden))
        return math.nan

    return turn


def providers(work: Work, cohorts: Sequence[int]) -> Mapping[str, Callable[[int], float]]:
    narrow = {"method": {"residual_dtype": "bfloat16"}}
    kinds = {
        "": work.experiment,
        " bf16": work.make(**narrow),
        " bf16 all": work.make(**narrow, model={"precision": "bfloat16"}),
    }
    found = {
        "peft": peft(work),
        "peft again": peft(work),
        "peft bf16": peft(work, grouped=True, autocast=True),
        "plain": plain(work),
        "floor": floor(work, work.experiment.train),
    }
    for suffix, experiment in kinds.items():
        found[f"alone{suffix}"] = ours(work, 1, experiment)
        for cohort in cohorts if not suffix else cohorts[:1]:
            found[f"cohort {cohort}{suffix}"] = ours(work, cohort, experiment)
    return found


def samples_of(name: str, work: Work) -> int:
    """Of one turn of a provider."""
    words = name.split()
    return work.batch * STEPS * (int(words[1]) if words[0] == "cohort" else work.few)


def judged(work: Work, turns: Mapping[str, Callable[[int], float]]) -> dict[str, str]:
    """Why some must not be timed: every provider starts from the pretrained model, so its first losses are near its."""
    model = copy.deepcopy(work.plain_model()).double().eval()
    experiment, wrong = work.experiment, {}
    everyone = np.concatenate([own[:16] for own in experiment.clients])
    batch = {name: tensor.to(experiment.learner.device) for name, tensor in experiment.train.batch(everyone).items()}
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for name, turn in turns.items():
        loss = turn(0)
        if name != "floor" and not 0.5 * expected < loss < 1.1 * expected:
            wrong[name] = f"wrong: loss {loss:.4f} in the first steps, {expected:.4f} before them"
    return wrong


def run_case(data: Path, sizes: Sequence[int], options: argparse.Namespace) -> list[dict]:
    tokens, batch, cohorts = sizes
    work = Work(data, tokens, batch, clients := max(cohorts))
    turns = providers(work, cohorts)
    wrong = judged(work, turns)
    runners = {
        name: eager({"round": lambda slot, turn=turn: turn(slot)}, range(1000), options.device)
        for name, turn in turns.items()
        if name not in wrong
    }
    times = interleave(runners, options.seconds, ROUNDS)
    environment, found = store.environment(options.device), []
    base = percentiles([row[0] for row in times["peft"]])[1] / samples_of("peft", work)
    for name in turns:
        samples = samples_of(name, work)
        ms = None if name in wrong else percentiles([row[0] for row in times[name]])
        found.append(
            {
                "subject": SUBJECT,
                "group": "MiniLM",
                "sizes": {"T": tokens, "B": batch, "C": clients},
                "dtype": "bf16" if "bf16" in name else "fp32",
                "provider": name,
                "mode": "eager",
                "phase": "round",
                "refused": wrong.get(name),
                "ms": ms,
                "rounds": len(times.get(name, ())),
                "ratio": None if ms is None else float(f"{base * samples / ms[1]:.4g}"),
                "baseline": "peft",
                "samples_per_second": None if ms is None else float(f"{1e3 * samples / ms[1]:.4g}"),
                "environment": environment,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, SUBJECT)
    parser.add_argument("--data", type=Path, required=True, help="folder of 20 Newsgroups")
    options = prepare(parser, argv, seconds=30.0)
    reuse_memory()
    for sizes in CASES[options.device][-1:] if options.quick else CASES[options.device]:
        if options.only and options.only != f"{sizes[0]}x{sizes[1]}":
            continue
        rows = run_case(options.data, sizes, options)
        tokens, batch, _ = sizes
        print(f"{batch} examples of up to {tokens} tokens a step, {torch.get_num_threads()} threads")
        for row in rows:
            what = row["refused"] or f"{row['samples_per_second']:8.1f} samples/s  {row['ratio']:5.2f} x peft"
            print(f"  {row['provider']:20} {what}", flush=True)
        if options.record:
            store.save(rows)
    return 0
