# SPDX-License-Identifier: Apache-2.0
"""The passes and loss terms of a `PerceptionRule`: the policy under perturbed images.

Letters: B rows, C completion columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.advantages import (
    sequence_mean,
    top_share_mask,
    trajectory_weights,
    visual_dependency,
)
from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.errors import InputError
from fastgrpo.images.perturb import perturb
from fastgrpo.integrations.trl.batches import loss_mask
from fastgrpo.integrations.trl.rows import IMAGE_FIELDS
from fastgrpo.models.adapter import Adapter
from fastgrpo.objective import KLStream, Objective
from fastgrpo.ops.grpo_loss import grpo_loss

PERTURBED = "perturbed_per_token_logps"
TOKEN_WEIGHTS = "token_weights"


@dataclass(frozen=True)
class PerceptionTerms:
    """PAPO's terms at one step: the KL stream "perturbed", and coefficients of mean(-log p) under
    the image and under the perturbed one (a constant)."""

    streams: dict[str, KLStream]
    entropy_coef: float
    perturbed_entropy_coef: float


def perception_terms(rule: PerceptionRule, step: int, total: int) -> PerceptionTerms:
    """What `rule` adds to the loss at `step` of `total`."""
    coefficient = rule.kl_coef(step, total)
    share = coefficient / rule.kl_coef.start if rule.kl_coef.start else 1.0
    clamp = 10.0 if rule.kl_ceiling is None else min(10.0, rule.kl_ceiling)
    stream = KLStream(-coefficient, "k3", value_clamp=clamp, token_share=rule.kl_token_share)
    return PerceptionTerms(
        {"perturbed": stream}, share * rule.entropy_coef, share * rule.perturbed_entropy_coef
    )


def perturbed_entropy(
    terms: PerceptionTerms,
    obj: Objective,
    perturbed: Tensor,
    seq_ids: Tensor,
    num_rows: int,
    totals: dict,
) -> Tensor:
    """PAPO's entropy under the perturbed image, in the mean of `obj`: it moves the loss, not the
    gradient. `perturbed`, `seq_ids` (N,); `totals` the denominators of `grpo_loss`."""
    plain = Objective(
        obj.loss_type,
        aggregation=obj.aggregator,
        max_completion_length=obj.max_completion_length,
    )
    return grpo_loss(
        perturbed,
        perturbed.new_zeros(num_rows),
        plain,
        seq_ids=seq_ids,
        sampled_entropy_coef=terms.perturbed_entropy_coef,
        **totals,
    ).loss


class PerceptionMixin:
    """Perturbed passes after generation: VPPO's weights, and the log-probs of PAPO's terms."""

    @property
    def _progress(self) -> tuple[int, int]:
        return self.state.global_step, max(self.state.max_steps, 1)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.perception is not None and self._mode == "train":
            self._apply_perception(inputs, output)
        return output

    def _apply_perception(self, inputs: list[dict], output: dict) -> None:
        rule = self.perception
        with torch.no_grad():
            perturbed = self._policy_logps(output | self._perturbed_images(inputs, output))
            old = output.get("old_per_token_logps")
            if rule.token_share is not None or rule.weight_minimum is not None:
                if old is None:
                    old = self._policy_logps(output)
                self._weigh(output, old, perturbed)
        if rule.has_loss_terms:
            output[PERTURBED] = perturbed

    def _perturbed_images(self, inputs: list[dict], output: dict) -> dict[str, Tensor]:
        """The family's vision inputs for the perturbed images, one perturbation per prompt."""
        family = Adapter(self.accelerator.unwrap_model(self.model)).family
        if not any(output.get(name) is not None for name in family.vision_inputs):
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
        processed = self.processing_class.image_processor(images=images, return_tensors="pt")
        perturbed = {}
        for name in family.vision_inputs:
            own, other = output[name], processed.get(name)
            if other is None or other.shape != own.shape:
                came = None if other is None else tuple(other.shape)
                raise InputError(
                    f"perception: {name} of the perturbed images is {came}, of the originals "
                    f"{tuple(own.shape)}"
                )
            perturbed[name] = other.to(own)
        return perturbed

    def _policy_logps(self, output: dict) -> Tensor:
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            input_ids,
            attention_mask,
            output["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            num_images=output["num_images"],
            mm_token_type_ids=output.get("mm_token_type_ids"),
            **{name: output[name] for name in IMAGE_FIELDS if name in output},
        )
        return logps

    def _weigh(self, output: dict, old: Tensor, perturbed: Tensor) -> None:
        """VPPO: advantages times the trajectory's weight; token weights of 0 where a token needs
        no image."""
        rule, mask = self.perception, loss_mask(output).bool()
        seq_ids = mask.nonzero()[:, 0]
        dependency = visual_dependency(old[mask], perturbed[mask])
        if rule.weight_minimum is not None:
            local = sequence_mean(dependency, seq_ids, len(mask))
            score = self.accelerator.gather(local)
            valid = self.accelerator.gather(mask.any(1))
            weights = trajectory_weights(score, minimum=rule.weight_minimum, valid=valid)
            output["advantages"] = output["advantages"] * self._own_rows(weights, output)
        if rule.token_share is not None:
            kept = torch.zeros_like(mask)
            kept[mask] = top_share_mask(dependency, seq_ids, rule.token_share)
            output[TOKEN_WEIGHTS] = kept.float()
            share = kept.sum() / mask.sum().clamp(min=1)
            self._metrics["train"]["fastgrpo/perception_token_share"].append(share.item())
