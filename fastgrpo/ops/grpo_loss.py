# SPDX-License-Identifier: Apache-2.0
"""grpo_loss: every GRPO variant on packed per-token log-probs."""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastgrpo.checks import check_tensor
from fastgrpo.errors import InputError
from fastgrpo.losses.metrics import merge_stats, metric_names
from fastgrpo.losses.tokens import IGNORE, Scales, Tokens, token_scales
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.select import select
from fastgrpo.reference.grpo_loss import loss_terms
from fastgrpo.reference.grpo_metrics import metric_stats


@dataclass(frozen=True)
class GRPOLoss:
    """Result of `grpo_loss` and `linear_grpo_loss`.

    loss: 0-dim, differentiable. logp: (N,) detached.
    stats: (K, 2) mergeable statistics behind `metrics`, in the order of `stat_names`; see
    `merge_metrics`. plan, overflow, entropy: see `linear_grpo_loss`.
    """

    loss: torch.Tensor
    logp: torch.Tensor
    stats: torch.Tensor
    stat_names: tuple[str, ...]
    plan: str = "autograd"
    overflow: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @functools.cached_property
    def metrics(self) -> dict[str, torch.Tensor]:
        """0-dim tensors under TRL's names, made when they are first read."""
        return merge_stats(list(self.stat_names), [self.stats])


def merge_metrics(parts: Sequence[GRPOLoss]) -> dict[str, torch.Tensor]:
    """The metrics of a batch from the results of its micro-batches: exact, whatever the split."""
    if not parts:
        raise InputError("parts: expected at least one result, got none")
    return merge_stats(list(parts[0].stat_names), [part.stats for part in parts])


def grpo_loss(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    obj: Objective,
    *,
    seq_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    num_tokens: float | torch.Tensor | None = None,
    num_sequences: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    kl_terms: Sequence[KLTerm] = (),
    sampled_entropy_coef: float = 0.0,
    impl: str | None = None,
) -> GRPOLoss:
    """The GRPO loss of packed log-probs; formulas and sources in `Objective`.

        loss = sum_t a_t (u_t policy_t + beta kl_t + sum_i c_i kl_i,t - s l_t) - c_H mean entropy

    with a_t = 0 for masked tokens (selected, never multiplied: they may hold NaN or inf), else
    1 / num_tokens, 1 / (|m_i| num_sequences), ... by `obj.aggregator`.

    Args:
        logp: (N,) floating, packed. seq_ids: (N,) int64, non-decreasing, 0..B-1; a sequence may
            have no token. mask: (N,) bool or 0/1.
        advantages: (B,), or (N,) one per token; of length N they
            are per token unless seq_ids names N sequences.
        old_logp, ref_logp, rollout_logp: (N,) constants; old_logp None means on-policy (the
            ratio is exactly 1). entropy: (N,), needed by entropy_coef and top_entropy_quantile.
        num_tokens, num_sequences: unmasked tokens and sequences of the whole optimizer step
            (default: of this call), so that micro-batches add up to the step. A sequence without
            a token counts, as in TRL.
        token_weights: (N,) u_t. kl_terms: more KL streams. sampled_entropy_coef: s; its term is
            the sampled entropy -l_t, so a positive s lowers the entropy (PAPO).
        impl: "reference" or "triton". A loss type without a Triton formula, and float64, run as
            "reference" on any device.

    Returns GRPOLoss; loss is differentiable in logp, entropy and the kl_terms' other_logp.
    """
    t = Tokens(
        logp,
        advantages,
        seq_ids,
        mask,
        old_logp,
        ref_logp,
        rollout_logp,
        entropy,
        token_weights,
    )
    call = checked(t, obj, num_tokens, num_sequences, kl_terms, sampled_entropy_coef)
    chosen = select_loss(logp, obj, impl)
    if chosen != "triton" or kl_terms:  # the kernel reads the call as it is
        call = call.per_token()
    return call.evaluate(chosen)


class LossCall(NamedTuple):
    """A checked call of a GRPO loss, whole: which tokens, what is minimised, over how many.

    Without log-probs (the projection makes them) `tokens.logp` is only of the right length. As
    checked, the mask may be absent, advantages `tokens.per_sequence` are (B,), and scales are
    None; `per_token` has all of them (N,).
    """

    tokens: Tokens
    obj: Objective
    num_rows: int
    scales: Scales | None
    kl_terms: tuple[KLTerm, ...]
    sampled_entropy_coef: float
    num_tokens: float | torch.Tensor | None = None
    num_sequences: float | torch.Tensor | None = None

    def per_token(self) -> "LossCall":
        """The call with a mask, an advantage and a weight for each token."""
        t = self.tokens
        mask = torch.ones_like(t.seq_ids, dtype=torch.bool) if t.mask is None else t.mask.bool()
        advantages = t.advantages[t.seq_ids] if t.per_sequence else t.advantages
        totals = self.num_tokens, self.num_sequences
        scales = token_scales(self.obj, t.seq_ids, mask, self.num_rows, *totals, t.logp.dtype)
        return self._replace(tokens=t._replace(mask=mask, advantages=advantages), scales=scales)

    @property
    def names(self) -> list[str]:
        """The metric names of the call."""
        t = self.tokens
        return metric_names(
            self.obj,
            has_ref=t.ref_logp is not None,
            has_rollout=t.rollout_logp is not None,
            has_entropy=t.entropy is not None,
            num_kl_terms=len(self.kl_terms),
        )

    def loss_and_stats(
        self, impl: str, names: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, differentiable in logp and entropy, and its statistics of these names."""
        names = self.names if names is None else names
        if impl == "triton":
            kernel = importlib.import_module("fastgrpo_kernels.grpo_loss")
            return kernel.grpo_terms(*self, names)
        loss, terms = loss_terms(*self[:6])
        t = self.tokens._replace(logp=self.tokens.logp.detach())
        return loss, metric_stats(t, self.obj, self.num_rows, terms, names)

    def evaluate(self, impl: str) -> GRPOLoss:
        """The result of the call."""
        loss, stats = self.loss_and_stats(impl)
        t = self.tokens
        entropy = None if t.entropy is None else t.entropy.detach()
        return GRPOLoss(loss, t.logp.detach(), stats, tuple(self.names), entropy=entropy)


def checked(
    t: Tokens,
    obj: Objective,
    num_tokens: float | torch.Tensor | None,
    num_sequences: float | torch.Tensor | None,
    kl_terms: Sequence[KLTerm],
    sampled_entropy_coef: float,
    targets: torch.Tensor | None = None,
) -> LossCall:
    """The call with every argument checked.

    A mask of None keeps every token; a token whose target is `IGNORE` is masked in any case.
    """
    _check_tokens(t, obj)
    _check_kl_terms(t.logp, kl_terms)
    if targets is not None:
        kept = targets != IGNORE
        t = t._replace(mask=kept if t.mask is None else kept & t.mask.bool())
    num_rows, per_sequence = _resolve_advantages(t.advantages, t.seq_ids)
    t = t._replace(per_sequence=per_sequence)
    rest = (tuple(kl_terms), sampled_entropy_coef, num_tokens, num_sequences)
    return LossCall(t, obj, num_rows, None, *rest)


def select_loss(logp: torch.Tensor, obj: Objective, impl: str | None) -> str:
    """The implementation that serves `logp`: the kernel computes in float32, and its formulas
    are those the loss types name."""
    reason = None
    if logp.dtype == torch.float64:
        reason = "logp is float64"
    elif obj.loss.kernel is None:
        reason = f"loss type {obj.loss_type!r} has no Triton formula"
    if reason and impl == "triton":
        raise InputError(f"impl: grpo_loss cannot run as 'triton': {reason}")
    return select("grpo_loss", logp.device, "reference" if reason else impl)


def _resolve_advantages(advantages: torch.Tensor, seq_ids: torch.Tensor) -> tuple[int, bool]:
    """(B, whether the advantages are given per sequence).

    Of length N they are per token, unless the ids name N sequences.
    """
    N, B = seq_ids.shape[0], advantages.shape[0]
    if B == N and N > 0:
        B = int(seq_ids[-1]) + 1
        if B != N:
            return B, False
    return B, True


def _check_tokens(t: Tokens, obj: Objective) -> None:
    """InputError for the first argument of a GRPO loss that does not fit."""
    if not isinstance(obj, Objective):
        raise InputError(f"obj: expected fastgrpo.Objective, got {type(obj).__name__}")
    sizes: dict[str, int] = {}
    device = t.logp.device if isinstance(t.logp, torch.Tensor) else None
    check_tensor("logp", t.logp, "N", like=sizes, floating=True)
    check_tensor("seq_ids", t.seq_ids, "N", like=sizes, dtypes=(torch.int64,), device=device)
    check_tensor("advantages", t.advantages, "B", floating=True, device=device)
    for name in ("mask", "old_logp", "ref_logp", "rollout_logp", "token_weights"):
        if getattr(t, name) is not None:
            check_tensor(name, getattr(t, name), "N", like=sizes, device=device)
    if t.entropy is not None:
        check_tensor("entropy", t.entropy, "N", like=sizes, floating=True, device=device)
    elif obj.needs_entropy:
        name = "entropy_coef" if obj.entropy_coef != 0.0 else "top_entropy_quantile"
        raise InputError(f"entropy: {name} needs it, expected (N,), got None")
    if obj.beta != 0.0 and t.ref_logp is None:
        raise InputError(f"ref_logp: beta is {obj.beta}, expected (N,) log-probs, got None")
    correcting = t.rollout_logp is not None and obj.vllm_importance_sampling_correction
    mode = obj.vllm_importance_sampling_mode
    if correcting and obj.loss.folds_rollout_weights and not mode.startswith("token"):
        raise InputError(
            f"vllm_importance_sampling_mode: {obj.loss_type} folds per-token weights into its "
            f"own, expected a token mode, got {mode!r}"
        )
    if t.logp.device.type == "cpu" and not torch.compiler.is_compiling() and t.seq_ids.numel():
        _check_seq_ids(t.seq_ids, t.advantages)


def _check_seq_ids(seq_ids: torch.Tensor, advantages: torch.Tensor) -> None:
    falling = seq_ids.diff() < 0
    if bool(falling.any()):
        row = int(falling.nonzero()[0, 0]) + 1
        raise InputError(f"seq_ids: expected non-decreasing ids, row {row} is {int(seq_ids[row])}")
    if int(seq_ids[0]) < 0:
        raise InputError(f"seq_ids: expected ids >= 0, row 0 is {int(seq_ids[0])}")
    N, B = seq_ids.shape[0], advantages.shape[0]
    if B != N and int(seq_ids[-1]) >= B:
        raise InputError(
            f"advantages: expected (B,) with B > {int(seq_ids[-1])} sequences or (N,) with N={N}, "
            f"got {tuple(advantages.shape)}"
        )


def _check_kl_terms(logp: torch.Tensor, kl_terms: Sequence[KLTerm]) -> None:
    sizes = {"N": logp.shape[0]}
    for i, term in enumerate(kl_terms):
        name = f"kl_terms[{i}]"
        check_tensor(f"{name}.other_logp", term.other_logp, "N", like=sizes, device=logp.device)
        if term.mask is not None:
            check_tensor(f"{name}.mask", term.mask, "N", like=sizes, device=logp.device)
