"""What importing fastgrpo needs, starts and hides; what its code never calls."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = "triton trl flash_attn xformers liger_kernel peft sklearn matplotlib datasets httpx2"
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "marshal.loads"}


def run(code: str, cwd: Path | str = "/") -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_no_optional_library():
    run(f"import sys\nfor m in {OPTIONAL.split()}: sys.modules[m] = None\nimport fastgrpo")


def test_import_starts_nothing():
    run(
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import fastgrpo, torch\n"
        "assert dict(os.environ) == before\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = 'transformers.models trl peft datasets matplotlib sklearn triton'.split()\n"
        "loaded = [m for m in heavy if m in sys.modules]\n"
        "assert not loaded, loaded\n"
    )


@pytest.mark.parametrize("kernels", ["installed", "absent"])
def test_transformers_imports_from_the_checkout(kernels):
    """The folder kernels/ must not hide Hugging Face's package of that name."""
    code = (
        "import sys\nsys.path.insert(0, '')\n"
        + ("sys.modules['kernels'] = None\n" if kernels == "absent" else "")
        + "from transformers import LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration\n"
        + "import transformers.models.llama.modeling_llama as m\n"
        + (
            "import kernels; assert getattr(kernels, '__file__', None), kernels\n"
            if kernels == "installed"
            else ""
        )
    )
    run(code, cwd=ROOT)


def test_public_names_are_those_of_the_contract():
    names = (
        "linear_logprob Objective grpo_loss linear_grpo_loss token_kl linear_kl group_advantages "
        "box_iou pairwise_box_iou match_boxes average_precision Group score GRPOStep generate "
        "rewards InputError"
    )
    run(f"import fastgrpo as fg\nfor n in '{names}'.split(): assert hasattr(fg, n), n")


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


def test_layers_import_downwards():
    """Only command line and integrations import trl; references import torch and scipy."""
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        part = path.relative_to(ROOT / "fastgrpo").parts[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top == "trl":
                    assert part in ("cli", "integrations", "demo", "testing"), path
                if part == "reference":
                    own = name.startswith(("fastgrpo.reference", "fastgrpo.losses")) or top in (
                        "torch",
                        "scipy",
                        "numpy",
                    )
                    assert own or top in sys.stdlib_module_names, f"{path}: {name}"
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "from fastgrpo." not in path.read_text("utf-8"), path
