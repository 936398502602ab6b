# SPDX-License-Identifier: Apache-2.0
"""One file per published system, and `<system>_upstream` with its published behaviour beside it.

Every module of this folder is imported here; each registers its rewards.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
