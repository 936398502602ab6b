# SPDX-License-Identifier: Apache-2.0
"""Every source of an image gives the same upright RGB pixels, or one named fault."""

import base64
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.images import ImageFault, image_size, load_image
from fastgrpo.images.read import resolve_inside

PIXELS = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)  # 6 wide, 4 high


def png(pixels=PIXELS, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def uri(data: bytes, head="data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


SOURCES = {
    "path": lambda folder: folder / "a.png",
    "path as text": lambda folder: str(folder / "a.png"),
    "a name with a colon": lambda folder: str(folder / "cam:1.png"),
    "bytes": lambda folder: png(),
    "bytearray": lambda folder: bytearray(png()),
    "file in memory": lambda folder: io.BytesIO(png()),
    "data URI": lambda folder: uri(png()),
    "data URI without a kind": lambda folder: uri(png(), "data:;base64,"),
    "bare base64": lambda folder: uri(png(), ""),
    "base64 with line ends": lambda folder: (
        "\n".join(uri(png(), "")[i : i + 60] for i in (0, 60)) + uri(png(), "")[120:]
    ),
    "PIL": lambda folder: Image.fromarray(PIXELS),
    "array": lambda folder: PIXELS,
    "array, channels first": lambda folder: PIXELS.transpose(2, 0, 1),
    "array, strided": lambda folder: PIXELS[:, :, ::-1][:, :, ::-1],
    "array of floats": lambda folder: PIXELS / 255,
    "array of int64": lambda folder: PIXELS.astype(np.int64),
    "array of uint16": lambda folder: PIXELS.astype(np.uint16) * 257,
    "tensor": lambda folder: torch.from_numpy(PIXELS).permute(2, 0, 1),
    "feature with bytes": lambda folder: {"bytes": png(), "path": "elsewhere.png"},
    "feature with a path": lambda folder: {"bytes": None, "path": str(folder / "a.png")},
}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "cam:1.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_pixels(folder, source):
    given = SOURCES[source](folder)
    assert image_size(given) == (6, 4)
    image = load_image(given)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.array_equal(np.asarray(image), PIXELS)


def test_a_pil_image_stays_open_for_its_owner(folder):
    with Image.open(folder / "a.png") as opened:
        load_image(opened)
        assert opened.getpixel((0, 0)) == tuple(PIXELS[0, 0])


def test_grey_arrays_and_transparency():
    grey = PIXELS[..., 0]
    for source in (grey, grey[..., None], grey[None]):
        assert np.array_equal(np.asarray(load_image(source))[..., 1], grey)
    assert load_image(np.ones((2, 3), bool)).getpixel((0, 0)) == (255, 255, 255)
    clear = np.zeros((2, 3, 4), np.uint8)
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


FAULTS = {
    "url http": "http://example.com/a.png",
    "url https": "https://example.com/a.png?x=1",
    "url s3": "s3://bucket/a.png",
    "url hub": "hf://datasets/x/a.png",
    "url file": "file:///etc/passwd",
    "url in a feature": {"bytes": None, "path": "https://example.com/a.png"},
    "missing": "nowhere.png",
    "missing colon": "http:nowhere.png",
    "not_a_file": ".",
    "not_an_image bytes": b"\x89PNG\r\n\x1a\n",
    "not_an_image empty": b"",
    "not_an_image zeros": bytes(500),
    "not_an_image uri": "data:image/png;base64,AAAA",
    "not_an_image uri text": "data:image/svg+xml,<svg/>",
    "not_an_image uri broken": "data:image/png;base64,%%%",
    "not_an_image shape": np.zeros((2, 3, 5, 7)),
    "not_an_image empty array": np.zeros((0, 3, 3), np.uint8),
    "not_an_image range": np.full((2, 2), 300),
    "not_an_image NaN": np.full((2, 2), np.nan),
    "not_an_image text array": np.array([["a"]]),
    "bad_name none": None,
    "bad_name number": 7,
    "bad_name empty feature": {"bytes": None, "path": None},
    "too_many_pixels": np.zeros((100, 101), np.uint8),
    "aspect_ratio": np.zeros((1, 900), np.uint8),
    "broken": png(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))[:3000],
}
FAULTS["broken closed"] = Image.new("RGB", (4, 4))
FAULTS["broken closed"].close()


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named(folder, monkeypatch, case):
    monkeypatch.chdir(folder)
    with pytest.raises(ImageFault) as caught:
        load_image(FAULTS[case], max_pixels=10_000)
    assert caught.value.reason == case.split()[0]
    assert len(str(caught.value)) < 500
    if case.startswith("url"):
        assert "remote address" in str(caught.value)


def test_bits_that_flip_give_an_image_or_a_named_fault(tmp_path):
    """One in a thousand bits of a picture, a hundred times."""
    rng, names = np.random.default_rng(0), set()
    noise = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for trial in range(100):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format=("PNG", "JPEG", "WEBP", "GIF")[trial % 4])
        bits = np.unpackbits(np.frombuffer(buffer.getvalue(), np.uint8))
        bits[rng.random(bits.size) < 1e-3] ^= 1
        try:
            image = load_image(np.packbits(bits).tobytes(), max_pixels=10_000)
            assert image.mode == "RGB"
            names.add("an image")
        except ImageFault as fault:
            names.add(fault.reason)
    assert {"an image", "broken"} <= names


def test_a_file_that_may_not_be_read_is_named():
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.png")
        path.write_bytes(png())
        path.chmod(0)
        Path(folder).chmod(0o755)
        try:
            if before == 0:  # who may read anything
                os.seteuid(65534)
            with pytest.raises(ImageFault, match="Permission") as caught:
                load_image(path)
        finally:
            os.seteuid(before)
    assert caught.value.reason == "unreadable"


def test_a_name_is_not_an_address_for_its_colon(folder):
    assert resolve_inside(folder.resolve(), "cam:1.png") == (folder / "cam:1.png").resolve()
    (folder / "http:").mkdir()
    (folder / "http:" / "a.png").write_bytes(png())
    assert resolve_inside(folder.resolve(), "http:/a.png").name == "a.png"
    with pytest.raises(ImageFault, match="remote address"):
        resolve_inside(folder.resolve(), "http://a.png")


# Where EXIF says the pixel stored first belongs, on a stored image 6 wide and 4 high.
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS.transpose(1, 0, 2)[:, ::-1],
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
    8: PIXELS.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["path", "bytes", "data URI", "PIL", "feature"])
def test_exif_is_applied_to_size_and_pixels_as_transformers_does(tmp_path, orientation, kind):
    from transformers.image_utils import load_image as stock

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(exif=exif)
    path = tmp_path / "turned.png"
    path.write_bytes(data)
    source = {
        "path": path,
        "bytes": data,
        "data URI": uri(data),
        "PIL": Image.open(path),
        "feature": {"bytes": data, "path": None},
    }[kind]
    want = UPRIGHT[orientation]
    assert image_size(source) == (want.shape[1], want.shape[0])
    image = load_image(source)
    assert np.array_equal(np.asarray(image), want)
    assert image.getexif().get(0x0112, 1) == 1  # applied once: a second reader turns nothing
    assert np.array_equal(np.asarray(stock(str(path))), want)


MODES = {
    "L": (120, (120, 120, 120)),
    "LA": ((120, 0), (255, 255, 255)),
    "P": (3, None),
    "RGBA": ((10, 20, 30, 0), (255, 255, 255)),
    "CMYK": ((0, 0, 0, 255), (0, 0, 0)),
    "1": (1, (255, 255, 255)),
    "I;16": (257 * 100, (100, 100, 100)),
    "I;16 in TIFF": (257 * 100, (100, 100, 100)),
    "I": (257 * 100, (100, 100, 100)),
    "F": (0.5, (128, 128, 128)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    colour, expected = MODES[mode]
    mode, *tiff = mode.split()
    path = tmp_path / ("x.tiff" if tiff or mode in ("CMYK", "F", "I") else "x.png")
    Image.new(mode, (4, 3), colour).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    if expected:
        assert image.getpixel((1, 1)) == expected


def test_animations_show_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)
