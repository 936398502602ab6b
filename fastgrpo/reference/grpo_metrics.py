# SPDX-License-Identifier: Apache-2.0
"""The statistics of `fastgrpo.losses.metrics` from the terms of the reference loss."""

from typing import Any

import torch

from fastgrpo.losses.tokens import Tokens, segment_sum


@torch.no_grad()
def metric_stats(
    t: Tokens, obj: Any, num_rows: int, terms: dict[str, torch.Tensor], names: list[str]
) -> torch.Tensor:
    """(len(names), 2) statistics from the `terms` of `loss_terms`."""
    sequence_level = obj.importance_sampling_level == "sequence" and t.per_sequence
    m = _Measure(t, num_rows, sequence_level)
    stats = {"policy_loss": m.value(terms["policy_loss"])}
    ratio = (t.logp - (t.logp if t.old_logp is None else t.old_logp)).exp()
    stats["ratio/min"], stats["ratio/max"] = m.low(ratio, t.mask), m.high(ratio, t.mask)
    for name in ("kl", *(n for n in terms if n.startswith("kl_terms/"))):
        if name in terms:
            stats[name] = m.token_mean(terms[name])
    if t.entropy is not None:
        stats["entropy"] = m.token_mean(t.entropy)
    if obj.loss.clips:
        low, high = terms["clip_low"], terms["clip_high"]
        for name, flag in (("low", low), ("high", high), ("region", low | high)):
            stats[f"clip_ratio/{name}_mean"] = m.level_mean(flag)
        rows = m.rows_present()
        stats["clip_ratio/low_min"] = m.low(m.row_means(low), rows)
        stats["clip_ratio/high_max"] = m.high(m.row_means(high), rows)
    if obj.loss.metric:
        m.sequence_level |= obj.loss.metric_per_sequence and t.per_sequence
        stats[obj.loss.metric] = m.level_mean(terms[obj.loss.metric])
    if "rollout_ratio" in terms:
        known = t.mask & ~terms["rollout_difference"].isnan()
        difference = terms["rollout_difference"].abs()
        stats["sampling/sampling_logp_difference/mean"] = m.mean(difference, known)
        stats["sampling/sampling_logp_difference/max"] = m.high(difference, known)
        w = terms["rollout_ratio"]
        per_token = obj.vllm_importance_sampling_mode.startswith("token")
        among = t.mask if per_token else torch.ones_like(w, dtype=torch.bool)
        for name, of in (("min", m.low), ("mean", m.mean), ("max", m.high)):
            stats[f"sampling/importance_sampling_ratio/{name}"] = of(w, among)
    return torch.stack([stats[name] for name in names])


class _Measure:
    """Sums, means, minima and maxima over masked tokens or over sequences."""

    def __init__(self, t: Tokens, num_rows: int, sequence_level: bool) -> None:
        self.t, self.num_rows, self.sequence_level = t, num_rows, sequence_level
        self.dtype = t.logp.dtype
        self.lengths = segment_sum(t.mask.to(self.dtype), t.seq_ids, num_rows)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.detach().to(self.dtype), x.new_zeros((), dtype=self.dtype)])

    def mean(self, x: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        x = x.detach().to(self.dtype)
        kept = torch.where(among, x, torch.zeros_like(x))
        return torch.stack([kept.sum(), among.sum().to(self.dtype)])

    def token_mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.mean(x, self.t.mask)

    def low(self, x: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        return -self.high(-x, among)

    def high(self, x: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        floor = x.new_full((1,), -torch.inf)
        kept = torch.where(among, x, torch.full_like(x, -torch.inf))
        return self.value(torch.cat([kept, floor]).amax())

    def row_means(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) mean of x over each sequence's tokens, 0 for an empty sequence."""
        kept = torch.where(self.t.mask, x.to(self.dtype), torch.zeros_like(self.t.logp))
        return segment_sum(kept, self.t.seq_ids, self.num_rows) / self.lengths.clamp(min=1.0)

    def rows_present(self) -> torch.Tensor:
        """(B,) sequences that count in a minimum or maximum over sequences."""
        return (self.lengths > 0) | self.sequence_level

    def level_mean(self, x: torch.Tensor) -> torch.Tensor:
        """TRL's mean: over sequences where the quantity has one value each, else over tokens."""
        if not self.sequence_level:
            return self.token_mean(x)
        means = self.row_means(x)
        return torch.stack([means.sum(), means.new_tensor(float(self.num_rows))])
