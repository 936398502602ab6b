# SPDX-License-Identifier: Apache-2.0
"""The compiled parts are optional, and what was built is on record."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastgrpo_kernels
import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def build(folder: Path, prepare: str = "", **environment) -> tuple[dict, Path]:
    """Run `setup.py build_ext` into `folder` after `prepare`: the record and the package."""
    script = (
        f"import sys, shutil; {prepare}\n"
        f"sys.argv = ['setup.py', 'build_ext', '-b', {str(folder / 'lib')!r}, "
        f"'-t', {str(folder / 'tmp')!r}]\n"
        "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "FASTGRPO_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    package = folder / "lib" / "fastgrpo_kernels"
    return json.loads((package / "_build_info.json").read_text()), package


@pytest.mark.parametrize(
    ("prepare", "environment", "reason"),
    [
        ("", {"CXX": "no-such-compiler"}, "no C++ compiler: tried no-such-compiler"),
        ("", {"CXX": "false"}, "the build failed"),
        ("sys.modules['pybind11'] = None", {}, "pybind11 was not found"),
        ("shutil.which = lambda tool, path=None: None", {"CXX": "g++"}, "no C++ compiler"),
        (
            "find = shutil.which; "
            "shutil.which = lambda tool, path=None: None if tool == 'ninja' else find(tool)",
            {"CXX": "true"},
            "ninja was not found",
        ),
        ("", {"FASTGRPO_BUILD_CPP": "0"}, "FASTGRPO_BUILD_CPP=0"),
    ],
)
def test_package_builds_without_the_extension_and_says_why(tmp_path, prepare, environment, reason):
    info, package = build(tmp_path, prepare, **environment)
    assert info["cpp"]["built"] is False and reason in info["cpp"]["reason"]
    assert info["cuda"] == {"built": False, "reason": "FASTGRPO_BUILD_CUDA=0"}
    assert not list(package.glob("*.so"))


@pytest.mark.skipif(CXX is None, reason="no g++")
def test_this_environment_has_the_extension():
    info = fastgrpo_kernels.build_info()["cpp"]
    assert info == {"built": True, "reason": None}
    from fastgrpo_kernels import _C

    assert {"offset_exp", "pairwise_box_iou", "match_boxes", "average_precision"} <= set(dir(_C))


def test_ops_work_without_the_extension():
    code = (
        "import sys, torch\n"
        "sys.modules['fastgrpo_kernels._C'] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: "
        "None if name == 'fastgrpo_kernels._C' else find(name, package)\n"
        "import fastgrpo as fg\n"
        "boxes = torch.tensor([[0, 0, 4, 4], [2, 2, 6, 6]])\n"
        "values, offsets = fg.pairwise_box_iou(boxes, boxes, [2], [2])\n"
        "assert fg.match_boxes(values, offsets, [2], [2]).tolist() == [0, 1]\n"
        "ap = fg.average_precision(boxes, [0, 0], None, boxes, [0, 0], [2], [2])\n"
        "assert abs(ap.item() - 1) < 1e-12\n"
        "try:\n"
        "    fg.match_boxes(values, offsets, [2], [2], impl='cpp')\n"
        "except fg.InputError as error:\n"
        "    assert 'was not built' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('impl=cpp was served')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.skipif(CXX is None, reason="no g++")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_lanes_agree_with_serial_and_never_race(tmp_path, sanitizer):
    """The CUDA algorithms with one host thread per lane, under a sanitizer: see the source."""
    program = tmp_path / "lanes"
    source = ROOT / "tests" / "csrc" / "lanes_on_threads.cpp"
    flags = ["-O1", "-g", "-std=c++17", "-fopenmp-simd", "-pthread", f"-I{ROOT / 'csrc'}"]
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [CXX, *flags, *sanitize, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("g++ came without this sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@pytest.mark.parametrize("archs", ["90a", pytest.param("80,90a,100", marks=pytest.mark.slow)])
def test_cuda_sources_compile_for_the_architectures_asked_for(tmp_path, archs):
    info, package = build(
        tmp_path, FASTGRPO_BUILD_CPP="0", FASTGRPO_BUILD_CUDA="1", FASTGRPO_CUDA_ARCHS=archs
    )
    assert info["cuda"] == {"built": True, "reason": None}
    binary = (package / "libfastgrpo_cuda.so").read_bytes()
    for arch in archs.split(","):
        assert f"sm_{arch}".encode() in binary
    code = (
        "from pathlib import Path\n"
        "from fastgrpo_kernels import _cuda\n"
        f"_cuda._LIBRARY = Path({str(package / 'libfastgrpo_cuda.so')!r})\n"
        "import torch\n"
        "start, gt_start = torch.tensor([0, 3, 5]), torch.tensor([0, 2, 2])\n"
        "space = _cuda.ap_space(start, gt_start, 10, 100)\n"
        "assert space[0] == 0 and (space % 8 == 0).all() and (space.diff() > 0).all()\n"
        "status = _cuda.library().fastgrpo_match_boxes("
        "None, 1, *[None] * 4, 1, 0, 0.0, 5, 5, None, None, 99, None)\n"
        "try:\n"
        "    _cuda.check(status)\n"  # there is no device 99, whatever the machine
        "except RuntimeError as error:\n"
        "    assert 'CUDA kernel: ' in str(error)\n"
        "else:\n"
        "    raise SystemExit('a launch on device 99 went well')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
