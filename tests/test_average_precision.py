# SPDX-License-Identifier: Apache-2.0
"""average_precision equals pycocotools on one image per sample, in every implementation."""

import fastgrpo_kernels
import numpy as np
import pytest
import torch
from coco import coco_stats
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrpo as fg

INFO = fastgrpo_kernels.build_info()["cpp"]
CPP = pytest.mark.skipif(not INFO["built"], reason=f"no C++ kernels: {INFO['reason']}")
IMPLS = ["reference", pytest.param("cpp", marks=CPP)]
COCO_AREAS = (0.0, 1e10)


def ours(samples, impl, **options) -> torch.Tensor:
    """(B, 3) AP, AP50 and AP75 of a list of samples."""
    pred, pred_labels, scores, gt, gt_labels = (
        sum(part, []) for part in zip(*samples, strict=True)
    )
    ap = fg.average_precision(
        torch.tensor(pred, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(pred_labels, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(gt, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(gt_labels, dtype=torch.int64),
        [len(s[0]) for s in samples],
        [len(s[3]) for s in samples],
        per_threshold=True,
        impl=impl,
        **options,
    )
    return torch.stack([ap.mean(-1), ap[..., 0], ap[..., 5]], -1)


def random_sample(rng, preds, gts, classes=3, levels=None, smallest=1):
    """Integer boxes near each other; few score levels make ties."""

    def draw(count):
        corner = rng.integers(0, 25, (count, 2))
        boxes = np.concatenate([corner, corner + rng.integers(smallest, 15, (count, 2))], 1)
        return boxes.astype(float)

    gt, pred = draw(gts), draw(preds)
    near = rng.random(preds) < 0.6
    pred[near] = gt[rng.integers(0, gts, near.sum())]
    pred[near, 2:] += rng.integers(0, 3, (near.sum(), 2))
    scores = rng.random(preds) if levels is None else rng.integers(0, levels, preds) / levels
    return (
        pred.tolist(),
        rng.integers(1, classes + 2, preds).tolist(),  # one class the ground truth lacks
        scores.tolist(),
        gt.tolist(),
        rng.integers(1, classes + 1, gts).tolist(),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_average_precision_is_pycocotools(impl):
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, int(rng.integers(1, 40)), int(rng.integers(1, 20)), levels=levels)
        for levels in (None, 1, 2, 5)
        for _ in range(15)
    ]
    want = torch.tensor([coco_stats(s) for s in samples], dtype=torch.float64)
    torch.testing.assert_close(ours(samples, impl), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_average_precision_with_coco_areas_is_pycocotools_on_reversed_boxes(impl):
    rng = np.random.default_rng(1)
    samples = [random_sample(rng, 12, 6, levels=3, smallest=-6) for _ in range(40)]
    want = torch.tensor([coco_stats(s) for s in samples], dtype=torch.float64)
    got = ours(samples, impl, area_range=COCO_AREAS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    # Without area ranges every box counts, and the value is a proportion.
    counted = ours(samples, impl)
    assert ((counted >= 0) & (counted <= 1)).all()


def test_pooled_average_precision_is_pycocotools_over_several_images():
    rng = np.random.default_rng(2)
    for levels in (None, 1, 3):
        for areas in (None, COCO_AREAS):
            samples = [
                random_sample(rng, int(rng.integers(1, 30)), int(rng.integers(1, 9)), levels=levels)
                for _ in range(12)
            ]
            want = torch.tensor(coco_stats(*samples), dtype=torch.float64)
            got = ours(samples, None, pooled=True, area_range=areas)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
            assert abs(ours(samples, None).mean(0) - got).max() > 1e-3  # not the mean of the images


def test_pooled_average_precision_by_hand():
    """Two images: a hit in each, and a miss of the first that outranks the second's hit."""
    images = [([BOX, FAR], [1, 1], [0.9, 0.8], [BOX], [1]), ([BOX], [1], [0.7], [BOX], [1])]
    # precision 1 up to recall 1/2, 2/3 beyond: 51 of 101 recall levels are at most 1/2
    want = (51 + 50 * 2 / 3) / 101
    assert ours(images, None, pooled=True).tolist() == pytest.approx([want] * 3, abs=1e-12)
    empty = [([], [], [], [], []), ([BOX], [1], [1.0], [], [])]
    assert ours(empty[:1], None, pooled=True).tolist() == [1.0] * 3
    assert ours(empty, None, pooled=True).tolist() == [0.0] * 3
    assert ours(empty, None, pooled=True, area_range=COCO_AREAS).tolist() == [-1.0] * 3
    with pytest.raises(fg.InputError, match="pooled=True has the reference alone, got 'cpp'"):
        ours(images, "cpp", pooled=True)


BOX, FAR = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
HALF = [0.0, 0.0, 10.0, 5.0]  # IoU exactly 0.5 with BOX
ADVERSARIAL = {
    "perfect": ([BOX], [1], [1.0], [BOX], [1]),
    "iou on the threshold": ([HALF], [1], [1.0], [BOX], [1]),
    "iou 0.9 on the threshold 0.8999": ([[0, 0, 10, 9.0]], [1], [1.0], [BOX], [1]),
    "false positive first": ([FAR, BOX], [1, 1], [1.0, 1.0], [BOX], [1]),
    "false positive last": ([BOX, FAR], [1, 1], [1.0, 1.0], [BOX], [1]),
    "duplicates": ([BOX] * 5, [1] * 5, [1.0] * 5, [BOX], [1]),
    "duplicate ground truth": ([BOX, BOX], [1, 1], [0.5, 0.9], [BOX, BOX, BOX], [1, 1, 1]),
    "two equally good": ([HALF], [1], [1.0], [BOX, [0.0, -5.0, 10.0, 5.0]], [1, 1]),
    "all wrong label": ([BOX, FAR], [2, 1], [1.0, 1.0], [BOX, FAR], [1, 2]),
    "unknown label only": ([BOX], [7], [1.0], [BOX], [1]),
    "a class never predicted": ([BOX], [1], [1.0], [BOX, FAR], [1, 2]),
    "zero area": ([[3, 3, 3, 3.0], BOX], [1, 1], [1.0, 0.5], [[3, 3, 3, 3.0], BOX], [1, 1]),
    "negative scores": ([FAR, BOX], [1, 1], [-2.0, -1.0], [BOX], [1]),
    "101 detections, the hit last": ([FAR] * 100 + [BOX], [1] * 101, [1.0] * 101, [BOX], [1]),
    "100 detections per class": (
        [FAR] * 100 + [BOX],
        [1] * 100 + [2],
        [1.0] * 101,
        [BOX, BOX],
        [1, 2],
    ),
    "recall on a grid point": ([BOX] * 3, [1] * 3, [1.0] * 3, [BOX] * 10, [1] * 10),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_average_precision_adversarial_is_pycocotools(name, impl):
    sample = tuple(list(part) for part in ADVERSARIAL[name])
    want = torch.tensor([coco_stats(sample)], dtype=torch.float64)
    for areas in (None, COCO_AREAS):
        got = ours([sample], impl, area_range=areas)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_average_precision_order_of_equal_scores_decides(impl):
    gt = [BOX, FAR]
    extra = [20.0, 20.0, 30.0, 30.0]
    first = ([extra, BOX, FAR], [1] * 3, [1.0] * 3, gt, [1, 1])
    last = ([BOX, FAR, extra], [1] * 3, [1.0] * 3, gt, [1, 1])
    values = ours([first, last], impl)[:, 0]
    assert values[0] < 0.7 and values[1] > 0.999


@pytest.mark.parametrize("impl", IMPLS)
def test_average_precision_without_ground_truth_or_predictions(impl):
    samples = [([], [], [], [], []), ([BOX], [1], [1.0], [], []), ([], [], [], [BOX], [1])]
    assert ours(samples, impl)[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert ours(samples, impl, area_range=COCO_AREAS)[:, 0].tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_average_precision_labels_are_anything_hashable(impl):
    boxes = torch.tensor([BOX, FAR])
    labels = ["Hüte 🎩", None]

    def ap(pred_labels):
        return fg.average_precision(
            boxes, pred_labels, None, boxes, labels, [2], [2], impl=impl
        ).item()

    assert ap(["Hüte 🎩", None]) == pytest.approx(1.0)
    assert ap(["Hüte", None]) == pytest.approx(0.5)
    assert ap(["None", 3]) == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_average_precision_options(impl):
    sample = ([HALF, FAR, BOX], [1, 1, 1], [0.9, float("nan"), 0.1], [BOX], [1])
    tensors = [torch.tensor(part) for part in sample]

    def ap(**options):
        return fg.average_precision(*tensors, [3], [1], impl=impl, **options)

    assert ap(thresholds=[0.5]).item() == pytest.approx(1.0)
    assert ap(thresholds=[0.6]).item() == pytest.approx(0.5)  # HALF misses, BOX is second
    assert ap(thresholds=[0.6], max_dets=1).item() == 0.0
    assert ap(thresholds=[0.5, 0.6], per_threshold=True).shape == (1, 2)
    assert ap(thresholds=[1.0]).item() == pytest.approx(0.5)
    assert ap().dtype == torch.float64


@CPP
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(0, 12), st.integers(1, 4))
def test_average_precision_implementations_agree_and_stay_in_range(seed, preds, gts, levels):
    rng = np.random.default_rng(seed)
    sample = random_sample(rng, preds, max(gts, 1), levels=levels, smallest=-3)
    if gts == 0:
        sample = (*sample[:3], [], [])
    for options in ({}, {"area_range": (16.0, 90.0)}, {"max_dets": 3}):
        reference, cpp = ours([sample], "reference", **options), ours([sample], "cpp", **options)
        torch.testing.assert_close(cpp, reference, rtol=0, atol=1e-12)
        if "area_range" not in options:
            assert ((cpp >= 0) & (cpp <= 1)).all()


@CPP
def test_average_precision_cpp_any_number_of_threads():
    rng = np.random.default_rng(2)
    samples = [random_sample(rng, 20, 10, levels=3) for _ in range(100)]
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 4):
            torch.set_num_threads(count)
            runs.append(ours(samples, "cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*runs)


@CPP
def test_average_precision_cpp_opcheck():
    from fastgrpo_kernels import _cpp

    boxes, labels, scores = torch.rand(3, 4).double(), torch.zeros(3).long(), torch.rand(3).double()
    start = torch.tensor([0, 1, 3])
    args = (boxes, labels, scores, boxes, labels, start, start, [0.5, 0.75], 100, None, None)
    torch.library.opcheck(_cpp.average_precision, args)


def test_average_precision_says_what_is_wrong():
    boxes, labels = torch.rand(2, 4), torch.tensor([0, 1])

    def ap(pred_labels=labels, scores=None, sizes=(2,), **options):
        fg.average_precision(boxes, pred_labels, scores, boxes, labels, list(sizes), [2], **options)

    with pytest.raises(fg.InputError, match=r"pred_labels: expected one per box, shape \(2,\)"):
        ap(labels[:1])
    with pytest.raises(fg.InputError, match="pred_labels: expected an integer dtype"):
        ap(torch.rand(2))
    with pytest.raises(fg.InputError, match="two tensors or two sequences"):
        ap(["cat", "dog"])
    with pytest.raises(fg.InputError, match="pred_scores: expected one per box"):
        ap(scores=[1.0])
    with pytest.raises(fg.InputError, match="pred_sizes: expected counts that sum to 2, got 3"):
        ap(sizes=(3,))
    with pytest.raises(fg.InputError, match="gt_sizes: expected 2 samples"):
        ap(sizes=(1, 1))
    with pytest.raises(fg.InputError, match="thresholds"):
        ap(thresholds=[0.0])
    with pytest.raises(fg.InputError, match="max_dets"):
        ap(max_dets=0)
