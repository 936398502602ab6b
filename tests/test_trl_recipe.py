# SPDX-License-Identifier: Apache-2.0
"""What a recipe asks of the trainer: advantage rules, perception terms, rewards that work ahead."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOTrainer

from fastgrpo import advantages as fa
from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.advantages.rule import AdvantageRule, GroupFilter
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.integrations.trl.config import RenamedConfig
from fastgrpo.integrations.trl.perception import PERTURBED
from fastgrpo.judges import CoTrainedReward
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.grpo_loss import grpo_loss
from fastgrpo.ops.token_kl import token_kl
from fastgrpo.rewards.core.compose import Running
from fastgrpo.testing import models, processors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen2.5-VL with its processor, on disk."""
    path = tmp_path_factory.mktemp("model")
    model = models.tiny_model("qwen2_5_vl")
    model.save_pretrained(path)
    processors.tiny_processor(model.config).save_pretrained(path)
    return path


def rows(count=8, **columns):
    rng = np.random.RandomState(0)
    return [
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "7?"}]}
            ],
            "image": Image.fromarray(rng.randint(0, 256, (16, 24, 3), dtype=np.uint8)),
            **{k: v[i] for k, v in columns.items()},
        }
        for i in range(count)
    ]


def length_reward(prompts, completions, **columns):
    return [float(len(c[0]["content"]) % 3) for c in completions]


def make(folder, tmp_path, data=None, reward=length_reward, rule=None, perception=None, **options):
    settings = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=6, max_steps=2, report_to="none", loss_type="bnpo", use_cpu=True,
        top_k=0, disable_tqdm=True, gradient_checkpointing=False, bf16=False, learning_rate=1e-3,
        model_init_kwargs={"dtype": "float32"}, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    return FastGRPOTrainer(
        model=str(folder),
        reward_funcs=[reward],
        args=RenamedConfig(**(settings | options)),
        train_dataset=Dataset.from_list(data or rows()),
        rule=rule,
        perception=perception,
    )


def prepared(trainer):
    """One micro-batch as the trainer would train on it."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._prepare_inputs(batch)


def stock_logps(trainer, inputs):
    """(B, C) log-probs by TRL's own padded forward, with gradient."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    vision = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    columns = inputs["completion_ids"].shape[1]
    logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, columns, **{name: inputs[name] for name in vision}
    )
    return logps


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "grpo", "dr_grpo", "luspo", "gmpo"])
def test_papo_terms_equal_the_objective_on_stock_log_probs(folder, tmp_path, loss_type):
    rule = PerceptionRule(
        kl_coef=0.5, entropy_coef=0.03, perturbed_entropy_coef=0.04, kl_ceiling=0.3,
        kl_token_share=0.5, token_share=0.4, options={"patch_size": 4, "probability": 0.9},
    )  # fmt: skip
    trainer = make(folder, tmp_path, perception=rule, loss_type=loss_type)
    inputs = prepared(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    ours = gradients(trainer.model)

    mask = inputs["completion_mask"].bool()
    seq_ids, other = mask.nonzero()[:, 0], inputs[PERTURBED][mask]
    logp = stock_logps(trainer, inputs)[mask]
    obj = Objective(
        loss_type=loss_type, max_completion_length=trainer.max_completion_length, beta=0.0
    )
    kl = token_kl(logp.detach(), other, "k3", value_clamp=10.0)
    chosen = fa.quantile_mask(kl, seq_ids, 0.5)
    whole = grpo_loss(
        logp, inputs["advantages"], obj, seq_ids=seq_ids, num_sequences=len(mask),
        kl_terms=[KLTerm(other, -0.5, "k3", value_clamp=0.3, mask=chosen)],
        token_weights=inputs["token_weights"][mask], sampled_entropy_coef=0.03,
    ).loss  # fmt: skip
    whole.backward()
    lengths = mask.sum(1)[seq_ids]
    weights = {
        "bnpo": 1 / mask.sum(), "dapo": 1 / mask.sum(), "grpo": 1 / (lengths * 8),
        "gmpo": 1 / (lengths * 8), "dr_grpo": torch.tensor(1 / (8 * 6)),
        "luspo": torch.tensor(1 / 8),
    }[loss_type]  # fmt: skip
    torch.testing.assert_close(loss, whole + 0.04 * (-other * weights).sum(), rtol=1e-5, atol=1e-6)
    theirs = gradients(trainer.model)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    logged = trainer._metrics["train"]
    assert logged["fastgrpo/perception_kl_coef"] == [0.5] and logged["entropy"][0] > 0
    assert logged["fastgrpo/perception_kl"][0] == pytest.approx(
        torch.where(chosen, kl.clamp(0, 0.3), 0.0).mean().item(), rel=1e-4
    )


def test_the_perturbed_pass_sees_other_pixels_of_the_same_size(folder, tmp_path):
    rule = PerceptionRule(kl_coef=0.1, options={"patch_size": 4, "probability": 1.0})
    inputs = prepared(make(folder, tmp_path, perception=rule))
    assert inputs[PERTURBED].shape == inputs["completion_ids"].shape
    trainer = make(folder, tmp_path, perception=rule)
    ahead = prepared(trainer)
    with torch.no_grad():
        plain = trainer._policy_logps(ahead)
    mask = ahead["completion_mask"].bool()
    assert (plain[mask] - ahead[PERTURBED][mask]).abs().max() > 1e-3


def test_vppo_does_not_depend_on_the_micro_batch(folder, tmp_path):
    rule = PerceptionRule(token_share=0.4, weight_minimum=0.9)
    whole = prepared(make(folder, tmp_path, perception=rule, per_device_train_batch_size=8))
    trainer = make(
        folder, tmp_path, perception=rule, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    prepared(trainer)
    parts = trainer._buffered_inputs

    for power in (1, 2):
        total = sum(b["advantages"].pow(power).sum() for b in parts)
        expected = whole["advantages"].pow(power).sum()
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    assert sum(b["token_weights"].sum() for b in parts) == whole["token_weights"].sum()


def test_vppo_weights_equal_the_packed_formula(folder, tmp_path, monkeypatch):
    rule = PerceptionRule(token_share=0.4, weight_minimum=0.9)
    trainer = make(folder, tmp_path, perception=rule)
    seen = {}
    original = trainer._weigh

    def spy(output, old, perturbed):
        seen.update(old=old, perturbed=perturbed, advantages=output["advantages"].clone())
        original(output, old, perturbed)
        seen.update(output=dict(output))

    monkeypatch.setattr(trainer, "_weigh", spy)
    prepared(trainer)
    output = seen["output"]
    ratio = (output["advantages"] / seen["advantages"])[seen["advantages"] != 0]
    assert (ratio >= 0.9 - 1e-6).all() and ratio.max() > 1
    for row, mask in enumerate(output["completion_mask"].bool()):
        d = (seen["perturbed"][row][mask] - seen["old"][row][mask]).double()
        s = (d.exp() - d - 1).clamp(0, 10)
        kept = sorted(range(len(s)), key=lambda i: -s[i])[: int(np.ceil(0.4 * len(s)))]
        weights = torch.zeros_like(mask, dtype=torch.float32)
        weights[kept] = 1.0
        assert torch.equal(output["token_weights"][row], weights)


def test_a_loss_of_its_own_cannot_be_combined_with_what_it_would_not_see(folder, tmp_path):
    class Own(FastGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    settings = dict(model=str(folder), reward_funcs=[length_reward])
    settings["train_dataset"] = Dataset.from_list(rows())
    options = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(InputError, match="perception is not in TRL's loss, and Own has its own"):
        Own(**settings, args=RenamedConfig(**options), perception=PerceptionRule(kl_coef=0.1))
    with pytest.raises(InputError, match="loss_type='gmpo' is not in TRL's loss"):
        Own(**settings, args=RenamedConfig(**options, loss_type="gmpo"))
    with pytest.raises(InputError, match="loss_type.*'gmpa'"):
        FastGRPOTrainer(**settings, args=RenamedConfig(**options, loss_type="gmpa"))
    adaptive = dict(loss_type="gmpo", use_adaptive_entropy=True, entropy_coef=0.01)
    with pytest.raises(InputError, match="use_adaptive_entropy: .*loss_type='gmpo'"):
        FastGRPOTrainer(**settings, args=RenamedConfig(**options, **adaptive))


def test_rule_replaces_advantages_and_drops_filtered_groups(folder, tmp_path):
    def constant_for_first(prompts, completions, **columns):
        return [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 3.0]

    rule = AdvantageRule(
        scale_rewards="none", baseline="leave_one_out",
        filters=(GroupFilter("constant_for_first", 0.5, 1.0),),
    )  # fmt: skip
    trainer = make(folder, tmp_path, reward=constant_for_first, rule=rule)
    inputs = prepared(trainer)
    advantages = sorted(inputs["advantages"].tolist())
    # the first group's mean 1 is not inside (0.5, 1); the second's mean is 1 too: both drop
    assert advantages == [0.0] * 8 and not inputs["tool_mask"].any()
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.item() == 0.0
    loss.backward()
    assert all(
        p.grad is None or torch.equal(p.grad, torch.zeros_like(p.grad))
        for p in trainer.model.parameters()
    )


def test_rule_without_filters_is_the_column_rule(folder, tmp_path):
    def reward(prompts, completions, **columns):
        return [1.0, 2.0, 4.0, 1.0, 0.0, 1.0, 0.0, 3.0]

    rule = AdvantageRule(scale_rewards="none", baseline="leave_one_out", clamp=1.5)
    inputs = prepared(make(folder, tmp_path, reward=reward, rule=rule))
    values = torch.tensor([[1.0], [2.0], [4.0], [1.0], [0.0], [1.0], [0.0], [3.0]])
    expected = fa.column_advantages(values, 4, scale_rewards="none", baseline="leave_one_out")
    expected = expected.clamp(-1.5, 1.5)
    assert sorted(inputs["advantages"].tolist()) == pytest.approx(sorted(expected.tolist()))
    assert "tool_mask" not in inputs


def test_gate_joins_perception_and_reasoning_rows(folder, tmp_path):
    data = rows(2, question_id=["a", "a"], is_perception=[True, False])
    order = []

    def reward(prompts, completions, is_perception, **columns):
        order.extend(is_perception)
        gate, own = iter([0.0, 1.0, 0.0, 0.2]), iter([0.0, 1.0, 2.0, 3.0])
        return [next(gate) if p else next(own) for p in is_perception]

    rule = AdvantageRule(scale_rewards="none", gate_column="is_perception")
    inputs = prepared(make(folder, tmp_path, data, reward, rule))
    expected = [0.3 * x for x in (-1.5, -0.5, 0.5, 1.5)] + [
        0.1 * x for x in (-0.3, 0.7, -0.3, -0.1)
    ]
    assert sorted(inputs["advantages"].tolist()) == pytest.approx(sorted(expected), abs=1e-6)


def test_rewards_may_work_ahead_and_are_bound_once(folder, tmp_path):
    calls = []

    class Ahead:
        __name__ = "ahead"

        def prefetch(self, prompts, completions, **columns):
            calls.append(("prefetch", [c[0]["content"] for c in completions], columns["tag"]))

        def bind(self, trainer):
            calls.append(("bind", trainer))

        def __call__(self, prompts, completions, **columns):
            calls.append(("call", [c[0]["content"] for c in completions]))
            return [0.0] * len(completions)

    trainer = make(folder, tmp_path, rows(8, tag=list("abcdefgh")), Ahead())
    prepared(trainer)
    kinds = [c[0] for c in calls]
    assert kinds == ["bind", "prefetch", "call"]
    assert calls[0][1] is trainer and calls[1][1] == calls[2][1]
    assert len(set(calls[1][2])) == 2


def test_a_perturbation_is_one_per_prompt_on_every_process(folder, tmp_path, monkeypatch):
    rule = PerceptionRule(kl_coef=0.1)
    trainer = make(folder, tmp_path, perception=rule)
    inputs = prepared(trainer)
    seeds = []

    def spy(image, kind, *, seed, **options):
        seeds.append(seed)
        return image

    monkeypatch.setattr("fastgrpo.integrations.trl.perception.perturb", spy)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    for rank in (0, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        for step in (0, 1):
            trainer.state.global_step = step
            trainer._perturbed_images(trainer._batch_rows, inputs)
    assert len(seeds) == 4 * 8 and len(set(seeds)) == 4 * 2
    assert all(len(set(seeds[i : i + 4])) == 1 for i in range(0, len(seeds), 4))


class Learns:
    """A reward that keeps a tensor and a number, inside a composite."""

    __name__ = "learns"

    def __init__(self):
        self.seen, self.weight = 0, torch.zeros(2)

    def __call__(self, prompts, completions, **columns):
        self.seen += len(completions)
        self.weight += 1.0
        return [float(i + self.seen) for i in range(len(completions))]

    def state_dict(self):
        return {"seen": self.seen, "weight": self.weight}

    def load_state_dict(self, state):
        self.seen, self.weight = state["seen"], state["weight"]


def test_what_rewards_keep_travels_in_checkpoints(folder, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    first = make(folder, tmp_path, reward=Running(Learns(), "meanstd"), **options)
    first.train()
    again = Running(Learns(), "meanstd")
    second = make(folder, tmp_path, reward=again, **(options | {"max_steps": 3}))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.parts[0].seen == 24 and again.parts[0].weight.tolist() == [3.0, 3.0]
    assert again.shaper.count == 24

    (tmp_path / "checkpoint-2" / "reward_state_0.pt").unlink()
    third = make(folder, tmp_path, reward=Running(Learns(), "meanstd"), **options)
    with pytest.raises(InputError, match="reward_state_0.pt is missing"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_co_trained_reward_model_resumes_with_its_optimizer():
    def made():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def scores(texts):
            features = [[len(t), t.count("a"), t.count("b")] for t in texts]
            return model(torch.tensor(features, dtype=torch.float32))[:, 0]

        def rule(prompts, completions, **columns):
            return [float("a" in c) for c in completions]

        return CoTrainedReward(scores, rule, optimizer, group_size=2)

    batches = [["a", "bb"], ["aab", "b"], ["b", "ba"]]
    whole, cut = made(), made()
    expected = [whole([""] * 2, batch) for batch in batches]
    assert cut([""] * 2, batches[0]) == expected[0]
    buffer = io.BytesIO()
    torch.save(cut.state_dict(), buffer)
    buffer.seek(0)
    resumed = made()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert [resumed([""] * 2, batch) for batch in batches[1:]] == expected[1:]


def test_training_with_all_terms_changes_the_weights(folder, tmp_path):
    perception = PerceptionRule(
        kl_coef={"kind": "linear", "start": 0.02, "end": 0.0}, entropy_coef=0.03,
        perturbed_entropy_coef=0.03, kl_token_share=0.5, kl_ceiling=0.2, token_share=0.4,
        weight_minimum=0.9, perturbation="noise",
    )  # fmt: skip
    trainer = make(folder, tmp_path, rule=AdvantageRule(), perception=perception, beta=0.01)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    history = trainer.state.log_history
    assert [h["fastgrpo/perception_kl_coef"] for h in history[:2]] == [0.02, 0.01]
    assert all(np.isfinite(h["loss"]) for h in history[:2])
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_perception_without_images_is_refused(folder, tmp_path):
    data = [{"prompt": [{"role": "user", "content": "7?"}]} for _ in range(8)]
    trainer = make(folder, tmp_path, data, perception=PerceptionRule(kl_coef=0.1))
    with pytest.raises(InputError, match="no images"):
        prepared(trainer)
