# SPDX-License-Identifier: Apache-2.0
"""The quantities of a packed row that loss formulas are written in.

Letters: N tokens, B sequences; l log-prob, k log-ratio, q = old - rollout log-prob.
"""

import math
from typing import Any

import torch

from fastgrpo.losses.tokens import Tokens, segment_sum

_ROLLOUT_CLAMP = 80.0  # exp(80) is finite in float32


class Row:
    """A packed row with masked tokens selected away, so that no arithmetic ever sees them.

    What a `LossType` formula reads, (N,) each: logp, old, ref, A (advantages), k = logp - old,
    level_k (k, or its mean over the sequence at level "sequence"), ratio = e^level_k; mask,
    seq_ids; weights (rollout correction) and high_entropy (tokens above the entropy quantile),
    None without; obj. lengths: (B,) unmasked tokens. What it measures it puts in `metrics`.
    """

    def __init__(self, t: Tokens, obj: Any, num_rows: int) -> None:
        self.obj, self.num_rows, self.seq_ids, self.mask = obj, num_rows, t.seq_ids, t.mask
        self.metrics: dict[str, torch.Tensor] = {}
        self.logp = self.select(t.logp)
        self.old = self.logp.detach() if t.old_logp is None else self.select(t.old_logp.detach())
        self.ref = None if t.ref_logp is None else self.select(t.ref_logp)
        self.A = self.select(t.advantages.to(self.logp.dtype))
        self.lengths = segment_sum(t.mask.to(self.logp.dtype), t.seq_ids, num_rows)
        self.k = self.logp - self.old
        self.rollout = None if t.rollout_logp is None else self.select(t.rollout_logp)
        self.high_entropy = self._high_entropy(t.entropy)
        self.weights = self._rollout_weights()
        self.on_policy = self._on_policy()
        self.level_k = self.k
        if obj.importance_sampling_level == "sequence":
            self.level_k = self.sequence_mean(self.k)[t.seq_ids]
        self.ratio = self.exp(self.level_k)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """x where the mask is set, else exactly 0 (selected: 0 * inf would be NaN)."""
        return torch.where(self.mask, x, torch.zeros_like(x))

    def exp(self, k: torch.Tensor) -> torch.Tensor:
        """e^k with k clamped to +-log_ratio_clamp."""
        return k.clamp(-self.obj.log_ratio_clamp, self.obj.log_ratio_clamp).exp()

    def by_sign(self, positive: torch.Tensor, yes: float, no: float) -> torch.Tensor:
        """yes where positive, else no, in the dtype of the row (where() of floats is float32)."""
        like = self.A
        return torch.where(positive, torch.full_like(like, yes), torch.full_like(like, no))

    def sequence_sum(self, x: torch.Tensor) -> torch.Tensor:
        return segment_sum(self.select(x), self.seq_ids, self.num_rows)

    def sequence_mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.sequence_sum(x) / self.lengths.clamp(min=1.0)

    def _high_entropy(self, entropy: torch.Tensor | None) -> torch.Tensor | None:
        if self.obj.top_entropy_quantile >= 1.0:
            return None
        values = entropy.detach()[self.mask].float()  # TRL's threshold is float32
        if values.numel() == 0:
            return self.mask
        threshold = torch.quantile(values, 1.0 - self.obj.top_entropy_quantile)
        return self.mask & (entropy.detach() >= threshold)

    def _rollout_weights(self) -> torch.Tensor | None:
        """w(q) of the rollout correction, (N,); vespo takes its logarithm per token instead."""
        obj = self.obj
        if self.rollout is None or not obj.vllm_importance_sampling_correction:
            return None
        q = self.old.detach() - self.rollout
        q = self.select(q.where(~q.isnan(), torch.zeros_like(q)))
        level, how = obj.vllm_importance_sampling_mode.split("_")
        if level == "sequence":
            q = self.sequence_sum(q)
        elif level == "geometric":
            q = self.sequence_mean(q)
        w = q.clamp(-_ROLLOUT_CLAMP, _ROLLOUT_CLAMP).exp()
        low, high = obj.rollout_bounds
        if how == "truncate":
            if low is not None or high is not None:
                w = w.clamp(low, high)
        else:
            inside = (w >= (0.0 if low is None else low)) & (
                w <= (math.inf if high is None else high)
            )
            w = w.where(inside, torch.zeros_like(w))
        self.metrics["rollout_ratio"] = w
        self.metrics["rollout_difference"] = self.old.detach() - self.rollout
        return w if level == "token" else w[self.seq_ids]

    def _on_policy(self) -> torch.Tensor | None:
        """OPSM of DeepSeek-V3.2: which tokens' sequences stay."""
        threshold = self.obj.off_policy_mask_threshold
        if threshold is None:
            return None
        drift = (self.old if self.rollout is None else self.rollout) - self.logp.detach()
        drift = drift.where(~drift.isnan(), torch.zeros_like(drift))
        return (self.A >= 0) | (self.sequence_mean(drift) <= threshold)[self.seq_ids]
