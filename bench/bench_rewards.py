# SPDX-License-Identifier: Apache-2.0
"""Rewards: microseconds per completion beside the published algorithms, and cost against length.

The peers are the published algorithms written anew with the libraries they use: one completion at a
time, `re` and `json` to read it, pycocotools for AP, plain loops for IoU and greedy matching.
"""

import argparse
import json
import random
import re
from collections.abc import Callable

from common import Row, main, measure, median_ms

import fastgrpo as fg

# A slow peer is timed on this many completions and reported per completion.
PEER_ROWS = 16
GROUP = 8
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
FENCE = re.compile(r"```json(.*?)```", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOX = re.compile(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)]")


class Case:
    """Detection answers in groups of GROUP that share a solution: its boxes, moved a little."""

    def __init__(self, B: int, n: int) -> None:
        rng = random.Random(0)
        self.texts, self.solutions = [], []
        for k in range(B):
            if k % GROUP == 0:
                truth = [self.item(rng, i) for i in range(n)]
            said = [
                {**item, "bbox_2d": [v + rng.randint(-5, 5) for v in item["bbox_2d"]]}
                for item in truth
            ]
            rng.shuffle(said)
            self.texts.append(f"<think>t</think><answer>{fenced(said)}</answer>")
            self.solutions.append(f"<answer>{fenced(truth)}</answer>")

    @staticmethod
    def item(rng: random.Random, i: int) -> dict:
        x, y = rng.randint(10, 900), rng.randint(10, 900)
        box = [x, y, x + rng.randint(20, 200), y + rng.randint(20, 200)]
        return {"bbox_2d": box, "label": f"class {i % 5}"}

    def ours(self, name: str) -> Callable[[], list]:
        function = fg.rewards.get(name)
        return lambda: function(None, self.texts, solution=self.solutions)

    def peer(self, score: Callable[[list, list], float]) -> Callable[[], list]:
        rows = list(zip(self.texts, self.solutions, strict=True))[:PEER_ROWS]
        return lambda: [score(read(text), read(solution)) for text, solution in rows]


def fenced(items: list) -> str:
    return f"```json\n{json.dumps(items)}\n```"


def read(text: str) -> list[dict]:
    return json.loads(FENCE.findall(ANSWER.findall(text)[-1])[-1])


def pixel_iou(a, b) -> float:
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2] - 1, b[2] - 1), min(a[3] - 1, b[3] - 1)
    inter = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def weighted_sum_loops(preds: list[dict], gts: list[dict]) -> float:
    """Greedy matching that searches the whole table of free pairs for every match: O(n^3)."""
    table = [[pixel_iou(p["bbox_2d"], g["bbox_2d"]) for g in gts] for p in preds]
    free_p, free_g, total = list(range(len(preds))), list(range(len(gts))), 0.0
    while free_p and free_g:
        best, at_p, at_g = -1.0, -1, -1
        for p in free_p:
            for g in free_g:
                if table[p][g] > best:
                    best, at_p, at_g = table[p][g], p, g
        if best < 0.5:
            break
        total += best * (preds[at_p]["label"].lower() == gts[at_g]["label"].lower())
        free_p.remove(at_p)
        free_g.remove(at_g)
    missed, false = len(free_g) / len(gts), len(free_p) / len(preds)
    return 0.7 * total / len(gts) + 0.3 * (1 - (missed + false) / 2)


def coco_map(preds: list[dict], gts: list[dict]) -> float:
    """pycocotools on one image, all scores 1."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = {label: i for i, label in enumerate(dict.fromkeys(g["label"] for g in gts))}

    def annotation(i: int, item: dict) -> dict:
        x1, y1, x2, y2 = item["bbox_2d"]
        box = [x1, y1, x2 - x1, y2 - y1]
        kind = names[item["label"]]
        return {"id": i + 1, "image_id": 0, "category_id": kind, "bbox": box, "score": 1.0,
                "area": box[2] * box[3], "iscrowd": 0}  # fmt: skip

    def coco(items: list[dict]) -> COCO:
        one = COCO()
        one.dataset = {
            "images": [{"id": 0}],
            "categories": [{"id": i, "name": label} for label, i in names.items()],
            "annotations": [annotation(i, item) for i, item in enumerate(items)],
        }
        one.createIndex()
        return one

    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(coco(gts), coco([p for p in preds if p["label"] in names]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])


def length_penalised_map(preds: list[dict], gts: list[dict]) -> float:
    return coco_map(preds, gts) * min(1.0, len(gts) / len(preds))


PEERS = {
    "vlm_r1/weighted_sum": ("O(n^3) loops", weighted_sum_loops),
    "vlm_r1/od_ap": ("pycocotools", coco_map),
    "vlm_r1/od_length": ("pycocotools", length_penalised_map),
}


def rec_case(B: int) -> tuple[list[str], list[str]]:
    rng = random.Random(1)
    boxes = [Case.item(rng, i)["bbox_2d"] for i in range(B)]
    texts = [f"<think>{'word ' * 40}</think><answer>{{'bbox_2d': {b}}}</answer>" for b in boxes]
    return texts, [f"<answer> {b} </answer>" for b in boxes]


def rec_loop(texts: list[str], solutions: list[str]) -> list[float]:
    scores = []
    for text, solution in zip(texts, solutions, strict=True):
        truth = json.loads(ANSWER.findall(solution)[-1])
        found = BOX.search(ANSWER.search(text).group(1))
        scores.append(pixel_iou([int(n) for n in found.groups()], truth))
    return scores


def detection_rows(B: int, n: int, repeats: int) -> list[Row]:
    case, result = Case(B, n), []
    for name, (library, score) in PEERS.items():
        ours, peer = case.ours(name), case.peer(score)
        times = median_ms({"ours": ours, library: peer}, "cpu", repeats)
        per_row = {"ours": times["ours"] / B, library: times[library] / min(B, PEER_ROWS)}
        for variant, ms in per_row.items():
            extra = {"us per completion": ms * 1e3, "times published": per_row[library] / ms}
            result.append(
                Row("rewards", f"{name}, {B} of {n}x{n}", variant, ms, extra=extra,
                    note="ms per completion")
            )  # fmt: skip
    return result


def rec_rows(B: int, repeats: int) -> list[Row]:
    texts, solutions = rec_case(B)
    function = fg.rewards.get("vlm_r1/iou")
    steps = {
        "ours": lambda: function(None, texts, solution=solutions),
        "re and json": lambda: rec_loop(texts, solutions),
    }
    times = median_ms(steps, "cpu", repeats)
    return [
        Row("rewards", f"vlm_r1/iou, {B} of 1x1", variant, ms / B, note="ms per completion",
            extra={"us per completion": ms / B * 1e3, "times published": times["re and json"] / ms})
        for variant, ms in times.items()
    ]  # fmt: skip


def length_rows(lengths, repeats: int) -> list[Row]:
    """The cost of one completion of repeated boxes against its length, which stays linear."""
    item = '{"bbox_2d": [10, 10, 110, 110], "label": "cat"}, '
    solution = f"<answer>{fenced([json.loads(item[:-2])])}</answer>"
    columns = {
        "vlm_r1/od_ap": {"solution": [solution]},
        "vlm_r1/format_rec": {},
        "vlm_r1/repetition": {},
        "v_triune/detection_format": {},
        "three_d_r1/format": {},
    }
    result = []
    for name, given in columns.items():
        function = fg.rewards.get(name)
        for length in lengths:
            body = (item * (length // len(item) + 1))[:length]
            text = f"<think>t</think><answer>```json\n[{body}\n```</answer>"
            ms = median_ms({"ours": lambda f=function, t=text, g=given: f(None, [t], **g)},
                           "cpu", repeats)["ours"]  # fmt: skip
            extra = {"us per completion": ms * 1e3, "ns per character": ms * 1e6 / length}
            result.append(
                Row("reward_length", f"{name}, {length} characters", "ours", ms, extra=extra)
            )
    return result


def rows(args: argparse.Namespace) -> list[Row]:
    B, n = (4, 3) if args.small else (512, 50)
    lengths = LENGTHS[:2] if args.small else LENGTHS
    return [
        *detection_rows(B, n, args.repeats),
        *rec_rows(B, args.repeats),
        *length_rows(lengths, args.repeats),
    ]


def test_bench_rewards_small(benchmark):
    measure(benchmark, Case(4, 3).ours("vlm_r1/od_ap"))


if __name__ == "__main__":
    main(rows)
