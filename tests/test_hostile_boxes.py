# SPDX-License-Identifier: Apache-2.0
"""Boxes no detector should give, through IoU, GIoU, matching and average precision.

Whatever comes, values are defined and in range: an invalid box scores as no box (IoU 0, GIoU -1),
is matched with nothing above zero, and as a prediction is a false positive.
"""

import math

import fastgrpo_kernels
import pytest
import torch

import fastgrpo as fg

INFO = fastgrpo_kernels.build_info()["cpp"]
CPP = pytest.mark.skipif(not INFO["built"], reason=f"no C++ kernels: {INFO['reason']}")
IMPLS = ["reference", pytest.param("cpp", marks=CPP)]
GOOD = [10.0, 10.0, 50.0, 50.0]

INVALID = {
    "reversed": [50.0, 50.0, 10.0, 10.0],
    "partially reversed": [50.0, 10.0, 10.0, 50.0],
    "nan": [math.nan, 10.0, 50.0, 50.0],
    "inf": [10.0, 10.0, math.inf, 50.0],
    "minus inf": [-math.inf, 10.0, 50.0, 50.0],
    "1e308": [0.0, 0.0, 1e308, 1e308],
    "xywh": [40.0, 40.0, 20.0, 20.0],
}
VALID = {
    "zero area": [20.0, 20.0, 20.0, 20.0],
    "negative": [-30.0, -30.0, -10.0, -10.0],
    "beyond 2^53": [2**53 + 1, 0, 2**53 + 5, 4],
    "duplicates": GOOD,
}


def evaluate(pred, gt, impl, labels=None):
    """IoU, GIoU, the columns of both kinds of matching, and AP, of one sample."""
    sizes = [len(pred)], [len(gt)]
    iou, offsets = fg.pairwise_box_iou(pred, gt, *sizes, impl=impl)
    giou, _ = fg.pairwise_box_iou(pred, gt, *sizes, kind="giou", impl=impl)
    matches = [
        fg.match_boxes(iou, offsets, *sizes, method=m, threshold=0.5, impl=impl).tolist()
        for m in ("optimal", "greedy")
    ]
    pred_labels, gt_labels = labels or ([0] * len(pred), [0] * len(gt))
    ap = fg.average_precision(pred, pred_labels, None, gt, gt_labels, *sizes, impl=impl)
    assert ((iou >= 0) & (iou <= 1)).all() and ((giou >= -1) & (giou <= 1)).all()
    assert 0 <= ap.item() <= 1
    for columns in matches:
        taken = [c for c in columns if c >= 0]
        assert len(set(taken)) == len(taken)
    return iou, giou, matches, ap.item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", INVALID)
def test_invalid_box_scores_as_no_box(name, impl):
    bad = INVALID[name]
    iou, giou, matches, ap = evaluate([bad, GOOD], [GOOD, bad], impl)
    assert iou.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert giou.tolist() == [-1.0, -1.0, 1.0, -1.0]
    assert matches == [[-1, 0], [-1, 0]]
    assert ap == pytest.approx(51 / 101 / 2)  # recall 1/2 at precision 1/2
    _, _, _, as_prediction = evaluate([GOOD, bad], [GOOD], impl)
    assert as_prediction == pytest.approx(1.0)
    single = fg.box_iou(torch.tensor(bad), torch.tensor(GOOD), kind="giou")
    assert single.dtype == torch.float32 and single.item() == -1.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", VALID)
def test_odd_valid_box_is_defined(name, impl):
    odd = torch.tensor([VALID[name]] * 3)  # integers beyond 2^53 stay integers until the op
    iou, giou, matches, ap = evaluate(odd, odd, impl)
    expected = 0.0 if name == "zero area" else 1.0
    assert iou.tolist() == [expected] * 9 and giou.tolist() == [expected] * 9
    assert ap == pytest.approx(expected)
    assert matches[1] == ([-1] * 3 if name == "zero area" else [0, 1, 2])


@pytest.mark.parametrize("coordinates", [3, 5])
def test_other_numbers_of_coordinates_are_refused(coordinates):
    wrong = torch.ones(1, coordinates)
    good = torch.tensor([GOOD])
    for boxes in ((wrong, good), (good, wrong)):
        with pytest.raises(fg.InputError, match=rf"got \(1, {coordinates}\)"):
            fg.box_iou(*boxes)
        with pytest.raises(fg.InputError, match=rf"got \(1, {coordinates}\)"):
            fg.pairwise_box_iou(*boxes, [1], [1])
        with pytest.raises(fg.InputError, match=rf"got \(1, {coordinates}\)"):
            fg.average_precision(boxes[0], [0], None, boxes[1], [0], [1], [1])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_predicted_nothing_there_neither(impl):
    none = torch.empty(0, 4)
    good = torch.tensor([GOOD])
    assert evaluate(none, good, impl)[2:] == ([[], []], 0.0)
    assert evaluate(good, none, impl)[2:] == ([[-1], [-1]], 0.0)
    assert evaluate(none, none, impl)[2:] == ([[], []], 1.0)


@CPP
def test_thousand_by_thousand():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1000, 2, generator=generator) * 900
    gt = torch.cat([corner, corner + 40], 1)
    order = torch.randperm(1000, generator=generator)
    iou, _, matches, ap = evaluate(gt[order], gt, "cpp")
    assert iou.numel() == 10**6 and matches == [order.tolist()] * 2
    assert ap == pytest.approx(11 / 101)  # 100 of 1000 count: recalls 0 to 0.1
    same = gt[:1].expand(1000, 4)
    assert evaluate(same, same, "cpp")[2][1] == list(range(1000))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label", [None, 7, "кот 🐈", "", "x" * 100_000, float("inf"), (1, "a")])
def test_any_label(label, impl):
    pred = [GOOD, [60.0, 60.0, 70.0, 70.0]]
    assert evaluate(pred, pred, impl, ([label, "b"], [label, "b"]))[3] == pytest.approx(1.0)
    assert evaluate(pred, pred, impl, (["other", "b"], [label, "b"]))[3] == pytest.approx(0.5)


def test_missing_label_is_refused():
    with pytest.raises(fg.InputError, match="pred_labels: expected one per box"):
        fg.average_precision([GOOD, GOOD], [1], None, [GOOD], [1], [2], [1])


@CPP
@pytest.mark.parametrize("level", [0, 1, 2])
def test_invalid_boxes_on_smaller_processors(level):
    from fastgrpo_kernels import _C

    try:
        if _C.limit_isa(level) != level:
            pytest.skip("this processor has no such instructions")
        for name in INVALID:
            test_invalid_box_scores_as_no_box(name, "cpp")
        test_thousand_by_thousand()
    finally:
        _C.limit_isa(2)
