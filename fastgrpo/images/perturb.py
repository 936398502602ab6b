# SPDX-License-Identifier: Apache-2.0
"""Perturbed copies of an image that keep its size: what PAPO and VPPO compare the policy with.

The size, and so the token layout, the positions and the packed row, stay those of the original:
only pixel values differ.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from fastgrpo.errors import InputError


def blacken_patches(
    image: Image.Image, *, patch_size: int = 14, probability: float = 0.6, seed: int = 0
) -> Image.Image:
    """Blacken each ``patch_size`` x ``patch_size`` pixel patch with ``probability``.

    One draw per patch, row by row, from NumPy's legacy generator seeded with ``seed``; patches at
    the right and lower border are cut. PAPO uses probability 0.6, VPPO 0.5. Source:
    ``random_patch_blackening`` of MikeWangWZHL/PAPO and huaixuheqing/VPPO-RL.
    """
    pixels = np.array(image)
    rows = -(-pixels.shape[0] // patch_size)
    columns = -(-pixels.shape[1] // patch_size)
    black = np.random.RandomState(seed).rand(rows, columns) < probability
    mask = black.repeat(patch_size, 0).repeat(patch_size, 1)
    pixels[mask[: pixels.shape[0], : pixels.shape[1]]] = 0
    return Image.fromarray(pixels)


def add_noise(image: Image.Image, *, std: float = 189.0, seed: int = 0) -> Image.Image:
    """Gaussian noise of ``std`` grey levels on every colour channel (not on alpha), clipped."""
    pixels = np.array(image).astype(np.float32)
    noise = np.random.RandomState(seed).normal(0.0, std, pixels.shape)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        noise[..., 3] = 0.0
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def grey(image: Image.Image, *, level: int = 128, seed: int = 0) -> Image.Image:
    """The image replaced by one grey ``level``; ``seed`` is unused (nothing is drawn)."""
    return Image.fromarray(np.full_like(np.array(image), level))


def blur(image: Image.Image, *, radius: float = 6.0, seed: int = 0) -> Image.Image:
    """Gaussian blur of ``radius`` pixels; ``seed`` is unused (nothing is drawn)."""
    return image.filter(ImageFilter.GaussianBlur(radius))


PERTURBATIONS = {"blacken": blacken_patches, "noise": add_noise, "grey": grey, "blur": blur}


def perturb(image: Image.Image, kind: str, *, seed: int = 0, **options: float) -> Image.Image:
    """One of ``blacken``, ``noise``, ``grey``, ``blur``, by name."""
    if kind not in PERTURBATIONS:
        raise InputError(f"kind: expected one of {', '.join(PERTURBATIONS)}, got {kind!r}")
    return PERTURBATIONS[kind](image, seed=seed, **options)
