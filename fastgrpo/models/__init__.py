"""Which transformers models the engine serves, and how it reaches into them."""

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.families import FAMILIES, Family
