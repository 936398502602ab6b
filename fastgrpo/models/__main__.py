# SPDX-License-Identifier: Apache-2.0
"""`python -m fastgrpo.models RESULTS...`: the table of families from pytest's result files.

Each file is what `pytest tests/test_families.py --junitxml=FILE` wrote; its name (5.24.0.xml) is
the transformers version it ran on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

from fastgrpo.models.registry import families

# test function -> what it shows
SHOWN = {
    "test_packed_equals_one_by_one": "packed = one by one",
    "test_distinct_images_are_encoded_once": "images encoded once",
    "test_a_completion_changes_no_other": "completions isolated",
    "test_greedy_rollout_equals_model_generate": "packed rollout",
}


def outcomes(path: Path) -> dict[tuple[str, str], str]:
    """(test function, family) -> "yes", "fails" or "not run" of one result file."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        function, _, family = case.get("name", "").partition("[")
        children = {child.tag for child in case}
        state = "yes"
        if children & {"failure", "error"}:
            state = "fails"
        elif "skipped" in children:
            state = "not run"
        found[function, family.removesuffix("]")] = state
    return found


def table(paths: list[Path]) -> str:
    """Markdown: a row a family, in each cell what the tests of each version showed."""
    results = {path.stem: outcomes(path) for path in paths}
    head = ["family", "media", *SHOWN.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, family in families().items():
        media = "images" if family.vision_inputs else "text"
        cells = [name, media]
        for function in SHOWN:
            states = {v: found.get((function, name), "not run") for v, found in results.items()}
            if media == "text" and "images" in SHOWN[function]:
                cells.append("–")
            elif len(set(states.values())) == 1:
                cells.append(f"{next(iter(states.values()))} ({', '.join(states)})")
            else:
                cells.append(", ".join(f"{state} ({v})" for v, state in states.items()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]), end="")
