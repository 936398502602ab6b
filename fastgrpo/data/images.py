"""Images named by a data file: found inside their folder, bounded before decoding, always RGB."""

from __future__ import annotations

import re
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200  # the Qwen-VL processors raise beyond it
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
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


def resolve_inside(folder: Path, name: object) -> Path:
    """The regular file `name` inside `folder`, symbolic links followed.

    `folder` must be resolved already. Raises `ImageFault` for anything but a relative path that
    stays inside: an absolute path, "..", a URL, a link that leads out, a directory, a device.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ImageFault("bad_name", f"image must be a relative path, got {name!r:.200}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise ImageFault("url", f"{name!r:.200} is a URL or names a drive; images are local files")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ImageFault("outside_folder", f"{name!r:.200} is not a path below {folder}")
    try:
        resolved = (folder / path).resolve(strict=True)
        mode = resolved.stat().st_mode
    except FileNotFoundError:
        raise ImageFault("missing", f"{folder / path} does not exist") from None
    except (OSError, RuntimeError, ValueError) as error:
        detail = getattr(error, "strerror", None) or type(error).__name__
        raise ImageFault("unreadable", f"{name!r:.200}: {detail}") from None
    if not resolved.is_relative_to(folder):
        raise ImageFault("outside_folder", f"{name!r:.200} is a link to {resolved}")
    if not stat.S_ISREG(mode):
        raise ImageFault("not_a_file", f"{resolved} is not a regular file")
    return resolved


def check_header(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as `load_image` will return it, from the header alone."""
    with _open(path, max_pixels) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except _BROKEN:
            turned = False
    return (height, width) if turned else (width, height)


def load_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as 8-bit RGB, upright, the first frame of an animation, transparency on white.

    Raises `ImageFault` for a file that is no image, has more than `max_pixels` pixels (read from
    the header, before anything is decoded), or breaks while decoding.
    """
    with _open(path, max_pixels) as image:
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except _BROKEN as error:
            raise ImageFault("broken", f"{path}: {type(error).__name__}: {error}") from None


def _open(path: Path, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageFault("too_many_pixels", f"{path}: {error}") from None
    except _BROKEN as error:
        raise ImageFault("not_an_image", f"{path}: {type(error).__name__}: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageFault(
            "too_many_pixels", f"{path}: {width} x {height} exceeds {max_pixels} pixels"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        image.close()
        raise ImageFault(
            "aspect_ratio", f"{path}: {width} x {height} is thinner than 1:{MAX_ASPECT_RATIO}"
        )
    return image


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
