# SPDX-License-Identifier: Apache-2.0
"""Attention over packed rows and over the images of a vision tower."""

from fastgrpo.attention.registry import BACKENDS, choose_backend, install, is_installed, uninstall
