# SPDX-License-Identifier: Apache-2.0
"""Images wherever they are: bounded before they are decoded, upright, always RGB.

A source is a path, a data URI (or bare base64), encoded bytes, a PIL image, an array or tensor, or
the {"bytes", "path"} of a `datasets.Image` feature. Nothing is ever fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200  # the Qwen-VL processors raise beyond it
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap the sides
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"P6")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI = re.compile(r"data:(?:image/[A-Za-z0-9+.-]*)?(?:;[A-Za-z0-9=+.-]*)*,")
_SHORTEST_BASE64 = 88  # of the smallest PNG; no file name that long decodes to an image's signature
# What Pillow's readers raise on broken files, besides UnidentifiedImageError, an OSError.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageFault(Exception):
    """One image that cannot be used; `reason` is a short code, the message the details."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as 8-bit RGB, upright, the first frame of an animation, transparency on white.

    The EXIF orientation is applied and dropped, as `transformers.image_utils.load_image` does for
    the processors. An array is (H, W), (H, W, 1 | 3 | 4) or the same with channels first; uint8,
    bool, uint16 (scaled by 65535), floats in [0, 1] or whole numbers in [0, 255].

    Raises `ImageFault` for a remote address, for anything that is no image, has more than
    `max_pixels` pixels (read from the header, before anything is decoded), or breaks while
    decoding.
    """
    image, name = _opened(source, max_pixels)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise ImageFault("broken", f"{name}: {type(error).__name__}: {error}") from None
    finally:
        if image is not source:
            image.close()


def image_size(source: Any, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the image `load_image` returns, from the header alone; same errors."""
    image, _ = _opened(source, max_pixels)
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
    except _BROKEN:
        turned = False
    if image is not source:
        image.close()
    return (height, width) if turned else (width, height)


def resolve_inside(folder: Path, name: object) -> Path:
    """The regular file `name` inside `folder`, symbolic links followed.

    `folder` must be resolved already. Raises `ImageFault` for anything but a relative path that
    stays inside: an absolute path, "..", a remote address, a link that leads out, a directory, a
    device. A colon alone does not make a name an address: "cam:1.png" is a file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ImageFault("bad_name", f"image must be a relative path, got {name!r:.200}")
    refuse_remote(name)
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ImageFault("outside_folder", f"{name!r:.200} is not a path below {folder}")
    return regular_file(folder / path, inside=folder)


def regular_file(path: Path, inside: Path | None = None) -> Path:
    """`path` with its links followed; raises `ImageFault` unless it leads to a regular file."""
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
    except FileNotFoundError:
        raise ImageFault("missing", f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError) as error:
        detail = getattr(error, "strerror", None) or type(error).__name__
        raise ImageFault("unreadable", f"{str(path)!r:.200}: {detail}") from None
    if inside is not None and not resolved.is_relative_to(inside):
        raise ImageFault("outside_folder", f"{str(path)!r:.200} is a link to {resolved}")
    if not stat.S_ISREG(mode):
        raise ImageFault("not_a_file", f"{resolved} is not a regular file")
    return resolved


def embedded_bytes(text: str) -> bytes | None:
    """The bytes of a base64 data URI, or of bare base64 of an image file; None for other text."""
    uri = _DATA_URI.match(text)
    if uri is not None and not uri[0].lower().endswith(";base64,"):
        raise ImageFault("not_an_image", f"{text!r:.60}: a data URI of an image must be base64")
    if uri is None and len(text) < _SHORTEST_BASE64:
        return None
    try:
        data = base64.b64decode("".join(text[uri.end() if uri else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if uri is None:
            return None
        raise ImageFault("not_an_image", f"{text!r:.60}: {error}") from None
    return data if uri or data.startswith(_SIGNATURES) else None


def refuse_remote(name: str) -> None:
    """ImageFault for an address with a scheme; images are local files."""
    if _REMOTE.match(name):
        raise ImageFault(
            "url",
            f"{name!r:.200} is a remote address; images are read from local files only: download "
            "it and name the file",
        )


def _opened(source: Any, max_pixels: int) -> tuple[Image.Image, str]:
    """The image, nothing decoded yet and its size within bounds, and a name for messages."""
    if isinstance(source, Mapping):
        if source.get("bytes") is None and source.get("path") is None:
            raise ImageFault("bad_name", f"expected bytes or a path, got {dict(source)!r:.200}")
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, str):
        refuse_remote(source)
        data = embedded_bytes(source)
        source = Path(source) if data is None else data
    if isinstance(source, Path):
        image, name = _decoder(regular_file(source), str(source)), str(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        name = f"image of {len(source)} bytes"
        image = _decoder(io.BytesIO(source), name)
    elif isinstance(source, io.BytesIO):
        image, name = _decoder(io.BytesIO(source.getbuffer()), "image in memory"), "image in memory"
    elif isinstance(source, Image.Image):
        image, name = source, f"{type(source).__name__} of mode {source.mode}"
    else:
        image, name = _from_array(source), f"array {getattr(source, 'shape', '')}"
    try:
        _check_bounds(image.size, name, max_pixels)
    except ImageFault:
        if image is not source:
            image.close()
        raise
    return image, name


def _decoder(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageFault("too_many_pixels", f"{name}: {error}") from None
    except PermissionError as error:
        raise ImageFault("unreadable", f"{name}: {error.strerror}") from None
    except _BROKEN as error:
        raise ImageFault("not_an_image", f"{name}: {type(error).__name__}: {error}") from None


def _check_bounds(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageFault(
            "too_many_pixels", f"{name}: {width} x {height} exceeds {max_pixels} pixels"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageFault(
            "aspect_ratio", f"{name}: {width} x {height} is thinner than 1:{MAX_ASPECT_RATIO}"
        )


def _from_array(source: Any) -> Image.Image:
    if hasattr(source, "detach"):  # a tensor, on whatever device
        source = source.detach().cpu().numpy()
    if not isinstance(source, np.ndarray):
        raise ImageFault(
            "bad_name",
            "expected a path, bytes, a data URI, a PIL image, an array or {bytes, path}, got "
            f"{type(source).__name__}: {source!r:.100}",
        )
    values = source
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (1, 3, 4))):
        raise ImageFault("not_an_image", f"an array of shape {source.shape} is no image")
    if 0 in values.shape:
        raise ImageFault("not_an_image", f"an array of shape {source.shape} holds no pixel")
    pixels = _as_bytes(values)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 and pixels.ndim == 3 else pixels)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    kind = values.dtype.kind
    if kind not in "buif":
        raise ImageFault("not_an_image", f"an array of {values.dtype} is no image")
    top = 65535.0 if values.dtype == np.uint16 else 1.0 if kind in "bf" else 255.0
    scaled = values.astype(np.float64) / top
    if not ((scaled >= 0) & (scaled <= 1)).all():  # false for NaN too
        raise ImageFault(
            "not_an_image",
            f"an array of {values.dtype} must lie in [0, {top:g}], got {values.min()} to "
            f"{values.max()}",
        )
    return (scaled * 255).round().astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        return paper
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips these to 8 bits: white for nearly every 16-bit image.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535 if image.mode.startswith("I") else max(1.0, float(values.max()))
        scaled = np.clip(values / top * 255, 0, 255).round().astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    return image.convert("RGB")
