# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo doctor`, and what it proves about every Triton kernel without a GPU."""

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch

from fastgrpo.cli import doctor
from fastgrpo.errors import InputError
from fastgrpo.recurrence import seams

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from fastgrpo_kernels import aot


def test_doctor_names_packages_ops_and_reasons(capsys, tmp_path):
    doctor.main(["--json", str(tmp_path / "found.json")])
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    for op in ("linear_grpo_loss", "match_boxes", "packed attention"):
        assert re.search(rf"^  {op} ", text, re.M)
    assert found["ops"]["group_advantages"]["uses"] in ("reference", "triton")
    for seam, library in seams.LIBRARIES.items():
        installed = importlib.util.find_spec(library) is not None
        assert found["recurrence"][seam]["uses"] == (library if installed else "torch")
    assert {"ddp", "fsdp2", "zero1", "zero2", "zero3"} == set(found["parallel"])
    for entry in found["parallel"].values():
        assert Path(entry["config"]).is_file()
    without = importlib.util.find_spec("deepspeed") is None
    assert ("deepspeed" in (found["parallel"]["zero3"]["lacks"] or "")) == without
    on_gpu = seams.implementations(torch.device("cuda"))
    assert all("slower on a GPU" in str(e) for e in on_gpu.values() if e["uses"] == "torch")
    if not torch.cuda.is_available():
        assert "Triton kernels need a CUDA device" in text


def test_doctor_compiles_kernels_and_reports_resources(capsys, tmp_path):
    path = tmp_path / "found.json"
    doctor.main(["--compile", "sm_90", "--kernels", "offset_exp_kernel[bf16]", "--json", str(path)])
    (kernel,) = json.loads(path.read_text())["kernels"]
    assert kernel["arch"] == "sm_90" and kernel["problems"] == []
    assert 16 <= kernel["registers"] <= 255 and kernel["stack_bytes"] == 0
    assert "1 compiled, 0 with a problem" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--compile", "hopper"], ["--compile", "sm_90", "--kernels", "no such kernel"]]
)
def test_doctor_refuses_what_it_does_not_know(arguments):
    with pytest.raises(InputError, match="--compile|--kernels"):
        doctor.main(arguments)


def test_doctor_fails_when_a_kernel_does(monkeypatch, capsys):
    bad = matmul_spec(dtype="*bf16", other="*fp32")
    monkeypatch.setattr(aot, "collect", lambda arch: [bad])
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--compile", "sm_80"])
    assert stop.value.code == 1 and "does not compile" in capsys.readouterr().err


@triton.jit
def _square_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if DOT:
        tl.store(c_ptr + i, tl.dot(a, b))
    else:
        tl.store(c_ptr + i, (a * b).to(tl.float32))


def matmul_spec(dtype="*bf16", other="*bf16", dot=True):
    signature = {"a_ptr": dtype, "b_ptr": other, "c_ptr": "*fp32"}
    return aot.KernelSpec(_square_kernel, signature, {"BLOCK": 64, "DOT": dot}, matmul=True)


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")],
)
def test_report_names_the_matrix_instructions(arch, instruction):
    report = aot.report(matmul_spec(), arch)
    assert report.problems == [] and report.matrix_instructions.get(instruction, 0) > 0


def test_report_finds_a_matmul_without_tensor_cores():
    assert aot.report(matmul_spec(dot=False), "sm_90").problems == [
        "matmul without tensor-core instructions"
    ]


@triton.jit
def _hungry_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.debug_barrier()  # both are live at once: more than a thread's registers
    tl.store(x_ptr + i, y * tl.sum(x, 0))
    tl.store(y_ptr + i, x)


def test_report_finds_spilled_registers():
    spec = aot.KernelSpec(
        _hungry_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 8192}, num_warps=1
    )
    assert any("stack" in problem for problem in aot.report(spec, "sm_80").problems)
    cold = dataclasses.replace(spec, hot=False)
    assert aot.report(cold, "sm_80").problems == []


def test_resources_without_cuobjdump(monkeypatch):
    compiled = aot.compile_spec(matmul_spec(), "sm_90")
    usual = aot.resources(compiled.asm["cubin"], compiled.asm["ptx"], "sm_90")
    monkeypatch.setattr(aot, "find_tool", lambda name: None)
    assert aot.resources(compiled.asm["cubin"], compiled.asm["ptx"], "sm_90") == usual


def test_every_kernel_of_the_package_is_found():
    found = {
        aot.jit_function(spec.kernel).__name__
        for arch in ("sm_80", "sm_90", "sm_100")
        for spec in aot.collect(arch)
    }
    for path in Path(aot.__file__).parent.glob("*.py"):
        named = re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
        assert set(named) <= found, path.stem


def test_a_kernel_is_found_by_its_file_alone(monkeypatch, tmp_path):
    (tmp_path / "a_new_kernel.py").write_text(
        "from fastgrpo_kernels.aot import KernelSpec\n"
        "def aot_specs():\n"
        "    return [KernelSpec(None, {}, {}, archs=('sm_90',))]\n"
    )
    import fastgrpo_kernels

    monkeypatch.setattr(fastgrpo_kernels, "__path__", [*fastgrpo_kernels.__path__, str(tmp_path)])
    before = len(aot.collect("sm_90")), len(aot.collect("sm_80"))
    aot.kernel_modules.cache_clear()
    try:
        after = len(aot.collect("sm_90")), len(aot.collect("sm_80"))
    finally:
        aot.kernel_modules.cache_clear()
    assert after == (before[0] + 1, before[1])


@pytest.mark.parametrize("stem", aot.kernel_modules())
def test_kernels_compute_offsets_in_64_bits(stem):
    """The id along x, which grows with the tokens, is never multiplied in 32 bits."""
    spec = aot.collect("sm_90", (stem,))[0]
    ttir = aot.compile_spec(spec, "sm_90").asm["ttir"]
    ids = re.findall(r"(%\w+) = tt.get_program_id x", ttir)
    assert ids
    for name in ids:
        uses = [line for line in ttir.splitlines() if re.search(rf"{name}\b(?! = )", line)]
        assert uses and all(
            re.search("arith.(extsi.* to i64|divsi|remsi)", line) for line in uses
        ), uses


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_doctor_compiles_every_kernel(arch, capsys):
    doctor.main(["--compile", arch])
    assert " 0 with a problem" in capsys.readouterr().out
