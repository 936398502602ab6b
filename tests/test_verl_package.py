# SPDX-License-Identifier: Apache-2.0
"""The installed verl's actor on the CPU: its own micro-batch forward and ours, the same numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl")

import verl_cpu  # noqa: E402
from two_ranks import run_two_ranks  # noqa: E402
from verl_rows import padded_batch  # noqa: E402

verl_cpu.install()

from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding  # noqa: E402

from fastgrpo.integrations.verl import FastGRPOEngine  # noqa: E402
from fastgrpo.testing.models import TEXT_VOCAB, grad_error, tiny_model  # noqa: E402

FIXED = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4, "temperature": 0.7}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 45, "temperature": 0.7}
BATCHES = pytest.mark.parametrize("batches", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
LOSSES = {
    "ppo": {},
    "kl and entropy": {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.05},
    "seq-mean-token-sum": {"loss_agg_mode": "seq-mean-token-sum"},
    "seq-mean-token-mean": {"loss_agg_mode": "seq-mean-token-mean"},
    "seq-mean-token-sum-norm": {"loss_agg_mode": "seq-mean-token-sum-norm"},
    "token-sum": {"loss_agg_mode": "token-sum"},
    "gspo": {"policy_loss": {"loss_mode": "gspo"}, "loss_agg_mode": "seq-mean-token-mean"},
}
LORA = {"lora_rank": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    with verl_cpu.processes(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fields(model):
    return padded_batch(model)


def stock_engine(folder, **options):
    """verl's own on transformers' forwards: its replacements, which split rows over processes and
    call flash-attn, last for the process and import names that this transformers may lack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_impl, "apply_monkey_patch", lambda **_: None)
        return verl_cpu.engine_of(FSDPEngineWithLMHead, folder, **options)


def our_engine(folder, **options):
    cls = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert cls is FastGRPOEngine
    return verl_cpu.engine_of(cls, folder, **options)


@pytest.fixture(scope="module")
def stock(folder):
    return stock_engine(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return our_engine(folder)


def inferred(engine, fields, **settings):
    data = verl_cpu.batch_of(fields, calculate_entropy=True, **settings)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    return {key: no_padding_2_padding(value, data) for key, value in output.items()}


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "use_remove_padding"])
@BATCHES
def test_log_probs_and_entropies_are_verls(stock, ours, fields, batches, padded):
    want = inferred(stock, fields, use_remove_padding=not padded, **batches)
    got = inferred(ours, fields, **batches)
    text = fields["responses"] < TEXT_VOCAB  # an image's placeholders have no log-prob here
    for key in ("log_probs", "entropy"):
        assert ((got[key] - want[key]) * text).abs().max() < 2e-5, key


@pytest.mark.parametrize("name", LOSSES)
@BATCHES
def test_loss_and_gradients_are_verls(stock, ours, fields, batches, name):
    loss = verl_cpu.actor_loss(**LOSSES[name])
    settings = {"calculate_entropy": "entropy" in name, "global_batch_size": 8, **batches}
    want = verl_cpu.gradients(stock, fields, loss, use_remove_padding=False, **settings)
    got = verl_cpu.gradients(ours, fields, loss, **settings)
    assert got[0] == pytest.approx(want[0], rel=2e-5, abs=1e-6)
    error, where = grad_error(got[1], want[1])
    assert error < 2e-5, where


def test_a_worker_updates_its_actor_as_with_verls_engine(folder, fields, monkeypatch):
    """Two mini-batches of two epochs through verl's worker, whose registry chooses the engine."""
    monkeypatch.setattr(transformer_impl, "apply_monkey_patch", lambda **_: None)
    for figure in ("max_memory_allocated", "max_memory_reserved"):  # verl logs them
        monkeypatch.setattr(torch.cpu, figure, lambda: 0, raising=False)
    steps = {"mini_batch_size": 4, "global_batch_size": 4, "epochs": 2, **DYNAMIC}
    trained = []
    for vendor, own in (("none", {"use_remove_padding": False}), ("cpu", {})):
        monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
        worker = verl_cpu.worker_of(folder, verl_cpu.actor_loss())
        assert (type(worker.engine) is FastGRPOEngine) == (vendor == "cpu")
        data = verl_cpu.batch_of(fields, **own, **steps)
        metrics = tu.get(worker.train_mini_batch(data), "metrics")
        data = verl_cpu.batch_of(fields, calculate_entropy=True, compute_loss=False, **own, **FIXED)
        logp = no_padding_2_padding(tu.get(worker.infer_batch(data), "log_probs"), data)
        trained.append((metrics, logp))
    (want, verls), (got, ours) = trained
    assert len(want["grad_norm"]) == 4
    for key in ("loss", "grad_norm", "actor/pg_loss"):
        assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-5), key
    assert ((ours - verls) * (fields["responses"] < TEXT_VOCAB)).abs().max() < 1e-3


def test_the_configuration_is_the_switch(tmp_path):
    """A process that imports verl alone, and builds the model's configuration as a worker does."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent / "support")!r})
import verl_cpu
verl_cpu.install()
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
found = lambda: EngineRegistry.get_engine_cls("language_model", "fsdp2")
assert found() is FSDPEngineWithLMHead
verl_cpu.configs({str(tmp_path)!r}, model={{"external_lib": "fastgrpo.integrations.verl"}})
assert found().__name__ == "FastGRPOEngine"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_adapters_and_the_reference_without_them(model, folder, fields, ours):
    """`ref_in_actor`: the reference of a LoRA actor is the actor with its adapters off."""
    loss, settings = verl_cpu.actor_loss(), {"global_batch_size": 8, **DYNAMIC}
    found = []
    for build, own in ((stock_engine, {"use_remove_padding": False}), (our_engine, {})):
        engine = build(folder, model=LORA)
        generator = torch.Generator().manual_seed(0)
        for name, p in engine.module.named_parameters():
            if "lora_" in name:
                p.data.to_local().copy_(0.2 * torch.randn(p.shape, generator=generator))
        grads = verl_cpu.gradients(engine, fields, loss, **own, **settings)[1]
        found.append({n: g for n, g in grads.items() if "lora_" in n})
        with engine.disable_adapter():
            reference = inferred(engine, fields, **own, **FIXED)["log_probs"]
        base = inferred(ours, fields, **FIXED)["log_probs"]
        assert ((reference - base) * (fields["responses"] < TEXT_VOCAB)).abs().max() < 2e-5
    assert grad_error(found[1], found[0])[0] < 2e-5


@pytest.mark.slow
def test_two_processes_with_unequal_work(tmp_path):
    """One has images and more micro-batches; the other text alone."""
    model = tiny_model("qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    engine = our_engine(tmp_path / "model")
    settings = {"global_batch_size": 8, **DYNAMIC}
    want = verl_cpu.gradients(engine, padded_batch(model), verl_cpu.actor_loss(), **settings)[1]
    torch.save(want, tmp_path / "gradients.pt")
    run_two_ranks(__file__, tmp_path)


def worker(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    fields = padded_batch(tiny_model("qwen2_5_vl"))
    pictured = [bool(vision) for vision in fields["multi_modal_inputs"]]
    mine = [row for row, images in enumerate(pictured) if images == (rank == 0)]
    share = {
        key: value[mine] if torch.is_tensor(value) else [value[row] for row in mine]
        for key, value in fields.items()
    }
    with verl_cpu.processes(folder, rank, 2):
        engine = our_engine(folder / "model")
        settings = {"global_batch_size": 8, **DYNAMIC}
        got = verl_cpu.gradients(engine, share, verl_cpu.actor_loss(), **settings)[1]
        error, where = grad_error(got, torch.load(folder / "gradients.pt", weights_only=True))
    assert error <= 2e-5, (where, error)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
