# SPDX-License-Identifier: Apache-2.0
"""A long run's host memory stays where it was; more processes hold less each."""

from __future__ import annotations

import json
import statistics

import pytest
from compare import needs

pytest.importorskip("trl")

STEPS = 300


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("one", "fsdp2", "zero3"))
def test_host_memory_grows_by_less_than_one_per_cent(launch, models, mode):
    needs(mode)
    output = models / f"memory-{mode}"
    output.mkdir()
    launch(mode, "grow", output, STEPS, seconds=500)
    for path in output.glob("resident*.json"):
        sizes = json.loads(path.read_text())
        assert len(sizes) == STEPS
        # The first epochs fill the allocator's pools.
        early, late = (statistics.mean(part) for part in (sizes[60:80], sizes[-20:]))
        assert late <= 1.01 * early, (path.name, early, late)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("fsdp2", "zero3"))
def test_what_a_process_holds_falls_with_their_number(launch, models, mode):
    needs(mode)
    held = {}
    for processes in (2, 4):
        output = models / f"held-{mode}-{processes}"
        output.mkdir()
        launch(mode, "hold", output, processes=processes)
        held[processes] = max(json.loads(p.read_text()) for p in output.glob("held*.json"))
    print(f"{mode}: {held}")
    assert held[4] <= 0.65 * held[2], held
