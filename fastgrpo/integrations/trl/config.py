# SPDX-License-Identifier: Apache-2.0
"""TRL's settings under the names that the installed transformers has for them."""

from __future__ import annotations

from trl import GRPOConfig

_RENAMED = {  # in transformers 5.24; TRL sets the old ones by default
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class RenamedConfig(GRPOConfig):
    """GRPOConfig that takes old and new names alike and uses no deprecated one."""

    def __post_init__(self):
        for old, new in _RENAMED.items():
            if getattr(self, new, "absent") is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
