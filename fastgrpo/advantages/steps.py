"""Step rewards of multi-turn trajectories: refinement, discount, and advantages on each turn.

R rows (one row is one turn of a trajectory), K steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError


def clip_step_rewards(rewards: Tensor, eta: float = 0.0) -> Tensor:
    """Clip: r'_k = min(r_k - eta, 0), so that extra steps never add reward.

    Source: "On Designing Effective RL Reward"; its eta is not published, the default 0 is ours.
    """
    return (rewards - eta).clamp(max=0.0)


def delta_step_rewards(rewards: Tensor) -> Tensor:
    """Delta: r'_k = r_k - r_{k+1}, the last scored step keeps r, the answer step gets 0.

    ``rewards`` (K,) are the process rewards of one trajectory, the answer step last. The sum of the
    result is the first reward: repeating a good step gains nothing. Source: "On Designing
    Effective RL Reward".
    """
    if rewards.ndim != 1:
        raise InputError(f"rewards: expected (K,), got {tuple(rewards.shape)}")
    shaped = torch.zeros_like(rewards)
    if len(rewards) > 1:
        shaped[:-1] = rewards[:-1]
        shaped[:-2] -= rewards[1:-1]
    return shaped


def discounted_returns(rewards: Tensor, gamma: float = 0.99) -> Tensor:
    """R_k = sum_{s >= k} gamma^(s - k) r_s, (K,)."""
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(())
    for k in range(len(rewards) - 1, -1, -1):
        running = rewards[k] + gamma * running
        returns[k] = running
    return returns


def agent_step_rewards(
    tool_ok: Tensor,
    score: Tensor,
    confidence: Tensor,
    divergence: Tensor,
    repaired: Tensor,
    *,
    tool_weight: float = 0.3,
    divergence_weight: float = 0.01,
    repair_cost: float = 0.05,
    gate_slope: float = 5.0,
    gate_confidence: float = 0.7,
) -> Tensor:
    """Agent0-VL's step reward from its self-verifier, all arguments (K,).

    r = tool_weight [tool ok] + score confidence - divergence_weight KL - g repair_cost [repaired]
    with g = sigmoid(gate_slope (gate_confidence - confidence)). Source: the README and a fork of
    Agent0-VL.
    """
    gate = torch.sigmoid(gate_slope * (gate_confidence - confidence))
    value = tool_weight * tool_ok + score * confidence - divergence_weight * divergence
    return value - gate * repair_cost * repaired


def episode_return(step_rewards: Tensor, outcome: float, *, gamma: float = 0.99) -> Tensor:
    """Agent0-VL's scalar return: outcome + sum_k gamma^(k-1) r_k."""
    powers = gamma ** torch.arange(len(step_rewards), dtype=step_rewards.dtype)
    return outcome + (powers * step_rewards).sum()


def _group_baseline(
    scores: Tensor, groups: Sequence[Hashable], first: list[int], mode: str, eps: float
) -> Tensor:
    """Advantages of each row against the statistics of the rows ``first`` of its group."""
    members: dict[Hashable, list[int]] = {}
    for row in first:
        members.setdefault(groups[row], []).append(row)
    out = torch.empty_like(scores)
    for row, group in enumerate(groups):
        known = scores[members[group]]
        n = len(known)
        if n == 1:
            out[row] = scores[row] / (1.0 + eps) if mode == "mean_std" else scores[row]
        elif mode == "leave_one_out":
            out[row] = (scores[row] - known.mean()) * n / (n - 1)
        else:
            scale = known.std() + eps if mode == "mean_std" else 1.0
            out[row] = (scores[row] - known.mean()) / scale
    return out


def step_episode_advantages(
    episode_rewards: Tensor,
    step_rewards: Tensor,
    groups: Sequence[Hashable],
    trajectories: Sequence[Hashable],
    *,
    step_weight: float = 1.0,
    mode: str = "leave_one_out",
    eps: float = 1e-6,
    compat: str = "fixed",
) -> Tensor:
    """Advantages A = A_episode + step_weight A_step of every turn, (R,).

    Row i is one turn of trajectory ``trajectories[i]`` in group ``groups[i]``; ``episode_rewards``
    repeats the trajectory's reward on each of its rows. ``mode``: ``leave_one_out``
    (x - mean) n / (n - 1), ``mean`` (x - mean), ``mean_std`` (x - mean) / (std + eps). The episode
    baseline counts each trajectory once, the step baseline every turn of the group; a group with
    one entry keeps its raw score.

    ``compat="upstream"``: the released code counts only a trajectory's *first* turn in the step
    baseline too. Source: OPRL / iStar (Tongyi-ConvAI/Tongyi-Character, ``istar/core_istar.py``).
    """
    if mode not in ("leave_one_out", "mean", "mean_std"):
        raise InputError(f"mode: expected leave_one_out, mean or mean_std, got {mode!r}")
    rows = {len(episode_rewards), len(step_rewards), len(groups), len(trajectories)}
    if len(rows) != 1:
        raise InputError(f"rows: expected the same number everywhere, got {sorted(rows)}")
    seen: dict[tuple[Hashable, Hashable], int] = {}
    for row, key in enumerate(zip(groups, trajectories, strict=True)):
        seen.setdefault(key, row)
    first = list(seen.values())
    step_rows = first if compat == "upstream" else list(range(len(groups)))
    episode = _group_baseline(episode_rewards, groups, first, mode, eps)
    return episode + step_weight * _group_baseline(step_rewards, groups, step_rows, mode, eps)


def trajectory_preference_loss(
    log_ratio: Tensor, lengths: Sequence[int], trajectories: Sequence[Hashable], won: Sequence[bool]
) -> Tensor:
    """-log sigmoid(s_win - s_lose), mean over all win x lose pairs of one group; differentiable.

    s of a trajectory is the mean over its turns of ``log_ratio`` summed over the turn's tokens;
    ``log_ratio`` (T,) holds beta log(pi_phi / pi_ref) of all turns back to back, ``lengths`` their
    token counts. 0 when a side is empty. Source: OPRL / iStar (``istar/rm_utils.py``).
    """
    turns = torch.stack([t.sum() for t in log_ratio.split(list(lengths))])
    ids = list(dict.fromkeys(trajectories))
    score = {t: turns[[i for i, u in enumerate(trajectories) if u == t]].mean() for t in ids}
    outcome = {t: bool(w) for t, w in zip(trajectories, won, strict=True)}
    gaps = [score[w] - score[x] for w in ids for x in ids if outcome[w] and not outcome[x]]
    if not gaps:
        return log_ratio.sum() * 0.0
    return -torch.nn.functional.logsigmoid(torch.stack(gaps)).mean()
