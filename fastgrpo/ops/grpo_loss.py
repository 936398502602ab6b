"""grpo_loss: every GRPO variant on packed per-token log-probs."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fastgrpo.checks import check_tensor
from fastgrpo.errors import InputError
from fastgrpo.losses.metrics import merge_stats, metric_names
from fastgrpo.losses.tokens import Scales, Tokens, token_scales
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.select import select
from fastgrpo.reference.grpo_loss import loss_terms
from fastgrpo.reference.grpo_metrics import metric_stats


@dataclass(frozen=True)
class GRPOLoss:
    """Result of `grpo_loss` and `linear_grpo_loss`.

    loss: 0-dim, differentiable. metrics: 0-dim tensors under TRL's names. logp: (N,) detached.
    stats: (K, 2) mergeable statistics behind `metrics`, in the order of `stat_names`; see
    `merge_metrics`. plan, overflow: see `linear_grpo_loss`; only it sets them.
    """

    loss: torch.Tensor
    logp: torch.Tensor
    stats: torch.Tensor
    stat_names: tuple[str, ...]
    plan: str = "autograd"
    overflow: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        metrics = merge_stats(list(self.stat_names), [self.stats])
        object.__setattr__(self, "metrics", metrics)


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
        impl: "reference" or "triton".

    Returns GRPOLoss; loss is differentiable in logp, entropy and the kl_terms' other_logp.
    """
    check_loss_inputs(logp, advantages, obj, seq_ids, mask, old_logp, ref_logp, rollout_logp)
    check_loss_extras(logp, obj, entropy, token_weights, kl_terms)
    impl = select_loss(logp, impl)
    advantages, num_rows, per_sequence = resolve_advantages(advantages, seq_ids)
    t = Tokens(
        logp,
        advantages,
        seq_ids,
        bool_mask(mask, logp),
        old_logp,
        ref_logp,
        rollout_logp,
        entropy,
        token_weights,
        per_sequence,
    )
    scales = token_scales(obj, seq_ids, t.mask, num_rows, num_tokens, num_sequences, logp.dtype)
    names = names_of(obj, ref_logp, rollout_logp, entropy, kl_terms)
    evaluate = terms_and_stats(impl)
    loss, stats = evaluate(t, obj, num_rows, scales, kl_terms, sampled_entropy_coef, names)
    return GRPOLoss(loss, logp.detach(), stats, tuple(names))


def select_loss(logp: torch.Tensor, impl: str | None) -> str:
    """The implementation that serves `logp`: the kernel computes in float32."""
    if logp.dtype == torch.float64:
        if impl == "triton":
            raise InputError("impl: grpo_loss cannot run as 'triton': logp is float64")
        impl = impl or "reference"
    return select("grpo_loss", logp.device, impl)


def terms_and_stats(impl: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The function that gives the loss of `Tokens` and its metric statistics."""
    if impl == "triton":
        return importlib.import_module("fastgrpo_kernels.grpo_loss").grpo_terms
    return _reference_terms


def _reference_terms(
    t: Tokens,
    obj: Objective,
    num_rows: int,
    scales: Scales,
    kl_terms: Sequence[KLTerm],
    sampled_entropy_coef: float,
    names: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    loss, terms = loss_terms(t, obj, num_rows, scales, kl_terms, sampled_entropy_coef)
    return loss, metric_stats(t._replace(logp=t.logp.detach()), obj, num_rows, terms, names)


def names_of(
    obj: Objective,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    kl_terms: Sequence[KLTerm],
) -> list[str]:
    """The metric names of a call with these arguments."""
    present = (ref_logp is not None, rollout_logp is not None, entropy is not None)
    return metric_names(obj, *present, len(kl_terms))


def bool_mask(mask: torch.Tensor | None, logp: torch.Tensor) -> torch.Tensor:
    """The mask as booleans; None keeps every token."""
    if mask is None:
        return torch.ones(logp.shape[0], dtype=torch.bool, device=logp.device)
    return mask.bool()


def resolve_advantages(
    advantages: torch.Tensor, seq_ids: torch.Tensor
) -> tuple[torch.Tensor, int, bool]:
    """((N,) advantages, B, whether they were given per sequence).

    Of length N they are per token, unless the ids name N sequences.
    """
    N, B = seq_ids.shape[0], advantages.shape[0]
    if B == N and N > 0:
        B = int(seq_ids[-1]) + 1
        if B != N:
            return advantages, B, False
    return advantages[seq_ids], B, True


def check_loss_inputs(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    obj: Objective,
    seq_ids: torch.Tensor,
    mask: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
) -> None:
    """InputError for the first argument of a GRPO loss that does not fit."""
    if not isinstance(obj, Objective):
        raise InputError(f"obj: expected fastgrpo.Objective, got {type(obj).__name__}")
    sizes: dict[str, int] = {}
    device = logp.device if isinstance(logp, torch.Tensor) else None
    check_tensor("logp", logp, "N", like=sizes, floating=True)
    check_tensor("seq_ids", seq_ids, "N", like=sizes, dtypes=(torch.int64,), device=device)
    check_tensor("advantages", advantages, "B", floating=True, device=device)
    for name, x in (
        ("mask", mask),
        ("old_logp", old_logp),
        ("ref_logp", ref_logp),
        ("rollout_logp", rollout_logp),
    ):
        if x is not None:
            check_tensor(name, x, "N", like=sizes, device=device)
    if obj.beta != 0.0 and ref_logp is None:
        raise InputError(f"ref_logp: beta is {obj.beta}, expected (N,) log-probs, got None")
    correcting = rollout_logp is not None and obj.vllm_importance_sampling_correction
    if correcting and obj.loss_type == "vespo":
        if not obj.vllm_importance_sampling_mode.startswith("token"):
            raise InputError(
                "vllm_importance_sampling_mode: vespo folds per-token weights into its own, "
                f"expected a token mode, got {obj.vllm_importance_sampling_mode!r}"
            )
    if logp.device.type == "cpu" and not torch.compiler.is_compiling() and seq_ids.numel():
        _check_seq_ids(seq_ids, advantages)


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


def check_loss_extras(
    logp: torch.Tensor,
    obj: Objective,
    entropy: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    kl_terms: Sequence[KLTerm],
) -> None:
    """InputError for the first optional input of a GRPO loss that does not fit."""
    sizes = {"N": logp.shape[0]}
    if entropy is not None:
        check_tensor("entropy", entropy, "N", like=sizes, floating=True, device=logp.device)
    elif obj.needs_entropy:
        name = "entropy_coef" if obj.entropy_coef != 0.0 else "top_entropy_quantile"
        raise InputError(f"entropy: {name} needs it, expected (N,), got None")
    if token_weights is not None:
        check_tensor("token_weights", token_weights, "N", like=sizes, device=logp.device)
    for i, term in enumerate(kl_terms):
        name = f"kl_terms[{i}]"
        check_tensor(f"{name}.other_logp", term.other_logp, "N", like=sizes, device=logp.device)
        if term.mask is not None:
            check_tensor(f"{name}.mask", term.mask, "N", like=sizes, device=logp.device)
