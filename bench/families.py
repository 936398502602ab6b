# SPDX-License-Identifier: Apache-2.0
"""A model of each family for `bench_step.py --family`: one decoder width, each its own tower.

A prompt has about 480 image tokens, or as near as the family's fixed number an image allows (LLaVA:
its own 576); that of a text family has 1024 tokens. (Tokens alone bound a text family's ratio to a
padded forward by G (P + C) / (P + G C): 5.3 at 1024 tokens, 4.1 at 520.) The vocabulary is small,
as the head is a small part of a model of some billions of parameters.
"""

import torch

import fastgrpo as fg
from fastgrpo.models import families
from fastgrpo.testing import models as tm

GENERATIONS, LENGTHS = 8, (64, 96)
BESIDE_IMAGES, TEXT_TOKENS = 40, 1024  # tokens of text in a prompt with images, and in one without

_DECODER = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=2048,
)
_HYBRID = dict(
    head_dim=64,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
)
_GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=1024)
_EXPERTS = dict(moe_intermediate_size=176, shared_expert_intermediate_size=176)
_PATCHES = dict(depth=2, hidden_size=160, intermediate_size=440, num_heads=4, patch_size=14)
_TILES = dict(
    hidden_size=160,
    intermediate_size=440,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=14,
)
_QWEN3 = _PATCHES | dict(num_position_embeddings=2304)
_DEEPSTACK = dict(deepstack_visual_indexes=[0, 1])
_GRID = [(40, 48)]  # of patches, merged two by two

# family -> fields of the decoder, of the tower, of the whole, and the sizes of the images
SHAPES: dict[str, tuple[dict, dict, dict, list]] = {
    "gemma3": (_GEMMA, _TILES | {"image_size": 448}, {"mm_tokens_per_image": 256}, [None] * 2),
    "gemma3_text": (_GEMMA, {}, {}, []),
    "gemma4": (
        {"head_dim": 32, "global_head_dim": 64, "sliding_window": 512},
        dict(hidden_size=160, intermediate_size=440, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=40, patch_size=16, pooling_kernel_size=3),
        {},
        [(42, 54)] * 2,
    ),
    "gemma4_text": ({"head_dim": 32, "global_head_dim": 64, "sliding_window": 512}, {}, {}, []),
    "glm46v": ({"head_dim": 32}, _PATCHES | {"image_size": 672}, {}, _GRID),
    "glm4v": ({"head_dim": 32}, _PATCHES | {"image_size": 672}, {}, _GRID),
    "idefics3": ({}, _TILES | {"image_size": 364}, {"scale_factor": 2}, [None] * 3),
    "internvl": (
        {},
        _TILES | {"image_size": [448, 448], "patch_size": [14, 14]},
        {"image_seq_length": 256, "downsample_ratio": 0.5},
        [None] * 2,
    ),
    "llava": ({}, _TILES | {"image_size": 336}, {}, [None]),
    "llava_next": (
        {}, _TILES | {"image_size": 168}, {"image_grid_pinpoints": [[336, 168]]}, [(24, 12)]
    ),
    "llava_onevision": (
        {}, _TILES | {"image_size": 168}, {"image_grid_pinpoints": [[336, 168]]}, [(24, 12)]
    ),
    "minicpmv4_6": (_HYBRID, _TILES | {"image_size": 896}, {}, [(80, 96)]),
    "minicpmv4_7": (_HYBRID, _TILES | {"image_size": 896}, {}, [(80, 96)]),
    "mistral": ({"sliding_window": None}, {}, {}, []),
    "mistral3": ({}, _TILES | {"head_dim": 40, "image_size": 672}, {}, _GRID),
    "paligemma": ({"head_dim": 32}, _TILES | {"image_size": 224}, {}, [None] * 2),
    "qwen2_5_vl": (
        {}, _PATCHES | {"window_size": 112, "fullatt_block_indexes": [1]}, {}, _GRID
    ),
    "qwen2_vl": ({}, dict(depth=2, embed_dim=160, num_heads=4, patch_size=14), {}, _GRID),
    "qwen3_5": (_HYBRID, _QWEN3, {}, _GRID),
    "qwen3_5_moe": (_HYBRID | _EXPERTS, _QWEN3, {}, _GRID),
    "qwen3_5_moe_text": (_HYBRID | _EXPERTS, {}, {}, []),
    "qwen3_5_text": (_HYBRID, {}, {}, []),
    "qwen3_moe": (_EXPERTS, {}, {}, []),
    "qwen3_next": (_HYBRID | _EXPERTS, {}, {}, []),
    "qwen3_vl": ({}, _QWEN3 | _DEEPSTACK, {}, _GRID),
    "qwen3_vl_moe": (_EXPERTS, _QWEN3 | _DEEPSTACK, {}, _GRID),
    "smolvlm": ({}, _TILES | {"image_size": 448}, {"scale_factor": 4}, [None] * 8),
}  # fmt: skip


def build(name: str, *, small: bool = False) -> tuple[torch.nn.Module, fg.Group, fg.Group]:
    """The model in float32, one group of `GENERATIONS` completions, and a little one to warm up;
    `small`: of the sizes of tests, to see that it runs."""
    text, vision, top, images = SHAPES.get(name, ({}, {}, {}, []))
    little = [([(6, 6)] if images else [], 5, [3, 8, 4])]
    if small:
        model = tm.tiny_model(name).train()
        return model, *tm.synthetic_groups(model, little * 2)
    model = tm.tiny_model(name, text=_DECODER | text, vision=vision, **top).train()
    low, high = LENGTHS
    lengths = torch.linspace(low, high, GENERATIONS).long().tolist()
    tokens = BESIDE_IMAGES if images else TEXT_TOKENS
    generator = torch.Generator().manual_seed(0)
    group = tm.synthetic_group(model, images, tokens, lengths, generator=generator)
    return model, group, *tm.synthetic_groups(model, little)


def image_tokens(model: torch.nn.Module, group: fg.Group) -> int:
    family = families()[model.config.model_type]
    if not group.vision:
        return 0
    return sum(family.image_tokens(i, model.config) for i in family.split_images(group.vision))
