# SPDX-License-Identifier: Apache-2.0
"""An image processor and a tokenizer joined, for families whose own processor needs torchvision."""

from __future__ import annotations

from collections.abc import Callable


def joined_processor(
    image_processor, tokenizer, image_token: str, written: Callable[[dict, int], str], **options
):
    """A processor of transformers that writes `written(image inputs, i)` for the i-th
    `image_token` of a text; `options`: `chat_template`, and `types`, whether it tells tokens of
    images from text."""
    from transformers import ProcessorMixin
    from transformers.processing_utils import ProcessingKwargs

    types = options.pop("types", False)

    class Defaults(ProcessingKwargs, total=False):
        _defaults = {"text_kwargs": {"return_mm_token_type_ids": types}}

    class Joined(ProcessorMixin):
        valid_processor_kwargs = Defaults
        unused_input_names = ["num_soft_tokens_per_image", "grids", "num_patches_per_image"]

        def __init__(self, image_processor, tokenizer, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)
            self.image_token = image_token
            self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

        def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
            return written(image_inputs, image_idx)

    return Joined(image_processor, tokenizer, **options)
