# SPDX-License-Identifier: Apache-2.0
"""The errors users see."""

import importlib.util
import sys


class InputError(ValueError):
    """An argument, row or sample is not what the function documents.

    The message names the argument (and the row or sample where there is one), what was expected
    and what came.
    """


class MissingPackage(ModuleNotFoundError):
    """A part of fastgrpo needs packages that are not installed; the message names their extra."""


def require(part: str, extra: str, *modules: str) -> None:
    """Raises `MissingPackage`, one line, unless all of `modules` can be imported.

    part: who asks, as the user knows it. extra: the extra of this package that installs them.
    """
    missing = [module for module in modules if not _installed(module)]
    if missing:
        raise MissingPackage(
            f'{part} needs {", ".join(missing)}: pip install "fastgrpo[{extra}]"', name=missing[0]
        )


def _installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
