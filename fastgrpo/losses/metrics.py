# SPDX-License-Identifier: Apache-2.0
"""Metrics of the GRPO losses as mergeable statistics, under TRL's names.

A statistic is a (2,) tensor: (sum, count) of a mean, or (value, 0) of a minimum, maximum or sum.
"""

from typing import Any

import torch

_CLIP = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
_SAMPLING = (
    "sampling_logp_difference/mean",
    "sampling_logp_difference/max",
    "importance_sampling_ratio/min",
    "importance_sampling_ratio/mean",
    "importance_sampling_ratio/max",
)


def metric_names(
    obj: Any, has_ref: bool, has_rollout: bool, has_entropy: bool, num_kl_terms: int
) -> list[str]:
    """The names of the statistics of a call, known before it runs."""
    names = ["policy_loss", "ratio/min", "ratio/max"]
    if has_ref and obj.beta != 0.0:
        names.append("kl")
    if has_entropy:
        names.append("entropy")
    if obj.loss.metric:
        names.append(obj.loss.metric)
    if obj.loss.clips:
        names += [f"clip_ratio/{name}" for name in _CLIP]
    if has_rollout and obj.vllm_importance_sampling_correction:
        names += [f"sampling/{name}" for name in _SAMPLING]
    return names + [f"kl_terms/{i}" for i in range(num_kl_terms)]


def metric_kind(name: str) -> str:
    """How statistics of this name merge: "mean", "min", "max" or "sum"."""
    if name == "policy_loss":
        return "sum"
    tail = name.replace("/", "_").rsplit("_", 1)[-1]
    return tail if tail in ("min", "max") else "mean"


def combined_stats(names: list[str], stats: list[torch.Tensor]) -> torch.Tensor:
    """The (M, 2) statistics of a whole from those of its parts."""
    stacked = torch.stack(stats)
    combined = stacked.sum(0)
    for i, name in enumerate(names):
        if metric_kind(name) == "min":
            combined[i] = stacked[:, i].amin(0)
        elif metric_kind(name) == "max":
            combined[i] = stacked[:, i].amax(0)
    return combined


def merge_stats(names: list[str], stats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Metrics from the statistics of the parts of a batch: 0-dim tensors, NaN where undefined."""
    stacked = torch.stack(stats)
    total, values = stacked.sum(0), stacked[:, :, 0]
    nan = values.new_full((), torch.nan)
    by_kind = {"mean": total[:, 0] / total[:, 1].clamp(min=1.0)}
    by_kind["sum"] = by_kind["mean"]  # a sum counts nothing
    for kind, best in (("min", values.amin(0)), ("max", values.amax(0))):
        by_kind[kind] = best.where(best.isfinite(), nan)
    columns = {kind: column.unbind() for kind, column in by_kind.items()}
    return {name: columns[metric_kind(name)][i] for i, name in enumerate(names)}
