# SPDX-License-Identifier: Apache-2.0
"""What a recipe does with log-probs under a perturbed image, as one frozen description."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgrpo.errors import InputError
from fastgrpo.images.perturb import PERTURBATIONS
from fastgrpo.rewards.core.schedule import Schedule


@dataclass(frozen=True)
class PerceptionRule:
    """The terms of PAPO and VPPO; each is off at its default.

    The policy's log-probs under a ``perturbation`` of the images (one per prompt, shared by its
    completions) come from the old policy without gradient, in the same packed layout.

    PAPO (arXiv 2507.06448): the loss gains
      - kl_coef mean(k) + entropy_coef mean(-logp) + perturbed_entropy_coef mean(-logp_perturbed)
    with k = clamp(e^d - d - 1, -10, 10), d = clamp(logp_perturbed - logp, +-20), and the mean that
    of the policy loss. The third term moves the loss, not the gradient. ``kl_token_share`` keeps
    the k of the top share of each completion's tokens, ``kl_ceiling`` clamps k to [0, ceiling].

    VPPO (huaixuheqing/VPPO-RL): ``token_share`` keeps the policy loss of the share of tokens that
    depend most on the image (the mean still divides by all tokens); ``weight_minimum`` scales
    advantages by ``trajectory_weights`` over the whole generation batch.

    ``kl_coef`` is a number or a schedule; the entropy terms are scaled by the same share of their
    start.
    """

    perturbation: str = "blacken"
    options: dict[str, float] = field(default_factory=dict)
    kl_coef: Schedule = Schedule()
    entropy_coef: float = 0.0
    perturbed_entropy_coef: float = 0.0
    kl_token_share: float | None = None
    kl_ceiling: float | None = None
    token_share: float | None = None
    weight_minimum: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_coef", Schedule.parse(self.kl_coef))
        if self.perturbation not in PERTURBATIONS:
            raise InputError(
                f"perturbation: expected one of {sorted(PERTURBATIONS)}, got {self.perturbation!r}"
            )
        for name in ("kl_token_share", "token_share", "weight_minimum"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise InputError(f"{name}: expected a share in (0, 1], got {value}")

    @property
    def has_loss_terms(self) -> bool:
        """Whether anything is added to the loss (PAPO), beyond the advantages (VPPO)."""
        schedule = self.kl_coef
        moves = schedule.start or schedule.end or schedule.values
        return bool(moves or self.entropy_coef or self.perturbed_entropy_coef)
