"""What the mixtures of experts share."""


def tiny_experts(text: dict) -> dict:
    """A decoder's small config with four experts, two a token; fields given stay."""
    experts = dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return experts | text
