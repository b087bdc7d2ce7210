"""federa_kernels._C is there and tells the truth, or the package says why not and what to do."""

import importlib.machinery
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import federa_kernels

SOURCE = Path(federa_kernels.__file__).with_name("_extension.py")
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture(scope="module")
def extension():
    module = federa_kernels.load_extension()
    if module is None:
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        if os.environ.get("CI") == "true" and shutil.which("c++") and headers:
            pytest.fail(federa_kernels.why_no_extension())
        pytest.skip(federa_kernels.why_no_extension())
    return module


def test_build_info_says_what_was_built(extension):
    info = extension.build_info()
    assert set(info) == {"version", "compiler", "cpp_standard", "cuda_version", "cuda_missing", "architectures"}
    assert info["cpp_standard"] >= 201703
    assert (info["cuda_version"] is None) == (info["cuda_missing"] is not None) == (info["architectures"] == [])


def test_cpu_features_are_those_of_the_kernel(extension):
    if not (sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")):
        pytest.skip("reads /proc/cpuinfo of Linux")
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    names = {"neon": "asimd"}
    features = extension.cpu_features()
    assert features == {name: names.get(name, name) in listed for name in features}


def test_cuda_devices_are_listed_or_explained(extension):
    devices = extension.cuda_devices()
    if isinstance(devices, str):
        assert re.match(r"no CUDA half: .+|\d+: .+", devices)
    else:
        assert all(set(device) == {"name", "capability", "memory"} and device["memory"] > 0 for device in devices)


def test_there_is_a_module_or_a_reason():
    assert (federa_kernels.load_extension() is None) == (federa_kernels.why_no_extension() is not None)


def ask(folder, expression):
    """Run _extension.py in a package of its own under `folder`, where the files beside it are the test's."""
    script = f"from federa_kernels._extension import *; print({expression})"
    return subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {script}"],
                          capture_output=True, text=True)  # fmt: skip


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "federa_kernels"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(SOURCE, folder)
    return folder


def test_a_missing_module_is_none_and_the_command_is_told(package):
    answer = ask(package.parent, "load_extension(), why_no_extension()").stdout
    assert answer.startswith("None never built; with a C++17 compiler")
    assert "pip install -v --no-deps --force-reinstall ." in answer


def test_a_failed_build_is_remembered(package):
    (package / "_C.missing").write_text("no such compiler: g++\n")
    assert ask(package.parent, "why_no_extension()").stdout.startswith("not built: no such compiler: g++; with")


def test_a_module_of_another_python_is_named(package):
    (package / "_C.cpython-39-elsewhere.so").touch()
    assert "built for another Python (_C.cpython-39-elsewhere.so)" in ask(package.parent, "why_no_extension()").stdout


def test_a_broken_module_raises(package):
    (package / f"_C{SUFFIX}").write_bytes(b"no binary")
    answer = ask(package.parent, "load_extension()")
    assert answer.returncode == 1
    assert re.search(r"RuntimeError: federa_kernels._C must load, got: .*; build it again: pip install", answer.stderr)
