# SPDX-License-Identifier: Apache-2.0
"""The figures of pycocotools."""

import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def coco_stats(*samples) -> list[float]:
    """stats[0], stats[1], stats[2] of COCOeval, each sample an image."""

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    annotations, results, images = [], [], range(1, len(samples) + 1)
    for image, (pred, pred_labels, scores, gt, gt_labels) in zip(images, samples, strict=True):
        annotations += [
            {
                "image_id": image,
                "category_id": label,
                "bbox": xywh(box),
                "area": (box[2] - box[0]) * (box[3] - box[1]),
                "iscrowd": 0,
            }
            for box, label in zip(gt, gt_labels, strict=True)
        ]
        results += [
            {"image_id": image, "category_id": label, "bbox": xywh(box), "score": score}
            for box, label, score in zip(pred, pred_labels, scores, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image, "width": 2048, "height": 2048} for image in images],
            "categories": [{"id": label} for label in sorted({x for s in samples for x in s[4]})],
            "annotations": [entry | {"id": i} for i, entry in enumerate(annotations, 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:3].tolist()
