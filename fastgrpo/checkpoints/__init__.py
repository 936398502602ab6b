# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: written whole, checked before they are resumed."""

from fastgrpo.checkpoints.complete import fault_of, newest_complete
from fastgrpo.checkpoints.manifest import publish, write_manifest
