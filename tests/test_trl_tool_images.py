# SPDX-License-Identifier: Apache-2.0
"""Images that a tool returned inside a completion train from packed rows, with TRL's numbers."""

import pytest
from PIL import Image

pytest.importorskip("trl")

from trl_runs import SAME_ROWS, StockTrainer, deviation  # noqa: E402

from fastgrpo import models  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl.fallback import CUT_IMAGES  # noqa: E402
from fastgrpo.testing.trl import build_trainer, image_row, save_checkpoint, steps_of  # noqa: E402

CORE = ("qwen2_5_vl", "qwen3_5")
SERVED = [
    pytest.param(name, marks=() if name in CORE else pytest.mark.slow)
    for name, family in models.families().items()
    if family.serves_images_in_completions
]
PICTURES = [Image.radial_gradient("L").convert("RGB").resize(size) for size in ((24, 16), (16, 32))]


def zoom(index: int) -> str:
    """Shows a picture.

    Args:
        index: Which one.
    """
    raise AssertionError(index)  # the trainers below show pictures themselves


class ShowsPictures:
    """Every second completion is shown one picture or two and goes on, as TRL's own loop does after
    a tool call; the last `cut` tokens of what it was shown are missing."""

    cut = 0

    def _tool_call_loop(
        self, prompts, prompt_ids, completion_ids, completions, logprobs, images, _
    ):
        config = self.accelerator.unwrap_model(self.model).config
        family, process = models.families()[config.model_type], self.processing_class
        shown = [PICTURES[: 1 + i % 4 // 2] if i % 2 else [] for i in range(len(prompt_ids))]
        called = [i for i, pictures in enumerate(shown) if pictures]
        tools = []
        for i in called:
            seen = process.image_processor(images=shown[i], return_tensors="pt")
            parts = family.split_images({name: seen[name] for name in family.vision_inputs})
            tools.append([t for part in parts for t in family.image_text(part, config)])
        pairs = zip(called, tools, strict=True)
        contexts = [prompt_ids[i] + completion_ids[i] + tool for i, tool in pairs]
        merged = [(images[i] if images else []) + shown[i] for i in called]
        fields = process.image_processor(images=sum(merged, []), return_tensors="pt")
        after, _ = self._generate_single_turn(contexts, merged, dict(fields), 1, True)
        masks = [[1] * len(ids) for ids in completion_ids]
        for i, tool, more in zip(called, tools, after, strict=True):
            tool = tool[: len(tool) - self.cut]
            masks[i] += [0] * len(tool) + [1] * len(more)
            completion_ids[i] = completion_ids[i] + tool + more
        return masks, completions, completion_ids, logprobs, len(called), 0, shown


class Stock(ShowsPictures, StockTrainer):
    pass


class Ours(ShowsPictures, FastGRPOTrainer):
    def _unserved(self, batch):
        self.judged = super()._unserved(batch)
        return self.judged


def both(family, tmp_path, cut=0):
    """TRL's run and ours on prompts with an image, two, and none."""
    checkpoint, runs = save_checkpoint(tmp_path / family, family), []
    rows = [image_row(0, 1), image_row(1, 0), image_row(2, 2), image_row(3, 1)]
    for cls, fast in ((Stock, {}), (Ours, {"fast": SAME_ROWS})):
        trainer = build_trainer(
            cls,
            checkpoint,
            tmp_path / cls.__name__,
            rows=rows,
            max_steps=3,
            num_iterations=2,
            optim="sgd",
            **fast,
        )
        trainer.tools, trainer.cut = [zoom], cut
        trainer.train()
        runs.append(trainer)
    assert any(entry["grad_norm"] > 0 for entry in steps_of(runs[0]))
    return runs


@pytest.mark.parametrize("family", SERVED)
def test_same_numbers_as_trl(family, tmp_path):
    stock, ours = both(family, tmp_path)
    assert ours._padded_reason is None and ours.judged is None
    assert deviation(ours, stock) <= 1e-4


def test_a_batch_with_a_cut_image_is_scored_by_trl(tmp_path):
    """TRL then leaves out every image of the batch."""
    stock, ours = both("qwen2_5_vl", tmp_path, cut=2)
    assert ours.judged == CUT_IMAGES
    assert deviation(ours, stock) <= 1e-4
