"""Rewards of systems known to us by abstract or notes only: our own readings.

Their published formulas were not available, so each function says what it takes from the source
and what is ours; `compat` makes no difference here. Systems: DIP-R1, GRiP, VACoT, Syn-GRPO, HARMO,
Listener, VLAA-Thinking, PCPG. MagicGUI follows its published evaluation rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.rewards.detection import Detections, match, overlaps, read_detections
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import SPACE, answer, between, pattern
from fastgrpo.rewards.vlm_r1 import iou as vlm_r1_iou
from fastgrpo.rewards.vlm_r1 import think_then_answer
from fastgrpo.rewards.vlm_r1_answers import math_reward, mcq
from fastgrpo.rewards.vlm_r1_detection import folded, place, read_rows, where_empty

MAX_WORDS = 4096
_READING = "our own reading of the abstract"


def groups(prompts: Sequence[Any] | None, size: int) -> np.ndarray:
    """(size,) group number of each completion: neighbours with equal prompts share a group."""
    if prompts is None:
        return np.zeros(size, dtype=np.int64)
    new = [i > 0 and prompts[i] != prompts[i - 1] for i in range(size)]
    return np.cumsum(new, dtype=np.int64)


def _last_answer(text: str) -> str:
    content = answer(text, last=True)
    return text if content is None else content


@reward("dip_r1/format", source=f"DIP-R1, {_READING}")
def dip_format(text: str, *, compat: str) -> float:
    """1 for one `<think>`, one `<look>` and one `<answer>` block in this order, else 0.

    DIP-R1's abstract names the three tags; the strictness is ours.
    """
    whole = (
        rf"{SPACE}*<think>.*?</think>{SPACE}*<look>.*?</look>{SPACE}*<answer>.*?</answer>{SPACE}*"
    )
    once = all(text.count(f"<{tag}>") == 1 for tag in ("think", "look", "answer"))
    return float(once and pattern(whole).fullmatch(text) is not None)


@reward("dip_r1/precision_recall", columns=("solution",), source=f"DIP-R1, {_READING}",
        batched=True)  # fmt: skip
def dip_precision_recall(
    texts, note, *, solution, precision_weight: float = 0.5, iou_threshold: float = 0.5, compat: str
):
    """w * precision + (1 - w) * recall of the answer's boxes at IoU >= 0.5, equal labels.

    DIP-R1's abstract has a "weighted precision-recall" reward; w and the threshold are ours.
    """
    values, preds, gts, rows = read_rows(texts, solution, note, _last_answer)
    pairs = overlaps(preds, gts, same=folded)
    found = match(pairs, threshold=iou_threshold, same_label=True)
    hits = np.bincount(found.row, minlength=len(rows))
    precision, recall = (hits / np.maximum(n, 1) for n in (pairs.pred_sizes, pairs.gt_sizes))
    score = precision_weight * precision + (1 - precision_weight) * recall
    return place(values, rows, where_empty(score, pairs.pred_sizes, pairs.gt_sizes))


@reward("dip_r1/look", columns=("solution",), optional=("prompts",), source=f"DIP-R1, {_READING}",
        batched=True)  # fmt: skip
def dip_look(texts, note, *, solution, prompts=None, iou_threshold: float = 0.5, compat: str):
    """Share of the uncertain objects that the boxes of `<look>` cover, weighted by uncertainty.

    An object's weight is the variance, over the completions of its group, of the best IoU that the
    answer's boxes reach with it; it is covered by a look box with IoU >= 0.5. Without any variance
    all objects weigh the same. DIP-R1's abstract speaks of a variance-guided reward on regions
    looked at; this formula is ours.
    """
    values, preds, gts, rows = read_rows(texts, solution, note, _last_answer)
    looks = [_looked(texts[i]) for i in rows]
    best = [_best(one, gt) for one, gt in zip(preds, gts, strict=True)]
    seen = [_best(one, gt) >= iou_threshold for one, gt in zip(looks, gts, strict=True)]
    number = groups(prompts, len(texts))[rows] if rows else []
    scores = np.zeros(len(rows))
    for k in range(len(rows)):
        mates = [best[j] for j in range(len(rows)) if number[j] == number[k]]
        same = [b for b in mates if len(b) == len(best[k])]
        weight = np.var(same, axis=0) if same else np.ones(len(best[k]))
        weight = weight if weight.sum() > 0 else np.ones(len(best[k]))
        scores[k] = (weight * seen[k]).sum() / weight.sum() if len(weight) else 0.0
    return place(values, rows, scores)


def _looked(text: str) -> Detections:
    try:
        return read_detections(between(text, "<look>", "</look>") or "[]")
    except Unscorable:
        return read_detections("[]")


def _best(boxes: Detections, gt: Detections) -> np.ndarray:
    """(n_gt,) best IoU with any of the boxes."""
    if not boxes.labels or not gt.labels:
        return np.zeros(len(gt.labels))
    return overlaps([boxes], [gt]).iou.reshape(len(boxes.labels), -1).max(0)


@reward("grip/weighted_iou", columns=("solution",), optional=("salience",),
        source=f"GRiP, {_READING}", batched=True)  # fmt: skip
def grip_weighted_iou(texts, note, *, solution, salience=None, compat: str):
    """Sum over the objects of salience * IoU of the matched box / sum of salience.

    Boxes are matched best IoU first among equal labels; `salience` lists a weight per object of
    the solution (default 1 each). GRiP's abstract has a "salience-weighted IoU"; the matching is
    ours.
    """
    values, preds, gts, rows = read_rows(texts, solution, note, _last_answer)
    found = match(overlaps(preds, gts, same=folded), threshold=1e-9, same_label=True)
    scores = np.zeros(len(rows))
    for k, row in enumerate(rows):
        given = None if salience is None else salience[row]
        weight = np.ones(len(gts[k].labels)) if given is None else np.asarray(given, dtype=float)
        if weight.shape != (len(gts[k].labels),) or not (weight >= 0).all():
            raise InputError(f"salience[{row}]: expected {len(gts[k].labels)} weights >= 0")
        mine = found.row == k
        total = weight.sum()
        scores[k] = (weight[found.gt[mine]] * found.iou[mine]).sum() / total if total > 0 else 0.0
        if not gts[k].labels:
            scores[k] = float(not preds[k].labels)
    return place(values, rows, scores)


@reward("vacot/total", columns=("solution",), optional=("tool_needed", "completion_ids"),
        range=(-0.5, 1.5), verifies=True, source=f"VACoT, {_READING}")  # fmt: skip
def vacot(
    text: str,
    *,
    solution: str,
    tool_needed: bool = True,
    completion_ids=None,
    tool_bonus: float = 0.5,
    max_penalty: float = 0.5,
    free_length: int = 512,
    compat: str,
) -> float:
    """right + bonus [right, tool used, tool needed] - penalty for length.

    right is VLM-R1's mathematical match; a tool was used when there is a `<tool_call>`; the penalty
    grows linearly from `free_length` tokens (words without `completion_ids`) to `max_penalty` at
    twice that. VACoT's abstract has a conditional reward for tool use and a verbosity penalty; the
    constants are ours.
    """
    right = math_reward(text, solution=solution, compat="fixed")
    length = len(completion_ids) if completion_ids is not None else text.count(" ") + 1
    excess = min(max(length / free_length - 1, 0.0), 1.0)
    used = "<tool_call>" in text and bool(tool_needed)
    return right + tool_bonus * right * used - max_penalty * excess


@reward("syn_grpo/diversity", optional=("prompts",), source=f"Syn-GRPO, {_READING}", batched=True)
def syn_diversity(texts, note, *, prompts=None, tag: str = "description", compat: str):
    """1 - mean Jaccard similarity of the words with those of the group's other completions.

    Words are those in `<description>`, or of the whole text without it. A group of one has 0.
    Syn-GRPO's abstract rewards the diversity of predicted image descriptions; the measure is ours.
    """
    number = groups(prompts, len(texts))
    words = [_words(text, tag) for text in texts]
    scores = [0.0] * len(texts)
    for group in np.unique(number):
        rows = np.flatnonzero(number == group)
        codes: dict[str, int] = {}
        sets = [[codes.setdefault(w, len(codes)) for w in words[i]] for i in rows]
        table = np.zeros((len(rows), max(len(codes), 1)), dtype=np.float32)
        for k, one in enumerate(sets):
            table[k, one] = 1
        both, sizes = table @ table.T, table.sum(1)
        union = sizes[:, None] + sizes[None] - both
        alike = np.where(union > 0, both / np.maximum(union, 1), 1.0)
        for k, i in enumerate(rows):
            others = np.delete(alike[k], k)
            scores[i] = float(1 - others.mean()) if len(others) else 0.0
    return scores


def _words(text: str, tag: str) -> set[str]:
    inner = between(text, f"<{tag}>", f"</{tag}>")
    return set((text if inner is None else inner)[: 16 * MAX_WORDS].lower().split()[:MAX_WORDS])


@reward("harmo/length_penalty", columns=("acc_reward",), optional=("prompts", "completion_ids"),
        range=(-1.0, 0.0), source=f"HARMO, {_READING}", batched=True)  # fmt: skip
def harmo_length(
    texts,
    note,
    *,
    acc_reward,
    prompts=None,
    completion_ids=None,
    max_penalty: float = 0.5,
    tau: float = 1.0,
    compat: str,
):
    """-P_max * min(1, (L - m) / (tau m)) for completions longer than m, else 0.

    m is the mean length of the group's right completions (`acc_reward` >= 0.5); a group without a
    right one has no penalty. Lengths are tokens (`completion_ids`) or words. The reviews of HARMO
    say that the penalty needs a right sample and has P_max and tau; the shape is ours.
    """
    number = groups(prompts, len(texts))
    lengths = np.array(
        [len(ids) for ids in completion_ids] if completion_ids is not None
        else [text.count(" ") + 1 for text in texts], dtype=float,
    )  # fmt: skip
    right = np.array([r is not None and r >= 0.5 for r in acc_reward], dtype=bool)
    scores = np.zeros(len(texts))
    for group in np.unique(number):
        mine = number == group
        if (mine & right).any():
            mean = max(lengths[mine & right].mean(), 1.0)
            excess = (lengths - mean) / (tau * mean)
            scores = np.where(mine, -min(max_penalty, 1.0) * np.clip(excess, 0, 1), scores)
    return scores.tolist()


@reward("harmo/hybrid", columns=("solution",), optional=("verifiable",),
        source=f"HARMO, {_READING}")  # fmt: skip
def harmo_hybrid(
    text: str,
    *,
    solution: str,
    verifiable: bool = True,
    score: Callable[[str, str], float] | None = None,
    compat: str,
) -> float:
    """The rule where it applies, else a learned score: math match, or `score(text, solution)`.

    `score` returns a number in [0, 1]. The hybrid is HARMO's, the rule ours.
    """
    if verifiable:
        return math_reward(text, solution=solution, compat="fixed")
    if score is None:
        raise InputError("harmo/hybrid: rows that are not verifiable need the setting 'score'")
    return float(score(text, solution))


@reward("listener/total", columns=("solution", "listener_probability"), range=(0.0, 2.0),
        source="Listener, our own reading of third-party notes")  # fmt: skip
def listener(
    text: str, *, solution: str, listener_probability: float, compat: str
) -> float:  # fmt: skip
    """format + 0.5 [right choice] + 0.5 * the listener's probability of the right choice.

    The probability comes from a frozen model that reads the reasoning (a restricted softmax over
    the choices). Weights from the notes; format and choice are VLM-R1's "fixed" rules.
    """
    form = float(think_then_answer(text) is not None)
    right = mcq(text, solution=solution, compat="fixed")
    return form + 0.5 * right + 0.5 * min(max(float(listener_probability), 0.0), 1.0)


@reward("vlaa_thinking/rule", columns=("solution", "problem_type"),
        verifies=True, source="VLAA-Thinking, our own reading of its README figure")  # fmt: skip
def vlaa_rule(text: str, *, solution: Any, problem_type: str, compat: str) -> float:
    """By type: "digit" equal integers, "mcq" the letter, "math" math-verify, "iou" the box's IoU.

    VLAA-Thinking's figure names the four rules; the parsing is VLM-R1's "fixed" one.
    """
    if problem_type == "digit":
        said, truth = (_integer(_last_answer(side)) for side in (text, str(solution)))
        if truth is None:
            raise BadColumn("solution is not an integer")
        return float(said == truth)
    rules = {"mcq": mcq, "math": math_reward, "iou": vlm_r1_iou}
    if problem_type not in rules:
        raise BadColumn(f"problem_type {problem_type!r}")
    return rules[problem_type](text, solution=solution, compat="fixed")


def _integer(text: str) -> int | None:
    text = text.strip().rstrip(".")
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


@reward("pcpg/cer", columns=("solution",), source=f"PCPG, {_READING}")
def character_error(text: str, *, solution: str, compat: str) -> float:
    """max(0, 1 - CER), CER = character edits / characters of the solution.

    PCPG trains lip reading on the character error rate; the clipping at 0 is ours.
    """
    from rapidfuzz.distance import Levenshtein

    said, truth = _last_answer(text).strip(), str(solution).strip()
    if not truth:
        raise BadColumn("solution is empty")
    if len(said) > 16 * len(truth) + 1024:
        return 0.0
    return max(0.0, 1 - Levenshtein.distance(said, truth) / len(truth))
