import pytest
import torch


@pytest.fixture(scope="module")
def poisoned():
    """Memory that nobody has written is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def mma_library(tmp_path_factory):
    """The kernels of csrc/cuda/lora_linear_mma.cu for the CPU, which those for Hopper need too."""
    from .emulated import build

    sources = ("csrc/cuda/lora_linear_mma.cu", "tests/emulator/lora_linear_mma.cpp")
    return build(tmp_path_factory.mktemp("mma"), *sources)


@pytest.fixture(autouse=True)
def one_thread():
    """torch's own error is the yardstick, and long sums err less where its threads split them: one split always."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
