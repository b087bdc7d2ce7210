"""Compiles every GPU kernel without a GPU and reads what the compilers made of it.

    python -m benchmarks compile_check [--all] [--record]

Triton kernels are compiled just as their launchers launch them, which run here on tensors without memory. By default in
the tiles that a few usual layers get, most of them on Hopper; --all takes every tile with ranks 16, 64 and 128, for one
adapter, many clients and shared inputs. Files of csrc/cuda are compiled where nvcc is found. It fails on a spill, on
more shared memory than the GPU has, and on a half-precision product that runs off the tensor cores (on Hopper: HGMMA
from Triton, HMMA from csrc/cuda; a file named _sm90 is Hopper's alone and must have HGMMA and copies by TMA). Kernels
of lora_linear_mma.cu, which begin beside each other from sm_90 on, must let the next begin and wait there, and have
neither instruction below.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.records import RESULTS, ROOT, commit, write
from federa_kernels.lora_linear import tiles as table
from federa_kernels.lora_linear.tiles import Tile, Tiles, pick_tiles

FORMS = ("lora_linear", "clients", "shared")
ARCHS = (80, 90, 100)
CONSUMER = 89  # stands for the GPUs that get the safe tiles
RESERVED = {80: 0, 90: 1024, 100: 1024}  # bytes of a block that the GPU keeps, beside the limit; cuobjdump counts them
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a program may have
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the last is how SASS writes tcgen05.mma
PRODUCTS = re.compile(r"\b(down|gemm|columns)_kernel<")  # of csrc/cuda, in mma.sync on every GPU
HOPPER_PRODUCTS = re.compile(r"\bgemm_sm90_kernel<")
FOLLOWING, FOLLOW = "lora_linear_mma.cu", ("PREEXIT", "ACQBULK")  # how SASS writes the two griddepcontrol
MMA = re.compile(rf"\b(HMMA|HGMMA|UTC\w*MMA|UTMALDG|{'|'.join(FOLLOW)})\b")  # UTMALDG copies tiles
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Case:
    """A layer whose kernels are compiled. form: lora_linear, clients (32 of them) or shared (3 projections)."""

    form: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"{self.form} M{self.M} N{self.N} K{self.K} R{self.R} {name}"


DEFAULT = (
    Case("lora_linear", 8192, 4096, 4096, 16),
    Case("lora_linear", 2048, 768, 768, 16),
    Case("clients", 8192, 768, 3072, 16),
    Case("shared", 8192, 768, 768, 16),
)
FLOAT32 = Case("lora_linear", 2048, 768, 768, 16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    tile: Tile
    arguments: tuple
    constants: dict[str, Any]

    def source(self) -> tuple[dict, dict, dict]:
        """Types, constants and divisibilities by 16, by the rules of Triton's own launcher."""
        types, constants, divisible = dict.fromkeys(self.constants, "constexpr"), dict(self.constants), {}
        plain = set(self.kernel.do_not_specialize or ())
        for index, (name, value) in enumerate(zip(self.kernel.arg_names, self.arguments, strict=False)):
            types[name] = _type(value, (index,), constants, divisible, name in plain)
        return types, constants, divisible

    def __str__(self) -> str:
        sizes = [f"{name}{self.constants[name]}" for name in ("BM", "BN", "BK", "RP", "P") if name in self.constants]
        fly = ["on-the-fly"] if self.constants.get("ON_THE_FLY") else []
        return " ".join([*sizes, f"warps{self.tile.warps}", f"stages{self.tile.stages}", *fly])


def _type(value: Any, path: tuple[int, ...], constants: dict, divisible: dict, plain: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(item, (*path, i), constants, divisible, plain) for i, item in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1 and not plain):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    offset = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
    if offset % 16 == 0 and not plain:
        divisible[path] = [["tt.divisibility", 16]]
    return POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"


@dataclass(frozen=True)
class Compiled:
    """One row: spills are bytes of local memory a thread, shared bytes a program, mma counts by instruction."""

    kernel: str
    tile: str
    case: str
    arch: int
    registers: int
    spills: int
    shared: int
    mma: dict[str, int]

    def problems(self) -> list[str]:
        found = [f"spills {self.spills} bytes"] if self.spills else []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"wants {self.shared} bytes of shared memory, there are {SHARED_LIMIT[self.arch]}")
        if self.kernel == "_gemm_kernel" and "fp32" not in self.case and not self.mma.get(TENSOR_CORES[self.arch]):
            found.append(f"has no {TENSOR_CORES[self.arch]}")
        if PRODUCTS.match(self.kernel) and not self.mma.get("HMMA"):
            found.append("has no HMMA")
        if HOPPER_PRODUCTS.match(self.kernel):
            found += [f"has no {name}" for name in ("HGMMA", "UTMALDG") if not self.mma.get(name)]
        if self.case == FOLLOWING:
            found += [f"has no {name}" for name in FOLLOW if self.arch >= 90 and not self.mma.get(name)]
            found += [f"has {name}" for name in FOLLOW if self.arch < 90 and self.mma.get(name)]
        return found


def launches(case: Case, arch: int, tiles: Tiles | None = None) -> list[Launch]:
    """What the launchers of this form would launch in a training step, on tensors without memory."""
    from federa_kernels.lora_linear import launch

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    M, N, K, R, C, P = case.M, case.N, case.K, case.R, 32, 3
    clients = (C,) if case.form == "clients" else ()
    A, B = empty(*clients, R, K, dtype=torch.float32), empty(*clients, N, R, dtype=torch.float32)
    x, weight, bias, dy = empty(M, K), empty(N, K), empty(N), empty(M, N)
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple, tile: Tile, *arguments: Any, **constants: Any) -> None:
        found.append(Launch(kernel, tile, arguments, constants))

    with mock.patch.multiple(launch, _launch=record, _arch=lambda device: arch, _kernels="triton"):
        if case.form == "lora_linear":
            launch.launch_lora_linear_fwd(x, weight, A, B, bias, 0.5, tiles=tiles)
            needs = [True, False, True, True, False]
            launch.launch_lora_linear_bwd(dy, x, empty(M, R), weight, A, B, 0.5, needs, tiles=tiles)
        elif case.form == "clients":
            segments = (empty(C + 1, dtype=torch.int32), empty(C, dtype=torch.float32), empty(C, dtype=torch.int32))
            tensors, needs = (weight, A, B, bias, *segments), [True, False, True, True, False]
            launch.launch_lora_linear_clients_fwd(x, *tensors, tiles=tiles)
            launch.launch_lora_linear_clients_bwd(dy, x, empty(M, R), *tensors, needs, tiles=tiles)
        else:
            lists, needs = ([weight] * P, [A] * P, [B] * P), [True, *[False, True, True, False] * P]
            launch.launch_lora_linear_shared_fwd(x, *lists, [bias] * P, [0.5] * P, tiles=tiles)
            h = empty(M, P * R)
            launch.launch_lora_linear_shared_bwd([dy] * P, x, h, *lists, [0.5] * P, needs, tiles=tiles)
    return found


def triton_launches(every: bool) -> Iterator[tuple[int, Case, Launch]]:
    """(arch, case, launch) of everything that is compiled."""
    for arch in (*ARCHS, CONSUMER) if every else ARCHS:
        for case in (*DEFAULT, FLOAT32) if every or arch == 90 else DEFAULT[::2]:
            yield from ((arch, case, launch) for launch in launches(case, arch))
        for tile, form, R in itertools.product(table.GEMM.get(arch, table.SAFE_GEMM), FORMS, (16, 64, 128) * every):
            case = Case(form, 8192, 768, 768, R // 4 if form == "shared" else R)
            tiles = pick_tiles(case.M, case.N, case.K, R, case.dtype, arch, form == "clients")
            if tile in table.gemm_tiles(R, case.dtype, arch, form == "clients"):
                for fly in {R <= 16, False}:
                    tiles = dataclasses.replace(tiles, gemm=tile, on_the_fly=fly)
                    yield from ((arch, case, launch) for launch in launches(case, arch, tiles))


def compile_triton(arch: int, case: Case, launch: Launch, folder: Path) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from federa_kernels.lora_linear.launch import OPTIONS

    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, **OPTIONS}
    source = ASTSource(launch.kernel, *launch.source())
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    (_, registers, spills, _, mma) = read_cubin(path)[0]
    name = launch.kernel.__name__
    return Compiled(name, str(launch), str(case), arch, registers, spills, compiled.metadata.shared, mma)


def read_cubin(path: Path) -> list[tuple[str, int, int, int, dict[str, int]]]:
    """(name, registers, bytes of local memory, bytes of shared memory, tensor-core instructions) of each kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([cuobjdump, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL))
    rows = []
    for name, registers, stack, shared, local in usage:
        mma = dict(collections.Counter(MMA.findall(code.get(name, ""))))
        rows.append((name, int(registers), max(int(stack), int(local)), int(shared), mma))
    return rows


def compile_cuda(folder: Path) -> Iterator[Compiled]:
    """Every kernel of csrc/cuda; a file without kernels is only compiled."""
    nvcc = shutil.which("nvcc")
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc else ():
        for arch in (90,) if source.stem.endswith("_sm90") else ARCHS:
            cubin = folder / f"{source.stem}.cubin"
            options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}{'a' * (arch >= 90)}"]
            subprocess.run([nvcc, "-cubin", *options, "-o", cubin, source], check=True)
            for mangled, registers, spills, shared, mma in read_cubin(cubin):
                name, dynamic = readable(mangled)
                shared = max(shared - RESERVED[arch], 0) + dynamic
                yield Compiled(name, "", source.name, arch, registers, spills, shared, mma)


def readable(mangled: str) -> tuple[str, int]:
    """A kernel's name without namespaces and arguments; the dynamic shared memory that its last constant says."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\w+::|\(anonymous namespace\)::|^void |\b__(?:nv_)?", "", done).replace("> >", ">>")
    name = re.sub(r"\([^()]*\)$", "", name)
    dynamic = re.search(r"[< ](\d+)>$", name)
    return name, int(dynamic[1]) if dynamic else 0


HEADER = f"{'kernel':14} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>7}  {'tensor cores':24} tile | case"


def line(row: Compiled) -> str:
    mma = " ".join(f"{count} {name}" for name, count in sorted(row.mma.items()))
    sizes = f"{row.kernel:14} {row.arch:3} {row.registers:4} {row.spills:5} {row.shared:7}"
    return f"{sizes}  {mma:24} {row.tile} | {row.case}"


def compiled(every: bool) -> Iterator[Compiled]:
    """Every row of the table; what two cases have in common is compiled for the first."""
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for arch, case, launch in triton_launches(every):
            key = (arch, launch.kernel.__name__, str(launch.tile), str(launch.source()))
            if key not in seen:
                seen.add(key)
                yield compile_triton(arch, case, launch, Path(folder))
        yield from compile_cuda(Path(folder))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every tile, and the tiles of consumer GPUs")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/compile_check.jsonl")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("compile_check: TRITON_INTERPRET must not be set, the interpreter compiles nothing")
    start, rows = time.monotonic(), []
    print(HEADER)
    for row in compiled(options.all):
        print(line(row), flush=True)
        rows.append(row)
    failures = [
        f"{row.kernel} sm_{row.arch} {row.tile} ({row.case}) {problem}" for row in rows for problem in row.problems()
    ]
    if options.record:
        origin = {
            "commit": commit(),
            "utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "triton": version("triton"),
        }
        lines = [{"subject": "compile_check", **dataclasses.asdict(row), **origin} for row in rows]
        write(RESULTS / "compile_check.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"compile_check: {len(rows)} kernels, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
