# SPDX-License-Identifier: Apache-2.0
"""What importing fastgrpo needs, starts and hides; what its code never calls."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgrpo.ops.select import ORDER

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = "triton trl flash_attn xformers liger_kernel peft sklearn matplotlib datasets httpx2"
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "marshal.loads"}


def run(code: str, cwd: Path | str = "/") -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_no_optional_library():
    run(f"import sys\nfor m in {OPTIONAL.split()}: sys.modules[m] = None\nimport fastgrpo")


def test_import_starts_nothing_and_brings_the_public_names():
    names = (
        "linear_logprob Objective grpo_loss linear_grpo_loss token_kl linear_kl group_advantages "
        "box_iou pairwise_box_iou match_boxes average_precision Group score GRPOStep generate "
        "rewards InputError"
    )
    run(
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import fastgrpo, fastgrpo_kernels, torch\n"
        "assert dict(os.environ) == before\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = 'transformers.models trl peft datasets matplotlib sklearn triton'.split()\n"
        "loaded = [m for m in heavy if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not [m for m in sys.modules if m.endswith('._C') and 'fastgrpo' in m]\n"
        f"for n in '{names}'.split(): assert hasattr(fastgrpo, n), n\n"
    )


def test_transformers_imports_from_the_checkout():
    """The folder kernels/ must not hide Hugging Face's package of that name, installed or absent:
    a child process goes on without it."""
    run(
        "import os, sys\n"
        "import torch\n"
        "sys.path.insert(0, '')\n"
        "child = os.fork()\n"
        "if not child: sys.modules['kernels'] = None\n"
        "from transformers import LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration\n"
        "import transformers.models.llama.modeling_llama\n"
        "if child:\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, 'kernels absent'\n"
        "    import kernels\n"
        "    assert getattr(kernels, '__file__', None), kernels\n",
        cwd=ROOT,
    )


def test_no_package_hides_another():
    for folder in ("kernels", "tests", "bench", "csrc"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return f"{node.func.value.id}.{node.func.attr}"
    return ""


@pytest.mark.parametrize("folder", ["fastgrpo", "kernels", "bench"])
def test_no_code_evaluates_or_unpickles_text(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            assert called(node) not in FORBIDDEN, f"{path}:{node.lineno}"
            if called(node) == "torch.load":
                safe = [k for k in node.keywords if k.arg == "weights_only"]
                assert safe and safe[0].value.value is True, f"{path}:{node.lineno}"


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The dotted names a file imports anywhere in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            if node.module == "fastgrpo":
                yield from ((f"fastgrpo.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def layers() -> list[list[str]]:
    """The table of CONTRIBUTING.md, lowest first: the parts of `fastgrpo` in each line."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = re.search(r"```\nbench, tests\n(.*?)```", text, re.S).group(1)
    lines = (re.findall(r"fastgrpo\.(\w+)", line.split("  ")[0]) for line in table.splitlines())
    return [line for line in lines if line][::-1]


def test_imports_point_down_the_table_of_contributing():
    rank = {part: i for i, line in enumerate(layers()) for part in line}
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        part = path.relative_to(ROOT / "fastgrpo").with_suffix("").parts[0]
        if part == "__init__":
            continue
        assert part in rank, f"fastgrpo.{part} stands in no line of CONTRIBUTING.md"
        for name, line in imports(path):
            if name.split(".")[0] != "fastgrpo":
                continue
            # what the package itself exports reaches up to the rollout
            other = name.split(".")[1] if "." in name else "rollout"
            other = other if other in rank else "rollout"
            assert other == part or rank[other] < rank[part], f"{path}:{line}: {part} -> {name}"


def test_only_the_integrations_and_what_runs_jobs_import_trl():
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        part = path.relative_to(ROOT / "fastgrpo").parts[0]
        if part not in ("cli", "integrations", "demo", "testing"):
            assert not any(name.split(".")[0] == "trl" for name, _ in imports(path)), path


def test_references_import_torch_alone():
    own = ("fastgrpo.reference", "fastgrpo.losses")
    for path in (ROOT / "fastgrpo" / "reference").rglob("*.py"):
        for name, line in imports(path):
            top = name.split(".")[0]
            known = top in ("torch", "scipy", "numpy") or top in sys.stdlib_module_names
            assert known or name.startswith(own), f"{path}:{line}: {name}"


def test_only_the_op_that_chooses_it_imports_a_reference():
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        part = path.relative_to(ROOT / "fastgrpo").parts[0]
        found = [line for name, line in imports(path) if name.startswith("fastgrpo.reference")]
        if not found or part == "reference":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert part == "ops" and functions & set(ORDER), f"{path}:{found[0]}"


def test_kernels_import_nothing_of_the_library():
    for path in (ROOT / "kernels").rglob("*.py"):
        for name, line in imports(path):
            assert name.split(".")[0] != "fastgrpo", f"{path}:{line}: {name}"
