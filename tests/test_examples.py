# SPDX-License-Identifier: Apache-2.0
"""Every example runs, at tiny size."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("trl")

from transformers import AutoProcessor  # noqa: E402

from fastgrpo.cli.train import parse, reward_settings  # noqa: E402
from fastgrpo.testing.launch import Launcher  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIGS = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
APART = ("fsdp2", "vllm_server")  # run in processes of their own


def logged_step(folder: Path) -> dict:
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    (step,) = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(math.isfinite(value) for value in step.values())
    return step


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in APART])
def test_an_example_trains_a_step(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGRPO_JUDGE_URL", "")
    load("tiny").run(name, tmp_path)
    step = logged_step(tmp_path)
    if name == "judge":
        assert step["rewards/agrees/mean"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_an_example_of_several_processes_trains_a_step(name, tmp_path):
    arguments = ["--config", EXAMPLES / f"{name}.yaml", *load("tiny").overrides(name, tmp_path)]
    with Launcher(Path(__file__).parent / "distributed" / "example_job.py") as launch:
        if name == "fsdp2":
            launch("fsdp2", "train", *arguments)
        else:
            launch("one", "train_with_server", tmp_path / "model", *arguments)
    assert logged_step(tmp_path)["step"] == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_an_examples_settings_are_known_and_its_rewards_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config, model_config = parse(["--config", str(EXAMPLES / f"{name}.yaml")])
    assert model_config.model_name_or_path.startswith("Qwen/")
    assert reward_settings(config)["reward_funcs"]
    written = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert written["output_dir"] == config.output_dir


@pytest.mark.parametrize("name", ["grpo_step", "video"])
def test_a_loop_by_hand_steps_and_repeats(name):
    loop = load(name)
    options = "--tiny --steps 2 --prompts 2 --generations 3 --max_new_tokens 6".split()
    first, again = loop.main(options), loop.main(options)
    assert len(first) == 2 and first == again
    assert all(math.isfinite(value) for step in first for value in step.values())


def test_a_clip_is_patches_of_neighbouring_frames(tmp_path):
    """By hand: patch (row, column) of step t holds, colour by colour, frame 2t and then 2t + 1."""
    video = load("video")
    processor = AutoProcessor.from_pretrained(save_checkpoint(tmp_path))
    images = processor.image_processor
    frames = [Image.radial_gradient("L").rotate(40 * i).resize((24, 16)).convert("RGB")
              for i in range(4)]  # fmt: skip
    given = video.video_inputs(images, frames, fps=4.0)
    assert given["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert given["second_per_grid_ts"].tolist() == [0.5]
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    pixels = torch.stack(
        [(torch.tensor(np.array(f)).permute(2, 0, 1) / 255 - mean) / std for f in frames]
    )
    patches = given["pixel_values_videos"].view(2, 2, 3, 2, 2, 3, 2, 4, 4)
    for t, row, column, frame in itertools.product(range(2), range(4), range(6), range(2)):
        # 2 x 2 patches that are merged stand together
        here = patches[t, row // 2, column // 2, row % 2, column % 2, :, frame]
        want = pixels[2 * t + frame, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.allclose(here, want, atol=1e-5)


def test_the_list_of_examples_names_each_file():
    text = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py", ".sh")}
    assert {name for name in files if f"({name})" in text} == files - {"tiny.py"}
