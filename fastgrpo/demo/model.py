# SPDX-License-Identifier: Apache-2.0
"""The demo's policy: the Qwen2.5-VL architecture with about a million parameters, and its
processor.

The tokenizer knows the digits' vocabulary and nothing else: one token per integer up to
MAX_INTEGER, so a coordinate is one decision of the policy, the tags of a completion, and the words
of the questions.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from fastgrpo.demo import data

MAX_INTEGER = data.CELL * data.MAX_CELLS
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unknown|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PUNCTUATION = ("[", "]", ",", "?")
CELLS = tuple(
    f" {data.cell_name(row, column)}"
    for row in range(data.MAX_CELLS)
    for column in range(data.MAX_CELLS)
)
# Qwen's turn markers without their newlines, which would only be more tokens to predict.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose decoding gives back the text it encoded, character for
    character.
    """
    words = {"user", "assistant"}
    for question in data.QUESTIONS:
        words |= {f"{word} " for word in question.split() if word.isalpha()}
    integers = [str(value) for value in range(MAX_INTEGER + 1)]
    tokens = [*SPECIAL, *TAGS, *PUNCTUATION, *sorted(words), *CELLS, *integers]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|unknown|>")
    )
    pieces = Regex(r"</?think>|</?answer>| [A-D]\d|\d+|[A-Za-z]+ ?|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unknown|>",
        extra_special_tokens={
            "im_start_token": "<|im_start|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_processor() -> PaddleOCRVLProcessor:
    """Qwen2.5-VL's image processor and our tokenizer; blank paper is exactly zero to the vision
    tower.

    PaddleOCRVLProcessor joins the two as Qwen2_5_VLProcessor does, without the latter's video half,
    which needs torchvision.
    """
    image_processor = Qwen2VLImageProcessorPil(image_mean=[1.0] * 3, image_std=[0.5] * 3)
    return PaddleOCRVLProcessor(
        image_processor=image_processor, tokenizer=build_tokenizer(), chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The policy with fresh weights from torch's global generator."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5.0,
                "mrope_section": [4, 6, 6],
            },
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=96,
            intermediate_size=192,
            num_heads=3,
            out_hidden_size=128,
            patch_size=14,
            window_size=112,
            fullatt_block_indexes=[1],
        ),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)
