"""What `import fastgrpo` costs and needs."""

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    ).stdout


def test_import_needs_no_optional_library():
    blocked = [
        "triton",
        "trl",
        "flash_attn",
        "xformers",
        "liger_kernel",
        "peft",
        "sklearn",
        "matplotlib",
    ]
    code = f"import sys\nfor m in {blocked}: sys.modules[m] = None\nimport fastgrpo"
    run(code)
