# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels as PyTorch ops on CPU tensors; the first call imports `fastgrpo_kernels._C`.

Letters: C rows of a chunk, V vocabulary; a, b boxes of one sample.
"""

import torch

from fastgrpo_kernels.exponentials import OffsetExp

KINDS = ("iou", "giou", "diou", "ciou")
CONVENTIONS = ("continuous", "pixel", "vlm_r1")
METHODS = ("optimal", "greedy", "greedy_rows")


def offset_exp(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    inv_temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    exp_dtype: torch.dtype | None = None,
    target_logit: torch.Tensor | None = None,
) -> OffsetExp:
    """Replace a chunk of logits by exponentials about each row's target logit, in one sweep.

    logits (C, V) float32 with contiguous rows, overwritten; targets (C,) int64; inv_temperature
    (C,) float32 or None; bias (V,) or None. exp_dtype: float32 (None) or bfloat16, then E is
    `logits.view(torch.bfloat16)[:, :V]`. A target outside [0, V) makes its row NaN and flags it,
    unless target_logit (C,) is given: then the vocabulary is sharded, the target lies elsewhere
    and every column counts into S.
    """
    assert exp_dtype in (None, torch.float32, torch.bfloat16)
    overlay = exp_dtype == torch.bfloat16
    sum_exp, zy, moment, overflow = _offset_exp(
        logits, targets, inv_temperature, bias, target_logit, logit_scale, softcap, entropy, overlay
    )
    exps = logits.view(torch.bfloat16)[:, : logits.shape[1]] if overlay else logits
    return OffsetExp(exps, sum_exp, zy, moment if entropy else None, overflow)


@torch.library.custom_op("fastgrpo::offset_exp_cpp", mutates_args=("logits",))
def _offset_exp(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    target_logit: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    overlay: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastgrpo_kernels import _C

    sum_exp, zy, moment, overflow = results = _offset_exp_results(logits, entropy)
    _C.offset_exp(
        logits.detach().numpy(),
        _array(targets),
        _array(inv_temperature),
        _array(bias),
        _array(target_logit),
        logit_scale,
        softcap or 0.0,
        overlay,
        sum_exp.numpy(),
        zy.numpy(),
        moment.numpy() if entropy else None,
        overflow.view(torch.uint8).numpy(),
        torch.get_num_threads(),
    )
    return results


@_offset_exp.register_fake
def _(logits, targets, inv_temperature, bias, target_logit, logit_scale, softcap, entropy, overlay):
    return _offset_exp_results(logits, entropy)


def _offset_exp_results(logits: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, ...]:
    C = logits.shape[0]
    return (
        logits.new_empty(C),
        logits.new_empty(C),
        logits.new_empty(C if entropy else 0),
        logits.new_empty(C, dtype=torch.bool),
    )


@torch.library.custom_op("fastgrpo::kl_of_logits_cpp", mutates_args=("z_p", "z_q"))
def kl_of_logits(z_p: torch.Tensor, z_q: torch.Tensor, gradients: bool) -> torch.Tensor:
    """(C,) KL(softmax(z_p) || softmax(z_q)) of float32 (C, V) logits with contiguous rows.

    gradients: the logits are replaced by the gradients of the KL.
    """
    from fastgrpo_kernels import _C

    kl = z_p.new_empty(z_p.shape[0])
    p, q = z_p.detach().numpy(), z_q.detach().numpy()
    _C.kl_of_logits(p, q, gradients, kl.numpy(), torch.get_num_threads())
    return kl


@kl_of_logits.register_fake
def _(z_p, z_q, gradients):
    return z_p.new_empty(z_p.shape[0])


@torch.library.custom_op("fastgrpo::pairwise_box_iou_cpp", mutates_args=())
def pairwise_box_iou(
    a: torch.Tensor,
    b: torch.Tensor,
    a_start: torch.Tensor,
    b_start: torch.Tensor,
    offsets: torch.Tensor,
    pairs: int,
    kind: str,
    convention: str,
) -> torch.Tensor:
    """(pairs,) overlaps; a, b (., 4) float32 or float64; starts, offsets (B + 1,) int64."""
    from fastgrpo_kernels import _C

    values = a.new_empty(pairs)
    _C.pairwise_box_iou(
        *map(_array, (a, b, a_start, b_start, offsets)),
        KINDS.index(kind),
        CONVENTIONS.index(convention),
        values.numpy(),
        torch.get_num_threads(),
    )
    return values


@pairwise_box_iou.register_fake
def _(a, b, a_start, b_start, offsets, pairs, kind, convention):
    return a.new_empty(pairs)


@torch.library.custom_op("fastgrpo::match_boxes_cpp", mutates_args=())
def match_boxes(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    a_start: torch.Tensor,
    b_start: torch.Tensor,
    offsets: torch.Tensor,
    rows: int,
    method: str,
    threshold: float | None,
) -> torch.Tensor:
    """(rows,) int64 columns or -1; scores float32 or float64, mask bool of the same shape."""
    from fastgrpo_kernels import _C

    column = a_start.new_empty(rows)
    _C.match_boxes(
        _array(scores),
        None if mask is None else _array(mask.view(torch.uint8)),
        *map(_array, (a_start, b_start, offsets)),
        METHODS.index(method),
        float("-inf") if threshold is None else threshold,
        column.numpy(),
        torch.get_num_threads(),
    )
    return column


@match_boxes.register_fake
def _(scores, mask, a_start, b_start, offsets, rows, method, threshold):
    return a_start.new_empty(rows)


@torch.library.custom_op("fastgrpo::average_precision_cpp", mutates_args=())
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
    """(B, number of thresholds) float64; boxes and scores float64, labels and starts int64."""
    from fastgrpo_kernels import _C

    ap = pred_boxes.new_empty(len(pred_start) - 1, len(thresholds))
    _C.average_precision(
        *map(_array, (pred_boxes, pred_labels, pred_scores, gt_boxes, gt_labels)),
        *map(_array, (pred_start, gt_start, torch.tensor(thresholds, dtype=torch.float64))),
        min(max_dets, 2**31 - 1),
        area_low is not None,
        area_low or 0.0,
        area_high or 0.0,
        ap.numpy(),
        torch.get_num_threads(),
    )
    return ap


@average_precision.register_fake
def _(pred_boxes, pred_labels, pred_scores, gt_boxes, gt_labels, pred_start, gt_start, thresholds,
      max_dets, area_low, area_high):  # fmt: skip
    return pred_boxes.new_empty(pred_start.shape[0] - 1, len(thresholds))


def _array(tensor: torch.Tensor | None):
    """A NumPy view of the tensor's memory, or of a contiguous copy."""
    return None if tensor is None else tensor.detach().contiguous().numpy()
