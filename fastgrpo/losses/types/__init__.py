# SPDX-License-Identifier: Apache-2.0
"""One file per kind of loss. Importing this package finds them all.

Adding a loss type is one file here, or in any module that is imported, and its test. Formulas
and sources of those below: `fastgrpo.Objective`.
"""

import importlib
import pkgutil

from fastgrpo.losses.loss_type import LOSS_TYPES as LOSS_TYPES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
