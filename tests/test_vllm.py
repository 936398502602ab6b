# SPDX-License-Identifier: Apache-2.0
"""Rollouts of a vLLM server: TRL's numbers on the same rollouts, and weights that arrive.

The server is a stand-in that speaks TRL's protocol (`support/vllm_stand_in.py`). What arrives in
it is compared with the trainer's weights, adapters merged.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import METRICS, TOLERANCE, assert_same_steps, largest_difference, needs

pytest.importorskip("trl")

from fastgrpo.testing.launch import MODES, Launcher  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402

RATIOS = tuple(
    f"sampling/{name}"
    for name in (
        "sampling_logp_difference/mean",
        "sampling_logp_difference/max",
        "importance_sampling_ratio/min",
        "importance_sampling_ratio/mean",
        "importance_sampling_ratio/max",
    )
)
CASES = ("sequence_mask", "token_truncate", "uncorrected", "lora")


@pytest.fixture(scope="module")
def launch():
    with Launcher(Path(__file__).parent / "distributed" / "vllm_job.py") as launcher:
        yield launcher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    save_checkpoint(folder / "model_images")
    return folder


def run(launch, folder, mode, kind, case):
    """The run's folder; a run of TRL alone is kept for the next mode."""
    output = folder / f"{kind}-{mode}"
    output.mkdir(exist_ok=True)
    if not (output / f"{case}.json").exists():
        launch(mode, "train", output, kind, case)
    return output


def merged(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the model under LoRA (r 4, alpha 8), adapters added in."""
    if not any("lora_" in name for name in parameters):
        return parameters
    weights = {}
    for name, weight in parameters.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in plain:
            continue
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            a, b = (parameters[f"{stem}lora_{side}.default.weight"] for side in "AB")
            weight = weight + 2 * b @ a
        weights[plain] = weight
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ("one", *MODES))
def test_vllm_rollouts_give_trl_s_numbers_and_weights_arrive(launch, folder, mode, case):
    needs(mode)
    trl = run(launch, folder, "one", "stock", case)
    ours = run(launch, folder, mode, "fast", case)
    metrics = METRICS + (RATIOS if mode == "one" else ())
    assert_same_steps(ours / f"{case}.json", trl / f"{case}.json", f"{mode} {case}", metrics)
    got, want = (torch.load(f / f"{case}.pt", weights_only=True) for f in (ours, trl))
    error, name = largest_difference(got["trainer"], want["trainer"])
    assert error <= TOLERANCE, f"{mode} {case}: {name} differs from TRL's by {error:.1e}"
    error, name = largest_difference(got["server"], merged(got["trainer"]))
    assert error <= 1e-6, f"{mode} {case}: {name} did not arrive ({error:.1e})"
