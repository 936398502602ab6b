# SPDX-License-Identifier: Apache-2.0
"""The first micro-batch stops a run whose numbers are not TRL's."""

import logging

import pytest

pytest.importorskip("trl")

from fastgrpo.engine import SelfCheckError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer  # noqa: E402


@pytest.mark.parametrize("path", ["fused", "per-token"])
def test_the_self_check_stops_a_run_whose_numbers_differ(checkpoint, tmp_path, monkeypatch, path):
    from fastgrpo.integrations.trl import loss as fused
    from fastgrpo.integrations.trl import trainer as per_token

    def shifted(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            for group in getattr(result, "scores", result):
                group.logp = [logp + 0.01 for logp in group.logp]
            return result

        return call

    options = dict(max_steps=1, beta=0.0)
    if path == "fused":
        monkeypatch.setattr(fused, "loss_of_groups", shifted(fused.loss_of_groups))
    else:
        monkeypatch.setattr(per_token, "score", shifted(per_token.score))
        options["top_entropy_quantile"] = 0.5
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "checked", **options)
    with pytest.raises(RuntimeError, match="differ from TRL's on the first micro-batch.* max 0.01"):
        trainer.train()
    assert trainer.state.global_step == 0
    unchecked = {"self_check": False}
    build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "not", fast=unchecked, **options).train()


def test_the_self_check_stops_a_run_whose_gradient_is_cut(checkpoint, tmp_path):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, beta=0.0)

    def cut(module, args, kwargs, output):
        return output.detach() if kwargs.get("fg_layout") is not None else output

    layer = trainer.model.model.language_model.layers[1]
    layer.register_forward_hook(cut, with_kwargs=True)
    with pytest.raises(SelfCheckError, match="does not arrive through the packed row"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_self_check_compares_the_loss_itself(checkpoint, tmp_path, monkeypatch):
    from fastgrpo.integrations.trl.loss import LossMixin

    right = LossMixin._denominators
    monkeypatch.setattr(
        LossMixin, "_denominators", lambda *args: right(*args) | {"num_tokens": 3.0}
    )
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, num_iterations=2, beta=0.04
    )
    trainer.ref_model.lm_head.weight.data.mul_(1.1)  # a loss that is not zero at once
    with pytest.raises(RuntimeError, match="fused loss of the first micro-batch"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_nothing_is_logged_by_a_healthy_run(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=1).train()
    assert [record for record in caplog.records if record.name.startswith("fastgrpo")] == []
