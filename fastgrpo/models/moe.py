# SPDX-License-Identifier: Apache-2.0
"""What the mixtures of experts share."""

from torch import nn

from fastgrpo.models.family import Family


class Experts(Family):
    """Layers with routed experts, which see one token at a time: packing changes nothing for them,
    and only the load-balancing loss asks how often a token was seen."""

    def routers(self, core: nn.Module) -> list[nn.Module]:
        return [m for m in core.modules() if type(m).__name__.endswith("TopKRouter")]

    def tiny_experts(self, text: dict) -> dict:
        """A decoder's small config with four experts, two a token; fields given stay."""
        experts = dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
        return experts | text
