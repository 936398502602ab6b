# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo doctor`: what is installed, which implementation each op uses here, and why.

With `--compile sm_80,sm_90,sm_100` every Triton kernel of the package is compiled for those
architectures, no GPU needed; a failure, a register spill in a hot kernel or a matmul without
tensor-core instructions is printed and makes the exit status 1.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastgrpo
from fastgrpo.errors import InputError
from fastgrpo.recurrence import implementations

# distribution name -> what it is used for
PACKAGES = {
    "torch": "required",
    "transformers": "required",
    "triton": "the GPU kernels",
    "trl": "the trainer integration",
    "accelerate": "the trainer integration",
    "peft": "LoRA",
    "deepspeed": "ZeRO under the trainer",
    "vllm": "rollouts in another engine (use_vllm)",
    "flash-attn": "attention of completions and vision towers",
    "flash-linear-attention": "recurrent layers (gated DeltaNet: Qwen3.5 and later)",
    "causal-conv1d": "their convolution",
    "xformers": "attention with a merged prefix",
    "liger-kernel": "layer kernels (RMSNorm, M-RoPE, SwiGLU), on request",
    "verl": "actor and reference model (external_lib), reward adapters",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastgrpo doctor", description=__doc__)
    parser.add_argument("--compile", metavar="ARCHS", help="compile all kernels, e.g. sm_80,sm_90")
    parser.add_argument("--kernels", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings there")
    args = parser.parse_args(arguments)
    findings = {
        "fastgrpo": fastgrpo.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages(),
        "gpus": gpus(),
        "nvcc": nvcc(),
        "compiled": compiled_parts(),
        "ops": ops(),
        "attention": attention(),
        "recurrence": implementations(device()),
        "parallel": parallel(),
    }
    print(describe(findings))
    failed = False
    if args.compile:
        findings["kernels"] = compile_kernels(args.compile.split(","), args.kernels)
        failed = any(kernel["problems"] for kernel in findings["kernels"])
    if args.json:
        args.json.write_text(json.dumps(findings, indent=1) + "\n")
    if failed:
        raise SystemExit(1)


def packages() -> dict[str, str | None]:
    """Version of each package this one can use, None if it is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB" for p in properties]


def nvcc() -> str | None:
    """Path and release of the CUDA compiler, None without one."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = [line for line in text.splitlines() if "release" in line]
    return f"{path}: {release[0].strip()}" if release else path


def compiled_parts() -> dict[str, dict[str, Any]]:
    from fastgrpo_kernels import build_info

    return build_info()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ops() -> dict[str, dict[str, Any]]:
    """Per op: the implementation in use on this machine, and why each other one is not."""
    from fastgrpo.ops.select import ORDER, select, why_not

    found = {}
    for op, by_device in ORDER.items():
        chosen = select(op, device())
        names = dict.fromkeys(name for order in by_device.values() for name in order)
        others = {name: why_not(op, name, device()) for name in names if name != chosen}
        found[op] = {"uses": chosen, "others": others}
    return found


def attention() -> dict[str, Any]:
    """The attention backend in use for bfloat16 heads of 128, and why each other one is not."""
    from fastgrpo.attention.registry import BACKENDS, choose_backend, get_backend

    case = (device(), torch.bfloat16, 128)
    chosen = choose_backend(None, *case)
    others = [name for name in BACKENDS if name != chosen]
    return {"uses": chosen, "others": {n: get_backend(n).unavailable(*case) for n in others}}


def parallel() -> dict[str, dict[str, str | None]]:
    """accelerate's configuration files for several processes, and what each lacks here."""

    def lacks(name: str) -> str | None:
        wanted = ["trl", "accelerate", *(["deepspeed"] if name.startswith("zero") else [])]
        missing = [package for package in wanted if importlib.util.find_spec(package) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    configs = importlib.resources.files("fastgrpo") / "accelerate_configs"
    names = sorted(f.name.removesuffix(".yaml") for f in configs.iterdir())
    return {n: {"config": str(configs / f"{n}.yaml"), "lacks": lacks(n)} for n in names}


def compile_kernels(archs: list[str], only: str | None) -> list[dict[str, Any]]:
    """Compile the kernels for each architecture, printing a line for each."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("--compile: triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("--compile: expected TRITON_INTERPRET unset, the interpreter is on")
    for arch in archs:
        if not (arch.startswith("sm_") and arch[3:].isdigit()):
            raise InputError(f"--compile: expected architectures such as sm_90, got {arch!r}")
    import triton
    from fastgrpo_kernels import aot

    print(f"\nkernels compiled by triton {triton.__version__}")
    row = "  {:<60} {:>7} {:>9} {:>6} {:>7}  {}".format
    print(row("kernel", "arch", "registers", "stack", "shared", "tensor-core instructions"))
    reports = []
    for arch in archs:
        specs = [spec for spec in aot.collect(arch) if only is None or only in spec.name]
        if not specs:
            raise InputError(f"--kernels: no kernel for {arch} has {only!r} in its name")
        for spec in specs:
            report = aot.report(spec, arch)
            matrix = ", ".join(f"{n} {name}" for name, n in report.matrix_instructions.items())
            cells = (report.registers, report.stack_bytes, report.shared_bytes)
            numbers = ("-" if cell is None else cell for cell in cells)
            print(row(report.kernel, arch, *numbers, matrix or "-"), flush=True)
            for problem in report.problems:
                print(f"    FAILED: {problem}", file=sys.stderr)
            reports.append({"triton": triton.__version__, **dataclasses.asdict(report)})
    bad = sum(bool(report["problems"]) for report in reports)
    print(f"  {len(reports)} compiled, {bad} with a problem")
    return reports


def describe(findings: dict[str, Any]) -> str:
    """The findings as text."""
    lines = [
        f"fastgrpo {findings['fastgrpo']}, Python {findings['python']}, {findings['system']}",
        "",
        "packages",
    ]
    for name, version in findings["packages"].items():
        lines.append(f"  {name:<24}{version or 'not installed':<16}{PACKAGES[name]}")
    lines += ["", "machine"]
    lines += [f"  GPU           {gpu}" for gpu in findings["gpus"] or ["none that torch can use"]]
    lines.append(f"  nvcc          {findings['nvcc'] or 'not found'}")
    for part, info in findings["compiled"].items():
        state = "built" if info["built"] else f"not built: {info['reason']}"
        lines.append(f"  {part + ' kernels':<14}{state}")
    lines += ["", f"ops on {device().type}: the implementation in use, and the others"]
    table = findings["ops"] | {"packed attention": findings["attention"]} | findings["recurrence"]
    for op, entry in table.items():
        lines.append(f"  {op:<30}{entry['uses']}")
        for name, reason in entry["others"].items():
            lines.append(f"  {'':<30}  {name}: {reason or 'could serve, is not preferred here'}")
    lines += ["", "several processes: accelerate launch --config_file FILE"]
    for mode, entry in findings["parallel"].items():
        lines.append(f"  {mode:<14}{entry['config']}  {entry['lacks'] or ''}".rstrip())
    return "\n".join(lines)
