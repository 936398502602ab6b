# SPDX-License-Identifier: Apache-2.0
"""Package metadata is in pyproject.toml; this file builds the compiled kernels, which are optional.

`fastgrpo_kernels._C` holds the C++ kernels (CPU), `libfastgrpo_cuda.so` the CUDA kernels. Both are
compiled by ninja, each on its own. What is missing or fails does not stop the installation:
`_build_info.json` in the package says why, and `fastgrpo doctor` prints it.

Environment: CXX, the C++ compiler. FASTGRPO_BUILD_CPP=0 leaves the C++ part out.
FASTGRPO_BUILD_CUDA=1 or 0 builds the CUDA part or leaves it out; unset, it is built when nvcc is
found and the installed PyTorch has CUDA (which an isolated build cannot see: use
`pip install --no-build-isolation`). FASTGRPO_CUDA_ARCHS, by default "80,90a,100".
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPP_SOURCES = ["csrc/binding.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))
# No fused multiply-add in the box kernels: their values equal PyTorch's bit for bit. No flag asks
# for the builder's own processor; the kernels choose among instruction sets when they run.
CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -Wno-psabi -pthread"
)
CONTRACT = {"csrc/cpu/offset_exp.cpp": "fast", "csrc/cpu/linear_kl.cpp": "fast"}


class Unavailable(Exception):
    """Why a part cannot be built here."""


def need(tool: str | None, reason: str) -> str:
    if tool is None:
        raise Unavailable(reason)
    return tool


def find_ninja() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    return need(found, "ninja was not found")


def find_cxx() -> str:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    found = next((c for c in candidates if shutil.which(c.split()[0])), None)
    return need(found, f"no C++ compiler: tried {', '.join(candidates)}")


def find_nvcc() -> str:
    switch = os.environ.get("FASTGRPO_BUILD_CUDA")
    if switch == "0":
        raise Unavailable("FASTGRPO_BUILD_CUDA=0")
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    path = os.pathsep.join([f"{h}/bin" for h in [*homes, "/usr/local/cuda"]])
    nvcc = need(shutil.which("nvcc", path=path) or shutil.which("nvcc"), "nvcc was not found")
    if switch != "1" and not torch_has_cuda():
        raise Unavailable(
            "no PyTorch with CUDA was seen while building (FASTGRPO_BUILD_CUDA=1 forces it)"
        )
    return nvcc


def torch_has_cuda() -> bool:
    try:
        from torch.version import cuda
    except ImportError:
        return False
    return cuda is not None


def cpp_rules(output: Path) -> str:
    if os.environ.get("FASTGRPO_BUILD_CPP") == "0":
        raise Unavailable("FASTGRPO_BUILD_CPP=0")
    try:
        import pybind11
    except ImportError as error:
        raise Unavailable("pybind11 was not found") from error
    cxx = find_cxx()
    include = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    link = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,-s"
    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {CXX_FLAGS} -ffp-contract=$contract {include} "
        "-c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        "rule link",
        f"  command = {cxx} {link} -pthread $in -o $out",
    ]
    for source in CPP_SOURCES:
        lines.append(f"build {Path(source).stem}.o: cxx {escape(ROOT / source)}")
        lines.append(f"  contract = {CONTRACT.get(source, 'off')}")
    objects = " ".join(f"{Path(source).stem}.o" for source in CPP_SOURCES)
    lines.append(f"build {escape(output)}: link {objects}\n")
    return "\n".join(lines)


def cuda_rules(output: Path) -> str:
    nvcc = find_nvcc()
    archs = os.environ.get("FASTGRPO_CUDA_ARCHS", "80,90a,100").split(",")
    code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    code += f" -gencode arch=compute_{archs[0]},code=compute_{archs[0]}"  # PTX for other GPUs
    flags = "-O3 -std=c++17 -fmad=false --threads 2 -Xcompiler -fPIC,-fvisibility=hidden"
    sources = " ".join(escape(ROOT / source) for source in CUDA_SOURCES)
    headers = " ".join(escape(ROOT / header) for header in HEADERS)
    return (
        f"rule nvcc\n  command = {nvcc} {flags} {code} -shared $in -o $out\n"
        f"build {escape(output)}: nvcc {sources} | {headers}\n"
    )


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(folder: Path, rules: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(rules)
    done = subprocess.run(
        [find_ninja(), "-C", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Unavailable("the build failed:\n" + done.stdout[-2000:])


class BuildKernels(build_ext):
    """Builds each part by ninja, or records why not."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.products = [output, output.parent / "libfastgrpo_cuda.so"]
        info = {}
        for part, rules, product in zip(
            ("cpp", "cuda"), (cpp_rules, cuda_rules), self.products, strict=True
        ):
            product.unlink(missing_ok=True)
            try:
                run_ninja(Path(self.build_temp).resolve() / part, rules(product))
                info[part] = {"built": True, "reason": None}
            except Unavailable as error:
                info[part] = {"built": False, "reason": str(error)}
                print(f"fastgrpo: no {part} kernels: {error}", file=sys.stderr)
        self.products.append(output.parent / "_build_info.json")
        self.products[-1].write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """An editable installation imports from the source tree."""
        package = self.get_finalized_command("build_py").get_package_dir("fastgrpo_kernels")
        for product in self.products:
            target = Path(package) / product.name
            target.unlink(missing_ok=True)  # never write into a library that a process has mapped
            if product.exists():
                shutil.copy2(product, target)


setup(
    ext_modules=[
        Extension(
            "fastgrpo_kernels._C",
            CPP_SOURCES,
            depends=[*HEADERS, *CUDA_SOURCES],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
