# SPDX-License-Identifier: Apache-2.0
"""A real transformers processor small enough for tests: a token per character, Qwen's images.

Nothing is downloaded, and the ids of the special tokens are those of the given model config, so any
tiny vision-language model can be trained through a real chat template and a real image processor.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PaddleOCRVLProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

CHARACTERS = "0123456789[](),.<>/?: \nabcdefghijklmnopqrstuvwxyzA+-"
PAD, EOS, START, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|unknown|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def tiny_tokenizer(
    config: PretrainedConfig, *, pad_is_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A character tokenizer with the vocabulary size and the special ids of `config`."""
    size = config.get_text_config().vocab_size
    named = {
        "<|vision_start|>": getattr(config, "vision_start_token_id", None),
        "<|vision_end|>": getattr(config, "vision_end_token_id", None),
        "<|image_pad|>": getattr(config, "image_token_id", None),
        "<|video_pad|>": getattr(config, "video_token_id", None),
    }
    vocabulary = {token: index for token, index in named.items() if index is not None}
    free = iter(sorted(set(range(size)) - set(vocabulary.values())))
    for token in (PAD, EOS, START, UNKNOWN, *CHARACTERS):
        vocabulary[token] = next(free)
    vocabulary |= {f"<|unused_{index}|>": index for index in free}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        unk_token=UNKNOWN,
        extra_special_tokens={
            f"{token[2:-2].replace('_pad', '')}_token": token
            for token in (START, *named)
            if token in vocabulary
        },
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tiny_processor(config: PretrainedConfig, *, pad_is_eos: bool = False) -> PaddleOCRVLProcessor:
    """Images and text for a tiny Qwen-VL model: its patch sizes and its special ids.

    PaddleOCRVLProcessor joins an image processor and a tokenizer as Qwen2_5_VLProcessor does,
    without the video half, which needs torchvision.
    """
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": side * side, "longest_edge": 64 * side * side},
    )
    return PaddleOCRVLProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(config, pad_is_eos=pad_is_eos),
        chat_template=CHAT_TEMPLATE,
    )
