# SPDX-License-Identifier: Apache-2.0
"""Real transformers processors small enough for tests: a token per character, the family's images.

Nothing is downloaded, and the ids of the special tokens are those of the given model config, so any
tiny vision-language model can be trained through a real chat template and a real image processor.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin, processing_utils
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fastgrpo.models.family import Family
from fastgrpo.models.registry import families

CHARACTERS = "0123456789[](),.<>/?: \nabcdefghijklmnopqrstuvwxyzA+-"
PAD, EOS, START, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|unknown|>"

if Version(transformers.__version__) < Version("5.23"):
    # It reads no saved image processor without torchvision, PIL's neither, which do not use it.
    processing_utils.transformers_module.AutoImageProcessor = AutoImageProcessor


def _family(config: PretrainedConfig) -> Family:
    """The config's family, or one of text for a model that is none of ours."""
    return families().get(config.model_type) or Family(config.model_type)


def chat_template(config: PretrainedConfig) -> str:
    """Roles and turns as ChatML writes them, with what the family writes for an image."""
    image = _family(config).tiny_image_text
    return (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
        "{%- if message.content is string -%}{{ message.content }}"
        "{%- else -%}{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{image}"
        "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )


def tiny_tokenizer(
    config: PretrainedConfig, *, pad_is_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A character tokenizer with the vocabulary size and the special ids of `config`."""
    size = config.get_text_config().vocab_size
    special = _family(config).tiny_tokens(config)
    vocabulary = {text: index for text, index in special.values() if index is not None}
    free = iter(sorted(set(range(size)) - set(vocabulary.values())))
    unplaced = [text for text, index in special.values() if index is None]
    for token in (PAD, EOS, START, UNKNOWN, *CHARACTERS, *unplaced):
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
            "im_start_token": START,
            **{name: text for name, (text, _) in special.items()},
        },
        chat_template=chat_template(config),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tiny_processor(config: PretrainedConfig, *, pad_is_eos: bool = False) -> ProcessorMixin:
    """Images and text for a tiny vision-language model: its sizes and its special ids."""
    return families()[config.model_type].tiny_processor(
        config, tiny_tokenizer(config, pad_is_eos=pad_is_eos), chat_template=chat_template(config)
    )
