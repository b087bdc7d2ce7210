"""The layers of the house: who may import what, read from the sources."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("federa", "federa_kernels")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOLDERS = (*PACKAGES, "csrc", "benchmarks", "tests")


def imports(file: Path) -> Iterator[str]:
    """Dotted names a file imports anywhere in it; of `from a import b` both a and a.b, relative ones resolved."""
    package = file.with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importing(*names: str) -> set[Path]:
    """The files that import one of these modules or something in it."""
    return {f for f in FILES if any(i == name or i.startswith(f"{name}.") for i in imports(f) for name in names)}


def attributes(file: Path) -> set[str]:
    """Dotted names that a file uses, as `torch.ops.federa`."""
    nodes = (node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute))
    return {name for name in map(ast.unparse, nodes) if name.replace(".", "").isidentifier()}


def test_the_kernels_know_nothing_of_federated_learning():
    assert not {file for file in importing("federa") if file.parts[0] == "federa_kernels"}


def test_nobody_imports_tests_or_benchmarks():
    assert not importing("tests", "benchmarks")


def test_operators_do_not_know_the_layer():
    assert not {file for file in importing("federa_kernels.linear") if len(file.parts) > 2}


def test_nothing_below_the_command_line_imports_it():
    assert importing("federa.cli") <= {Path("federa/__main__.py")}


def test_the_reference_imports_torch_only():
    references = [file for file in FILES if file.name == "reference.py"]
    assert references
    for file in references:
        roots = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
        assert roots == {"torch"}, file


def test_only_triton_kernels_import_triton():
    assert {file.name for file in importing("triton")} <= {"triton_kernels.py"}


def test_only_op_files_touch_the_operator_registry():
    registry = ("torch.library", "torch.ops")
    users = {file for file in FILES if any(name.startswith(registry) for name in attributes(file))}
    assert {file.name for file in users | importing(*registry)} <= {"op.py"}


def test_only_runs_over_sites_know_flower():
    assert {file.parent for file in importing("flwr")} == {Path("federa/flower")}


def test_only_the_finder_imports_the_extension():
    assert importing("federa_kernels._C") == {Path("federa_kernels/_extension.py")}


def test_federa_imports_public_names_of_the_kernels():
    import federa_kernels

    public = {"federa_kernels", *(f"federa_kernels.{name}" for name in federa_kernels.__all__)}
    for file in FILES:
        if file.parts[0] == "federa":
            used = {name for name in {*imports(file), *attributes(file)} if name.split(".")[0] == "federa_kernels"}
            assert {".".join(name.split(".")[:2]) for name in used} <= public, file


@pytest.mark.parametrize("name", ["partition.py", "aggregate.py"])
def test_pure_files_know_no_model_and_no_file(name):
    roots = {imported.split(".")[0] for imported in imports(Path("federa", name))}
    assert not roots & {"transformers", "datasets", "peft", "os", "pathlib", "io"}


def test_kernel_sources_include_neither_torch_nor_python():
    for file in (ROOT / "csrc").rglob("*.*"):
        if file.name != "bindings.cpp":
            text = file.read_text()
            assert not [word for word in ("<torch", "<ATen", "<c10", "Python.h", "pybind11") if word in text], file


def test_files_are_named_after_what_they_do():
    names = {"utils", "util", "helpers", "helper", "common", "misc", "core"}
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    assert not [path for path in paths if names & {*path.parts, path.stem}]


def test_importing_initialises_no_cuda_and_starts_no_thread():
    """With one thread a library, so that no BLAS starts its own; torch.cuda stays untouched."""
    script = (
        "import sys, threading, torch, federa, federa_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert 'federa_kernels._C' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
