# SPDX-License-Identifier: Apache-2.0
"""Mistral: text, with a sliding window where the config has one."""

from fastgrpo.models.family import Family

FAMILIES = (Family("mistral"),)
