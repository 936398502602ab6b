# SPDX-License-Identifier: Apache-2.0
"""Dynamic sampling: dead groups are replaced, counted, bounded, and nothing else changes."""

import pytest
import torch

pytest.importorskip("trl")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl.batches import loss_mask  # noqa: E402
from fastgrpo.integrations.trl.resampling import merge  # noqa: E402
from fastgrpo.testing.trl import (  # noqa: E402
    build_trainer,
    distinct_characters,
    image_row,
    steps_of,
)


def rows(num_rows=8):
    return [image_row(i) | {"easy": i % 2 == 0} for i in range(num_rows)]


def half_dead(completions, easy, **columns):
    """The same for every completion of an easy prompt."""
    own = distinct_characters(completions)
    return [1.0 if is_easy else value for is_easy, value in zip(easy, own, strict=True)]


def record_batches(trainer):
    batches, original = [], trainer._generate_and_score_completions

    def note(inputs):
        batches.append(original(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = note
    return batches


def test_dead_groups_are_replaced_until_the_batch_is_full(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, rows=rows(), reward=half_dead, max_steps=4, beta=0.0,
        per_device_train_batch_size=8, gradient_accumulation_steps=2,
        fast={"max_generation_batches": 12},
    )  # fmt: skip
    batches = record_batches(trainer)
    trainer.train()
    for batch in batches:
        assert len(batch["advantages"]) == 16
        assert (batch["advantages"].view(4, 4) != 0).any(1).all()
        assert batch["num_items_in_batch"] == loss_mask(batch).sum()
        grids = batch["image_grid_thw"]
        assert len(grids) == sum(batch["num_images"]) == 16
        assert len(batch["pixel_values"]) == int(grids.prod(-1).sum())
        width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
        assert batch["mm_token_type_ids"].shape == (16, width)
    steps = steps_of(trainer)
    assert len(steps) == 4 and max(e["fastgrpo/generation_batches"] for e in steps) > 1
    assert all(e["fastgrpo/dead_groups"] == 0 for e in steps)
    assert sum(e["fastgrpo/replaced_groups"] for e in steps) > 0
    assert all(e["grad_norm"] > 0 for e in steps)


def test_the_bound_is_kept_and_what_stays_dead_is_counted(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, rows=rows(), reward=lambda completions, **_: [1.0] *
        len(completions), max_steps=1, beta=0.0, fast={"max_generation_batches": 3},
    )  # fmt: skip
    trainer.train()
    (step,) = steps_of(trainer)
    assert step["fastgrpo/generation_batches"] == 3
    assert (step["fastgrpo/replaced_groups"], step["fastgrpo/dead_groups"]) == (0, 2)


def test_a_full_batch_is_left_alone_and_a_run_repeats(checkpoint, tmp_path):
    def run(name, **fast):
        fast["keep_prompts"] = False  # nor are they where there may be another rollout
        trainer = build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path / name, max_steps=3, beta=0.0, fast=fast
        )
        trainer.train()
        keys = ("loss", "reward", "grad_norm", "completions/mean_length")
        return [[entry[key] for key in keys] for entry in steps_of(trainer)]

    assert run("a") == run("b", max_generation_batches=5)  # nothing is dead, nothing changes


def test_fresh_prompts_are_drawn_by_seed_step_and_batch(checkpoint, tmp_path):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, rows=rows())

    def drawn(batch, step=0):
        trainer.state.global_step = step
        return [row["prompt"][0]["content"] for row in trainer._fresh_rows(batch, 2)]

    first = drawn(1)
    assert first == drawn(1) and len(first) == 8
    assert len(set(first)) == 2 and first[:4] == first[:1] * 4
    assert len({tuple(drawn(batch, step)) for batch in (1, 2) for step in range(4)}) > 4


def part(num_rows, prompt, completion, images, start):
    """A batch whose every value tells where it came from."""
    ids = torch.arange(start, start + num_rows)[:, None]
    widths = {"prompt": prompt, "completion": completion}
    whole = {f"{half}_ids": ids.expand(-1, w) for half, w in widths.items()}
    masks = {f"{half}_mask": torch.ones(num_rows, w) for half, w in widths.items()}
    batch = whole | masks | {"advantages": ids[:, 0].float(), "num_items_in_batch": torch.tensor(9)}
    if images:
        batch |= {
            "pixel_values": [torch.full((2, 3), float(i)) for i in ids[:, 0]],
            "image_grid_thw": [torch.tensor([[1, 1, 2]])] * num_rows,
            "num_images": [1] * num_rows,
            "mm_token_type_ids": torch.cat(
                [torch.ones(num_rows, prompt), torch.zeros(num_rows, completion)], 1
            ).long(),
        }
    else:
        batch["tool_mask"] = torch.zeros(num_rows, completion)
    return batch


def test_batches_of_other_widths_are_padded_as_trl_pads():
    merged = merge([part(1, 3, 2, True, 10), part(2, 5, 1, False, 20)], pad_token_id=7)
    assert merged["prompt_ids"].tolist() == [[7, 7, 10, 10, 10], [20] * 5, [21] * 5]
    assert merged["completion_ids"].tolist() == [[10, 10], [20, 7], [21, 7]]
    assert merged["prompt_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5, [1] * 5]
    assert merged["completion_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    assert merged["tool_mask"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert merged["advantages"].tolist() == [10, 20, 21]
    assert merged["mm_token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 0, 0], [0] * 7, [0] * 7]
    assert merged["num_images"] == [1, 0, 0]
    assert [len(pixels) for pixels in merged["pixel_values"]] == [2, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fast={"max_generation_batches": 0}), "max_generation_batches: expected at least 1"),
        (dict(fast={"max_generation_batches": 2}, scale_rewards="batch"), "use group or none"),
    ],
)
def test_what_it_cannot_do_is_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build_trainer(FastGRPOTrainer, checkpoint, tmp_path, **options)
