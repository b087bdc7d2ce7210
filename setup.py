"""The extension modules and nothing else: federa_kernels._C, in C++ with a CUDA half where nvcc is found.

FEDERA_CUDA=auto|0|1 decides about the CUDA half: auto (the default) tries, 1 fails without it. Where nothing compiles
the package installs all the same, and a note beside the missing module tells `federa doctor` why.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CUDA = os.environ.get("FEDERA_CUDA") or "auto"
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a"  # PTX of 9.0a would run on nothing newer


def architecture_flags():
    for name in re.split(r"[;,\s]+", ARCHITECTURES.strip("; ")):
        if not (match := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must name architectures as in '8.0+PTX;9.0a', got {name!r}")
        for kind in ("sm", "compute") if match[3] else ("sm",):
            yield f"-gencode=arch=compute_{match[1]}{match[2]},code={kind}_{match[1]}{match[2]}"


def compile_cuda(folder):
    """Compile csrc/cuda/*.cu -> (objects, folders of the static runtime, architectures); torch is never asked."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=home and os.path.join(home, "bin"))
    if nvcc is None:
        raise FileNotFoundError(f"no nvcc {f'in CUDA_HOME={home}' if home else 'on PATH'}")
    if not home:  # nvcc on PATH may be a wrapper, so it is asked where its toolkit lies
        dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        if not (top := re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)):
            raise FileNotFoundError(f"{nvcc} --dryrun names no toolkit; set CUDA_HOME")
        home = top[1].strip()
    sources, flags = sorted(Path("csrc/cuda").glob("*.cu")), list(architecture_flags())
    options = ["-std=c++17", "-O3", "--threads=0", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-odir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([nvcc, "-c", *options, *flags, *map(str, sources)], check=True)
    libraries = [str(path) for pattern in ("lib64", "lib", "targets/*/lib") for path in Path(home).glob(pattern)]
    return [str(folder / f"{path.stem}.o") for path in sources], libraries, [flag.split(",code=")[1] for flag in flags]


def reason(problem):
    """One line out of whatever setuptools wrapped around it."""
    while problem.__cause__ or problem.__context__:
        problem = problem.__cause__ or problem.__context__
    if isinstance(problem, subprocess.CalledProcessError):
        return f"{problem.cmd[0]} failed with exit code {problem.returncode}"
    return str(problem).splitlines()[0]


class BuildExtension(build_ext):
    """Adds the CUDA half and turns a failed build into a note, unless FEDERA_CUDA=1 asked for everything."""

    problem = None

    def run(self):
        self.force = True  # what is built depends on the environment as much as on the sources
        super().run()
        module = Path(self.get_ext_fullpath("federa_kernels._C"))
        note = module.with_name("_C.missing")
        note.unlink(missing_ok=True)
        if self.problem:
            module.unlink(missing_ok=True)  # left by an earlier build
            note.write_text(f"{self.problem}\n")

    def build_extension(self, extension):
        macros = {"VERSION": self.distribution.get_version(), "ARCHITECTURES": ""}
        try:
            if CUDA == "0" or os.name == "nt":
                raise FileNotFoundError("built with FEDERA_CUDA=0" if CUDA == "0" else "not on Windows")
            extension.extra_objects, extension.library_dirs, names = compile_cuda(Path(self.build_temp, "cuda"))
            extension.libraries = ["cudart_static", "dl", "rt", "pthread"]
            macros["ARCHITECTURES"] = " ".join(names)
        except (OSError, ValueError, subprocess.SubprocessError) as problem:
            if CUDA == "1":
                raise SystemExit(f"FEDERA_CUDA=1, but the CUDA half cannot be built: {reason(problem)}") from problem
            macros["CUDA_MISSING"] = reason(problem)
        extension.define_macros += [(f"FEDERA_{name}", json.dumps(value)) for name, value in macros.items()]
        try:
            super().build_extension(extension)
        except Exception as problem:  # no compiler, headers or linker: each platform raises its own classes
            if CUDA == "1":
                raise
            self.problem = reason(problem)
            self.warn(f"federa_kernels._C is left out ({self.problem}); federa runs on PyTorch alone")


if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"FEDERA_CUDA must be auto, 0 or 1, got {CUDA!r}")

extension = Pybind11Extension(
    "federa_kernels._C",
    ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=[] if os.name == "nt" else ["-O3"],
)
extension.optional = CUDA != "1"
ParallelCompile().install()  # as many files at once as there are processors
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
