# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments: every run resumes, and goes on as if it had not been cut.

`make test-faults KILLS=100` kills that many times, over all kinds of run, each run up to four times
on its way. A moment is a step and a part of a step's time after it, so that every kill meets a run
that trains.
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
KILLS_A_RUN = 4
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


def killed(launch, mode, case, output, step, seconds) -> tuple[int, int]:
    """Goes on, until so long after that step; steps done, and the step to go on from."""
    for path in output.glob("done-*"):
        path.unlink()
    after = (output / f"done-{step}", seconds)
    assert not launch(mode, "go_on", output, case, kill_after=after), "it ended unkilled"
    return marked(output, "done")[-1][0], first_of(output)


@pytest.mark.parametrize(("mode", "case"), KINDS)
def test_killed_runs_repeat_the_uninterrupted_one(launch, whole, mode, case):
    needs(mode)
    whole, draw = whole(mode, case), random.Random(f"{mode} {case}")
    steps, times = zip(*marked(whole, "done"), strict=True)
    second = statistics.median(b - a for a, b in itertools.pairwise(times))
    every = min(b - a for (a, _), (b, _) in itertools.pairwise(marked(whole, "saved")))
    trials = [*range(KINDS.index((mode, case)), KILLS, len(KINDS))]
    for part in (trials[i : i + KILLS_A_RUN] for i in range(0, len(trials), KILLS_A_RUN)):
        output, first = whole.parent / f"trial-{part[0]}", 0
        output.mkdir()
        # The last step is for a run that is faster.
        for moment in sorted(draw.uniform(0, steps[-1] - 1) for _ in part):
            step = max(int(moment), first)
            done, first = killed(launch, mode, case, output, step, moment % 1 * second)
            assert step <= done < steps[-1]
            assert first >= done - every, (moment, done, first)
            print(
                f"{mode} {case}: killed at {step + moment % 1:.2f} of {steps[-1]} steps, {first=}"
            )
        resumes(launch, mode, case, output, whole)
        print(f"{mode} {case}: killed {len(part)} times and equal")


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
        first = killed(launch, mode, case, output, at, draw.uniform(0, seconds))[1]
        assert first in (at - 2, at)
        kept.append((first, (output / ".saving").exists()))
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
