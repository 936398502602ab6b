# SPDX-License-Identifier: Apache-2.0
"""Adapters of recorded cases that are advantages or objective terms, not rewards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo import advantages as fa
from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.engine.loss import RowLoss
from fastgrpo.images.perturb import blacken_patches
from fastgrpo.integrations.trl.perception import perception_terms, perturbed_entropy
from fastgrpo.judges import trajectory_preference_loss
from fastgrpo.objective import KLStream, Objective
from fastgrpo.ops.token_kl import token_kl
from fastgrpo.rewards.core import shaping, votes

OBJECTIVE_ADAPTERS = {}
_ESTIMATOR = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}


def adapter(system: str, *functions: str):
    def register(call):
        OBJECTIVE_ADAPTERS.update({(system, function): call for function in functions})
        return call

    return register


# PAPO and VPPO: one optimizer step of the published method on recorded log-probs


class _Rows:
    """Recorded (B, L) tables as packed tokens, with gradients back to the table."""

    def __init__(self, inputs: dict, rows: slice):
        self.mask = torch.tensor(inputs["response_mask"])[rows].bool()
        self.tables = {
            k: torch.tensor(v, dtype=torch.float64)[rows]
            for k, v in inputs.items()
            if k.endswith("log_probs") or k == "advantages"
        }
        self.seq_ids = self.mask.nonzero()[:, 0]
        self.logp = self["log_probs"].clone().requires_grad_()

    def __getitem__(self, name: str) -> Tensor:
        return self.tables[name][self.mask]

    def gradient(self) -> list[list[float]]:
        """d loss / d log_probs, (B, L)."""
        table = torch.zeros(self.mask.shape, dtype=torch.float64)
        table[self.mask] = self.logp.grad
        return table.tolist()


def _micro_batches(inputs: dict) -> list[_Rows]:
    size = inputs["config"]["micro_batch_size_per_device_for_update"]
    starts = range(0, len(inputs["log_probs"]), size)
    return [_Rows(inputs, slice(start, start + size)) for start in starts]


def _objective(config: dict) -> Objective:
    return Objective(
        loss_type={"token": "bnpo", "seq": "grpo"}[config["loss_avg_mode"]],
        epsilon=config["clip_ratio_low"],
        epsilon_high=config["clip_ratio_high"],
        dual_clip=config["clip_ratio_dual"],
    )


def _reference_stream(config: dict) -> KLStream:
    penalty = config["kl_penalty"]
    clamp = 10.0 if penalty == "low_var_kl" else None
    return KLStream(config["kl_coef"], _ESTIMATOR[penalty], value_clamp=clamp)


def _trainer_loss(rows: _Rows, config: dict, *, streams, token_weights=None, entropy_coef=0.0):
    """The loss the trainer's rows minimise, of the recorded log-probs.

    `streams`: name of the recorded table -> KLStream. The head has two tokens and hidden states of
    one number h, log p = log sigmoid(h): its log-probs are those recorded.
    """
    hidden = rows.logp - torch.log(-torch.expm1(rows.logp))
    loss = RowLoss(_objective(config), kl_streams=streams, sampled_entropy_coef=entropy_coef)
    batch = {
        "seq_ids": rows.seq_ids,
        "mask": torch.ones_like(rows.seq_ids, dtype=torch.bool),
        "advantages": rows["advantages"],
        "old_logp": rows["old_log_probs"],
        "kl_terms": [stream.term(rows[name]) for name, stream in streams.items()],
    }
    if token_weights is not None:
        batch["token_weights"] = token_weights
    head = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    targets = torch.zeros_like(rows.seq_ids)
    return loss.of_hidden(hidden[:, None], head, None, targets, batch).loss


@adapter("PAPO", "DataParallelPPOActor.update_policy")
def papo_step(inputs, compat="upstream"):
    config = inputs["config"]
    micro_batches = _micro_batches(inputs)
    out: dict = {"pg_loss_total": [], "grad_wrt_log_probs": []}
    for rows in micro_batches:
        out |= _papo_micro_batch(rows, config, 1 / len(micro_batches), out)
    return out


def _papo_micro_batch(rows: _Rows, config: dict, share: float, out: dict) -> dict:
    aug = rows["aug_log_probs"]
    top = config.get("kl_prcp_token_level_mask_top_p")
    rule = PerceptionRule(
        kl_coef=config.get("kl_prcp_coef", 0.0),
        entropy_coef=config["ori_entropy_loss_coef"] * config["use_ori_entropy_loss"],
        perturbed_entropy_coef=config["aug_entropy_loss_coef"] * config["use_aug_entropy_loss"],
        kl_token_share=top if config.get("use_kl_prcp_token_level_mask") else None,
        kl_ceiling=config["kl_prcp_clipping"] if config.get("use_kl_prcp_clipping") else None,
    )
    terms, streams, reported = perception_terms(rule, 0, 1), {}, None
    if config["use_kl_prcp"]:
        estimator = _ESTIMATOR[config["kl_prcp_penalty"]]
        streams["aug_log_probs"] = replace(terms.streams["perturbed"], estimator=estimator)
        k = token_kl(rows.logp.detach(), aug, estimator, value_clamp=10.0)
        if rule.kl_token_share is not None:
            k = torch.where(fa.quantile_mask(k, rows.seq_ids, rule.kl_token_share), k, 0.0)
        if rule.kl_ceiling is not None:
            k = k.clamp(0.0, rule.kl_ceiling)
        reported = -k.mean().item()
    aug_entropy, ori_entropy = -aug.mean().item(), -rows.logp.mean().item()
    kl = None
    if config["use_kl_loss"]:
        streams["ref_log_probs"] = _reference_stream(config)
        kl = _reference_kl(rows, config)
    loss = _trainer_loss(rows, config, streams=streams, entropy_coef=terms.entropy_coef)
    (loss * share).backward()
    total = loss + perturbed_entropy(
        terms, _objective(config), aug, rows.seq_ids, len(rows.mask), {}
    )
    total = total.item()
    return {
        "pg_loss_total": [*out["pg_loss_total"], total],
        "kl_loss_ref": kl,
        "neg_kl_prcp_loss": reported,
        "aug_entropy_loss": aug_entropy if config["use_kl_prcp"] else None,
        "ori_entropy_loss": ori_entropy if config["use_ori_entropy_loss"] else None,
        "grad_wrt_log_probs": out["grad_wrt_log_probs"] + rows.gradient(),
    }


def _reference_kl(rows: _Rows, config: dict) -> float:
    value = token_kl(
        rows.logp.detach(),
        rows["ref_log_probs"],
        _ESTIMATOR[config["kl_penalty"]],
        value_clamp=10.0 if config["kl_penalty"] == "low_var_kl" else None,
    )
    return value.mean().item()


@adapter("PAPO", "core_algos.compute_kl")
def papo_kl(inputs, compat="upstream"):
    logp, ref = (torch.tensor(inputs[k]).double() for k in ("log_probs", "ref_log_probs"))
    penalty = inputs["kl_penalty"]
    clamp = 10.0 if penalty == "low_var_kl" else None
    value = token_kl(logp.flatten(), ref.flatten(), _ESTIMATOR[penalty], value_clamp=clamp)
    return value.view_as(logp).tolist()


@adapter("VPPO", "DataParallelPPOActor.update_policy")
def vppo_step(inputs, compat="upstream"):
    config, micro_batches = inputs["config"], _micro_batches(inputs)
    whole = _Rows(inputs, slice(None))
    weights, tops = _vppo_weights(whole, config, [len(r.mask) for r in micro_batches])
    out = {
        "pg_loss": [],
        "perception_token_fraction": None,
        "scaling_max": tops,
        "scaling_mean": None if weights is None else [],
        "grad_wrt_log_probs": [],
    }
    start = 0
    for rows in micro_batches:
        token_weights = _vppo_mask(rows, config, out)
        if weights is not None:
            own = weights[start : start + len(rows.mask)]
            rows.tables["advantages"] = rows.tables["advantages"] * own[:, None]
            out["scaling_mean"].append(own.mean().item())
        start += len(rows.mask)
        _vppo_backward(rows, config, token_weights, len(whole.seq_ids), out)
    return out


def _vppo_weights(whole: _Rows, config: dict, sizes: list[int]):
    """Trajectory weights (B,) and the published dynamic maximum of each micro-batch."""
    if not (config["use_advantage_shaping"] and config["use_vppo_on_perception"]):
        return None, None
    dependency = fa.visual_dependency(whole["old_log_probs"], whole["aug_log_probs"])
    valid = whole.mask.any(1)
    scores = fa.sequence_mean(dependency, whole.seq_ids, len(whole.mask))
    minimum = config["advantage_scaling_min"]
    weights = fa.trajectory_weights(scores, minimum=minimum, valid=valid, mean_over=sizes)
    known = scores[valid]
    if len(known) < 2 or known.max() - known.min() <= 1e-6:
        return weights, None
    share = ((scores - known.min()) / (known.max() - known.min())).clamp(0, 1)
    parts = zip(share.split(sizes), valid.split(sizes), strict=True)
    return weights, [
        (minimum + (1 - minimum) / (s[v].mean() + 1e-8)).item() for s, v in parts if v.any()
    ]


def _vppo_mask(rows: _Rows, config: dict, out: dict) -> Tensor | None:
    if not config["use_vppo_on_perception"]:
        return None
    dependency = fa.visual_dependency(rows["old_log_probs"], rows["aug_log_probs"])
    kept = fa.top_share_mask(dependency, rows.seq_ids, config["top_p_perception_tokens"])
    fractions = out["perception_token_fraction"] or []
    out["perception_token_fraction"] = [*fractions, kept.double().mean().item()]
    return kept.double()


def _vppo_backward(rows: _Rows, config: dict, token_weights, total: int, out: dict) -> None:
    penalty = config["entropy_penalty_coef"] if config["use_entropy_penalty"] else 0.0
    with torch.no_grad():
        value = _trainer_loss(rows, config, streams={}, token_weights=token_weights)
    out["pg_loss"].append(value.item())
    streams = {"ref_log_probs": _reference_stream(config)} if config["use_kl_loss"] else {}
    terms = {"streams": streams, "token_weights": token_weights, "entropy_coef": penalty}
    whole = _trainer_loss(rows, config, **terms)
    (whole * len(rows.seq_ids) / total).backward()
    out["grad_wrt_log_probs"] += rows.gradient()


@adapter("PAPO / VPPO", "random_patch_blackening")
def patch_blackening(inputs, compat="upstream"):
    colour, size = inputs["image"].split()
    image = Image.new("RGB", tuple(int(n) for n in size.split("x")), colour)
    patch = inputs["patch_size"]
    black = blacken_patches(
        image, patch_size=patch, probability=inputs["black_prob"], seed=inputs["np_seed"]
    )
    pixels = np.array(black)
    return {
        "black_fraction": float((pixels == 0).mean()),
        "first_row_patches_black": [bool(p) for p in pixels[0, ::patch, 0][:8] == 0],
    }


# PAR


def _par(inputs: dict) -> tuple[Tensor, Tensor | None]:
    references = inputs.get("reference_rewards")
    return (
        torch.tensor(inputs["reward"], dtype=torch.float64),
        None if references is None else torch.tensor(references, dtype=torch.float64),
    )


@adapter(
    "PAR",
    "RewardShaper.shaped_reward (PAR: sigmoid, relative)",
    "RewardShaper.shaped_reward (PAR, 3 refs)",
)
def par_sigmoid(inputs, compat="upstream"):
    rewards, references = _par(inputs)
    return shaping.par(rewards, references, sigmoid_k=inputs.get("sigmoid_k", 1)).tolist()


def _running(function: str, kind: str) -> None:
    @adapter("PAR", function)
    def shaped(inputs, compat="upstream"):
        return shaping.RunningShaper(kind)(_par(inputs)[0]).tolist()


_running("shaped_reward (meanstd, running)", "meanstd")
_running("shaped_reward (clip, running mean +- std)", "clip")
_running("shaped_reward (minmax, running)", "minmax")


@adapter("PAR", "shaped_reward (lsc: log-sigmoid centred at 85th percentile)")
def par_log_sigmoid(inputs, compat="upstream"):
    return shaping.log_sigmoid_centered(*_par(inputs)).tolist()


@adapter("PAR", "shaped_reward (tanh / fittedpoly relative)")
def par_relative(inputs, compat="upstream"):
    rewards, references = _par(inputs)
    shapes = {
        "tanh": shaping.relative_tanh,
        "fittedpoly": shaping.fitted_polynomial,
        "centered": shaping.centered,
    }
    return {name: shape(rewards, references).tolist() for name, shape in shapes.items()}


# OPRL / iStar


def _turns(inputs: dict) -> tuple[Tensor, Tensor, list[str]]:
    episode, step = (torch.tensor(inputs[k]).double() for k in ("episode_reward", "step_reward"))
    rows = inputs.get("rows", "t1 turn1, t1 turn2, t2 turn1, t2 turn2")
    return episode, step, [row.split()[0] for row in rows.split(",")]


@adapter("OPRL / iStar", "compute_istar_rloo_advantage")
def istar_rloo(inputs, compat="upstream"):
    episode, step, trajectories = _turns(inputs)
    weight = inputs.get("step_advantage_w", 1.0)
    rows = dict(groups=[0] * len(step), trajectories=trajectories, step_weight=weight)
    return fa.step_episode_advantages(episode, step, compat=compat, **rows).tolist()


@adapter("OPRL / iStar", "compute_istar_grpo_advantage")
def istar_grpo(inputs, compat="upstream"):
    episode, step, trajectories = _turns(inputs)
    mode = {"mean_norm": "mean", "mean_std_norm": "mean_std"}[inputs["mode"]]
    weight = inputs.get("step_advantage_w", 1.0)
    rows = dict(groups=[0] * len(step), trajectories=trajectories, step_weight=weight)
    return fa.step_episode_advantages(episode, step, mode=mode, compat=compat, **rows).tolist()


@adapter("OPRL / iStar", "compute_eto_loss_rm (trajectory DPO)")
def istar_preference(inputs, compat="upstream"):
    q = inputs["beta"] * torch.tensor(inputs["log_ratio_q"]).double()
    lengths = [q.shape[1]] * q.shape[0]
    won = [bool(a) for a in inputs["acc"]]
    return trajectory_preference_loss(q.flatten(), lengths, inputs["traj"], won).item()


# Co-Reward and SophiaVL-R1


@adapter("Co-Reward", "CoRewardManager (cross-referred majority vote)")
def co_reward(inputs, compat="upstream"):
    original, rephrased = votes.cross_vote_rewards(
        inputs["answers_original_question"], inputs["answers_rephrased_question"]
    )
    return {"reward_original": original, "reward_rephrased": rephrased}


@adapter("SophiaVL-R1", "CustomRewardManager.__call__ (Trust-GRPO group reward)")
def sophia_trust(inputs, compat="upstream"):
    outcome = torch.tensor(inputs["answer_scores"], dtype=torch.float64)
    thinking = torch.tensor(inputs["thinking_reward_model_scores"], dtype=torch.float64)
    trusted = votes.trust_weighted_rewards(
        outcome, thinking, step=inputs["global_step"], total=inputs["T"], compat=compat
    )
    return {
        "reward": trusted.rewards.tolist(),
        "process_used": trusted.thinking.tolist(),
        "gamma_logged": [trusted.gamma] * len(outcome),
    }
