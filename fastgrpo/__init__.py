# SPDX-License-Identifier: Apache-2.0
"""fastgrpo: exact GRPO steps for vision-language models with a fraction of the work.

Importing starts nothing: no CUDA context, no patching, no environment edits.
"""

from fastgrpo_kernels import __version__

from fastgrpo.engine import GRPOStep, score
from fastgrpo.errors import InputError
from fastgrpo.objective import KLStream, KLTerm, Objective
from fastgrpo.ops.average_precision import average_precision
from fastgrpo.ops.box_iou import box_iou, pairwise_box_iou
from fastgrpo.ops.group_advantages import group_advantages
from fastgrpo.ops.grpo_loss import GRPOLoss, grpo_loss, merge_metrics
from fastgrpo.ops.linear.grpo import linear_grpo_loss
from fastgrpo.ops.linear.kl import linear_kl
from fastgrpo.ops.linear.logprob import linear_logprob
from fastgrpo.ops.match_boxes import match_boxes
from fastgrpo.ops.token_kl import token_kl
from fastgrpo.packing import Group
from fastgrpo.rollout import generate


def __getattr__(name: str):
    """Submodules on first use, so that importing the package stays light."""
    if name in ("rewards",):
        import importlib

        return importlib.import_module(f"fastgrpo.{name}")
    raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")
