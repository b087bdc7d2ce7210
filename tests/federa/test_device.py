"""Where the host waits for a device, found without one: its tensors are fake and claim "cuda", the host's are real."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from federa.client import train_client
from federa.cohort import train_cohort
from federa.config import changed
from federa.experiment import build

from .as_alone import SGD, check, moved, shares

CUDA = torch.device("cuda")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Device(TorchDispatchMode):
    """Notes every copy to or from the device that the host waits for; what is read is zero.

    Whatever else depends on numbers of the device (`.item()`, `nonzero`, a mask as an index) raises in fake tensors.
    """

    def __init__(self):
        super().__init__()
        self._fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), []

    def __enter__(self):
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not all(issubclass(kind, FakeTensor) or kind in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # nested tensors, which come back with their parts
        leaves = tree_leaves((args, kwargs))
        there = [leaf.device.type == "cuda" for leaf in leaves if isinstance(leaf, torch.Tensor)]
        target = torch.device(kwargs.get("device") or "cuda" if any(there) else kwargs.get("device") or "cpu")
        if func is torch.ops.aten._pin_memory.default:
            return args[0].clone()
        if func in COPIES and not (there[0] and target == CUDA and all(there)) and (any(there) or target == CUDA):
            if not (kwargs.get("non_blocking") or (func is COPIES[1] and len(args) > 2 and args[2])):
                self.waits.append((func, args[0].shape))
            if target.type == "cpu":
                with unset_fake_temporarily():
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if any(there) or target == CUDA:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def on_device(experiment):
    """All tensors of its model on the device, of which nothing is known but their shapes."""
    learner = experiment.learner
    for module in learner.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            there = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
            setattr(module, name, nn.Parameter(there, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    learner.dropout._device = CUDA
    trainable = {name: learner.model.get_parameter(name) for name in learner.trainable}
    return replace(experiment, learner=replace(learner, trainable=trainable, device=CUDA))


@pytest.fixture(autouse=True)
def attention_of_cuda(monkeypatch):
    """PyTorch asks the GPU, which is not there, which of its kernels it can run."""
    chosen = "torch.nested._internal.sdpa._select_sdp_backend"
    monkeypatch.setattr(chosen, lambda *facts: SDPBackend.EFFICIENT_ATTENTION)


@pytest.mark.parametrize("together", [True, False], ids=["cohort", "alone"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_no_step_waits_for_the_device(tiny_config, tiny_models, family, together):
    dropout = 0.1 if together else 0.0  # alone, torch's own generators are seeded, of a GPU that is not there
    client = {"batch_size": 4, "accumulate": 2, "proximal_mu": 0.1}
    config = changed(tiny_config, model={"name": str(tiny_models(family)), "dropout": dropout}, client=client)
    experiment = build(config)
    start, waits = moved(experiment), []
    for steps in (1, 3):
        config = changed(config, client={"steps": steps})
        with Device() as device:
            there = on_device(experiment)
            arguments = (there.learner, there.train)
            if together:
                updates = train_cohort(*arguments, list(enumerate(shares((9, 30, 2)))), 1, start, config)
            else:
                updates = [train_client(*arguments, np.arange(30), 0, 1, start, config)]
        assert all(update.steps == steps for update in updates)
        waits.append(device.waits)
    assert waits[0] == waits[1] != []


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


def test_what_waits_is_found():
    """The instrument itself."""
    with Device() as device:
        there = torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
        assert there.device.type == "cuda" and not device.waits
        torch.arange(3).to(CUDA)
        torch.tensor([1.0], device=CUDA)
        assert len(device.waits) == 2
        assert torch.equal(there.cpu(), torch.zeros(3)) and len(device.waits) == 3
        assert there.tolist() == [0.0] * 3 and len(device.waits) == 4
        for read in (there.sum().item, there.nonzero, lambda: there[there > 0], lambda: bool(there.any())):
            with pytest.raises(Exception, match="data|Data|dynamic|Dynamic|nonzero"):
                read()
