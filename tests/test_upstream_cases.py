# SPDX-License-Identifier: Apache-2.0
"""Every recorded call of the published code, reproduced by our reward or op to 1e-6.

The cases are executed outputs of the published repositories. Another folder of cases can be named
by FASTGRPO_CASES; a function we do not know fails.
"""

import json
import math
import os
from pathlib import Path

import published.systems  # noqa: F401
import published.trainer  # noqa: F401
import published.vlm_r1  # noqa: F401
import pytest
from published import ADAPTERS
from published.engine import OBJECTIVE_ADAPTERS
from published.fixed import fixed_value

FOLDER = Path(os.environ.get("FASTGRPO_CASES") or Path(__file__).parent / "cases")
TOLERANCE = 1e-6


def _each_case():
    for path in sorted(FOLDER.glob("*.json")):
        for i, case in enumerate(json.loads(path.read_text())):
            yield pytest.param(case, id=f"{path.stem}-{i}")


def _agrees(ours, published) -> bool:
    if isinstance(published, dict):
        return isinstance(ours, dict) and all(
            key in ours and _agrees(ours[key], value) for key, value in published.items()
        )
    if isinstance(published, list):
        same_length = isinstance(ours, list | tuple) and len(ours) == len(published)
        return same_length and all(map(_agrees, ours, published))
    if isinstance(published, bool) or not isinstance(published, int | float):
        return ours == published
    return ours is not None and math.isclose(ours, published, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


CASES = list(_each_case())


@pytest.mark.parametrize("case", CASES)
def test_published_output(case):
    key = case["system"], case["function"]
    # The cases of one update step carry their settings behind a colon: "update_policy: PAPO ...".
    step = case["system"], case["function"].split(": ")[0]
    call = ADAPTERS.get(key) or OBJECTIVE_ADAPTERS.get(key) or OBJECTIVE_ADAPTERS.get(step)
    assert call is not None, f"no reward or op stands for {key}"
    published = case["output"]
    if isinstance(published, dict) and "raises" in published:
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the type is compared below
            call(case["inputs"])
        names = [kind.__name__ for kind in type(raised.value).__mro__]
        assert published["raises"] in names
        return
    ours = call(case["inputs"])
    assert _agrees(ours, published), f"ours {ours}, published {published}; {case['note']}"


def _quirks():
    return [p for p in CASES if p.values[0].get("quirk") and p.values[0]["system"] == "VLM-R1"]


@pytest.mark.parametrize("case", _quirks())
def test_fixed_value_of_a_quirk(case):
    if case["function"].startswith("VLMGRPOTrainer"):
        pytest.skip("a metric of the trainer, not a reward")
    known, expected = fixed_value(case)
    if not known and FOLDER != Path(__file__).parent / "cases":
        pytest.skip("the table holds the quirks of tests/cases")
    assert known, "the table FIXED has no value for this quirk"
    ours = ADAPTERS[case["system"], case["function"]](case["inputs"], compat="fixed")
    assert (ours is None) == (expected is None)
    assert expected is None or math.isclose(ours, expected, rel_tol=1e-9, abs_tol=1e-9)
