"""A trained model in formats that others load: PEFT adapter, merged checkpoint, residual base with its adapter."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from federa.adapters import Bottleneck, SparseStart
from federa.combinations import MOVES
from federa.errors import InputError
from federa.experiment import Experiment
from federa.folder import free_folder, publish_folder
from federa.methods import adapted_layers
from federa.models import (
    MeanPoolingClassifier,
    backbone_of,
    head_modules,
    is_head,
    key_mapping,
    load_tokenizer,
    quiet_transformers,
)
from federa_kernels import FeDeRALinear

FORMATS = ("peft", "merged", "residual")

_LOAD = """\
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base!r}{settings})
model = PeftModel.from_pretrained(base, {adapter!r})
"""

_LOAD_MEAN = """\
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

backbone = PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), {adapter!r})
head = load_file({adapter!r} + "/head.safetensors")
hidden = backbone(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
logits = (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
"""

_WITH_BOTTLENECKS = """\
\"\"\"{name} with the bottlenecks that config.federa_bottlenecks names. Load it with trust_remote_code=True.\"\"\"

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from {module} import {name}


{bottleneck}

class {name}WithBottlenecks({name}):
    def __init__(self, config):
        super().__init__(config)
        for name in config.federa_bottlenecks:
            parent, _, leaf = name.rpartition(".")
            layer = self.get_submodule(name)
            width = layer.nf if hasattr(layer, "nf") else layer.out_features
            setattr(self.get_submodule(parent), leaf, Bottleneck(layer, width, config.federa_bottleneck))
"""


def adapter_problem(experiment: Experiment) -> str | None:
    """Why no LoRA on the untouched base is the evaluated model, or None where one is."""
    method, layers = experiment.config.method.name, _layers(experiment)
    if not layers:
        return f"must have adapters to export, got method {method}; use --format merged"
    if (aggregation := experiment.config.server.aggregation) in MOVES:
        return f"must have a base that never moved, got aggregation {aggregation}; use --format merged or residual"
    if any(isinstance(layer, SparseStart) and layer.changed for layer in layers.values()):
        return f"must be of the second stage of {method}, got a round of the first; use --format merged or residual"
    return None


def export(experiment: Experiment, format: str, path: Path) -> Path:
    """Writes the loaded state of `experiment` to the folder `path` in one of FORMATS.

    peft: a LoRA on the untouched base; merged: an ordinary transformers checkpoint; residual: base/ with the residuals
    as its weights and adapter/, the rank-R adapter on it. merged and residual rewrite the model in memory: restore it
    again before using it further. Raises InputError for an unknown format, a folder that is taken, or a method without
    adapters where the format needs them.
    """
    check_export(format, path)
    problem = adapter_problem(experiment)
    if problem is not None and (format == "peft" or (format == "residual" and not _layers(experiment))):
        raise InputError(f"--format: {format} {problem}")
    if path.is_dir():
        path.rmdir()
    experiment.learner.model.to("cpu")  # merging computes in float64, which not every device has
    if format == "peft":
        export_peft(experiment, path)
    elif format == "merged":
        temporary = free_folder(path)
        _save_model(experiment, {name: layer.merge() for name, layer in _layers(experiment).items()}, temporary)
        publish_folder(temporary, path)
    else:
        _export_residual(experiment, path)
    return path


def check_export(format: str, path: Path) -> None:
    """Raises InputError unless `format` is one of FORMATS and `path` is free."""
    if format not in FORMATS:
        raise InputError(f"--format: must be one of {', '.join(FORMATS)}, got {format!r}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--output: must be a new or empty folder, got {path}")


def export_peft(experiment: Experiment, path: Path) -> None:
    """A plain LoRA on the untouched base, dW = s (B A - B0 A0) = s [B, -B0] [A; A0]: rank 2R, lora_alpha 2 alpha so
    that the scaling stays s = alpha / R. Methods that start at B0 = 0 keep rank R. The head goes along in full.
    A bfloat16 residual's rounding is no part of it; merged and residual exports keep that."""
    factors = {}
    doubled = any(bool(layer.lora_B0.any()) for layer in _layers(experiment).values())
    for name, layer in _layers(experiment).items():
        factors[name] = layer.delta() if doubled else (layer.lora_A, layer.lora_B)
    temporary = free_folder(path)
    _save_adapter(experiment, factors, experiment.source.location, temporary, shown=path)
    publish_folder(temporary, path)


def _export_residual(experiment: Experiment, path: Path) -> None:
    layers = _layers(experiment)
    factors = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
    temporary = free_folder(path)
    _save_adapter(experiment, factors, str(path.absolute() / "base"), temporary / "adapter", shown=path / "adapter")
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.zero_()
        plain = {name: layer.merge() for name, layer in layers.items()}
    _save_model(experiment, plain, temporary / "base")
    publish_folder(temporary, path)


def _layers(experiment: Experiment) -> dict[str, FeDeRALinear]:
    return adapted_layers(experiment.learner.model)


def _save_adapter(
    experiment: Experiment,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    base: str,
    path: Path,
    shown: Path,
) -> None:
    model, layers = experiment.learner.model, _layers(experiment)
    mean = isinstance(model, MeanPoolingClassifier)
    prefix = f"{backbone_of(model)[0]}." if mean else ""
    rank = next(iter(factors.values()))[0].shape[0]
    first = layers[next(iter(factors))]
    settings = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if mean else experiment.task.peft_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": first.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": first.fan_in_fan_out,
        "target_modules": [name.removeprefix(prefix) for name in factors],
        "modules_to_save": None if mean else head_modules(model) or None,
    }
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        key = f"base_model.model.{name.removeprefix(prefix)}"
        tensors[f"{key}.lora_A.weight"] = lora_A
        tensors[f"{key}.lora_B.weight"] = lora_B
    head = {name: parameter for name, parameter in model.named_parameters() if is_head(model, name)}
    path.mkdir(parents=True, exist_ok=True)
    if mean:
        _save_tensors({name.removeprefix("classifier."): p for name, p in head.items()}, path / "head.safetensors")
    else:
        tensors |= {f"base_model.model.{name}": parameter for name, parameter in head.items()}
    _save_tensors(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    names = experiment.corpus.label_names
    loading = f", num_labels={len(names)}, pad_token_id={model.config.pad_token_id}" if names else ""
    if (renamed := key_mapping(model.config, experiment.task.auto_class)) is not None:
        loading += f", key_mapping={renamed!r}"
    code = (_LOAD_MEAN if mean else _LOAD).format(
        auto=experiment.task.auto_class,
        base=base,
        settings=loading,
        adapter=str(shown),
    )
    labels = "\n".join(f"{index}. {name}" for index, name in enumerate(names))
    labels = f"\nLabels, by id:\n\n{labels}\n" if names else ""
    origin = f"The base is {experiment.config.model.name}; {experiment.source.origin}."
    text = f"# A federa adapter\n\n{origin}\n\n```python\n{code}```\n{labels}"
    (path / "README.md").write_text(text, encoding="utf-8")


def _save_model(experiment: Experiment, plain: Mapping[str, nn.Module], path: Path) -> None:
    """The model with its adapted layers replaced by `plain` ones, as a transformers checkpoint with its tokenizer."""
    model = experiment.learner.model
    for name, module in plain.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    path.mkdir(parents=True, exist_ok=True)
    _write_bottlenecks(experiment, path)
    with quiet_transformers():
        if isinstance(model, MeanPoolingClassifier):
            model.backbone.save_pretrained(path)
            _save_tensors(dict(model.classifier.named_parameters()), path / "head.safetensors")
        else:
            # A renamed backbone is saved under the names of its own class, which then loads it without renaming.
            renamed = key_mapping(model.config, experiment.task.auto_class) is not None
            model.save_pretrained(path, save_original_format=not renamed)
    experiment.task.prepare(load_tokenizer(experiment.source)).save_pretrained(path)


def _write_bottlenecks(experiment: Experiment, path: Path) -> None:
    """A model with bottlenecks is no class of transformers: its code goes along, and its configuration points at it."""
    model = experiment.learner.model
    saved = model.backbone if isinstance(model, MeanPoolingClassifier) else model
    found = {name: module for name, module in saved.named_modules() if isinstance(module, Bottleneck)}
    if not found:
        return
    kind = "AutoModel" if saved is not model else experiment.task.auto_class
    name, source = type(saved).__name__, inspect.getsource(Bottleneck)
    code = _WITH_BOTTLENECKS.format(name=name, module=type(saved).__module__, bottleneck=source)
    (path / "modeling_federa.py").write_text(code, encoding="utf-8")
    saved.config.federa_bottlenecks = list(found)
    saved.config.federa_bottleneck = next(iter(found.values())).bottleneck["down"].out_features
    saved.config.auto_map = {kind: f"modeling_federa.{name}WithBottlenecks"}


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
