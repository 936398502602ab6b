# SPDX-License-Identifier: Apache-2.0
"""Which trl the trainer is for; asked before anything of it is imported."""

from importlib.metadata import version

from packaging.version import Version

from fastgrpo.errors import MissingPackage

TESTED_TRL = "1.16"


def check_not_older() -> None:
    """`MissingPackage` with a trl below the tested one, which lacks what the trainer calls."""
    installed = version("trl")
    if Version(installed).release[:2] < Version(TESTED_TRL).release:
        raise MissingPackage(
            f"fastgrpo.integrations.trl needs trl {TESTED_TRL}, {installed} is installed: pip "
            f'install "trl=={TESTED_TRL}.*". ms-swift\'s trainers need trl below 1.0 and are not '
            "served; fg.GRPOStep needs no trl",
            name="trl",
        )
