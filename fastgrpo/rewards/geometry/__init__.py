"""Overlap and matching of boxes, and the frames their coordinates are given in."""
