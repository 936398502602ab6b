# SPDX-License-Identifier: Apache-2.0
"""The installed verl's actor on the CPU: its own micro-batch forward and ours, the same numbers."""

import pytest

pytest.importorskip("verl")

import verl_cpu  # noqa: E402
from verl_rows import padded_batch  # noqa: E402

verl_cpu.install()

from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402

from fastgrpo.integrations.verl import FastGRPOEngine  # noqa: E402
from fastgrpo.testing.models import grad_error, tiny_model  # noqa: E402

FIXED = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 80}
LOSSES = {
    "ppo": {},
    "kl and entropy": {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.05},
    "seq-mean-token-sum": {"loss_agg_mode": "seq-mean-token-sum"},
    "seq-mean-token-mean": {"loss_agg_mode": "seq-mean-token-mean"},
    "seq-mean-token-sum-norm": {"loss_agg_mode": "seq-mean-token-sum-norm"},
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with verl_cpu.one_process(tmp_path_factory.mktemp("store")):
        yield


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    tiny_model(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fields(family):
    return padded_batch(tiny_model(family))


@pytest.fixture
def stock(folder, monkeypatch):
    """verl's own engine without its class patches, which would reach ours in this process."""
    import verl.workers.engine.fsdp.transformer_impl as impl

    monkeypatch.setattr(impl, "apply_monkey_patch", lambda **_: None)
    return verl_cpu.engine_of(FSDPEngineWithLMHead, folder)


@pytest.fixture
def ours(folder):
    cls = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert cls is FastGRPOEngine
    return verl_cpu.engine_of(cls, folder)


def inferred(engine, fields, **settings):
    data = verl_cpu.batch_of(fields, calculate_entropy=True, **settings)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    return {key: no_padding_2_padding(value, data) for key, value in output.items()}


def gradients(engine, fields, loss, **settings):
    data = verl_cpu.batch_of(fields, global_batch_size=len(fields["input_ids"]), **settings)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss, forward_only=False)
        named = engine.module.named_parameters()
        grads = {n: None if p.grad is None else p.grad.full_tensor().clone() for n, p in named}
    return sum(output["loss"]), output["metrics"], grads


@pytest.mark.parametrize("batches", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
def test_log_probs_and_entropies_are_verls(stock, ours, fields, batches):
    settings = {"temperature": 0.7, **batches}
    want = inferred(stock, fields, use_remove_padding=False, **settings)
    got = inferred(ours, fields, **settings)
    for key in ("log_probs", "entropy"):
        assert (got[key] - want[key]).abs().max() < 2e-5, key


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batches", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
def test_loss_and_gradients_are_verls(stock, ours, fields, batches, name):
    loss = verl_cpu.actor_loss(**LOSSES[name])
    entropy = "entropy_coeff" in LOSSES[name]
    settings = {"temperature": 0.7, "calculate_entropy": entropy, **batches}
    want = gradients(stock, fields, loss, use_remove_padding=False, **settings)
    got = gradients(ours, fields, loss, **settings)
    assert got[0] == pytest.approx(want[0], rel=2e-5, abs=1e-6)
    error, where = grad_error(got[2], want[2])
    assert error < 2e-5, where
