"""Samples a second of a round's local training: MiniLM on 20 Newsgroups, adapters on all linear layers, no dropout.

Every provider trains clients of one kind, each once through its own examples with a fresh optimiser. Examples are dealt
out by length, so that all clients have as many tokens; turns repeat the same work.

  peft            transformers and PEFT's LoRA, clients in turn, batches at random padded to their longest, fp32
  peft bf16       the same with autocast and batches of like length: the peer at its best
  plain           FeDeRA as the paper reads, in plain PyTorch, batches at random
  alone           federa, one client after another (run.cohort 1)
  cohort C        federa, C clients in one batch
  ... bf16        with a bfloat16 residual (fp32 activations); "... bf16 all": activations too (model.precision)
  floor           the same tokens through the frozen model and back to its embeddings: no adapter or optimiser

Then the cohorts' curve, the same turns and their memory for cohorts of 1 to 32 clients; the clients' curve, whole
rounds of runs with 10 to 10,000 clients (round_clients.py); and, where ray is installed, "peft" as clients of Flower's
simulation (round_flower.py). --part asks for one of the four.

--data names a folder with train.jsonl.gz and test.jsonl.gz of 20 Newsgroups.
"""

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import records as store
from benchmarks.clock import eager, interleave, peak_bytes, percentiles
from benchmarks.harness import arguments, prepare
from benchmarks.round_clients import run_clients, shown
from benchmarks.round_flower import NO_RAY, Flower
from benchmarks.round_work import BASE, STEPS, Work, make_base, peft_model, train_plain_client
from federa.client import train_client
from federa.cohort import memory_of_client, train_cohort
from federa.experiment import Experiment
from federa.memory import reuse_memory
from federa_kernels import FeDeRALinear

SUBJECT = "federated_round"
GROUPS = {"cpu": "MiniLM", "cuda": BASE}
CASES = {  # tokens, batch, cohorts
    "cpu": ((256, 16, (2, 4)), (128, 16, (2, 4)), (128, 4, (4, 16))),
    "cuda": ((128, 16, (8, 32)),),
}
CURVE = (128, 4, (2, 4, 8, 16, 32))  # small local batches, which cohorts are for
ROUNDS = (3, 7)


def train_plainly(work: Work, model: nn.Module, grouped: bool, autocast: bool) -> Callable[[int], float]:
    """A turn of clients one after another in plain PyTorch; the mean of their losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    def turn(number: int) -> float:
        total = 0.0
        for client in range(work.few):
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            total += train_plain_client(work, model, client, number, grouped, autocast)
        return total / work.few

    return turn


def peft(work: Work, grouped: bool = False, autocast: bool = False) -> Callable[[int], float]:
    return train_plainly(work, peft_model(work), grouped, autocast)


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


def floor(work: Work, together: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[int], float]:
    """All clients' tokens, packed, through the frozen model forward and to the gradient of their embeddings; of so many
    clients together."""
    from federa.packing import pack_encoder
    from federa_kernels import pack_frozen

    model = work.plain_model().requires_grad_(False).to(dtype)
    pack_frozen(model)
    pack_encoder(model)
    embeddings, examples = model.get_input_embeddings(), work.experiment.train

    def turn(number: int) -> float:
        clients = [work.batches(client, number, True) for client in range(max(together, work.few))]
        for first in range(0, len(clients), together):
            for indices in map(np.concatenate, zip(*clients[first : first + together], strict=True)):
                batch = examples.batch_on(work.experiment.learner.device, indices)
                embedded = embeddings(batch["input_ids"]).requires_grad_()
                mask, lengths = batch["attention_mask"], batch["lengths"]
                model(inputs_embeds=embedded, attention_mask=mask, lengths=lengths).logits.sum().backward()
        return math.nan

    return turn


def providers(work: Work, cohorts: Sequence[int]) -> Mapping[str, Callable[[int], float]]:
    return (on_cuda if work.experiment.learner.device.type == "cuda" else on_cpu)(work, cohorts)


def on_cuda(work: Work, cohorts: Sequence[int]) -> Mapping[str, Callable[[int], float]]:
    narrow = work.make(method={"residual_dtype": "bfloat16"}, model={"precision": "bfloat16"})
    most = max(cohorts)
    return {
        "peft": peft(work),
        "peft bf16": peft(work, grouped=True, autocast=True),
        "peft bf16 again": peft(work, grouped=True, autocast=True),
        f"floor {most} bf16": floor(work, most, torch.bfloat16),
        "alone bf16 all": ours(work, 1, narrow),
        **{f"cohort {cohort} bf16 all": ours(work, cohort, narrow) for cohort in cohorts},
    }


def on_cpu(work: Work, cohorts: Sequence[int]) -> Mapping[str, Callable[[int], float]]:
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
        "floor": floor(work),
    }
    for suffix, experiment in kinds.items():
        found[f"alone{suffix}"] = ours(work, 1, experiment)
        for cohort in cohorts if not suffix else cohorts[:1]:
            found[f"cohort {cohort}{suffix}"] = ours(work, cohort, experiment)
    return found


def curve(work: Work, cohorts: Sequence[int]) -> Mapping[str, Callable[[int], float]]:
    """Clients in turn and in larger and larger cohorts, beside PEFT."""
    found = {"peft": peft(work), "alone": ours(work, 1, work.experiment)}
    return found | {f"cohort {cohort}": ours(work, cohort, work.experiment) for cohort in cohorts}


def simulated(work: Work, cohorts: Sequence[int]) -> Mapping[str, Callable[[int], float]]:
    """PEFT in turn and in Flower, apart from the others, whom Ray's processes would disturb."""
    return {"peft": peft(work), "flower": Flower(work)}


PHASES = {"round": providers, "cohorts": curve, "flower": simulated}


def samples_of(name: str, work: Work) -> int:
    """Of one turn of a provider."""
    words = name.split()
    clients = int(words[1]) if words[1:] and words[1].isdigit() else work.clients if name == "flower" else work.few
    return work.batch * STEPS * clients


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
        if not name.startswith("floor") and not 0.5 * expected < loss < 1.1 * expected:
            wrong[name] = f"wrong: loss {loss:.4f} in the first steps, {expected:.4f} before them"
    return wrong


def run_case(data: Path, sizes: Sequence[int], options: argparse.Namespace, phase: str = "round") -> list[dict]:
    """A record for each provider: of the table ("round"), of the curve over cohorts ("cohorts") or of "flower"."""
    tokens, batch, cohorts = sizes
    work = Work(data, tokens, batch, clients := max(cohorts), options.device)
    turns = PHASES[phase](work, cohorts)
    wrong = judged(work, turns)
    runners = {
        name: eager({"round": lambda slot, turn=turn: turn(slot)}, range(1000), options.device)
        for name, turn in turns.items()
        if name not in wrong
    }
    times = interleave(runners, options.seconds, ROUNDS)
    peaks = {name: peak_bytes({"turn": turns[name]}, 0, options.device, warm=True) for name in runners
             if name != "flower"}  # fmt: skip
    environment, found = store.environment(options.device), []
    base = percentiles([row[0] for row in times["peft"]])[1] / samples_of("peft", work)
    for name in turns:
        samples = samples_of(name, work)
        ms = None if name in wrong else percentiles([row[0] for row in times[name]])
        found.append(
            {
                "subject": SUBJECT,
                "group": GROUPS[options.device],
                "sizes": {"T": tokens, "B": batch, "C": clients},
                "dtype": "bf16" if "bf16" in name else "fp32",
                "provider": name,
                "mode": "eager",
                "phase": phase,
                "refused": wrong.get(name),
                "ms": ms,
                "rounds": len(times.get(name, ())),
                "ratio": None if ms is None else float(f"{base * samples / ms[1]:.4g}"),
                "baseline": "peft",
                "samples_per_second": None if ms is None else float(f"{1e3 * samples / ms[1]:.4g}"),
                "peak_bytes": peaks.get(name),  # what a turn takes beyond the model and its data
                "client_bytes": memory_of_client(work.experiment),  # predicted, of one more client in a cohort
                "environment": environment,
            }
        )
        if isinstance(turns[name], Flower):
            found[-1]["startup_seconds"] = float(f"{turns[name].startup:.3g}")  # no part of the turns
            turns[name].close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, SUBJECT)
    parser.add_argument("--data", type=Path, help="folder of 20 Newsgroups; none on a GPU")
    parser.add_argument("--part", choices=("table", "cohorts", "clients", "flower"), help="that part alone")
    options = prepare(parser, argv, seconds=30.0)
    if (options.data is None) == (options.device == "cpu"):
        parser.error("--data: must name a folder of 20 Newsgroups on a CPU, and is not taken on a GPU")
    reuse_memory()
    part, cases = options.part or ("table" if options.only else None), []
    chosen = [sizes for sizes in CASES[options.device][-1 if options.quick else 0 :]
              if options.only in (None, f"{sizes[0]}x{sizes[1]}")]  # fmt: skip
    if part in (None, "table"):
        cases += [("round", sizes) for sizes in chosen]
    if part in (None, "cohorts"):
        tokens, batch, cohorts = CURVE
        cases.append(("cohorts", (tokens, batch, cohorts[:2] if options.quick else cohorts)))
    if part in (None, "flower"):
        if Flower.there():
            cases += [("flower", sizes) for sizes in chosen]
        else:
            print(NO_RAY)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder)
        if options.data is None:
            make_base(data, CASES["cuda"][0][0])
        for phase, sizes in cases:
            report(run_case(data, sizes, options, phase), options)
        if part in (None, "clients"):
            report(run_clients(data, options), options)
    return 0


def report(rows: Sequence[dict], options: argparse.Namespace) -> None:
    """A line for each row, and with --record the rows to results/."""
    sizes, threads = rows[0]["sizes"], torch.get_num_threads()
    print(f"{rows[0]['phase']}: {sizes['B']} examples of up to {sizes['T']} tokens a step, {threads} threads")
    for row in rows:
        memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**20:7,.0f} MiB"
        if row["phase"] == "clients":
            line = shown(row)
        elif row["refused"]:
            line = row["refused"]
        else:
            line = f"{row['samples_per_second']:8.1f} samples/s  {row['ratio']:5.2f} x peft"
            line += f", started in {row['startup_seconds']:.0f} s" if "startup_seconds" in row else ""
        print(f"  {row['provider']:20} {line}{memory}", flush=True)
    if options.record:
        store.save(rows)
