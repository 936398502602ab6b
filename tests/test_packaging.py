# SPDX-License-Identifier: Apache-2.0
"""What an installation brings: extras, one version, types, licence lines, a changelog."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import fastgrpo_kernels
import pytest

import fastgrpo
from fastgrpo.cli import EXTRAS as EXTRA_OF
from fastgrpo.cli import main
from fastgrpo.errors import MissingPackage, require

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Everything an extra may bring is hidden; httpx2 comes with transformers.
HIDDEN = (
    "PIL accelerate datasets flash_attn json_repair latex2sympy2_extended lap liger_kernel "
    "math_verify matplotlib msgspec orjson peft pyarrow pycocotools rapidfuzz re2 scipy sklearn "
    "trl vllm xformers"
)
WITHOUT_EXTRAS = f"""
import importlib, json, pkgutil
from importlib.machinery import PathFinder

HIDDEN = set("{HIDDEN}".split())


installed = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *given: None if name.split(".")[0] in HIDDEN else installed(name, *given)
)
import torch
import fastgrpo as fg
import fastgrpo_kernels

CORE = "attention engine losses models objective ops packing recurrence reference rollout".split()
for part in CORE:
    module = importlib.import_module(f"fastgrpo.{{part}}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"fastgrpo.{{part}}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
for found in pkgutil.iter_modules(fastgrpo_kernels.__path__, "fastgrpo_kernels."):
    importlib.import_module(found.name)

hidden = torch.randn(6, 8, requires_grad=True)
ids = torch.tensor([0, 0, 0, 1, 1, 1])
result = fg.linear_grpo_loss(
    hidden, torch.randn(11, 8), ids, fg.group_advantages(torch.tensor([0.0, 1.0]), 2),
    fg.Objective(), seq_ids=ids,
)
result.loss.backward()
assert hidden.grad.abs().sum() > 0

said = {{}}
for name in "rewards judges data images report recipes integrations.trl".split():
    try:
        importlib.import_module(f"fastgrpo.{{name}}")
    except ImportError as error:
        said[name.replace("report", "fastgrpo.report")] = str(error)
from fastgrpo.cli import main
for command in "init check train eval report".split():
    try:
        main([command, "x"])
    except SystemExit as error:
        said[command] = str(error.code)
print(json.dumps(said))
"""


def test_kernels_ops_and_engine_need_no_extra_and_the_rest_names_its_own():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert all("\n" not in text for text in said.values()), said
    extra = {
        name: (re.findall(r"fastgrpo\[(\w+)\]", text) or [text])[0] for name, text in said.items()
    }
    assert extra == {
        **{"rewards": "rewards", "judges": "rewards", "images": "rewards", "recipes": "rewards"},
        **{"data": "trl", "integrations.trl": "trl", "fastgrpo.report": "report"},
        **{"init": "rewards", "check": "trl", "train": "trl", "eval": "trl", "report": "report"},
    }


def needs(extra: str) -> set[str]:
    """The distributions that an extra of the package brings, its own extras followed."""
    found = set()
    for text in EXTRAS[extra]:
        name, own = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", text).groups()
        if name == PROJECT["name"]:
            for part in own.split(","):
                found |= needs(part)
        else:
            found.add(name.lower().replace("_", "-"))
    return found


def literals(node: ast.Call) -> list[str]:
    return [leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)]


def requirements() -> list[tuple[str, list[str]]]:
    """(extra, modules) of every `require` in the source, and of the commands' table."""
    found = []
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                texts = literals(node)
                if len(texts) >= 3:
                    found.append((texts[1], texts[2:]))
    return found + [(extra, [module]) for module, extra in EXTRA_OF.items()]


def test_what_is_required_is_what_the_named_extra_brings():
    owners, checked = packages_distributions(), 0
    for extra, modules in requirements():
        for module in modules:
            brought = {name.lower().replace("_", "-") for name in owners[module]}
            assert brought & needs(extra), f"{module} is not among {sorted(needs(extra))}"
            checked += 1
    assert checked > 10


def test_require_says_all_that_is_missing_in_one_line():
    require("a part", "rewards", "json", "torch")
    with pytest.raises(MissingPackage) as caught:
        require("a part", "rewards", "json", "no_such_a", "no_such_b")
    assert str(caught.value) == (
        'a part needs no_such_a, no_such_b: pip install "fastgrpo[rewards]"'
    )


def test_dependencies_of_the_package_alone():
    names = {re.match(r"[\w-]+", text)[0] for text in PROJECT["dependencies"]}
    assert names == {"torch", "transformers", "numpy", "triton"}
    assert needs("rewards") | needs("report") <= needs("trl") <= needs("vllm")


def test_there_is_one_version(capsys):
    assert fastgrpo.__version__ is fastgrpo_kernels.__version__
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    main(["--version"])
    assert capsys.readouterr().out == f"fastgrpo {fastgrpo.__version__}\n"
    changes = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([\w.]+)\]", changes, re.M)
    assert versions[0] == "Unreleased" and fastgrpo.__version__ in versions
    assert set(re.findall(r"^### (\w+)", changes, re.M)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }


def test_both_packages_are_typed_and_every_public_signature_whole():
    for package in (fastgrpo, fastgrpo_kernels):
        assert Path(package.__path__[0], "py.typed").exists()
    public = {name: value for name, value in vars(fastgrpo).items() if not name.startswith("_")}
    called = {n: v for n, v in public.items() if inspect.isfunction(v)}
    for name, value in public.items():
        if inspect.isclass(value) and not issubclass(value, Exception):
            called |= {f"{name}.{n}": v for n, v in vars(value).items() if public_method(n, v)}
    assert len(called) > 15
    for name, function in called.items():
        signature = inspect.signature(function)
        for parameter in list(signature.parameters.values())["." in name :]:
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"
        assert signature.return_annotation is not inspect.Signature.empty, name


def public_method(name: str, value: object) -> bool:
    """Methods written here; `eval` of dataclasses' own has no annotations to check."""
    written = inspect.isfunction(value) and value.__code__.co_filename.endswith(".py")
    return written and (not name.startswith("_") or name in ("__init__", "__call__"))


@pytest.mark.parametrize("pattern", ["csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "bench/*.sh"])
def test_sources_that_ruff_does_not_read_say_their_licence(pattern):
    paths = list(ROOT.glob(pattern))
    assert paths
    for path in (*paths, ROOT / "Makefile", ROOT / ".ci" / "run"):
        assert "SPDX-License-Identifier: Apache-2.0" in path.read_text()[:200], path
