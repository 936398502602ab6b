# SPDX-License-Identifier: Apache-2.0
"""Image features that training does not change, encoded once for a generation batch."""

from __future__ import annotations

import torch
from torch import nn

from fastgrpo.engine.parallel import in_shards
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.vision import KeptFeatures


class FeatureMixin:
    """Rollout, old, reference and policy passes over one generation batch share its features.

    Where nothing before the decoder is trained or adapted, and weights are whole: a sharded tower
    is a collective, which no process may leave out. A reference model shares them if its tower is
    the policy's, bit for bit.
    """

    _features: KeptFeatures | None = None
    _same_tower: bool | None = None

    def _generate_and_score_completions(self, inputs):
        self._features = KeptFeatures()
        return super()._generate_and_score_completions(inputs)

    def _kept_features(self, model: nn.Module) -> KeptFeatures | None:
        """The features that passes of `model` may use and add to, if any."""
        policy = Adapter(self.accelerator.unwrap_model(self.model))
        own = Adapter(model).core is policy.core
        if self._features is None or in_shards(policy.core):
            return None
        if not policy.features_are_constant() or not (own or self._reference_shares(policy)):
            return None
        return self._features

    def _reference_shares(self, policy: Adapter) -> bool:
        if self.args.sync_ref_model:  # its mixture of equal weights may differ in the last bit
            return False
        if self._same_tower is None:
            reference = Adapter(self.accelerator.unwrap_model(self.ref_model))
            self._same_tower = _same_weights(_before_decoder(policy), _before_decoder(reference))
        return self._same_tower


def _before_decoder(adapter: Adapter) -> list[torch.Tensor]:
    decoder = {id(p) for p in adapter.core.get_decoder().parameters()}
    decoder |= {id(p) for p in adapter.head.parameters()}
    return [p for p in adapter.core.parameters() if id(p) not in decoder]


def _same_weights(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all())
        for x, y in zip(a, b, strict=True)
    )
