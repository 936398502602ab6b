# SPDX-License-Identifier: Apache-2.0
"""What a generation batch is: its prompts, the rows left out of the loss, its micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict
from trl.trainer.utils import unsplit_pixel_values_by_grid as unsplit_pixel_values

from fastgrpo.integrations.trl.distinct import distinct_rows
from fastgrpo.integrations.trl.rows import plan_micro_batches
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.frames import frame_columns, model_frame
from fastgrpo.models.join import neighbours


class BatchMixin:
    """Whole groups in one micro-batch, each of their prompts read by the processor once, and
    placeholders the policy sampled out of the loss."""

    def _generate_and_score_completions(self, inputs):
        if self._padded_reason:
            return super()._generate_and_score_completions(inputs)
        with distinct_rows(self, Adapter(self.accelerator.unwrap_model(self.model))):
            return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        frame = model_frame(self.accelerator.unwrap_model(self.model).config)
        self._frames = images and frame_columns(frame, self.processing_class, images, fields)
        if images is not None and not self.use_vllm:
            # Processors take [] for a prompt without images; TRL's None ends in a TypeError.
            images = [row or [] for row in images]
        return prompt_ids, images, fields

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _prepare_inputs(self, generation_batch):
        if self._mode == "eval" or not self.fast.keep_groups or self._padded_reason:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = take_rows(split_pixel_values_by_grid(batch), self._row_order(batch))
            self._buffered_inputs = [
                join_pixel_values(chunk) for chunk in split_tensor_dict(batch, steps)
            ]
        return self._buffered_inputs[self._step % steps]

    def _row_order(self, batch: dict) -> list[int]:
        num_rows = len(batch["completion_ids"])
        first = self.accelerator.process_index * num_rows  # a group may straddle two processes
        group_of_row = [(first + row) // self.num_generations for row in range(num_rows)]
        # One draw of TRL's size: sampling after it sees the random numbers it would see in TRL.
        order = torch.randperm(num_rows).tolist()
        advantages = batch["advantages"]
        return plan_micro_batches(
            group_of_row,
            order,
            self.args.steps_per_generation,
            live=(advantages.view(num_rows, -1) != 0).any(1).tolist(),
            batches_per_step=self.args.gradient_accumulation_steps,
            costs=self._row_costs(batch) if self.accelerator.num_processes > 1 else None,
        )

    def _row_costs(self, batch: dict) -> list[float]:
        """Tokens of each row, its share of the group's prompt among them."""
        prompts, completions = (batch[f"{part}_mask"].sum(1) for part in ("prompt", "completion"))
        return (completions + prompts / self.num_generations).tolist()

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, ids.new_tensor(self._placeholder_ids))

    def _exclude_placeholders(self, output: dict) -> None:
        """Image and video placeholders the policy sampled: no loss, counted."""
        if not self._placeholder_ids:
            return
        count = self._leave_out(output, self._is_placeholder(output["completion_ids"]))
        self._metrics[self._mode]["fastgrpo/sampled_placeholders"].append(count)

    def _leave_out(self, output: dict, tokens: Tensor) -> float:
        """Take `tokens` (B, C) from the loss, numerator and denominator; how many counted before,
        over all processes."""
        mask = loss_mask(output)
        counted = self.accelerator.gather((mask * tokens).sum()).sum()
        if (mask * tokens).any():
            tool_mask = output.get("tool_mask", torch.ones_like(mask))
            output["tool_mask"] = tool_mask.masked_fill(tokens, 0)
        output["num_items_in_batch"] = output["num_items_in_batch"] - counted
        return float(counted)


def loss_mask(inputs: dict) -> Tensor:
    """(B, C) tokens that count in the loss of a batch."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def take_rows(batch: dict, order: list[int]) -> dict:
    """The batch with its rows in `order`; scalars and absent fields as they are."""

    def take(value):
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[row] for row in order]

    return {key: take(value) for key, value in batch.items()}


def join_pixel_values(batch: dict) -> dict:
    """TRL's `unsplit_pixel_values_by_grid`, which copies nothing that lies in memory as it is."""
    lists = {key: value for key, value in batch.items() if isinstance(value, list) and value}
    whole = {
        key: neighbours(pieces)
        for key, pieces in lists.items()
        if all(isinstance(piece, Tensor) for piece in pieces)
    }
    return unsplit_pixel_values(batch | {k: v for k, v in whole.items() if v is not None})
