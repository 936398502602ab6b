# SPDX-License-Identifier: Apache-2.0
"""The processor stand-in returns what the processor returns, distinct rows read once."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("trl")

from fastgrpo.integrations.trl.distinct import _repeated, _VisionRows, distinct_rows  # noqa: E402
from fastgrpo.models.adapter import Adapter  # noqa: E402
from fastgrpo.testing.models import tiny_model  # noqa: E402
from fastgrpo.testing.processors import tiny_processor  # noqa: E402


@pytest.fixture(scope="module")
def adapter():
    return Adapter(tiny_model("qwen2_5_vl"))


@pytest.fixture(scope="module")
def processor(adapter):
    return tiny_processor(adapter.config)


def picture(seed: int, side: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(text: str, *images) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# A group of three whose images are other objects of the same pixels, two images in a row, a row of
# text, and the first prompt once more, which is no neighbour.
def rows() -> list[list[dict]]:
    return [
        *(chat("a", picture(0)) for _ in range(3)),
        *(chat("b", picture(1), picture(2, 32)) for _ in range(2)),
        *(chat("c") for _ in range(2)),
        chat("a", picture(0)),
        chat("a", picture(3)),
    ]


def read_both(adapter, processor, run):
    """What `run` returns with the processor and with its stand-in, and the rows the latter read."""
    trainer, seen = types.SimpleNamespace(processing_class=processor), []
    plain, original = run(processor), type(processor).__call__

    def counted(self, images=None, text=None, **kwargs):
        seen.append(len(text))
        return original(self, images=images, text=text, **kwargs)

    type(processor).__call__ = counted
    try:
        with distinct_rows(trainer, adapter):
            assert isinstance(trainer.processing_class, type(processor))
            distinct = run(trainer.processing_class)
    finally:
        type(processor).__call__ = original
    assert trainer.processing_class is processor
    return plain, distinct, seen


def assert_same(plain, distinct) -> None:
    assert type(plain) is type(distinct) and plain.keys() == distinct.keys()
    for name, value in plain.items():
        if isinstance(value, list) and name != "pixel_values":
            assert value == distinct[name], name
        else:
            expected = torch.as_tensor(np.asarray(value))
            assert torch.equal(expected, torch.as_tensor(np.asarray(distinct[name]))), name


def test_a_chat_template_reads_a_group_once(adapter, processor):
    def run(chosen):
        return chosen.apply_chat_template(
            rows(), add_generation_prompt=True, tokenize=True, return_dict=True
        )

    plain, distinct, seen = read_both(adapter, processor, run)
    assert_same(plain, distinct)
    assert seen == [5]


def test_a_padded_call_reads_a_group_once(adapter, processor):
    texts = [processor.apply_chat_template(row, tokenize=False) for row in rows()]
    images = [[p["image"] for p in row[0]["content"] if p["type"] == "image"] for row in rows()]

    def run(chosen):
        return chosen(images=images, text=texts, padding=True, return_tensors="pt")

    plain, distinct, seen = read_both(adapter, processor, run)
    assert_same(plain, distinct)
    assert isinstance(distinct["pixel_values"], torch.Tensor)
    assert seen == [5]


def test_images_are_read_once_for_both_calls(adapter, processor, monkeypatch):
    """Other objects of the same pixels, as a chat template makes them, are the same images."""
    reader, seen = type(processor.image_processor), []
    original = reader.__call__

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(reader, "__call__", counted)
    texts = [processor.apply_chat_template(row, tokenize=False) for row in rows()]

    def run(chosen, changed=None):
        template = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
        tokenized = chosen.apply_chat_template(rows(), **template)
        images = [[p["image"] for p in row[0]["content"] if p["type"] == "image"] for row in rows()]
        if changed:
            images[-1] = [picture(changed)]
        padded = chosen(images=images, text=texts, padding=True, return_tensors="pt")
        assert isinstance(padded["pixel_values"], torch.Tensor)
        return {
            f"{name} {i}": x for i, y in enumerate((tokenized, padded)) for name, x in y.items()
        }

    plain = run(processor), run(processor, 4)
    for expected, changed, calls in ((plain[0], None, 1), (plain[1], 4, 2)):
        seen.clear()
        trainer = types.SimpleNamespace(processing_class=processor)
        with distinct_rows(trainer, adapter):
            assert_same(expected, run(trainer.processing_class, changed))
        assert len(seen) == calls


def test_rows_that_differ_in_one_pixel_are_read_apart(adapter, processor):
    other = picture(0)
    other.putpixel((3, 3), (1, 2, 3))
    prompts = [chat("a", picture(0)), chat("a", other)]

    def run(chosen):
        return chosen.apply_chat_template(prompts, tokenize=True, return_dict=True)

    plain, distinct, seen = read_both(adapter, processor, run)
    assert_same(plain, distinct)
    assert seen == [2]


def test_one_conversation_and_rendering_are_the_processors_own(adapter, processor):
    for options in ({"tokenize": False}, {"tokenize": True, "return_dict": True}):
        prompt = chat("a", picture(0))
        plain, distinct, _ = read_both(
            adapter,
            processor,
            lambda chosen, o=options, p=prompt: chosen.apply_chat_template(p, **o),
        )
        if options["tokenize"]:
            assert_same(plain, distinct)
        else:
            assert plain == distinct


def test_fields_a_family_cannot_take_apart_are_not_repeated(adapter):
    """SmolVLM's rows hold images padded to the most of any row; a field of no known structure."""
    mixed = {
        "pixel_values": torch.rand(2, 2, 3, 8, 8),
        "pixel_attention_mask": torch.ones(2, 2, 8, 8, dtype=torch.bool),
    }
    ids = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    smolvlm = _VisionRows(Adapter(tiny_model("smolvlm")))
    assert _repeated(smolvlm, ids | mixed, [2, 2], [0, 0, 1]) is None
    fields = ids | {
        "pixel_values": torch.rand(8, 6),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
        "other": torch.rand(3),
    }
    vision_rows = _VisionRows(adapter)
    assert _repeated(vision_rows, fields, [1, 1], [0, 0, 1]) is None
    del fields["other"]
    again = _repeated(vision_rows, fields, [1, 1], [0, 0, 1])
    first, second = fields["pixel_values"].split(4)
    assert torch.equal(again["pixel_values"], torch.cat([first, first, second]))


def test_rows_of_one_image_each_are_repeated_whole():
    fields = {
        "pixel_values": torch.rand(2, 3, 3, 8, 8),  # LLaVA-NeXT: padded to the most tiles
        "image_sizes": torch.tensor([[8, 8], [8, 16]]),
    }
    vision_rows = _VisionRows(Adapter(tiny_model("llava_next")))
    again = _repeated(vision_rows, fields, [1, 1], [0, 1, 1])
    assert torch.equal(again["pixel_values"], fields["pixel_values"][[0, 1, 1]])
    assert again["image_sizes"].tolist() == [[8, 8], [8, 16], [8, 16]]


def test_the_same_inputs_are_repeated_once(adapter):
    fields = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "pixel_values": torch.rand(8, 6),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }
    vision_rows = _VisionRows(adapter)
    pixels = _repeated(vision_rows, fields, [1, 1], [0, 0, 1])["pixel_values"]
    copies = fields | {"pixel_values": fields["pixel_values"].clone()}
    assert _repeated(vision_rows, copies, [1, 1], [0, 0, 1])["pixel_values"] is pixels
    other = _repeated(vision_rows, copies, [1, 1], [0, 1, 1])["pixel_values"]
    assert torch.equal(
        other, torch.cat([copies["pixel_values"][:4], *[copies["pixel_values"][4:]] * 2])
    )
    copies["pixel_values"][0, 0] += 1
    changed = _repeated(vision_rows, copies, [1, 1], [0, 1, 1])["pixel_values"]
    assert changed[0, 0] == other[0, 0] + 1
