# SPDX-License-Identifier: Apache-2.0
"""Whole TRL training runs on a tiny checkpoint, small enough for tests: seconds for 20 steps."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastgrpo.testing.models import IMAGE_ID, VIDEO_ID, tiny_model
from fastgrpo.testing.processors import tiny_processor, tiny_tokenizer

SIZES = ((16, 24), (32, 16), (24, 24))


def save_checkpoint(folder: Path, family: str = "qwen2_5_vl", **processor) -> Path:
    """A tiny model and its processor, or tokenizer for a text family, for `from_pretrained`."""
    model = tiny_model(family)
    build = tiny_processor if hasattr(model.config, "vision_config") else tiny_tokenizer
    model.save_pretrained(folder)
    build(model.config, **processor).save_pretrained(folder)
    return folder


def image_row(index: int, num_images: int = 1) -> dict:
    """A prompt about `num_images` images of noise; sizes and noise differ between rows."""
    images = [
        Image.radial_gradient("L")
        .rotate(37 * (index + i))
        .convert("RGB")
        .resize(SIZES[(index + i) % 3])
        for i in range(num_images)
    ]
    return {"prompt": [{"role": "user", "content": f"find {index}"}], "images": images}


def distinct_characters(completions, **columns) -> list[float]:
    """A reward that varies within a group whatever the policy writes."""
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def build_trainer(
    cls, checkpoint: Path, output: Path, *, rows=None, reward=None, processor=None, **options
):
    """A trainer of class `cls` on `checkpoint`; `options` override GRPOConfig's fields.

    `processor` is the checkpoint's own unless given.

    `fast`, `rule`, `perception`, `peft_config`, `eval_dataset` and `callbacks` go to the
    constructor. Two prompts of four
    completions per step unless told otherwise; image placeholders are never sampled.
    """
    import transformers
    from datasets import Dataset

    from fastgrpo.integrations.trl.config import RenamedConfig

    passed = {
        key: options.pop(key)
        for key in ("fast", "rule", "perception", "peft_config", "eval_dataset", "callbacks")
        if key in options
    }
    settings = dict(
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=20,
        learning_rate=1e-3,
        beta=0.04,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        generation_kwargs={"suppress_tokens": [IMAGE_ID, VIDEO_ID]},
    )
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    model = getattr(transformers, config.architectures[0]).from_pretrained(checkpoint)
    if processor is None:
        auto = "AutoProcessor" if hasattr(config, "vision_config") else "AutoTokenizer"
        processor = getattr(transformers, auto).from_pretrained(checkpoint)
    return cls(
        model,
        reward or distinct_characters,
        RenamedConfig(str(output), **(settings | options)),
        train_dataset=Dataset.from_list(rows or [image_row(i) for i in range(8)]),
        processing_class=processor,
        **passed,
    )


def steps_of(trainer) -> list[dict]:
    """The logged training steps, without the summary at the end and without evaluations."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
