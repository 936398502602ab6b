# SPDX-License-Identifier: Apache-2.0
"""Limits on image sizes: obeyed, or one line that names the setting, before anything is loaded."""

import pytest
from PIL import Image

pytest.importorskip("trl")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.cli.processor import image_tokens  # noqa: E402
from fastgrpo.cli.train import load_processor, parse  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request, tmp_path_factory):
    """Its processor allows 64 pixels, one token of (4 x 2) squared, to 4096."""
    return save_checkpoint(tmp_path_factory.mktemp("ck"), request.param)


def load(checkpoint, **limits):
    options = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    data = ["--data_file_paths", "x", "--image_folders", "x", "--output_dir", "out"]
    machine = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    settings = parse(["--model_name_or_path", str(checkpoint), *data, *machine, *options])
    return load_processor(*settings).image_processor


REFUSED = {
    "max_pixels: expected .* above 0, got 0": dict(max_pixels=0),
    "max_pixels: expected .* above 0, got -5": dict(max_pixels=-5),
    "min_pixels: expected .* above 0, got -1": dict(min_pixels=-1),
    "min_pixels: 512 is above max_pixels, 256": dict(min_pixels=512, max_pixels=256),
    "max_pixels: 32 is below the processor's own minimum of 64": dict(max_pixels=32),
    "min_pixels: 5000 is above the processor's own maximum of 4096": dict(min_pixels=5000),
    "max_pixels: 63 is less than the 64 pixels of one": dict(min_pixels=1, max_pixels=63),
    "max_tiles: the processor of .* does not cut images into tiles": dict(max_tiles=4),
}


@pytest.mark.parametrize("message", REFUSED)
def test_limits_that_cannot_be_kept_are_refused_in_one_line(checkpoint, message):
    with pytest.raises(InputError, match=message) as caught:
        load(checkpoint, **REFUSED[message])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "limits",
    [
        dict(max_pixels=64),
        dict(min_pixels=4096),
        dict(min_pixels=64, max_pixels=64),
        dict(min_pixels=6000, max_pixels=9000),
    ],
)
def test_limits_at_the_edge_are_obeyed(checkpoint, limits):
    processor = load(checkpoint, **limits)
    for side in (3, 8, 300):
        grid = processor(Image.new("RGB", (side, side)), return_tensors="pt")["image_grid_thw"][0]
        pixels = int(grid.prod()) * processor.patch_size**2
        assert limits.get("min_pixels", 64) <= pixels <= limits.get("max_pixels", 4096)


def test_the_image_tokens_of_a_processor(checkpoint):
    from transformers import AutoProcessor

    tokens = image_tokens(AutoProcessor.from_pretrained(checkpoint))
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(tokens)
    assert all(token.startswith("<|") for token in tokens)
