# SPDX-License-Identifier: Apache-2.0
"""Llama: text, one position per token."""

from fastgrpo.models.family import Family

FAMILIES = (Family("llama"),)
