# SPDX-License-Identifier: Apache-2.0
"""`python -m fastgrpo.models RESULTS...`: the table of families from pytest's result files.

Each file is what pytest wrote with `--junitxml=FILE` of the tests that `make families` names; its
name (5.24.0.xml) is the transformers version they ran on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

from fastgrpo.models.registry import families

# test function -> what it shows
SHOWN = {
    "test_packed_equals_one_by_one": "packed = one by one",
    "test_videos_equal_one_by_one": "videos",
    "test_distinct_images_are_encoded_once": "images encoded once",
    "test_a_completion_changes_no_other": "completions isolated",
    "test_the_fault_shows": "faults show",
    "test_adapters_under_checkpointing": "LoRA, both checkpointings",
    "test_greedy_rollout_equals_model_generate": "packed rollout",
    "test_same_numbers_as_trl": "TRL's numbers",
}

NOTES = """
TRL 1.16 does not train four of them: it marks completions as part of the prompt for PaliGemma, and
has no argument for LLaVA-OneVision's `batch_num_images` and MiniCPM-V's `target_sizes`;
`fg.GRPOStep` does. TRL passes no videos on, for any family. "Not run": what the test needs (trl,
the family itself) is not there beside that transformers, or it was left out.
"""


def outcomes(path: Path) -> dict[tuple[str, str], str]:
    """(test function, family) -> "yes", "fails" or "not run" of one result file.

    A case's id begins with its family; of several, one that fails decides, then one that ran.
    """
    found: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        function, _, parameters = case.get("name", "").partition("[")
        key = function, parameters.removesuffix("]").split("-")[0]
        children = {child.tag for child in case}
        state = "yes"
        if children & {"failure", "error"}:
            state = "fails"
        elif "skipped" in children:
            state = "not run"
        order = ("not run", "yes", "fails")
        found[key] = max(state, found.get(key, state), key=order.index)
    return found


def table(paths: list[Path]) -> str:
    """Markdown: a row a family, in each cell what the tests of each version showed."""
    results = {path.stem: outcomes(path) for path in paths}
    head = ["family", "media", *SHOWN.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, family in families().items():
        media = "images" if family.vision_inputs else "text"
        media += ", videos" if family.video_inputs else ""
        cells = [name, media]
        for function in SHOWN:
            states = {v: found.get((function, name), "not run") for v, found in results.items()}
            title = SHOWN[function]
            lacking = title == "videos" and "videos" not in media
            if lacking or ("images" in title and media == "text"):
                cells.append("–")
            elif len(set(states.values())) == 1:
                cells.append(f"{next(iter(states.values()))} ({', '.join(states)})")
            else:
                cells.append(", ".join(f"{state} ({v})" for v, state in states.items()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + NOTES


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]), end="")
