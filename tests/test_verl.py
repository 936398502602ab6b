# SPDX-License-Identifier: Apache-2.0
"""Our engine for verl on a stand-in with verl's names and parameters; `test_verl_package` has the
installed one."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from verl_rows import padded_batch, scattered_rows, with_its_images

from fastgrpo import InputError
from fastgrpo.models import Adapter
from fastgrpo.testing.models import TEXT_VOCAB, grad_error, naive_logits, take_grads, tiny_model

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def verl(tmp_path_factory):
    """The stand-in, our integration imported on top of it, and a process group of one."""
    import verl_stand_in

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if ours_or_verls(name)}
    verl_stand_in.EngineRegistry.engines.clear()
    verl_stand_in.pretend_installed()
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("verl") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    importlib.import_module("fastgrpo.integrations.verl")
    yield verl_stand_in
    torch.distributed.destroy_process_group()
    for name in [name for name in sys.modules if ours_or_verls(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


def ours_or_verls(name):
    return name.split(".")[0] in ("verl", "tensordict") or "integrations.verl" in name


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3"])
def model(request):
    return tiny_model(request.param)


def engine_of(verl, model, folder, **engine):
    """Our engine for this model, as verl's registry gives it."""
    model.save_pretrained(folder)
    cls = verl.EngineRegistry.get_engine_cls("language_model", "fsdp2")
    built = cls(
        SimpleNamespace(
            hf_config=model.config,
            local_path=folder,
            trust_remote_code=False,
            enable_gradient_checkpointing=False,
            use_fused_kernels=False,
            use_liger=False,
            enable_activation_offload=False,
        ),
        engine_config(**engine),
        None,
        None,
    )
    built.initialize()
    return built


def engine_config(**given):
    off = SimpleNamespace(enable=False, mode="disabled")
    fields = dict(
        strategy="fsdp2",
        model_dtype="fp32",
        forward_only=False,
        ulysses_sequence_parallel_size=1,
        qat=off,
        router_replay=off,
        pad_to_length=False,
        entropy_checkpointing=False,
        entropy_from_logits_with_chunking=False,
    )
    return SimpleNamespace(**(fields | given))


def batch_of(verl, fields, **settings):
    """verl's unpadded batch of `padded_batch`'s fields."""
    attended = fields["attention_mask"].bool()

    def jagged(value):
        rows = [x[..., keep] for x, keep in zip(value, attended, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    unpadded = {key: jagged(fields[key]) for key in ("input_ids", "position_ids")}
    counted = {"loss_mask": fields["response_mask"], "temperature": TEMPERATURE}
    return verl.Batch(fields | unpadded | counted | settings)


FIXED = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 45}


def plain(model):
    """Per row (C,) log-probs and entropies of the ordinary forward of that sequence."""
    for group, c in scattered_rows(model):
        logits = naive_logits(model, with_its_images(model, group, c), group.completions[c])
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        logp = log_p.gather(-1, group.completions[c][:, None])[:, 0]
        yield logp, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("batches", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
def test_log_probs_stand_where_verl_reads_them(verl, model, tmp_path, batches):
    engine = engine_of(verl, model, tmp_path)
    data = batch_of(verl, padded_batch(model), calculate_entropy=True, **batches)
    with torch.no_grad():
        output = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
        wanted = list(plain(model))
    for key, nth in (("log_probs", 0), ("entropy", 1)):
        rows = zip(output[key].unbind(), wanted, scattered_rows(model), strict=True)
        for row, values, (group, c) in rows:
            length = len(values[nth])
            text = group.completions[c] < TEXT_VOCAB  # an image's placeholders have no log-prob
            assert ((row[-length - 1 : -1] - values[nth]) * text).abs().max() < 2e-5
            assert row[-1] == 0 and not row[: -length - 1].any()


def some_loss(model_output, data, dp_group):
    """A clipless policy loss and entropies, of the tokens that count, over the whole step's."""
    columns = [model_output[key].values() for key in ("log_probs", "entropy")]
    ends = data["input_ids"].offsets()[1:].tolist()
    lengths = data["attention_mask"][:, data["prompts"].shape[1] :].sum(1).tolist()
    loss = 0.0
    for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        logp, entropy = (values[end - length - 1 : end - 1] for values in columns)
        loss = loss + loss_of_row(data, row, logp, entropy)
    return loss / data["batch_num_tokens"], {}


def loss_of_row(data, row, logp, entropy):
    ratio = (logp - data["old_log_probs"][row, : len(logp)]).exp()
    term = -ratio * data["advantages"][row, : len(logp)] - 0.05 * entropy
    return (term * data["response_mask"][row, : len(logp)]).sum()


@pytest.mark.parametrize("batches", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
def test_gradients_of_verls_loss_are_the_plain_ones(verl, model, tmp_path, batches):
    engine, fields = engine_of(verl, model, tmp_path), padded_batch(model)
    data = batch_of(verl, fields, calculate_entropy=True, **batches)
    output = engine.forward_backward_batch(data, some_loss)
    assert engine.synchronized and len(output["loss"]) > 1
    assert not output["model_output"]  # not kept while training
    losses = [loss_of_row(fields, row, *values) for row, values in enumerate(plain(model))]
    loss = sum(losses) / int(fields["response_mask"].sum())
    loss.backward()
    assert sum(output["loss"]) == pytest.approx(loss.item(), rel=2e-5)
    error, where = grad_error(take_grads(engine.module), take_grads(model))
    assert error < 2e-5, where


def test_a_group_is_encoded_once_however_its_rows_lie(verl, tmp_path):
    model = tiny_model("qwen2_5_vl")
    engine = engine_of(verl, model, tmp_path)
    patches = []
    engine.module.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    shown = [group.vision_of(c) for group, c in scattered_rows(model)]
    once = sum(len(vision.get("pixel_values", ())) for vision in shown)
    once += sum(
        len(group.vision.get("pixel_values", ())) for group, c in scattered_rows(model) if c == 0
    )
    for batches in (
        DYNAMIC | {"max_token_len_per_gpu": 4000},
        FIXED | {"micro_batch_size_per_gpu": 8},
    ):
        data = batch_of(verl, padded_batch(model), **batches)
        with torch.no_grad():
            engine.forward_backward_batch(data, None, forward_only=True)  # checks the model first
            patches.clear()
            engine.forward_backward_batch(data, None, forward_only=True)
        assert sum(patches) == once


REFUSED = {
    "ulysses_sequence_parallel_size=2": {"ulysses_sequence_parallel_size": 2},
    "qat.enable": {"qat": SimpleNamespace(enable=True)},
    "router_replay.mode=R3": {"router_replay": SimpleNamespace(mode="R3")},
    "pad_to_length": {"pad_to_length": True},
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_configuration_that_is_not_served_is_refused_by_its_field(verl, tmp_path, field):
    with pytest.raises(InputError, match=field):
        engine_of(verl, tiny_model("qwen3"), tmp_path, **REFUSED[field])


@pytest.mark.parametrize("strategy", ["fsdp", "megatron"])
def test_another_strategy_does_not_run_unnoticed(verl, strategy):
    cls = verl.EngineRegistry.get_engine_cls("language_model", strategy)
    with pytest.raises(InputError, match=f"actor.strategy={strategy}: fastgrpo serves fsdp2"):
        cls(None, SimpleNamespace(strategy=strategy), None, None)


def spoiled(fields, key):
    if key == "positions":
        fields["position_ids"] = fields["position_ids"] + 1
    elif key == "temperature":
        fields["temperature"] = torch.linspace(0.5, 1.0, len(fields["prompts"]))
    elif key == "responses":
        del fields["responses"]
    else:
        fields[key] = True
    return fields


@pytest.mark.parametrize(
    "key, message",
    [
        ("positions", "row [0-9]: position_ids at token 0"),
        ("temperature", "temperature: the rows"),
        ("responses", "no 'responses'"),
        ("distillation_use_topk", "distillation"),
        ("calculate_sum_pi_squared", "calculate_sum_pi_squared"),
    ],
)
def test_a_batch_that_is_not_served_is_refused(verl, tmp_path, key, message):
    model = tiny_model("qwen2_5_vl")
    engine = engine_of(verl, model, tmp_path)
    data = batch_of(verl, padded_batch(model), **FIXED)
    with torch.no_grad(), pytest.raises(InputError, match=message):
        engine.forward_backward_batch(spoiled(data, key), None, forward_only=True)


def test_micro_batches_that_do_not_fit_are_refused(verl, tmp_path):
    model = tiny_model("qwen3")
    engine = engine_of(verl, model, tmp_path)
    for settings, message in (
        (FIXED | {"micro_batch_size_per_gpu": 3}, "3 does not divide the 8 rows"),
        (DYNAMIC | {"max_token_len_per_gpu": 9}, "exceed max_tokens=9"),
    ):
        with pytest.raises(InputError, match=message):
            engine.forward_backward_batch(
                batch_of(verl, padded_batch(model), **settings), None, forward_only=True
            )


def test_unpadded_prompts_and_responses_are_read_as_padded_ones(verl, model):
    from fastgrpo.integrations.verl.rows import read_groups

    fields = padded_batch(model)
    width = fields["prompts"].shape[1]
    sides = {"prompts": slice(width), "responses": slice(width, None)}
    sides |= {"response_mask": sides["responses"]}
    attended = fields["attention_mask"].bool()
    jagged = {
        key: torch.nested.as_nested_tensor(
            [x[keep[side]] for x, keep in zip(fields[key], attended, strict=True)],
            layout=torch.jagged,
        )
        for key, side in sides.items()
    }
    padded = batch_of(verl, fields)
    unpadded = verl.Batch(padded | jagged)
    del unpadded["attention_mask"]
    images, adapter = fields["multi_modal_inputs"], Adapter(model)
    both = [read_groups(adapter, data, images) for data in (padded, unpadded)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.prompt_ids, b.prompt_ids) and a.vision.keys() == b.vision.keys()
        assert torch.equal(a.completions[0], b.completions[0])
        assert torch.equal(a.mask[0], b.mask[0])


def test_another_verl_is_refused_by_what_differs(verl, monkeypatch):
    from fastgrpo.integrations.verl.support import check_signatures

    check_signatures()
    monkeypatch.setattr(
        verl.FSDPEngineWithLMHead, "forward_step", lambda self, micro_batch, loss_function: None
    )
    with pytest.raises(
        InputError, match=r"forward_step is \(self, micro_batch, loss_function\), not"
    ):
        check_signatures()
