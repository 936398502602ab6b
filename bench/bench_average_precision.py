# SPDX-License-Identifier: Apache-2.0
"""average_precision of many completions, one image each; pycocotools as a reward calls it."""

import argparse
import contextlib
import io
from collections.abc import Callable

import torch
from common import Row, importable, main, measure, median_ms, peak_mib

import fastgrpo as fg
from fastgrpo.ops.select import why_not

# B samples, n predictions, m ground-truth boxes
SHAPES = {"B=512 50x50": (512, 50, 50)}
SMALL = {"small B=3 5x4": (3, 5, 4)}
CLASSES = 3


class Case:
    def __init__(self, B: int, n: int, m: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        corner, size = torch.randint(1, 400, (2, B, m, 2), generator=generator).double()
        gt = torch.cat([corner, corner + size], 2)
        pick = torch.randint(0, m, (B, n, 1), generator=generator)
        pred = gt.gather(1, pick.expand(B, n, 4)).clone()
        pred[..., 2:] += torch.randint(0, 60, (B, n, 2), generator=generator)
        gt_labels = torch.randint(0, CLASSES, (B, m), generator=generator)
        pred_labels = gt_labels.gather(1, pick[..., 0])
        scores = torch.rand(B, n, generator=generator, dtype=torch.float64)
        self.parts = [pred, pred_labels, scores, gt, gt_labels]
        self.flat = [part.flatten(0, 1).to(device) for part in self.parts]
        self.sizes = [n] * B, [m] * B

    def variants(self) -> dict[str, Callable[[], torch.Tensor]]:
        steps = {
            impl: lambda impl=impl: fg.average_precision(*self.flat, *self.sizes, impl=impl)
            for impl in ("cuda", "cpp", "reference")
            if why_not("average_precision", impl, self.flat[0].device) is None
        }
        if importable("pycocotools"):
            samples = list(zip(*(part.tolist() for part in self.parts), strict=True))
            steps["pycocotools"] = lambda: torch.tensor(
                [pycocotools_ap(*s) for s in samples], dtype=torch.float64
            )
        return steps


def pycocotools_ap(pred, pred_labels, scores, gt, gt_labels) -> float:
    """stats[0] of COCOeval with one image, without its summary of sizes and its printing."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotation(i, box, label, **more):
        w, h = box[2] - box[0], box[3] - box[1]
        box = [box[0], box[1], w, h]
        return {"id": i, "image_id": 1, "category_id": label, "bbox": box, "area": w * h, **more}

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": 1}],
            "categories": [{"id": label} for label in sorted(set(gt_labels))],
            "annotations": [
                annotation(i, box, label, iscrowd=0)
                for i, (box, label) in enumerate(zip(gt, gt_labels, strict=True), 1)
            ],
        }
        truth.createIndex()
        found = truth.loadRes(
            [
                annotation(i, box, label, score=score)
                for i, (box, label, score) in enumerate(
                    zip(pred, pred_labels, scores, strict=True), 1
                )
            ]
        )
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean())


def rows(args: argparse.Namespace) -> list[Row]:
    result = []
    for shape, sizes in (SMALL if args.small else SHAPES).items():
        case = Case(*sizes, args.device)
        steps = case.variants()
        times = median_ms(steps, args.device, args.repeats)
        exact = fg.average_precision(*case.flat, *case.sizes, impl="reference").cpu()
        for name, step in steps.items():
            extra = {}
            if "pycocotools" in times:
                extra["times pycocotools"] = times["pycocotools"] / times[name]
            result.append(
                Row(
                    op="average_precision",
                    shape=shape,
                    variant=name,
                    ms=times[name],
                    peak_mib=peak_mib(step, args.device),
                    error=(step().cpu() - exact).abs().max().item(),
                    note="largest difference from the reference",
                    extra=extra,
                )
            )
    return result


def test_bench_average_precision_small(benchmark):
    case = Case(3, 5, 4, "cpu")
    measure(benchmark, lambda: fg.average_precision(*case.flat, *case.sizes))


if __name__ == "__main__":
    main(rows)
