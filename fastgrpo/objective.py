# SPDX-License-Identifier: Apache-2.0
"""The GRPO objective: what is minimised, as one frozen description.

Letters: l log-prob, k = l - old its log-ratio, r = exp(k), A advantage, |m_i| tokens of sequence
i, sg stop-gradient, e = epsilon, eh = epsilon_high.
"""

import dataclasses
from dataclasses import dataclass

import torch

from fastgrpo.checks import check_choice, check_positive
from fastgrpo.errors import InputError
from fastgrpo.losses.loss_type import LEVELS, LossType
from fastgrpo.losses.types import LOSS_TYPES

_REFUSED = {
    "real": "its log-sum-exp runs over the groups of a batch, which packed rows do not carry",
    "clip_cov": "its token selection is random over the whole batch",
    "kl_cov": "its token selection ranks covariances over the whole batch",
    "fipo": "its weights look ahead in the sequence; pass them as token_weights",
}
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")
ROLLOUT_MODES = tuple(
    f"{level}_{how}" for level in ("token", "sequence", "geometric") for how in ("truncate", "mask")
)


@dataclass(frozen=True)
class KLTerm:
    """One more KL stream: adds coefficient * KL(l, other) to each token's loss.

        x = clamp(other_logp - l, +-log_ratio_clamp),  value = clamp(estimator(x), +-value_clamp)

    other_logp: (N,). coefficient carries the sign (PAPO's perception term is -0.02: the
    divergence from the policy that sees a masked image is maximised). estimator as in `token_kl`.
    mask: (N,) tokens the term acts on, within the mask of the call. The denominator is that of
    the policy term. Source: PAPO (arXiv 2507.06448), verl.
    """

    other_logp: torch.Tensor
    coefficient: float
    estimator: str = "k3"
    log_ratio_clamp: float = 20.0
    value_clamp: float | None = None
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("kl_terms.estimator", self.estimator, ESTIMATORS)
        check_positive("kl_terms.log_ratio_clamp", self.log_ratio_clamp)


@dataclass(frozen=True)
class KLStream:
    """A KLTerm of `GRPOStep` before its log-probs are known; they are `Group.streams[name]`.

    `token_share`: the term acts on each completion's tokens at or above the (1 - share) quantile
    of its divergence only (PAPO's optional mask, `advantages.quantile_mask`).
    """

    coefficient: float
    estimator: str = "k3"
    log_ratio_clamp: float = 20.0
    value_clamp: float | None = None
    token_share: float | None = None

    def term(self, other_logp: torch.Tensor) -> KLTerm:
        """The term with its (N,) log-probs."""
        return KLTerm(
            other_logp, self.coefficient, self.estimator, self.log_ratio_clamp, self.value_clamp
        )


@dataclass(frozen=True)
class Objective:
    """What `grpo_loss`, `linear_grpo_loss` and `GRPOStep` minimise. Field names are TRL's.

    loss_type, the loss of a token (source; default aggregation):
      grpo, bnpo, dr_grpo, dapo  -min(min(r, delta) A, clip(r, 1-e, 1+eh) A)   (arXiv 2402.03300,
            TRL, 2503.20783, 2503.14476; mean of sequence means, token mean, sum / (B L_max),
            token mean). delta is INTELLECT-2's two-sided bound, only if set. dual_clip c: for
            A < 0 the loss is at most -c A (arXiv 1912.09729, verl).
      luspo      the same, each sequence summed, mean over sequences (TRL >= 1.10).
      cispo      -sg(min(r, eh)) A l, eh absolute as in TRL (epsilon_high=5); with
            cispo_clip="relative" -sg(clip(r, 1-e, 1+eh)) A l as in verl (arXiv 2506.13585).
      sapo       -A (4/t) sigmoid(t (r - 1)), t = sapo_temperature_pos if A > 0 else _neg
            (arXiv 2511.20347).
      vespo      -sg(phi(w)) A l, log phi = la + ka log w - la w, w = exp sum_t clamp(k, +-20),
            log w in [log 1e-8, 20], (ka, la) by the sign of A; rollout weights folded into w
            (arXiv 2602.10693, TRL).
      gmpo       -A exp(mean_t kc), kc = min(k, eh) if A > 0 else max(k, -e) (arXiv 2507.20673).
      gspo_token -min(s A, clip(s, 1-e, 1+eh) A), s = sg(exp(min(mean_t k, 10))) exp(l - sg(l))
            (arXiv 2507.18071, verl).
      dppo_tv    -A sg(min(r, 20)) l where p - p_old <= eh (A > 0) or >= -e (A < 0), else 0;
      dppo_kl    the same where the binary KL(p_old || p) of the token moved that way is within
            eh / e (arXiv 2602.04879, verl).
      gpg        -A l (arXiv 2504.02546).   reinforce  -A l, meant with rollout weights (verl).
      dro        -(A l - dro_beta/2 k^2) (arXiv 2405.19107, verl).
    real, clip_cov, kl_cov and fipo are refused with the reason.

    importance_sampling_level: "token", or "sequence" (GSPO): k is replaced by its mean over the
      sequence, differentiable through all its tokens; for clipped losses, cispo and sapo.
    beta, kl_estimator: beta * token_kl(l, ref). use_bias_correction_kl multiplies it by r (of
      the level in use), so that the gradient is that of the KL itself (arXiv 2506.09477).
      At level "sequence" TRL's vespo uses the sequence ratio here only.
    log_ratio_clamp: k (after a sequence mean) and ref - l are clamped to +- this before exp;
      TRL has no such clamp and overflows; gradients beyond it are 0. kl_value_clamp: verl's 10.
    off_policy_mask_threshold: OPSM of DeepSeek-V3.2: a sequence is dropped where A < 0 and
      mean(rollout - l) exceeds it (rollout, or old log-probs without them).
    top_entropy_quantile: only tokens at or above the (1 - q) entropy quantile of the call keep
      their policy term (arXiv 2506.01939). entropy_coef: - coef * mean entropy of those tokens.
    vllm_importance_sampling_*: with rollout log-probs, the policy term is multiplied by w(q),
      q = old - rollout: mode token_*: per token; sequence_*: sum of q; geometric_*: mean of q;
      *_truncate (TIS): clip(e^q, min, max); *_mask (IcePop, MIS): 0 outside [min, max]. A NaN
      rollout log-prob counts as q = 0; q is clamped to +-80. vespo takes token modes only.
    aggregation: None takes the loss type's own; else verl's token-mean (sum / num_tokens),
      token-sum, seq-mean-token-sum, seq-mean-token-mean, seq-mean-token-sum-norm (sum /
      (num_sequences max_completion_length)).
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    temperature: float = 1.0
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    max_completion_length: int | None = None
    aggregation: str | None = None
    off_policy_mask_threshold: float | None = None
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    cispo_clip: str = "absolute"
    dro_beta: float = 1.0
    log_ratio_clamp: float = 20.0
    kl_value_clamp: float | None = None

    def __post_init__(self) -> None:
        if self.loss_type in _REFUSED:
            raise InputError(f"loss_type: {self.loss_type!r}: {_REFUSED[self.loss_type]}")
        check_choice("loss_type", self.loss_type, tuple(LOSS_TYPES))
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_choice("kl_estimator", self.kl_estimator, ESTIMATORS)
        check_choice("aggregation", self.aggregation, (None, *AGGREGATIONS))
        check_choice("cispo_clip", self.cispo_clip, ("absolute", "relative"))
        check_choice(
            "vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, ROLLOUT_MODES
        )
        for name in ("temperature", "log_ratio_clamp", "sapo_temperature_pos"):
            check_positive(name, getattr(self, name))
        check_positive("sapo_temperature_neg", self.sapo_temperature_neg)
        for name in ("epsilon", "epsilon_high", "delta", "dual_clip", "kl_value_clamp"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{name}: expected a finite number >= 0, got {value!r}")
        quantile = self.top_entropy_quantile
        if not 0.0 <= quantile <= 1.0:
            raise InputError(f"top_entropy_quantile: expected a number in [0, 1], got {quantile}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.importance_sampling_level not in self.loss.levels:
            raise InputError(
                f"importance_sampling_level: {self.loss_type!r} defines its own level, "
                "expected 'token'"
            )
        if not self.loss.bounds:
            for name in ("delta", "dual_clip"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: {self.loss_type!r} has no such bound, expected None")
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise InputError(f"dual_clip: expected a number > 1, got {self.dual_clip}")
        if self.max_completion_length is None and self.aggregator == "seq-mean-token-sum-norm":
            raise InputError(f"max_completion_length: {self.loss_type!r} divides by it, got None")
        low, high = self.rollout_bounds
        if low is not None and high is not None and low >= high:
            raise InputError(
                f"vllm_importance_sampling_clip_min: expected below clip_max {high}, got {low}"
            )

    @property
    def loss(self) -> LossType:
        """What is known of the loss type."""
        return LOSS_TYPES[self.loss_type]

    @property
    def clip_high(self) -> float:
        """epsilon_high, which defaults to epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def rollout_bounds(self) -> tuple[float | None, float | None]:
        """(clip_min, clip_max) of the rollout correction."""
        return self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max

    @property
    def aggregator(self) -> str:
        """The aggregation in use."""
        return self.aggregation or self.loss.aggregation

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss itself depends on the entropy of the tokens."""
        return self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0

    def couples_tokens(self, with_rollout: bool) -> bool:
        """Whether a token's loss depends on the log-probs of the other tokens of its sequence."""
        rollout = with_rollout and self.vllm_importance_sampling_correction
        return (
            self.importance_sampling_level == "sequence"
            or self.loss.couples
            or self.off_policy_mask_threshold is not None
            or (rollout and not self.vllm_importance_sampling_mode.startswith("token"))
        )

    @classmethod
    def from_trl(cls, config: object) -> "Objective":
        """The objective of a TRL 1.16 GRPOConfig (any object with its attributes)."""
        if getattr(config, "use_adaptive_entropy", False):
            raise InputError(
                "use_adaptive_entropy: the coefficient changes every step; set entropy_coef with "
                "dataclasses.replace instead"
            )
        names = [f.name for f in dataclasses.fields(cls) if hasattr(config, f.name)]
        values = {name: getattr(config, name) for name in names}
        values["vllm_importance_sampling_correction"] = bool(
            getattr(config, "use_vllm", False)
            and getattr(config, "vllm_importance_sampling_correction", False)
        )
        return cls(**values)
