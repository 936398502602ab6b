# SPDX-License-Identifier: Apache-2.0
"""Recorded calls of VLM-R1's trainer, as calls of our ops."""

from __future__ import annotations

import torch

from fastgrpo.objective import Objective
from fastgrpo.ops.group_advantages import group_advantages
from fastgrpo.ops.grpo_loss import grpo_loss
from fastgrpo.ops.linear.logprob import linear_logprob
from published import adapter


@adapter("VLM-R1", "VLMGRPOTrainer._get_per_token_logps")
def per_token_logps(inputs):
    logits, ids = torch.tensor(inputs["logits"]), torch.tensor(inputs["input_ids"])
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    out = linear_logprob(rows, torch.eye(rows.shape[1]), ids[:, 1:].reshape(-1))
    return out.logp.view(len(ids), -1).tolist()


@adapter("VLM-R1", "VLMGRPOTrainer._generate_and_score_completions")
def score_completions(inputs):
    per_func = torch.tensor(inputs["rewards_per_func"])
    size, width = inputs["num_generations"], inputs["completion_width"]
    rewards = per_func.sum(0)
    ends = inputs["eos_position"] or [None] * len(rewards)
    mask = [[1] * (width if end is None else end + 1) for end in ends]
    mask = [row + [0] * (width - len(row)) for row in mask]
    metrics = {f"rewards/r{i}": row.mean().item() for i, row in enumerate(per_func)}
    return {
        "advantages": group_advantages(rewards, size).tolist(),
        "completion_mask": mask,
        "metrics": metrics
        | {
            "completion_length": sum(map(sum, mask)) / len(mask),
            "reward": rewards.mean().item(),
            "reward_std": rewards.view(-1, size).std(1).mean().item(),
        },
    }


@adapter("VLM-R1", "VLMGRPOTrainer.compute_loss")
def compute_loss(inputs):
    """The published `clip_ratio` counts tokens out of range that are not clipped; so does this."""
    mask = torch.tensor(inputs["completion_mask"]).bool()
    table = {
        name: torch.tensor(inputs[f"{name}per_token_logps"], dtype=torch.float64)[mask]
        for name in ("", "old_", "ref_")
        if inputs[f"{name}per_token_logps"] is not None
    }
    seq_ids, advantages = mask.nonzero()[:, 0], torch.tensor(inputs["advantages"])
    obj = Objective(
        loss_type="grpo",
        epsilon=inputs["epsilon_low"],
        epsilon_high=inputs["epsilon_high"],
        beta=inputs["beta"],
        use_bias_correction_kl=False,
    )
    logp = table[""].clone().requires_grad_()
    old, ref = table.get("old_"), table.get("ref_")
    if ref is None and inputs["beta"]:
        raise ValueError("beta needs ref_per_token_logps")
    given = {"old_logp": old, "ref_logp": ref}
    res = grpo_loss(logp, advantages, obj, seq_ids=seq_ids, **given)
    res.loss.backward()
    ratio = (logp.detach() - (logp.detach() if old is None else old)).exp()
    clipped = ratio.clamp(1 - inputs["epsilon_low"], 1 + inputs["epsilon_high"])
    per_token = advantages[seq_ids]
    metrics = {"clip_ratio": _row_mean((ratio * per_token < clipped * per_token), mask)}
    if inputs["beta"]:
        gap = ref - logp.detach()
        metrics["kl"] = _row_mean(gap.exp() - gap - 1, mask)
    grad = torch.zeros(mask.shape, dtype=torch.float64)
    grad[mask] = logp.grad
    return {"loss": res.loss.item(), "grad_logps": grad.tolist(), "metrics": metrics}


def _row_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean of the rows' means."""
    table = torch.zeros(mask.shape, dtype=torch.float64)
    table[mask] = values.double()
    return (table.sum(1) / mask.sum(1)).mean().item()
