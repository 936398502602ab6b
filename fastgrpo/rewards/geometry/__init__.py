# SPDX-License-Identifier: Apache-2.0
"""Overlap and matching of boxes, and the frames their coordinates are given in."""
