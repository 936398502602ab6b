"""Packing: many groups in one row, each prompt and its images once."""

from fastgrpo.packing.group import Group
