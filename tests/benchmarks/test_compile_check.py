"""The offline check of the GPU kernels, in a process of its own: here Triton's interpreter is on."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compile_check
from benchmarks.compile_check import ARCHS, DEFAULT, FLOAT32, Case, Compiled

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def installed():
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed: pip install 'federa[test]'"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


OF_MMA = {"kernel": "sum_kernel", "case": "lora_linear_mma.cu"}


def row(**changes):
    usual = {"kernel": "_gemm_kernel", "tile": "BM128", "case": "M64 bf16", "arch": 90, "registers": 200}
    return Compiled(**usual | {"spills": 0, "shared": 1024, "mma": {"HGMMA": 5}} | changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": 300_000}, "wants 300000 bytes of shared memory, there are 232448"),
        ({"mma": {"HMMA": 96}}, "has no HGMMA"),
        ({"arch": 100}, "has no UTCHMMA"),
        ({"arch": 80, "mma": {}}, "has no HMMA"),
        ({"kernel": "gemm_sm90_kernel<Tile<half>, 8>"}, "has no UTMALDG"),
        ({"kernel": "gemm_sm90_kernel<Tile<half>, 8>", "mma": {"UTMALDG": 3}}, "has no HGMMA"),
        (OF_MMA | {"mma": {"ACQBULK": 1}}, "has no PREEXIT"),
        (OF_MMA | {"mma": {"PREEXIT": 1}}, "has no ACQBULK"),
        (OF_MMA | {"arch": 80, "mma": {"ACQBULK": 1}}, "has ACQBULK"),
    ],
)
def test_a_tile_that_must_not_ship_is_named(changes, problem):
    assert row(**changes).problems() == [problem]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt, which comes with g++")
def test_a_cuda_kernel_has_a_name_that_says_its_shared_memory():
    mangled = "_ZN6federa11mma_kernels12_GLOBAL__N_111gemm_kernelINS1_7ProductI6__halfLi64ELb1EEELi40960EEEvNS0_4GemmE"
    assert compile_check.readable(mangled) == ("gemm_kernel<Product<half, 64, true>, 40960>", 40960)
    assert compile_check.readable("_ZN6federa10sum_kernelENS_3SumE") == ("sum_kernel", 0)
    jacobi = "_ZN6federa12_GLOBAL__N_113jacobi_kernelILi149056EEEvPKdiPdS4_"
    assert compile_check.readable(jacobi) == ("jacobi_kernel<149056>", 149056)
    gram = "_ZN6federa12_GLOBAL__N_111gram_kernelILi3EfEEvNS0_5PanelIKT0_EEiiPd"
    assert compile_check.readable(gram) == ("gram_kernel<3, float>", 0)
    assert row(kernel="gemm_kernel<Product<half>, 8>", mma={"HGMMA": 1}).problems() == ["has no HMMA"]
    assert not row(kernel="sum_kernel", mma={}).problems()


def test_what_may_ship():
    assert not row().problems()
    assert not row(mma={}, case="M64 fp32").problems()  # full precision has no tensor cores
    assert not row(mma={"HMMA": 8}, kernel="_dA_kernel").problems()
    assert not row(**OF_MMA | {"mma": {"PREEXIT": 1, "ACQBULK": 2}}).problems()
    assert not row(**OF_MMA | {"arch": 80, "mma": {}}).problems()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", [*DEFAULT, FLOAT32], ids=str)
def test_every_kernel_of_a_training_step_is_seen(case, arch):
    launches = compile_check.launches(case, arch)
    assert {"_gemm_kernel", "_dy_kernel", "_dA_kernel"} <= {launch.kernel.__name__ for launch in launches}
    for launch in launches:
        assert len(launch.arguments) + len(launch.constants) == len(launch.kernel.arg_names)


COMPILE = """
import json, sys, tempfile, torch
from pathlib import Path
from benchmarks import compile_check
case = compile_check.Case("lora_linear", 128, 128, 64, 8)
with tempfile.TemporaryDirectory() as folder:
    for launch in compile_check.launches(case, 90):
        row = compile_check.compile_triton(90, case, launch, Path(folder))
        print(json.dumps([row.kernel, row.registers, row.spills, row.mma, row.problems()]))
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"_gemm_kernel", "_dy_kernel", "_dA_kernel"} <= {name for name, *_ in rows}
    for name, registers, spills, mma, problems in rows:
        assert 16 <= registers <= 255 and spills == 0 and not problems
        assert "HGMMA" in mma or name != "_gemm_kernel"


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        compile_check.main([])


def test_a_case_says_what_it_is():
    assert str(Case("clients", 8, 4, 2, 1, torch.float32)) == "clients M8 N4 K2 R1 fp32"
