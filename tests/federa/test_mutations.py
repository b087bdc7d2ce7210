"""Mutated configurations, checkpoints and client updates, 2,000 in all: none accepted silently, no other exception."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federa.aggregate import problem_of
from federa.checkpoint import load_checkpoint
from federa.client import ClientUpdate
from federa.config import Config, dump_config, load_config
from federa.errors import InputError
from federa.experiment import build
from federa.folder import RunFolder
from federa.methods import Broadcast, make_trainable
from federa.models import load_model
from federa.simulation import run


def mutations(count: int):
    """Settings for `count` examples that are the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def attempt(load, *arguments):
    """(result, ""), or (None, message) of an InputError, one line of reasonable length; nothing else is caught."""
    try:
        return load(*arguments), ""
    except InputError as error:
        message = str(error)
    assert message and len(message.splitlines()) == 1 and len(message) < 1000, message
    return None, message


# Configurations

BASE = load_config({"partition": {"clients": 7}, "client": {"head_lr": 1e-2, "steps": 3}, "data": {"path": "a"}})
NUMBERS = st.one_of(st.integers(-2, 3), st.sampled_from([2**31, 2**63, -(2**70), 10**400]), st.floats())
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.just("x" * 5000))
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner)),
    max_leaves=5,
)
DISGUISES = [str, lambda value: [value], float, int, bool, lambda value: {"value": value}, lambda value: -value]


@st.composite
def mutated_values(draw) -> dict:
    values = BASE.model_dump(mode="json")
    for _ in range(draw(st.integers(1, 2))):
        holder, keys = values, [key for key in values if isinstance(values[key], dict)]
        if keys and draw(st.booleans()) | draw(st.booleans()):
            holder = values[draw(st.sampled_from(keys))]
        key = draw(st.sampled_from(sorted(holder) or ["none"]))
        match draw(st.sampled_from(["replace", "disguise", "rename", "delete", "add"])):
            case "replace":
                holder[key] = draw(JUNK)
            case "disguise":
                try:
                    holder[key] = draw(st.sampled_from(DISGUISES))(holder.get(key))
                except (TypeError, ValueError):
                    holder[key] = None
            case "rename":
                holder[draw(st.sampled_from([key + "s", key[1:], key.upper(), "", "lr", "name"]))] = holder.pop(
                    key, None
                )
            case "delete":
                holder.pop(key, None)
            case "add":
                holder[draw(st.text(max_size=8))] = draw(JUNK)
    return values


def same(written, held) -> bool:
    """Whether a configuration holds what was written: the same types and values; an integer may stand for a float."""
    if isinstance(held, dict):
        return isinstance(written, dict) and all(
            key in held and same(value, held[key]) for key, value in written.items()
        )
    if isinstance(held, list):
        return isinstance(written, list) and len(written) == len(held) and all(map(same, written, held))
    return written == held and (type(written) is type(held) or (type(written), type(held)) == (int, float))


@mutations(700)
@given(mutated_values())
def test_configurations(values):
    config, message = attempt(load_config, copy.deepcopy(values))
    if config is None:
        assert message.startswith("config: ")
    else:
        assert same(values, config.model_dump(mode="json"))
        assert load_config(config) == config


FRAGMENTS = [
    "\n",
    " ",
    "  ",
    ":",
    ": ",
    "- ",
    "#",
    "'",
    '"',
    "{",
    "}",
    "[",
    "&a ",
    "*a",
    "!!int ",
    "!!float ",
    "!",
    "|",
    ">",
]
FRAGMENTS += [
    "%",
    "@",
    "0",
    "1e5",
    "010",
    "1:30",
    "1_0",
    "0x1F",
    ".5",
    "~",
    "null",
    "yes",
    "No",
    ".inf",
    "<<: ",
    "\t",
    "\r",
]
FRAGMENTS += ["\x00", "\x85", "\ufeff", "\u2028", "\ud7ff", "\x07", "--- ", "...", "lr: 1\n", "seed: 1\n", "? ", "é"]


@st.composite
def mutated_text(draw) -> bytes:
    text = dump_config(BASE).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        lines = text.splitlines(keepends=True)
        line = draw(st.integers(0, max(len(lines) - 1, 0)))
        match draw(st.sampled_from(["insert", "byte", "cut", "truncate", "twice", "move"])):
            case "insert":
                text = text[:at] + draw(st.sampled_from(FRAGMENTS)).encode() + text[at:]
            case "byte":
                text = text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
            case "cut":
                text = text[:at] + text[at + draw(st.integers(1, 9)) :]
            case "truncate":
                text = text[:at]
            case "twice":
                text = b"".join([*lines[: line + 1], *lines[line:]])
            case "move":
                text = b"".join([*lines[:line], *lines[line + 1 :], *lines[line : line + 1]])
    return text


def as_written(node: yaml.Node):
    """A YAML tree as nested dictionaries and lists of (text, quoted): nothing interpreted, nothing dropped."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(as_written(key)[0], as_written(value)) for key, value in node.value]
        assert len(dict(pairs)) == len(pairs), "a key was accepted twice"
        return dict(pairs)
    if isinstance(node, yaml.SequenceNode):
        return [as_written(item) for item in node.value]
    return node.value, node.style is not None


def says(written, held) -> bool:
    """Whether what was written can only mean what the configuration holds."""
    if isinstance(held, dict):
        return isinstance(written, dict) and all(
            key in held and says(value, held[key]) for key, value in written.items()
        )
    if isinstance(held, list):
        return isinstance(written, list) and len(written) == len(held) and all(map(says, written, held))
    if not isinstance(written, tuple):
        return False
    text, quoted = written
    if isinstance(held, str):
        return text == held and (quoted or text.lower() not in ("null", "true", "false", "~", ""))
    if held is None or isinstance(held, bool):
        return text.lower() in {None: ("", "~", "null"), True: ("true",), False: ("false",)}[held]
    plain = r"[-+]?(0|[1-9]\d*)" if isinstance(held, int) else r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?"
    return re.fullmatch(plain, text, re.ASCII) is not None and type(held)(text) == held


@mutations(300)
@given(text=mutated_text())
def test_configuration_files(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_bytes(text)
    config, message = attempt(load_config, path)
    if config is None:
        assert message.startswith("config: ")
    else:
        tree = yaml.compose(text.decode(), yaml.SafeLoader)
        assert tree is None or says(as_written(tree), config.model_dump(mode="json"))


# Checkpoints

FILES = ("init.safetensors", "checkpoints/round-00003/state.json", "checkpoints/round-00003/state.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_config):
    """A function from a broadcast to what it and the files of a finished run give, and the files of several runs."""
    folders = {}
    others = {"run": {}, "seed": {"seed": 1}, "method": {"method": {"name": "lora"}}, "rank": {"method": {"rank": 2}}}
    for name, changes in others.items():
        folders[name] = run(changed(tiny_config, changes), tmp_path_factory.mktemp("runs") / name).folder
    experiment = build(tiny_config)
    model = load_model(
        tiny_config.model, experiment.source, experiment.corpus.label_names, pad_id=0, seed=tiny_config.seed
    )

    def load(folder: RunFolder, broadcast_changed: bool):
        """As `restore` does, with a copy of the model in memory instead of one from disk."""
        broadcast, begun = Broadcast.load(folder.init_file), experiment
        if broadcast_changed:
            cpu = torch.device("cpu")
            learner = make_trainable(copy.deepcopy(model), tiny_config.method, tiny_config.seed, cpu, broadcast)
            begun = replace(experiment, learner=learner)
        return load_checkpoint(folder, 3, begun.digest, begun.learner.state())

    return folders, load


def changed(config: Config, changes: dict) -> Config:
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    return load_config(values)


@st.composite
def mutated_file(draw, contents: dict[str, bytes], elsewhere: list[bytes]) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    at = draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(2000, len(content) - 1))))
    match draw(st.sampled_from(["flip", "truncate", "zero", "append", "insert", "swap", "field"])):
        case "flip":
            return name, content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        case "truncate":
            return name, content[:at]
        case "zero":
            return name, content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :]
        case "append":
            return name, content + draw(st.binary(min_size=1, max_size=9))
        case "insert":
            return name, content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
        case "swap":
            return name, draw(st.sampled_from(elsewhere))
        case "field":
            name = next(file for file in contents if file.endswith(".json"))
            facts = json.loads(contents[name])
            key = draw(st.sampled_from(sorted(facts)))
            facts[draw(st.sampled_from([key, "extra"]))] = draw(JUNK)
            if draw(st.booleans()):
                facts.pop(key, None)
            return name, json.dumps(facts).encode("utf-8", "surrogatepass")


def test_checkpoints(tmp_path, saved):
    folders, load = saved
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(folders["run"], folder.path)
    contents = {name: (folder.path / name).read_bytes() for name in FILES}
    elsewhere = [
        p.read_bytes() for f in folders.values() for p in sorted(f.rglob("*")) if p.suffix in (".json", ".safetensors")
    ]
    expected = load(folder, True)
    accepted = 0

    @mutations(500)
    @given(mutated_file(contents, elsewhere))
    def check(mutation):
        nonlocal accepted
        name, content = mutation
        path = folder.path / name
        path.write_bytes(content)
        state, message = attempt(load, folder, name == FILES[0])
        path.write_bytes(contents[name])
        if state is None:
            named = (str(folder.path), "hash of its weight", "factors must", "must be the base model")
            assert any(part in message for part in named), message
        else:
            accepted += 1
            for got, saved_one in ((state.tensors, expected.tensors), (state.previous, expected.previous)):
                assert got.keys() == saved_one.keys()
                assert all(torch.equal(tensor, saved_one[key]) for key, tensor in got.items())
            assert replace(state, tensors={}, previous={}) == replace(expected, tensors={}, previous={})

    check()
    assert accepted < 50  # only what changed nothing: white space in JSON, the same file of another run


@pytest.mark.parametrize(("other", "word"), [("method", "other factors"), ("rank", "")])
def test_factors_of_another_run(tmp_path, saved, other, word):
    """LoRA's B0 = 0 under FeDeRA's factors would be another model, with every hash of the file itself right."""
    folders, load = saved
    shutil.copytree(folders["run"], tmp_path / "copy")
    shutil.copyfile(folders[other] / FILES[0], tmp_path / "copy" / FILES[0])
    state, message = attempt(load, RunFolder(tmp_path / "copy"), True)
    assert state is None and word in message


# Client updates

TEMPLATE = {"a": torch.zeros(3, 4), "b": torch.zeros(5), "c": torch.zeros(2, 2)}
NOT_TENSORS = [None, 1.0, "a", [1.0], torch.zeros(5).numpy(), {}]


def good_update() -> ClientUpdate:
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in TEMPLATE.items()}
    return ClientUpdate(4, 10, 2, tensors, {"loss": 0.5})


@st.composite
def mutated_update(draw) -> tuple[ClientUpdate, str]:
    """An update with one fault, and the word that its rejection must hold."""
    update = good_update()
    tensors = dict(update.tensors)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    match draw(st.sampled_from(["value", "shape", "dtype", "missing", "extra", "type", "layout", "count", "loss"])):
        case "value":
            place = draw(st.integers(0, tensor.numel() - 1))
            tensor.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        case "shape":
            shapes = [
                tensor[None],
                tensor[:1],
                tensor[:0],
                torch.cat([tensor, tensor]),
                tensor.sum(),
                tensor.expand(2, *tensor.shape),
            ]
            tensors[name] = draw(st.sampled_from(shapes))
        case "dtype":
            kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64]
            tensors[name] = tensor.to(draw(st.sampled_from(kinds)))
        case "missing":
            del tensors[name]
        case "extra":
            name = draw(st.sampled_from(["A", "a.", "", "lora_A", 3, None, ("a",)]))
            tensors[name] = tensor
        case "type":
            tensors[name] = draw(st.sampled_from(NOT_TENSORS))
        case "layout":
            tensors[name] = draw(st.sampled_from([tensor.to_sparse(), tensor.to("meta")]))
        case "count":
            counts = [0, -1, 2**31, 10**400, True, 10.0, math.nan, None, "10", torch.tensor(10)]
            return replace(update, examples=draw(st.sampled_from(counts))), "examples"
        case "loss":
            losses = [{"loss": math.nan}, {"loss": math.inf}, {"loss": None}, {"loss": "0"}, {}]
            return replace(update, metrics=draw(st.sampled_from(losses))), "loss"
    return replace(update, tensors=tensors), str(name)


def test_good_update():
    assert problem_of(good_update(), TEMPLATE) is None


@mutations(500)
@given(mutated_update())
def test_updates(mutation):
    update, word = mutation
    problem = problem_of(update, TEMPLATE)
    assert problem is not None and word in problem and len(problem.splitlines()) == 1
