# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch holds, and what of it is left out of the loss."""

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import MIXED  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl.batches import join_pixel_values  # noqa: E402
from fastgrpo.testing.models import IMAGE_ID, VIDEO_ID  # noqa: E402
from fastgrpo.testing.trl import build_trainer, steps_of  # noqa: E402


def test_a_group_stays_in_one_micro_batch_and_is_encoded_once(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        max_steps=2,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=4,
        fast={"self_check": False},
    )
    prompts = []
    original = trainer._compute_loss

    def spy(model, inputs):
        rows = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        prompts.append(set(rows))
        return original(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert [len(group) for group in prompts] == [1] * 8


def test_a_batch_with_every_completion_masked_is_a_zero_step(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        max_steps=2,
        mask_truncated_completions=True,
        generation_kwargs={"suppress_tokens": [IMAGE_ID, VIDEO_ID, 0, 1]},
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert [(e["loss"], e["grad_norm"]) for e in steps_of(trainer)] == [(0.0, 0.0)] * 2
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("placeholder", [IMAGE_ID, VIDEO_ID])
def test_a_sampled_placeholder_is_left_out_of_the_loss_and_counted(
    checkpoint, tmp_path, monkeypatch, placeholder
):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, rows=MIXED)
    generate, losses = trainer._generate_single_turn, []
    compute_loss = trainer._compute_loss

    def with_placeholders(*args, **kwargs):
        completions, logprobs = generate(*args, **kwargs)
        for ids in completions[::2]:
            ids[1] = placeholder
        return completions, logprobs

    def spy(model, inputs):
        sampled = inputs["completion_ids"] == placeholder
        losses.append((int(sampled.sum()), int((sampled & (inputs["tool_mask"] == 0)).sum())))
        assert (inputs["ref_per_token_logps"][sampled] == 0).all()
        kept = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
        assert inputs["num_items_in_batch"] == kept
        return compute_loss(model, inputs)

    monkeypatch.setattr(trainer, "_generate_single_turn", with_placeholders)
    monkeypatch.setattr(trainer, "_compute_loss", spy)
    trainer.train()
    assert losses == [(4, 4)] * 2
    for entry in steps_of(trainer):
        assert entry["fastgrpo/sampled_placeholders"] == 4
        assert 0 < entry["grad_norm"] < float("inf")


@pytest.mark.parametrize(
    ("rows", "copied"), [([0, 1, 2], False), ([1, 2], False), ([1, 0], True), ([0, 2], True)]
)
def test_pieces_of_a_tensor_are_joined_where_they_lie(rows, copied):
    pixels, grids = torch.rand(9, 2), torch.arange(9).view(3, 3)
    batch = {
        "pixel_values": [pixels.split([2, 4, 3])[row] for row in rows],
        "image_grid_thw": [grids.split(1)[row] for row in rows],
        "num_images": [1 for _ in rows],
    }
    joined = join_pixel_values(batch)
    assert torch.equal(joined["pixel_values"], torch.cat(batch["pixel_values"]))
    assert torch.equal(joined["image_grid_thw"], torch.cat(batch["image_grid_thw"]))
    assert joined["num_images"] == batch["num_images"]
    inside = joined["pixel_values"].untyped_storage().data_ptr() == pixels.data_ptr()
    assert inside is not copied


def test_pieces_of_other_tensors_are_copied_together():
    wide, empty = torch.rand(4, 6), torch.rand(0, 3)
    for pieces in (
        [torch.rand(2, 3), torch.rand(1, 3)],
        list(wide[:, :3].split(2)),  # columns of a wider one
        list(wide.view(8, 3).split(4)),  # views of another shape than the memory they lie in
        list(empty.split([0, 0])),
    ):
        joined = join_pixel_values({"pixel_values": pieces})["pixel_values"]
        assert torch.equal(joined, torch.cat(pieces))
