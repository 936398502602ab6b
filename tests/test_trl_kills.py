# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments: every run resumes, and goes on as if it had not been cut.

`make test-faults KILLS=100` runs that many trials over all kinds of run. A moment is a step and a
part of a step's time after it, so that every kill meets a run that trains.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
from pathlib import Path

import pytest
import torch
from compare import METRICS, needs

pytest.importorskip("trl")

from fastgrpo.checkpoints import newest_complete  # noqa: E402
from fastgrpo.testing.launch import MODES, Launcher  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("FASTGRPO_KILLS", "100"))
SAVES_KILLED = 20
CASES = ("moving_reference", "lora", "several_steps_a_generation", "every_step_saved")
KINDS = [("one", case) for case in CASES]
KINDS += [(mode, case) for mode in MODES for case in ("moving_reference", "lora")]


@pytest.fixture(scope="module")
def launch():
    with Launcher(Path(__file__).parent / "distributed" / "killed_job.py") as launcher:
        yield launcher


@pytest.fixture(scope="module")
def whole(launch, models):
    """The folder of a kind's uninterrupted run, which is made once."""

    def run(mode, case):
        output = models / f"killed-{mode}-{case}" / "whole"
        if not output.exists():
            output.mkdir(parents=True)
            launch(mode, "go_on", output, case)
        return output

    return run


def number(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def marked(output: Path, what: str) -> list[tuple[int, float]]:
    """Steps and the seconds at which they were done, or saved."""
    return sorted((number(path), path.stat().st_mtime) for path in output.glob(f"{what}-*"))


def first_of(output: Path) -> int:
    """The step a run in that folder would go on from."""
    start, _ = newest_complete(output)
    return number(start) if start else 0


def resumes(launch, mode, case, output, whole):
    """Goes on to the end, where all is as in the uninterrupted run."""
    launch(mode, "go_on", output, case)
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (output, whole))
    # Rewards are logged by the step that samples them.
    for a, b in zip(ours, theirs, strict=True):
        for metric in ("step", *METRICS):
            assert a.get(metric) == b.get(metric), (output, b["step"], metric)
    ours, theirs = (torch.load(f / "result.pt", weights_only=True) for f in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), output


@pytest.mark.parametrize(("mode", "case"), KINDS)
def test_killed_runs_repeat_the_uninterrupted_one(launch, whole, mode, case):
    needs(mode)
    whole, draw = whole(mode, case), random.Random(f"{mode} {case}")
    steps, times = zip(*marked(whole, "done"), strict=True)
    second = statistics.median(b - a for a, b in itertools.pairwise(times))
    every = min(b - a for (a, _), (b, _) in itertools.pairwise(marked(whole, "saved")))
    trials = range(KINDS.index((mode, case)), KILLS, len(KINDS))
    for trial in trials:
        output = whole.parent / f"trial-{trial}"
        output.mkdir()
        moment = draw.uniform(0, steps[-1] - 1)  # the last step is for a run that is faster
        after = (output / f"done-{int(moment)}", moment % 1 * second)
        assert not launch(mode, "go_on", output, case, kill_after=after), "it ended unkilled"
        done, first = marked(output, "done")[-1][0], first_of(output)
        assert int(moment) <= done < steps[-1]
        assert first >= done - every, (trial, done, first)
        resumes(launch, mode, case, output, whole)
        print(f"{mode} {case}: killed at {moment:.2f} of {steps[-1]}, resumed from {first}: equal")


@pytest.mark.parametrize("mode", ("one", "fsdp2", "zero3"))
def test_runs_killed_while_they_save_repeat_the_uninterrupted_one(launch, whole, mode):
    needs(mode)
    case, at = "moving_reference", 4
    whole, draw = whole(mode, case), random.Random(mode)
    seconds = dict(marked(whole, "saved"))[at] - dict(marked(whole, "done"))[at]
    kept = []
    for trial in range(SAVES_KILLED if mode == "one" else SAVES_KILLED // 5):
        output = whole.parent / f"save-{trial}"
        output.mkdir()
        after = (output / f"done-{at}", draw.uniform(0, seconds))
        assert not launch(mode, "go_on", output, case, kill_after=after), "it ended unkilled"
        kept.append((first_of(output), (output / ".saving").exists()))
        assert kept[-1][0] in (at - 2, at)
        resumes(launch, mode, case, output, whole)
    print(f"{mode}: newest checkpoint and whether a part of another lay there: {kept}")
    assert any(part for _, part in kept), "no kill met a save"


@pytest.mark.parametrize(
    "phase", ("rollout", "reward", "forward", "backward", "optimizer", "evaluation")
)
def test_a_run_killed_in_each_phase_repeats_the_uninterrupted_one(launch, whole, phase):
    whole = whole("one", "evaluated")
    output = whole.parent / phase
    output.mkdir()
    assert not launch("one", "go_on", output, "evaluated", phase, dies=True)
    assert marked(output, "done")[-1][0] == 4
    assert first_of(output) == (2 if phase == "evaluation" else 4)
    resumes(launch, "one", "evaluated", output, whole)
