# SPDX-License-Identifier: Apache-2.0
"""GRiP, by its abstract: IoU weighted by salience."""

from __future__ import annotations

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import detection_truth
from fastgrpo.rewards.geometry.matching import folded, match, overlaps
from fastgrpo.rewards.read.tags import last_answer
from fastgrpo.rewards.systems.vlm_r1_detection import place, read_rows


@reward("grip/weighted_iou", columns=("solution",), optional=("salience",),
        source="GRiP, our own reading of the abstract", batched=True, framed=True,
        truth=detection_truth)  # fmt: skip
def grip_weighted_iou(texts, note, *, solution, frames, salience=None):
    """Sum over the objects of salience * IoU of the matched box / sum of salience.

    Boxes are matched best IoU first among equal labels; `salience` lists a weight per object of
    the solution (default 1 each). GRiP's abstract has a "salience-weighted IoU"; the matching is
    ours.
    """
    values, preds, gts, rows = read_rows(texts, note, solution, frames, last_answer)
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
