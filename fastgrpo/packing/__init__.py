# SPDX-License-Identifier: Apache-2.0
"""Packing: many groups in one row, each prompt and its images once."""

from fastgrpo.packing.group import Group
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.packing.planner import Part, plan_rows, regroup
from fastgrpo.packing.row import PackedRow
from fastgrpo.packing.vision import FeatureStore, Images
