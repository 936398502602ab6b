"""The passes and loss terms of a `PerceptionRule`: the policy under perturbed images.

Letters: B rows, C completion columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.advantages import (
    quantile_mask,
    sequence_mean,
    top_share_mask,
    trajectory_weights,
    visual_dependency,
)
from fastgrpo.errors import InputError
from fastgrpo.images.perturb import perturb
from fastgrpo.integrations.trl.batches import loss_mask
from fastgrpo.ops.token_kl import token_kl

PERTURBED = "perturbed_per_token_logps"


class PerceptionMixin:
    """Perturbed passes after generation; VPPO's advantages, PAPO's terms in the loss."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.perception is not None and self._mode == "train":
            self._apply_perception(inputs, output)
        return output

    def _apply_perception(self, inputs: list[dict], output: dict) -> None:
        rule = self.perception
        with torch.no_grad():
            perturbed = self._policy_logps(output, self._perturbed_pixels(inputs, output))
            old = output.get("old_per_token_logps")
            if rule.token_share is not None or rule.weight_minimum is not None:
                if old is None:
                    old = self._policy_logps(output, output["pixel_values"])
                output["advantages"] = self._perceptual_advantages(output, old, perturbed)
        if rule.has_loss_terms:
            output[PERTURBED] = perturbed

    def _perturbed_pixels(self, inputs: list[dict], output: dict) -> Tensor:
        """(patches, dim) pixel values of the perturbed images, one perturbation per prompt."""
        if output.get("pixel_values") is None:
            raise InputError("perception: this batch has no images to perturb")
        images = []
        first = self.accelerator.process_index * len(inputs)
        batch = self.state.global_step * self.accelerator.num_processes * len(inputs)
        for row, example in enumerate(inputs, batch + first):
            own = example.get("images") or [example.get("image")]
            group = row // self.num_generations  # may straddle two processes
            for index, image in enumerate(i for i in own if i is not None):
                seed = (self.args.seed * 1_000_003 + group * 64 + index) % 2**32
                options = self.perception.options
                images.append(perturb(image, self.perception.perturbation, seed=seed, **options))
        pixels = self.processing_class.image_processor(images=images, return_tensors="pt")
        pixels = pixels["pixel_values"].to(output["pixel_values"])
        if pixels.shape != output["pixel_values"].shape:
            raise InputError(
                f"perception: perturbed images give {tuple(pixels.shape)} pixel values, the "
                f"originals {tuple(output['pixel_values'].shape)}"
            )
        return pixels

    def _policy_logps(self, output: dict, pixel_values: Tensor) -> Tensor:
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            input_ids,
            attention_mask,
            output["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            pixel_values=pixel_values,
            image_grid_thw=output["image_grid_thw"],
            num_images=output["num_images"],
            mm_token_type_ids=output.get("mm_token_type_ids"),
        )
        return logps

    def _perceptual_advantages(self, output: dict, old: Tensor, perturbed: Tensor) -> Tensor:
        """VPPO: (B, C) advantages with the trajectory's weight, 0 on tokens that need no image."""
        rule, mask = self.perception, loss_mask(output).bool()
        seq_ids = mask.nonzero()[:, 0]
        dependency = visual_dependency(old[mask], perturbed[mask])
        advantages = output["advantages"]
        if advantages.ndim == 1:
            advantages = advantages[:, None].expand(-1, mask.shape[1])
        if rule.weight_minimum is not None:
            local = sequence_mean(dependency, seq_ids, len(mask))
            score = self.accelerator.gather(local)
            valid = self.accelerator.gather(mask.any(1))
            weights = trajectory_weights(score, minimum=rule.weight_minimum, valid=valid)
            first = self.accelerator.process_index * len(mask)
            advantages = advantages * weights[first : first + len(mask), None]
        if rule.token_share is not None:
            kept = torch.zeros_like(mask)
            kept[mask] = top_share_mask(dependency, seq_ids, rule.token_share)
            advantages = advantages * kept
            share = kept.sum() / mask.sum().clamp(min=1)
            self._metrics["train"]["fastgrpo/perception_token_share"].append(share.item())
        return advantages.contiguous()

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if PERTURBED not in inputs:
            return loss
        return loss + self._perception_loss(self._logps, inputs)

    def _perception_loss(self, logps: Tensor, inputs: dict) -> Tensor:
        """PAPO's terms, averaged as TRL averages the policy loss of this loss type."""
        rule, mask = self.perception, loss_mask(inputs).bool()
        logp, perturbed = logps[mask], inputs[PERTURBED][mask]
        kl = token_kl(logp, perturbed, "k3", log_ratio_clamp=20.0, value_clamp=10.0)
        if rule.kl_token_share is not None:
            seq_ids = mask.nonzero()[:, 0]
            kl = torch.where(quantile_mask(kl.detach(), seq_ids, rule.kl_token_share), kl, 0.0)
        if rule.kl_ceiling is not None:
            kl = kl.clamp(0.0, rule.kl_ceiling)
        coefficient = rule.kl_coef(self.state.global_step, max(self.state.max_steps, 1))
        scale = coefficient / rule.kl_coef.start if rule.kl_coef.start else 1.0
        weights = self._token_weights(inputs, mask)[mask]
        value = -coefficient * kl - scale * (
            rule.entropy_coef * logp + rule.perturbed_entropy_coef * perturbed
        )
        metrics = self._metrics[self._mode]
        metrics["fastgrpo/perception_kl"].append((kl * weights).sum().item())
        metrics["fastgrpo/perception_kl_coef"].append(coefficient)
        return (value * weights).sum()

    def _token_weights(self, inputs: dict, mask: Tensor) -> Tensor:
        """(B, C) weight of each token's loss in TRL's normaliser for the loss type in use."""
        accumulation = self.current_gradient_accumulation_steps if self._mode == "train" else 1.0
        rows, kind = mask.shape[0], self.loss_type
        one = torch.ones_like(mask, dtype=torch.float32)
        if kind in ("grpo", "sapo"):
            return one / (mask.sum(1, keepdim=True).clamp(min=1) * rows * accumulation)
        if kind == "bnpo":
            return one / (mask.sum().clamp(min=1) * accumulation)
        if kind == "dr_grpo":
            return one / (rows * self.max_completion_length * accumulation)
        if kind == "luspo":
            return one / (rows * accumulation)
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "train":
            items = items * accumulation / self.args.steps_per_generation
        return one / items
