"""Where the host waits for a device, found without one: "meta" stands for it, whose tensors have no numbers."""

import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from federa.client import train_client
from federa.cohort import train_cohort
from federa.config import changed
from federa.experiment import build

from .as_alone import SGD, check, distance, moved, shares

THERE = torch.device("meta")


class Copies(TorchDispatchMode):
    """Notes every copy to or from the device that the host waits for; what is read is zero.

    Whatever else depends on numbers of the device (`.item()`, `nonzero`, a mask as an index) raises.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not all(kind in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # nested tensors, which come back with their parts
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.waits.append(tuple(args[0].shape))
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and target.type != args[0].device.type:
            if not (kwargs.get("non_blocking") and getattr(args[0], "pinned", False)):
                self.waits.append(tuple(args[0].shape))
            if target.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class Made(TorchFunctionMode):
    """Notes what is made from numbers on the device at once, which is a copy too."""

    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu") == THERE:
            self._waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


def on_device(experiment):
    """Its model on the device."""
    learner = experiment.learner
    for module in learner.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(THERE), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(THERE)
    learner.dropout._device = THERE
    trainable = {name: learner.model.get_parameter(name) for name in learner.trainable}
    return replace(experiment, learner=replace(learner, trainable=trainable, device=THERE))


def pinned(tensor):
    copy = tensor.clone()
    copy.pinned = True
    return copy


@pytest.fixture
def gpu(monkeypatch):
    """The device is taken for a GPU, by PyTorch too where it chooses kernels."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    for module in ("transfer", "attention"):
        monkeypatch.setattr(f"federa_kernels.{module}.GPUS", (THERE.type,))
    for name, said in {
        "_select_sdp_backend": lambda *facts: SDPBackend.FLASH_ATTENTION,
        "_is_computing_meta_flops": lambda tensor: False,
        "_autocast": lambda *tensors: tensors,
    }.items():
        monkeypatch.setattr(f"torch.nested._internal.sdpa.{name}", said)
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: nullcontext())  # which "meta" does not know
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [THERE.type])


@pytest.mark.parametrize("together", [True, False], ids=["cohort", "alone"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_no_step_waits_for_the_device(gpu, tiny_config, tiny_models, family, together):
    client = {"batch_size": 4, "accumulate": 2, "proximal_mu": 0.1}
    config = changed(tiny_config, model={"name": str(tiny_models(family)), "dropout": 0.1}, client=client)
    experiment = build(config)
    start, waits = moved(experiment), []
    there = on_device(experiment)
    arguments = (there.learner, there.train)
    for steps in (1, 3):
        config = changed(config, client={"steps": steps})
        with Copies() as copies, Made(copies.waits):
            if together:
                updates = train_cohort(*arguments, list(enumerate(shares((9, 30, 2)))), 1, start, config)
            else:
                updates = [train_client(*arguments, np.arange(30), 0, 1, start, config)]
        assert all(update.steps == steps for update in updates)
        waits.append(len(copies.waits))
    assert waits[0] == waits[1] > 0


def test_attention_at_once_as_alone(monkeypatch, tiny_config):
    """A GPU's way through whole cohorts, here by PyTorch's attention of nested tensors for the CPU."""
    config = changed(tiny_config, client=SGD | {"steps": 3})
    experiment = build(config)
    start = moved(experiment)
    arguments = (experiment.learner, experiment.train, [(0, np.arange(20))], 1, start, config)
    (plain,) = train_cohort(*arguments)
    monkeypatch.setattr("federa_kernels.attention.GPUS", ("cpu",))
    (nested,) = train_cohort(*arguments)
    assert 0 < distance(plain, nested, start) <= 2e-5
    check(experiment, start, config)


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits(tiny_config):
    """As PyTorch itself finds it."""
    counts = []
    for steps in (1, 3):
        experiment = build(changed(tiny_config, model={"device": "cuda", "dropout": 0.1}, client={"steps": steps}))
        arguments = (list(enumerate(shares((9, 30, 2)))), 1, moved(experiment), experiment.config)
        for _ in range(2):  # what a first step compiles waits too
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    train_cohort(experiment.learner, experiment.train, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in found))
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_on_a_gpu_as_alone(tiny_config, tiny_models, family):
    config = changed(tiny_config, model={"name": str(tiny_models(family)), "device": "cuda"}, client=SGD)
    experiment = build(config)
    check(experiment, moved(experiment), config)


def test_what_waits_is_found(gpu):
    """The instrument itself."""
    with Copies() as copies, Made(copies.waits):
        there = torch.zeros(3).pin_memory().to(THERE, non_blocking=True)
        assert there.device == THERE and not copies.waits
        torch.arange(3).to(THERE)
        torch.zeros(3).pin_memory().to(THERE)
        torch.tensor([1.0], device=THERE)
        assert len(copies.waits) == 3
        assert torch.equal(there.cpu(), torch.zeros(3)) and len(copies.waits) == 4
        assert there.tolist() == [0.0] * 3 and len(copies.waits) == 5
        for read in (there.sum().item, there.nonzero, lambda: there[there > 0], lambda: bool(there.any())):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
