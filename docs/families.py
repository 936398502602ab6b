# SPDX-License-Identifier: Apache-2.0
"""docs/families.md, from what the tests of every family showed.

    python docs/families.py run RESULTS [FAMILY ...]  # on the transformers installed here
    python docs/families.py table RESULTS > docs/families.md

`run` keeps what each case showed in RESULTS/VERSION/FAMILY.json and leaves out what passed there: a
run that was cut goes on where it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

from fastgrpo.models.family import Family
from fastgrpo.models.registry import families

TESTS = Path(__file__).resolve().parent.parent / "tests"

# test function -> what it shows
SHOWN = {
    "test_packed_equals_one_by_one": "float64",
    "test_float32_adds_only_its_rounding": "float32",
    "test_videos_equal_one_by_one": "videos",
    "test_equals_one_by_one": "tool images",
    "test_distinct_images_are_encoded_once": "encoded once",
    "test_a_completion_changes_no_other": "isolated",
    "test_order_changes_nothing": "any order",
    "test_the_fault_shows": "faults show",
    "test_adapters_under_checkpointing": "LoRA, checkpoints",
    "test_greedy_rollout_equals_model_generate": "rollout",
    "test_same_numbers_as_trl": "TRL",
    "test_values": "hostile rows",
    "test_errors": "hostile rows",
    "test_pictures_of_any_size": "hostile rows",
    "test_vision_that_disagrees": "hostile rows",
    "test_images_of_different_dtypes": "hostile rows",
    "test_padded_batches": "hostile rows",
}
FILES = (
    *("test_families.py", "test_family_controls.py", "test_video.py", "test_tool_images.py"),
    *("test_hostile_rows.py", "test_trl_families.py"),
)

NOTES = """
Each cell is what a test showed on transformers {versions}; a number is the largest deviation it
saw, of a log-probability or of a gradient relative to its parameter's largest.

- **float64**: packed rows against one forward a completion, every gradient, prompts of 0, 1 and 3
  images and a video in one batch, 1 and 5 completions, one row and split rows; 1e-12 at most.
  **float32**: the same within 2e-5, but for biases of keys, whose true gradient is zero.
- **videos**: several in a prompt, beside images. **tool images**: inside a completion.
- **encoded once**: an image of several prompts, by calls of the tower. **isolated**: a completion
  changed, every other log-probability the same bit for bit. **any order**: of groups, completions.
- **faults show**: each way to get the row wrong (no hook, positions that go on, a state zeroed, its
  gradient cut, a convolution or a rule that leaks, a window or a block forgotten) fails the test.
- **LoRA, checkpoints**: adapters on decoder, tower and head, under both kinds of activation
  checkpointing. **rollout**: greedy, equal to `model.generate`.
- **TRL**: five steps of `FastGRPOTrainer`, the largest relative difference of a logged number.
- **hostile rows**: empty completions, cut images, images of a pixel, a batch of 512, and the like.

TRL 1.16 does not train four of them: it marks completions as part of the prompt for PaliGemma, and
has no argument for LLaVA-OneVision's `batch_num_images` and MiniCPM-V's `target_sizes`;
`fg.GRPOStep` does. TRL passes no videos on, for any family. MiniCPM-V is served from transformers
5.23 on. "Not run" is what was left out, or needs what is not there.
"""


class Keeper:
    """A pytest plugin: runs what is in `SHOWN` family by family and keeps each case's result; of
    those that are kept, the ones that failed run again."""

    def __init__(self, folder: Path, names: set[str]):
        self.folder, self.running = folder, {}
        self.cases = {
            name: json.loads(self.path(name).read_text()) if self.path(name).exists() else {}
            for name in names
        }

    def path(self, family: str) -> Path:
        return self.folder / f"{family}.json"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        self.family = {
            item.nodeid: item.callspec.params["family"]
            for item in items
            if item.originalname in SHOWN and "family" in item.callspec.params
        }
        items[:] = filter(self.is_left, items)
        items.sort(key=lambda item: self.family[item.nodeid])

    def is_left(self, item) -> bool:
        known = self.cases.get(self.family.get(item.nodeid))
        return known is not None and known.get(item.nodeid, {}).get("outcome") in (None, "failed")

    def pytest_runtest_logreport(self, report):
        case = self.running.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        case["seconds"] = round(case["seconds"] + report.duration, 2)
        case |= dict(report.user_properties)
        if report.outcome != "passed":
            case["outcome"] = report.outcome
        if report.when == "teardown":
            family = self.family[report.nodeid]
            self.cases[family][report.nodeid] = case
            self.path(family).write_text(json.dumps(self.cases[family], indent=1) + "\n")


def run(results: Path, names: list[str]) -> int:
    folder = results.resolve() / transformers.__version__
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(TESTS / name) for name in FILES]
    keeper = Keeper(folder, set(names or families()))
    return pytest.main([*files, "-q", "-m", "not gpu"], plugins=[keeper])


def outcomes(path: Path) -> dict[str, str]:
    """What a family's results show -> "yes", a number, "fails" or "not run".

    Of several cases one that fails decides, then one that ran; of numbers the largest.
    """
    found: dict[str, list[dict]] = {}
    for node, case in json.loads(path.read_text()).items():
        function = node.rpartition("::")[2].partition("[")[0]
        found.setdefault(SHOWN[function], []).append(case)
    return {title: _state(cases) for title, cases in found.items()}


def _state(cases: list[dict]) -> str:
    ran = {case["outcome"] for case in cases}
    if "failed" in ran:
        return "fails"
    if "passed" not in ran:
        return "not run"
    worst = max((case["worst"] for case in cases if "worst" in case), default=None)
    return "yes" if worst is None else f"{worst:.0e}"


def table(results: Path) -> str:
    """Markdown: a row a family, in each cell what the tests of each version showed."""
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    titles = dict.fromkeys(SHOWN.values())
    head = ["family", "media", *titles]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, family in families().items():
        paths = [folder / f"{name}.json" for folder in folders]
        shown = [outcomes(path) if path.exists() else {} for path in paths]
        media = "text"
        if family.vision_inputs:
            media = "images, videos" if family.video_inputs else "images"
        cells = [name, media]
        for title in titles:
            states = [by_title.get(title, _absent(title, family)) for by_title in shown]
            cells.append(states[0] if len(set(states)) == 1 else " / ".join(states))
        lines.append(f"| {' | '.join(cells)} |")
    versions = " / ".join(folder.name for folder in folders)
    return "\n".join(lines) + "\n" + NOTES.format(versions=versions)


def _absent(title: str, family: Family) -> str:
    """Of a test without a case of this family: there is nothing to show, or it was not run."""
    possible = {
        "videos": family.video_inputs,
        "tool images": family.serves_images_in_completions,
        "encoded once": family.vision_inputs,
    }
    return "not run" if possible.get(title, True) else "–"


if __name__ == "__main__":
    command, results, *names = sys.argv[1:]
    if command == "run":
        sys.exit(run(Path(results), names))
    print(table(Path(results)), end="")
