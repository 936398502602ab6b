# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public ops: one line per argument, one kind of message."""

import torch

from fastgrpo.errors import InputError


def check_tensor(
    name: str,
    x: object,
    shape: str,
    *,
    like: dict[str, int] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    floating: bool = False,
    device: torch.device | None = None,
) -> torch.Tensor:
    """`x`, checked: a tensor of `shape` ("N D": one letter or number per dimension).

    `like` maps letters to sizes; letters not yet in it are added, so that one dict carries the
    sizes of all arguments of a call.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{name}: expected a tensor ({shape}), got {type(x).__name__}")
    sizes = {} if like is None else like
    letters = shape.split()
    wanted = tuple(int(d) if d.isdigit() else sizes.get(d) for d in letters)
    fits = x.dim() == len(letters) and all(
        w is None or w == s for w, s in zip(wanted, x.shape, strict=True)
    )
    if not fits:
        known = ", ".join(f"{d}={sizes[d]}" for d in letters if d in sizes)
        text = f"({', '.join(letters)})" + (f" with {known}" if known else "")
        raise InputError(f"{name}: expected shape {text}, got {tuple(x.shape)}")
    sizes.update({d: s for d, s in zip(letters, x.shape, strict=True) if not d.isdigit()})
    if floating and not x.is_floating_point():
        raise InputError(f"{name}: expected a floating dtype, got {x.dtype}")
    if dtypes is not None and x.dtype not in dtypes:
        raise InputError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise InputError(f"{name}: expected device {device}, got {x.device}")
    return x


def check_choice(name: str, value: object, choices: tuple) -> None:
    """InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: expected one of {list(choices)}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """InputError unless `value` is a finite number above zero."""
    if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
        raise InputError(f"{name}: expected a finite number > 0, got {value!r}")


def check_targets(targets: torch.Tensor, vocabulary: int, name: str = "targets") -> None:
    """InputError naming the first row whose id is neither -100 nor inside the vocabulary."""
    bad = (targets != -100) & ((targets < 0) | (targets >= vocabulary))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InputError(
            f"{name}: row {row} is {int(targets[row])}, expected -100 or an id in [0, {vocabulary})"
        )
