"""FastGRPOTrainer with a recipe's advantage rule and perception terms.

Letters: B rows, C completion columns, F reward functions.
"""

from __future__ import annotations

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastgrpo.advantages import (
    paired_gate,
    quantile_mask,
    sequence_mean,
    top_share_mask,
    trajectory_weights,
    visual_dependency,
)
from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.advantages.rule import AdvantageRule
from fastgrpo.errors import InputError
from fastgrpo.images.perturb import perturb
from fastgrpo.integrations.trl.trainer import FastGRPOTrainer
from fastgrpo.ops.token_kl import token_kl

PERTURBED = "perturbed_per_token_logps"


class RecipeTrainer(FastGRPOTrainer):
    """FastGRPOTrainer plus ``rule`` (AdvantageRule) and ``perception`` (PerceptionRule).

    Rewards, advantages and masks change after TRL has computed its own; the loss keeps TRL's code
    and gains the perception terms. Reward functions with a ``prefetch`` method are started right
    after generation, so that a judge works while log-probs are computed; those with ``bind`` get
    the trainer once.
    """

    def __init__(
        self,
        *args,
        rule: AdvantageRule | None = None,
        perception: PerceptionRule | None = None,
        reward_funcs,
        **kwargs,
    ):
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._prefetchers = [f for f in functions if hasattr(f, "prefetch")]
        super().__init__(*args, reward_funcs=reward_funcs, **kwargs)
        self.rule, self.perception = rule, perception
        self._logps: Tensor | None = None
        for function in functions:
            if hasattr(function, "bind"):
                function.bind(self)

    def _generate_and_score_completions(self, inputs):
        self._batch_rows = inputs
        output = super()._generate_and_score_completions(inputs)
        if self.rule is not None:
            self._apply_rule(output)
        if self.perception is not None and self._mode == "train":
            self._apply_perception(inputs, output)
        return output

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if self._prefetchers and len(prompts) == len(self._batch_rows):
            self._start_rewards(prompts, generated[3])
        return generated

    def _start_rewards(self, prompts: list, completions: list) -> None:
        """Hand a batch's completions to the rewards that can work before they are asked."""
        rows = self._batch_rows
        columns = {k: [row[k] for row in rows] for k in rows[0] if k != "prompt"}
        for function in self._prefetchers:
            function.prefetch(prompts, completions, **columns)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = result[0]  # what the loss of this micro-batch is made of
        return result

    def _apply_rule(self, output: dict) -> None:
        """Replace TRL's advantages (the same on every process) and drop filtered groups."""
        size = self.num_generations if self._mode == "train" else self.num_generations_eval
        sizes = [size] * (len(self._rewards) // size)
        advantages, kept = self.rule(
            self._rewards.double(), self.reward_func_names, sizes, self.reward_weights.tolist()
        )
        if self.rule.gate_column is not None:
            advantages = self._gated(advantages)
        rows = len(output["advantages"])
        first = self.accelerator.process_index * rows
        local = slice(first, first + rows)
        output["advantages"] = advantages[local].to(output["advantages"])
        self._metrics[self._mode]["fastgrpo/kept_groups"].append(kept.float().mean().item())
        dropped = (~kept).repeat_interleave(size)[local].to(output["completion_mask"].device)
        if not kept.all():
            self._drop_rows(output, dropped)

    def _gated(self, advantages: Tensor) -> Tensor:
        columns = [(r["question_id"], r[self.rule.gate_column]) for r in self._batch_rows]
        questions, is_gate = zip(*gather_object(columns), strict=True)
        weights = self.reward_weights.to(self._rewards)
        total = (self._rewards * weights).nansum(1)
        total[self._rewards.isnan().all(1)] = torch.nan
        return paired_gate(
            advantages,
            total,
            questions,
            [bool(g) for g in is_gate],
            ceiling=self.rule.gate_ceiling,
            gate_weight=self.rule.gate_weight,
        )

    def _drop_rows(self, output: dict, dropped: Tensor) -> None:
        """Rows that leave the loss: no token of theirs counts, in numerator or denominator."""
        mask = self._loss_mask(output)
        removed = self.accelerator.gather((mask * dropped[:, None]).sum()).sum()
        output["tool_mask"] = mask.masked_fill(dropped[:, None], 0)
        output["num_items_in_batch"] = output["num_items_in_batch"] - removed

    @staticmethod
    def _loss_mask(inputs: dict) -> Tensor:
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

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
        images, size = [], self.num_generations
        for row, example in enumerate(inputs):
            own = example.get("images") or [example.get("image")]
            group = (self.state.global_step * len(inputs) + row) // size
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
        rule, mask = self.perception, self._loss_mask(output).bool()
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
        rule, mask = self.perception, self._loss_mask(inputs).bool()
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
