# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels as PyTorch ops: `libfastgrpo_cuda.so` by ctypes, pointers and a stream.

The library is loaded by the first call. What the kernels trust is what the public ops have checked.
"""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from fastgrpo_kernels import build_info
from fastgrpo_kernels._cpp import METHODS

# One problem's state lives in shared memory.
MAX_SIZE = {"optimal": 256, "greedy": 2048, "greedy_rows": 2048}

_LIBRARY = Path(__file__).with_name("libfastgrpo_cuda.so")
_SIGNATURES = {
    "fastgrpo_match_boxes": (
        c_int,
        [c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_double]
        + [c_int64, c_int64, c_void_p, c_void_p, c_int, c_void_p],
    ),
    "fastgrpo_average_precision": (
        c_int,
        [c_void_p] * 7
        + [c_int64, c_void_p, c_int, c_int, c_int, c_double, c_double]
        + [c_void_p, c_void_p, c_void_p, c_int, c_void_p],
    ),
    "fastgrpo_average_precision_space": (
        None,
        [c_void_p, c_void_p, c_int64, c_int, c_int, POINTER(c_int64)],
    ),
    "fastgrpo_error": (c_char_p, [c_int]),
}


def why_missing() -> str | None:
    """Why there are no CUDA kernels, or None if there are."""
    return None if _LIBRARY.exists() else f"not compiled: {build_info()['cuda']['reason']}"


@functools.cache
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    return library


@torch.library.custom_op("fastgrpo::match_boxes_cuda", mutates_args=(), device_types="cuda")
def match_boxes(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    a_start: torch.Tensor,
    b_start: torch.Tensor,
    offsets: torch.Tensor,
    rows: int,
    method: str,
    threshold: float | None,
    max_rows: int,
    max_cols: int,
) -> torch.Tensor:
    """(rows,) int64 columns or -1; every tensor on the GPU, sizes of one problem <= MAX_SIZE."""
    column = a_start.new_empty(rows)
    cost = scores.new_empty(len(scores) if method == "optimal" else 0, dtype=torch.float64)
    scores, mask = scores.contiguous(), None if mask is None else mask.contiguous()
    check(
        library().fastgrpo_match_boxes(
            scores.data_ptr(),
            scores.dtype == torch.float64,
            None if mask is None else mask.data_ptr(),
            a_start.data_ptr(),
            b_start.data_ptr(),
            offsets.data_ptr(),
            len(a_start) - 1,
            METHODS.index(method),
            float("-inf") if threshold is None else threshold,
            max_rows,
            max_cols,
            cost.data_ptr(),
            column.data_ptr(),
            *_place(scores),
        )
    )
    return column


@match_boxes.register_fake
def _(scores, mask, a_start, b_start, offsets, rows, method, threshold, max_rows, max_cols):
    return a_start.new_empty(rows)


@torch.library.custom_op("fastgrpo::average_precision_cuda", mutates_args=(), device_types="cuda")
def average_precision(
    pred_boxes: torch.Tensor,
    pred_labels: torch.Tensor,
    pred_scores: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_labels: torch.Tensor,
    pred_start: torch.Tensor,
    gt_start: torch.Tensor,
    thresholds: list[float],
    max_dets: int,
    area_low: float | None,
    area_high: float | None,
) -> torch.Tensor:
    """(B, number of thresholds) float64; the starts on the CPU, the other tensors on the GPU."""
    samples, device = len(pred_start) - 1, pred_boxes.device
    ap = pred_boxes.new_empty(samples, len(thresholds))
    space_start = ap_space(pred_start, gt_start, len(thresholds), max_dets)
    space = pred_boxes.new_empty(int(space_start[-1]), dtype=torch.uint8)
    tensors = (pred_boxes, pred_labels, pred_scores, gt_boxes, gt_labels)
    tensors = [t.contiguous() for t in tensors]
    starts = [t.to(device) for t in (pred_start, gt_start, space_start)]
    limits = torch.tensor(thresholds, dtype=torch.float64, device=device)
    check(
        library().fastgrpo_average_precision(
            *(t.data_ptr() for t in (*tensors, starts[0], starts[1])),
            samples,
            limits.data_ptr(),
            len(thresholds),
            max_dets,
            area_low is not None,
            area_low or 0.0,
            area_high or 0.0,
            space.data_ptr(),
            starts[2].data_ptr(),
            ap.data_ptr(),
            *_place(pred_boxes),
        )
    )
    return ap


@average_precision.register_fake
def _(pred_boxes, pred_labels, pred_scores, gt_boxes, gt_labels, pred_start, gt_start, thresholds,
      max_dets, area_low, area_high):  # fmt: skip
    return pred_boxes.new_empty(pred_start.shape[0] - 1, len(thresholds))


def ap_space(
    pred_start: torch.Tensor, gt_start: torch.Tensor, num_thresholds: int, max_dets: int
) -> torch.Tensor:
    """(B + 1,) int64: where each sample's working memory starts, in bytes."""
    space_start = torch.empty_like(pred_start)
    library().fastgrpo_average_precision_space(
        pred_start.data_ptr(),
        gt_start.data_ptr(),
        len(pred_start) - 1,
        num_thresholds,
        max_dets,
        ctypes.cast(space_start.data_ptr(), POINTER(c_int64)),
    )
    return space_start


def check(status: int) -> None:
    """RuntimeError with CUDA's message unless the launch went well."""
    if status:
        raise RuntimeError(f"CUDA kernel: {library().fastgrpo_error(status).decode()}")


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
