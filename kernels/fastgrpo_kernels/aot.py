# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel of the package ahead of time, without a GPU, and read what came out.

Each kernel module defines `aot_specs() -> list[KernelSpec]`: one entry per kernel and structural
variant worth checking (dtypes, flags, block sizes), with the configuration the launcher uses.
They are found by that function. Nothing here runs a kernel.
"""

import functools
import importlib
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.errors import TritonError


@dataclass(frozen=True)
class KernelSpec:
    """One compilation: a kernel, its argument types and its launch configuration.

    kernel: the `@triton.jit` function (heuristics and autotune wrappers are unwrapped).
    signature: run-time arguments by name, e.g. {"x_ptr": "*bf16", "n": "i32", "scale": "fp32"};
        "i32:16" is an integer known to be divisible by 16, as Triton finds out at launch;
        a named tuple of types describes a named tuple of numbers.
    constexprs: every other argument by name; an absent optional tensor is `"bias_ptr": None`.
    hot: the kernel is on the step's critical path, so a register spill is a failure.
    matmul: the kernel multiplies matrices, so the absence of tensor-core instructions is a failure.
    label: tells variants of one kernel apart in the report.
    archs: the architectures launched with this configuration; empty means all.
    options: further compiler options the launcher passes, e.g. {"enable_fp_fusion": False}.
    """

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True
    matmul: bool = False
    label: str = ""
    archs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        base = jit_function(self.kernel).__name__.lstrip("_")
        return f"{base}[{self.label}]" if self.label else base


@dataclass
class Report:
    """What one kernel became on one architecture; `problems` is empty when all promises hold."""

    kernel: str
    arch: str
    registers: int | None = None
    stack_bytes: int | None = None
    shared_bytes: int | None = None
    matrix_instructions: dict[str, int] = field(default_factory=dict)
    hot: bool = True
    problems: list[str] = field(default_factory=list)


def jit_function(kernel: Any) -> triton.runtime.JITFunction:
    """The `JITFunction` under heuristics and autotune wrappers."""
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    return kernel


@functools.cache
def kernel_modules() -> dict[str, ModuleType]:
    """The modules of this package that define kernels, by name."""
    found = pkgutil.iter_modules(importlib.import_module("fastgrpo_kernels").__path__)
    stems = sorted(info.name for info in found if not info.name.startswith("_"))
    modules = {stem: importlib.import_module(f"fastgrpo_kernels.{stem}") for stem in stems}
    return {stem: module for stem, module in modules.items() if hasattr(module, "aot_specs")}


def collect(arch: str, stems: Iterable[str] | None = None) -> list[KernelSpec]:
    """The specs of the kernel modules (default: of all) for an architecture."""
    modules = kernel_modules()
    specs = [s for stem in stems or modules for s in modules[stem].aot_specs()]
    return [spec for spec in specs if not spec.archs or arch in spec.archs]


def compile_spec(spec: KernelSpec, arch: str) -> Any:
    """Compile one spec for an architecture such as "sm_90"; returns Triton's compiled kernel.

    Pointers are taken as 16-byte aligned, as torch's allocations are, unless the kernel forbids the
    launcher to look (`do_not_specialize_on_alignment`).
    """
    kernel = jit_function(spec.kernel)
    missing = set(kernel.arg_names) - set(spec.signature) - set(spec.constexprs)
    assert not missing, f"{spec.name}: no type for {sorted(missing)}"
    types = {name: spec.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (kind, param) in enumerate(zip(types.values(), kernel.params, strict=True))
        if isinstance(kind, str) and (kind.startswith("*") or kind.endswith(":16"))
        if not (param.do_not_specialize or param.do_not_specialize_on_alignment)
    }
    signature = {
        name: kind.removesuffix(":16") if isinstance(kind, str) else kind
        for name, kind in types.items()
    }
    source = ASTSource(kernel, signature, constexprs=dict(spec.constexprs), attrs=aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    return triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)


def report(spec: KernelSpec, arch: str) -> Report:
    """Compile a spec and judge it: failure, spill in a hot kernel, matmul off the tensor cores."""
    out = Report(kernel=spec.name, arch=arch, hot=spec.hot)
    try:
        compiled = compile_spec(spec, arch)
    except (TritonError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        out.problems.append(f"does not compile: {error}")
        return out
    out.shared_bytes = compiled.metadata.shared
    out.registers, out.stack_bytes = resources(compiled.asm["cubin"], compiled.asm["ptx"], arch)
    out.matrix_instructions = matrix_instructions(compiled.asm["ptx"])
    if spec.hot and out.stack_bytes:
        out.problems.append(f"hot kernel uses {out.stack_bytes} bytes of stack (spilled registers)")
    if spec.matmul and not out.matrix_instructions:
        out.problems.append("matmul without tensor-core instructions")
    return out


def matrix_instructions(ptx: str) -> dict[str, int]:
    """How often each tensor-core instruction occurs in PTX text: mma.sync, wgmma, tcgen05.mma."""
    found = re.findall(r"^\s*(?:@%p\d+\s+)?(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx, re.M)
    return dict(Counter(found))


def find_tool(name: str) -> str | None:
    """A CUDA binary tool: the one shipped in Triton's package, else the one on PATH."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(shipped) if shipped.is_file() else shutil.which(name)


def resources(cubin: bytes, ptx: str, arch: str) -> tuple[int, int]:
    """Registers per thread and stack bytes, by cuobjdump, or by assembling the PTX again."""
    with tempfile.TemporaryDirectory() as folder:
        if tool := find_tool("cuobjdump"):
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            command = [tool, "-res-usage", str(path)]
            pattern = r"REG:(\d+) STACK:(\d+)"
        else:
            path = Path(folder, "kernel.ptx")
            path.write_text(ptx)
            target = re.search(r"^\.target (\w+)", ptx, re.M).group(1)
            command = [
                get_ptxas(int(arch[3:])).path,
                "-v",
                f"--gpu-name={target}",
                str(path),
                "-o",
                f"{path}.o",
            ]
            pattern = None
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    if pattern:
        registers, stack = re.search(pattern, text).groups()
    else:
        registers = re.search(r"Used (\d+) registers", text).group(1)
        stack = re.search(r"(\d+) bytes stack frame", text).group(1)
    return int(registers), int(stack)
