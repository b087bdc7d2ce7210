"""A study tried out in small: every cell is built, and every kind of cell runs to its end, on random models of the same
classes and on made-up data of the same tasks. It shows that a study can run, and nothing of what it would find."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from federa.errors import InputError
from federa.experiment import build
from federa.folder import write_atomic
from federa.models import quiet_transformers, resolve_model
from federa.randomness import Purpose, generator, torch_seed
from federa.rounds import Watch
from federa.study.grid import Kind, Study, laid_over, load_study
from federa.study.runner import run_study

WORDS = [a + b + c for a in ("ba", "ke", "li", "mo") for b in ("du", "fi", "ga", "po") for c in ("n", "r", "s")]
LABELS = ("north", "east", "south", "west")
TAGS = ("B-person", "I-person", "B-place", "I-place")
SIZE = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    **{"pooler_hidden_size": 64, "max_position_embeddings": 160},
}
PARTS = {"models", "data", "tokens", "study"}
LENGTH, ROUNDS, CLIENTS = 64, 2, 4


def dry_run(
    source: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    watch: Watch,
) -> Path:
    """Tries a study out in the folder `output`; returns the path of its page, whose numbers mean nothing.

    Every cell of the grid is built: data partitioned, model loaded, adapters attached. Of every kind one cell runs:
    its sweep's first two points, two rounds, the yardsticks and the page. Raises what the first broken cell raises.
    Whatever an earlier dry run left in `output` goes.
    """
    study = load_study(source, overrides)
    folder = _fresh(Path(output))
    small = load_study(shrunk(study, folder))
    cells = [cell for kind in small.kinds for cell in small.grid(kind, small.points(kind)[0])]
    for position, cell in enumerate(cells, 1):
        watch("build", {"name": cell.name, "position": position, "of": len(cells)})
        try:
            build(small.run_config(cell))
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from None
    first = small.config.model_dump(mode="json")
    first |= {"alphas": first["alphas"][:1], "seeds": first["seeds"][:1], "budget": None}
    first["sweep"] |= {"alphas": None, "seeds": None, "rounds": None}
    for entry in first["datasets"].values():
        entry["alphas"] = entry["alphas"] and entry["alphas"][:1]
    for over in (first["sweep"]["over"], *(entry["sweep"] or {} for entry in first["methods"].values())):
        over.update({key: values[:2] for key, values in over.items()})

    def told(event: str, facts: dict[str, Any]) -> None:
        if event != "warn":  # of two rates tried the better one is at an edge
            watch(event, facts)

    return run_study(first, folder / "study", watch=told)


def _fresh(folder: Path) -> Path:
    """The folder without what an earlier dry run left in it; InputError if it holds anything else."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held - PARTS:
        raise InputError(f"{folder}: must be empty or hold a dry run, got {min(held - PARTS)}; choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def shrunk(study: Study, folder: Path) -> dict[str, Any]:
    """The study's values with small models and data in their places, written into `folder`."""
    values = study.config.model_dump(mode="json")
    configs = {kind: study.run_config(study.grid(kind, study.points(kind)[0])[0]) for kind in study.kinds}
    for name, entry in values["models"].items():
        config = next(config for kind, config in configs.items() if kind.model == name)
        place = _write_model(entry["architecture"], config, folder / "models" / name)
        _lay_over(entry, {"model": {"name": str(place), "revision": None, "trust_remote_code": False}})
    for name, entry in values["datasets"].items():
        resolved = next(config for kind, config in configs.items() if kind.dataset == name).model_dump(mode="json")
        clients = max(configs[kind].partition.clients for kind in configs if kind.dataset == name)
        place = _write_data(resolved, max(240, 8 * clients), folder / "data" / name)
        data = {"path": str(place), "subset": None, "max_train": None, "max_test": None, "max_length": LENGTH}
        _lay_over(entry, {"data": data | {"cache": str(folder / "tokens")}})
        if "stride" in resolved.get("task", {}):
            _lay_over(entry, {"task": {"stride": 8}})
    for name, entry in values["methods"].items():
        own = {kind: config for kind, config in configs.items() if kind.method == name}
        _lay_over(entry, _short(own))
    return values


def _short(configs: Mapping[Kind, Any]) -> dict[str, Any]:
    """Sections that make runs short; a method's come last and hold whatever models and datasets say."""
    clients = min(config.server.clients_per_round or config.partition.clients for config in configs.values())
    sections: dict[str, Any] = {
        "client": {"steps": 1, "batch_size": 4},
        "server": {"rounds": ROUNDS, "clients_per_round": min(CLIENTS, clients), "min_updates": 1},
        "failures": {"dropout": 0.0, "deadline": None},
        "evaluation": {"every": 1, "test_every": None},
        "run": {"checkpoint_every": 1},
    }
    if all(hasattr(config.method, "sparse_rounds") for config in configs.values()):
        sections["method"] = {"sparse_rounds": 1}
    return sections


def _lay_over(entry: dict[str, Any], sections: Mapping[str, Any]) -> None:
    entry.update(laid_over(entry, sections))


def _write_model(architecture: Mapping[str, Any] | None, config, folder: Path) -> Path:
    """A random model of the class that the study names, with a tokenizer of the made-up words."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "eos_token": "[SEP]",
    }
    letters = sorted({letter for word in (*WORDS, *LABELS, "<>/e12:?.") for letter in word})
    vocabulary = dict.fromkeys([*special.values(), *WORDS, *LABELS, *letters, *(f"##{letter}" for letter in letters)])
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    kind, settings = _architecture(architecture, config)
    sizes = SIZE | {
        "vocab_size": len(ids),
        "pad_token_id": 0,
        "bos_token_id": ids["[CLS]"],
        "eos_token_id": ids["[SEP]"],
    }
    settings = hf.AutoConfig.for_model(kind, **settings | sizes)
    causal = config.model_dump().get("task", {}).get("name") == "causal-lm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(0, Purpose.ADAPTER))
        model = (hf.AutoModelForCausalLM if causal else hf.AutoModel).from_config(settings)
    with quiet_transformers():
        model.save_pretrained(folder)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **special)
    fast.save_pretrained(folder)
    return folder


def _architecture(architecture: Mapping[str, Any] | None, config) -> tuple[str, dict[str, Any]]:
    """(model type, settings) as the study names them, else those of the model itself, if it can be reached."""
    from transformers import AutoConfig

    if architecture is not None:
        settings = dict(architecture)
        if not isinstance(settings.get("model_type"), str):
            raise InputError(f"models.architecture: must name model_type, as roberta or deberta-v2, got {settings}")
        return settings.pop("model_type"), settings
    try:
        source = resolve_model(config.model)
    except InputError as error:
        raise InputError(f"{error}; or name models.NAME.architecture.model_type for a dry run without it") from None
    settings = AutoConfig.from_pretrained(source.location, **source.arguments).to_dict()
    return settings.pop("model_type"), settings


def _write_data(values: Mapping[str, Any], count: int, folder: Path) -> Path:
    """train.jsonl and test.jsonl of made-up rows with the columns that the configuration names."""
    for split, step, size in (("train", 1, count), ("test", 2, 60)):
        rows = _rows(values, size, generator(0, Purpose.PARTITION, step=step))
        write_atomic(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _rows(values: Mapping[str, Any], count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows that hold something to learn: a label's name among the words, tags by word, answers at known places."""
    data, task = values["data"], values.get("task", {}).get("name", "classification")
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        words = [*rng.choice(WORDS, int(rng.integers(5, 12))), label]
        words = [str(words[place]) for place in rng.permutation(len(words))]
        text, at = " ".join(words), words.index(label)
        row = {"client": f"client {index % 5}"} if data["client"] is None else {data["client"]: f"client {index % 5}"}
        if task == "token-classification":
            tags = ["O"] * len(words)
            tags[at] = TAGS[2 * (index % 2)]
            row |= {data["tokens"]: words, data["tags"]: tags}
        elif task == "question-answering":
            answer = {"text": [label], "answer_start": [text.index(label)]}
            asked = " ".join(map(str, rng.choice(WORDS, 3)))
            row |= {data["question"]: f"{asked}?", data["context"]: text, data["answers"]: answer}
        elif task == "causal-lm":
            row |= {data["prompt"]: text, data["answer"]: label}
        else:
            marked = f"<e1>{words[0]}</e1> {' '.join(words[1:-1])} <e2>{words[-1]}</e2>"
            row |= {data["text"]: marked if task == "entity-classification" else text, data["label"]: label}
            row |= {data["pair"]: text} if task == "pair-classification" else {}
        yield row
