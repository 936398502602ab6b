# SPDX-License-Identifier: Apache-2.0
"""The `fastgrpo` command; each of its commands is a module here."""

from __future__ import annotations

import importlib
import sys

from fastgrpo.errors import InputError, MissingPackage

COMMANDS = {
    "init": "write a folder with a commented config, two rows and a reward, ready to train",
    "check": "what a run would do: data, memory, batch, rewards, before any weight is loaded",
    "train": "train a vision-language model with GRPO from a config file",
    "eval": "accuracy or mAP of a checkpoint, or of a folder of them, on rows with solutions",
    "doctor": "what is installed, which implementation each op uses and why",
    "bench": "run the benchmarks of a source checkout",
    "report": "write the report of a training run",
}

# Package -> the extra of ours that installs it.
EXTRAS = {
    **dict.fromkeys(("PIL", "json_repair", "math_verify", "orjson", "rapidfuzz", "re2"), "rewards"),
    **dict.fromkeys(("trl", "datasets", "peft", "accelerate"), "trl"),
    **dict.fromkeys(("matplotlib", "pyarrow"), "report"),
    "httpx2": "judge",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs `fastgrpo COMMAND ...`; a command's own modules are imported only when it runs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments == ["--version"]:
        from fastgrpo import __version__

        print(f"fastgrpo {__version__}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise SystemExit(f"fastgrpo: unknown command {command!r}\n\n{_usage()}")
    try:
        importlib.import_module(f"fastgrpo.cli.{command}").main(rest)
    except InputError as error:
        raise SystemExit(f"fastgrpo {command}: {error}") from error
    except MissingPackage as error:
        raise SystemExit(str(error)) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise SystemExit(
            f"fastgrpo {command}: needs {package}: pip install 'fastgrpo[{EXTRAS[package]}]'"
        ) from error


def _usage() -> str:
    lines = [f"  {name:<8}{text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: fastgrpo COMMAND [options]", "       fastgrpo --version", "", *lines])
