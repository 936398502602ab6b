# SPDX-License-Identifier: Apache-2.0
"""Which transformers models the engine serves, and how it reaches into them.

A module of this folder with a tuple `FAMILIES` of `Family` objects serves those model types.
"""

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.family import Coordinates, Family
from fastgrpo.models.registry import families, family_of
