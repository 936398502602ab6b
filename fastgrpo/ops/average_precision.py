# SPDX-License-Identifier: Apache-2.0
"""COCO average precision of many samples at once."""

from collections.abc import Hashable, Sequence
from importlib import import_module

import torch

from fastgrpo.errors import InputError
from fastgrpo.ops._boxes import as_box_pair, as_sizes, check_same_samples, starts
from fastgrpo.ops.select import select
from fastgrpo.reference import average_precision as reference
from fastgrpo.reference.average_precision import COCO as COCO
from fastgrpo.reference.average_precision import RECALLS as RECALLS

Labels = torch.Tensor | Sequence[Hashable]


def average_precision(
    pred_boxes: torch.Tensor,
    pred_labels: Labels,
    pred_scores: torch.Tensor | Sequence[float] | None,
    gt_boxes: torch.Tensor,
    gt_labels: Labels,
    pred_sizes: Sequence[int] | torch.Tensor,
    gt_sizes: Sequence[int] | torch.Tensor,
    *,
    thresholds: Sequence[float] = COCO,
    max_dets: int = 100,
    area_range: tuple[float, float] | None = None,
    per_threshold: bool = False,
    impl: str | None = None,
    pooled: bool = False,
) -> torch.Tensor:
    """Average precision of each sample as pycocotools computes it for one image.

    Per class of the sample's ground truth and IoU threshold: predictions by falling score (equal
    ones in the given order, NaN last, the first `max_dets` of the class) each take the free ground
    truth with the best IoU >= threshold; precision, made monotone from the right, is averaged over
    the 101 recalls 0, 0.01 ... 1. The result is the mean over classes and thresholds: `stats[0]` of
    COCOeval by default, `stats[1]`, `stats[2]` for `thresholds=[0.5]`, `[0.75]`.

    boxes: (sum of sizes, 4) x1 y1 x2 y2. labels: integer tensors, or sequences of anything
    hashable, compared with ==; predictions of a class the ground truth lacks are left out.
    pred_scores: (sum pred_sizes,), None for all equal. Returns (B,) float64 on the device of
    pred_boxes, or (B, number of thresholds) with per_threshold=True. Not differentiable.

    Every box counts, whatever its size, and an invalid one (see `box_iou`) overlaps with nothing:
    as prediction it is a false positive, as ground truth it is missed. Without ground truth the
    value is 1 if there are no predictions either, else 0; so values are in [0, 1].
    `area_range=(0, 1e10)` follows pycocotools to the letter instead: a box whose signed area
    (x2 - x1) * (y2 - y1) is outside counts neither as ground truth nor as a false positive, and a
    sample where no ground truth counts is -1.

    `pooled=True` is COCO's figure of a data set whose images are the samples: the outcomes of a
    class are ranked over all samples before precision and recall are formed, equal scores in the
    order of the samples, and the mean is over the classes of the whole ground truth. The result is
    () or, per threshold, (number of thresholds,), by the reference alone.

    impl: "reference", "cpp", "cuda"; None picks the fastest there is.

    Raises InputError for shapes, sizes or thresholds outside (0, 1] that do not fit.
    """
    pred_boxes, gt_boxes = as_box_pair(("pred_boxes", "gt_boxes"), pred_boxes, gt_boxes, ndim=2)
    pred_sizes = as_sizes("pred_sizes", pred_sizes, len(pred_boxes))
    gt_sizes = as_sizes("gt_sizes", gt_sizes, len(gt_boxes))
    check_same_samples(("pred_sizes", "gt_sizes"), pred_sizes, gt_sizes)
    pred_labels, gt_labels = _codes(pred_labels, gt_labels)
    _check_one_per_box("pred_labels", pred_labels, pred_boxes)
    _check_one_per_box("gt_labels", gt_labels, gt_boxes)
    pred_scores = _scores(pred_scores, len(pred_boxes))
    _check_one_per_box("pred_scores", pred_scores, pred_boxes)
    thresholds = [float(t) for t in thresholds]
    if not thresholds or not all(0 < t <= 1 for t in thresholds):
        raise InputError(f"thresholds: expected numbers in (0, 1], got {thresholds}")
    if max_dets < 1:
        raise InputError(f"max_dets: expected a count >= 1, got {max_dets}")
    device = pred_boxes.device
    if pooled and impl not in (None, "reference"):
        raise InputError(f"impl: pooled=True has the reference alone, got {impl!r}")
    impl = "reference" if pooled else select("average_precision", device, impl)
    place = device if impl == "cuda" else torch.device("cpu")
    tensors = [pred_boxes.double(), pred_labels, pred_scores, gt_boxes.double(), gt_labels]
    tensors = [t.detach().to(place) for t in tensors]
    if impl == "reference":
        options = {"thresholds": thresholds, "max_dets": max_dets, "area_range": area_range}
        ap = reference.average_precision(*tensors, pred_sizes, gt_sizes, **options, pooled=pooled)
    else:
        module = "_cuda" if impl == "cuda" else "_cpp"
        kernel = import_module(f"fastgrpo_kernels.{module}").average_precision
        low, high = (None, None) if area_range is None else map(float, area_range)
        sizes = [starts(s, torch.device("cpu")) for s in (pred_sizes, gt_sizes)]
        ap = kernel(*tensors, *sizes, thresholds, max_dets, low, high)
    ap = ap.to(device)
    return ap if per_threshold else ap.mean(-1)


def _check_one_per_box(name: str, values: torch.Tensor, boxes: torch.Tensor) -> None:
    if values.shape != boxes.shape[:1]:
        raise InputError(
            f"{name}: expected one per box, shape ({len(boxes)},), got {tuple(values.shape)}"
        )


def _codes(pred_labels: Labels, gt_labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as int64 tensors: tensors as they are, other sequences numbered by equality."""
    if isinstance(pred_labels, torch.Tensor) != isinstance(gt_labels, torch.Tensor):
        raise InputError("pred_labels, gt_labels: expected two tensors or two sequences")
    if isinstance(pred_labels, torch.Tensor):
        for name, labels in (("pred_labels", pred_labels), ("gt_labels", gt_labels)):
            if labels.is_floating_point() or labels.is_complex():
                raise InputError(f"{name}: expected an integer dtype, got {labels.dtype}")
        return pred_labels.long(), gt_labels.long()
    codes: dict[Hashable, int] = {}
    numbered = [
        torch.tensor([codes.setdefault(label, len(codes)) for label in labels], dtype=torch.int64)
        for labels in (pred_labels, gt_labels)
    ]
    return numbered[0], numbered[1]


def _scores(scores: torch.Tensor | Sequence[float] | None, number: int) -> torch.Tensor:
    if scores is None:
        return torch.zeros(number, dtype=torch.float64)
    return torch.as_tensor(scores, dtype=torch.float64)
