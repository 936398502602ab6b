# SPDX-License-Identifier: Apache-2.0
"""Processes under DDP, FSDP2, ZeRO-2 and ZeRO-3 train to the parameters of one process.

Every case of `distributed/job.py` runs once alone and once in each mode, three steps of plain SGD
in float32 from the same completions. The reference is stock TRL in one process, where it can run.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from compare import METRICS, TOLERANCE, assert_same_steps, largest_difference, needs

pytest.importorskip("trl")

from fastgrpo.checkpoints import fault_of  # noqa: E402
from fastgrpo.testing.launch import MODES  # noqa: E402

# What every change runs; the slow test runs all of the rest.
COVERING = [
    ("ddp", "max_tokens_accumulation"),
    ("fsdp2", "greedy"),
    ("fsdp2", "lora"),
    ("zero2", "greedy"),
    ("zero3", "max_tokens_accumulation"),
]
CASES = (
    "full",
    "lora",
    "mixed_rows",
    "greedy",
    "max_tokens_accumulation",
    "greedy_lora",
    "evaluation",
    "tied",
    "text",
    "frozen_tower",
    "no_reference",
    "straddling",
    "accumulation",
    "max_tokens",
    "checkpointing",
    "reentrant",
)
# TRL hands its processor None for a prompt without images; it does not know our stop strings.
NOT_STOCK = ("mixed_rows", "greedy", "greedy_lora")


def run(launch, models, mode, kind, case):
    """The run's folder; a run is kept for the next mode."""
    output = models / f"{mode}-{kind}"
    output.mkdir(exist_ok=True)
    if not (output / f"{case}.json").exists():
        launch(mode, "train", output, kind, case)
    return output


def check(launch, models, mode, case):
    needs(mode)
    one = run(launch, models, "one", "fast" if case in NOT_STOCK else "stock", case)
    output = run(launch, models, mode, "fast", case)
    # Means over micro-batches, whose rows depend on the number of processes.
    means = ("entropy", "kl") if "accumulation" in case else ()
    metrics = tuple(m for m in METRICS if m not in means)
    assert_same_steps(output / f"{case}.json", one / f"{case}.json", case, metrics)
    got, expected = (torch.load(f / f"{case}.pt", weights_only=True) for f in (output, one))
    error, name = largest_difference(got, expected)
    print(f"{mode} {case}: {error:.1e}")
    assert error <= TOLERANCE, f"{mode} {case}: {name} differs by {error:.1e}"
    if (said := one / f"{case}.said.json").exists():
        generations = json.loads((output / said.name).read_text())
        assert generations == json.loads(said.read_text())
        halves = generations[0][:4], generations[0][4:]
        assert len({max(map(len, half)) for half in halves}) == 2  # processes end apart


@pytest.mark.parametrize(("mode", "case"), COVERING)
def test_two_processes_equal_one(launch, models, mode, case):
    check(launch, models, mode, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "case"), [(m, c) for m in MODES for c in CASES if (m, c) not in COVERING]
)
def test_two_processes_equal_one_in_every_case(launch, models, mode, case):
    check(launch, models, mode, case)


@pytest.mark.slow
def test_an_evaluation_logs_what_trl_logs_in_as_many_processes(launch, models):
    ours, trl = (
        run(launch, models, "ddp", kind, "evaluation_rest") / "evaluation_rest.json"
        for kind in ("fast", "stock")
    )
    assert any("eval_loss" in step for step in json.loads(trl.read_text()))
    assert_same_steps(ours, trl, "evaluation_rest")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_bf16_is_as_near_to_float32_as_trl_is(launch, models, mode):
    """Rounding to bf16 moves each run elsewhere: what can be asked is that it moves no farther."""
    needs(mode)
    exact = torch.load(run(launch, models, "one", "stock", "full") / "full.pt", weights_only=True)
    distances = {}
    for kind in ("stock", "fast"):
        got = torch.load(run(launch, models, mode, kind, "bf16") / "bf16.pt", weights_only=True)
        distances[kind] = math.sqrt(sum(float((got[n] - exact[n]).square().sum()) for n in exact))
    print(f"{mode} bf16: {distances}")
    assert 0 < distances["fast"] <= 1.5 * distances["stock"], distances


SAVED = [(mode, ()) for mode in MODES]
SAVED.append(("fsdp2", ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")))


@pytest.mark.slow
@pytest.mark.parametrize("case", ("adamw", "moving_reference", "lora_saved"))
@pytest.mark.parametrize(("mode", "options"), SAVED)
def test_a_resumed_run_repeats_the_uninterrupted_one(launch, models, mode, options, case):
    needs(mode)
    runs = models / "-".join((mode, "saved", *options)) / case
    launch(mode, "resume", runs, case, "whole", options=options)
    launch(mode, "resume", runs, case, "resumed", "whole/checkpoint-6", options=options)
    for run in ("whole", "resumed"):
        assert fault_of(runs / run / "checkpoint-8", 8) is None
    steps = [json.loads((runs / f"{run}.json").read_text()) for run in ("whole", "resumed")]
    assert [s["step"] for s in steps[1]] == [*range(1, 9)]  # the first six from the checkpoint
    for ours, theirs in zip(*steps, strict=True):
        for metric in METRICS:
            assert ours.get(metric) == theirs.get(metric), (ours["step"], metric)
    whole, resumed = (
        torch.load(runs / f"{run}.pt", weights_only=True) for run in ("whole", "resumed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), (("ddp", "one"), ("one", "ddp")))
def test_a_run_goes_on_in_another_number_of_processes(launch, models, first, then):
    runs = models / f"{first}-{then}"
    launch(first, "resume", runs, "sgd", "whole")
    launch(then, "resume", runs, "sgd", "resumed", "whole/checkpoint-2")
    assert_same_steps(runs / "resumed.json", runs / "whole.json", f"{first}-{then}")
    got, expected = (
        torch.load(runs / f"{run}.pt", weights_only=True) for run in ("resumed", "whole")
    )
    error, name = largest_difference(got, expected)
    assert error <= TOLERANCE, (name, error)
