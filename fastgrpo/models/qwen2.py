# SPDX-License-Identifier: Apache-2.0
"""Qwen2: text, one position per token."""

from fastgrpo.models.family import Family

FAMILIES = (Family("qwen2"),)
