# SPDX-License-Identifier: Apache-2.0
"""Gated delta rule and causal convolution over a packed row of prompts and their completions.

The delta rule of one sequence, per head, S (K, V) with S_0 = 0 (Yang et al., arXiv 2412.06464):
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T,    o_t = S_t^T q_t
A completion's S_0 is its prompt's last state; the gradients of the G completions add up there.

Letters: T packed tokens, S segments, W width of the convolution, H value heads, K and V head sizes,
M tokens and n sequences of one call. In index tables T stands for "no token": a row of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.recurrence.convolution import depthwise
from fastgrpo.recurrence.gated_delta_rule import Chunks, gated_delta_rule

# A second call costs host time, running a prompt again costs the device: below this many repeated
# tokens one call over whole sequences is taken. tree-recurrence 0.1.1 measures about 10 ms a call
# against 0.2 us a token; not measured by us.
RESCAN_TOKENS = 50_000


class Sequences:
    """Some sequences of packed tokens, each run from its own initial state in one call."""

    def __init__(self, rows: Sequence[np.ndarray], device: torch.device):
        bounds = np.cumsum([0, *map(len, rows)])
        self.tokens = torch.from_numpy(np.concatenate(rows)).to(device)  # (M,)
        self.bounds = torch.from_numpy(bounds).to(device)  # (n + 1,)

    def run(self, rule, inputs: Sequence[Tensor], state: Tensor | None, final: bool, **options):
        """(M, H, V) outputs and, with `final`, (n, H, K, V) states; `inputs` are (1, T, ...)."""
        q, k, v, g, beta = (x.index_select(1, self.tokens) for x in inputs)
        options |= dict(initial_state=state, output_final_state=final, cu_seqlens=self.bounds)
        out, last = rule(q, k, v, g=g, beta=beta, **options)
        return out[0], last


class Branches:
    """The sequences of a GroupLayout, for a kernel as two calls (fork) or as one over whole
    sequences (rescan); without a kernel in chunks.

    fork: the prompts, then the completions from their prompts' states. rescan: each completion with
    its prompt in front; a prompt's outputs are those of its first sequence.
    """

    def __init__(self, layout, device: torch.device):
        self.segments = np.array(layout.segments, dtype=np.int64)
        start, end, prefix, prefix_end = self.segments.T
        self.total, self.device = layout.total, device
        self.is_prompt = prefix == prefix_end
        self.is_branch = ~self.is_prompt & (end > start)
        self.owner = (np.cumsum(self.is_prompt) - 1)[self.is_branch]
        self.repeated = int((prefix_end - prefix)[self.is_branch].sum())
        self._convolutions: dict[int, tuple[Tensor, Tensor]] = {}
        self._calls: dict[str, tuple] = {}
        self._chunks: Chunks | None = None

    def convolution(self, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of a row with the W - 1 that precede it before each segment; where its own are."""
        if width not in self._convolutions:
            start, end, prefix, prefix_end = self.segments.T
            reach, count = width - 1, len(start)
            before = prefix_end[:, None] + np.arange(-reach, 0)
            before = np.where(before < prefix[:, None], self.total, before)
            own = np.arange(self.total) + reach * (np.repeat(np.arange(count), end - start) + 1)
            source = np.empty(self.total + reach * count, dtype=np.int64)
            source[own] = np.arange(self.total)
            source[(start + reach * np.arange(count))[:, None] + np.arange(reach)] = before
            self._convolutions[width] = tuple(
                torch.from_numpy(x).to(self.device) for x in (source, own)
            )
        return self._convolutions[width]

    def fork(self) -> tuple[Sequences, Sequences | None, Tensor, Tensor]:
        """Prompts, completions, (n,) the prompt of each completion, (T,) outputs in row order."""
        if "fork" not in self._calls:
            start, end = self.segments[:, 0], self.segments[:, 1]
            ranges = [np.arange(s, e) for s, e in zip(start, end, strict=True)]
            prompts = [r for r, kept in zip(ranges, self.is_prompt, strict=True) if kept]
            branches = [r for r, kept in zip(ranges, self.is_branch, strict=True) if kept]
            order = np.argsort(np.concatenate(prompts + branches))
            self._calls["fork"] = (
                Sequences(prompts, self.device),
                Sequences(branches, self.device) if branches else None,
                torch.from_numpy(self.owner).to(self.device),
                torch.from_numpy(order).to(self.device),
            )
        return self._calls["fork"]

    def rescan(self) -> tuple[Sequences, Tensor]:
        """Every sequence from its first token, and (T,) the output that is each packed token's."""
        if "rescan" not in self._calls:
            rows, served = [], set()
            for start, end, prefix, prefix_end in self.segments[self.is_branch]:
                rows.append(np.r_[prefix:prefix_end, start:end])
                served.add(prefix)
            for start, end, _, _ in self.segments[self.is_prompt]:
                if start not in served:
                    rows.append(np.arange(start, end))
            _, first = np.unique(np.concatenate(rows), return_index=True)
            self._calls["rescan"] = (
                Sequences(rows, self.device),
                torch.from_numpy(first).to(self.device),
            )
        return self._calls["rescan"]

    def chunks(self) -> Chunks:
        if self._chunks is None:
            self._chunks = Chunks(self.segments, self.device)
        return self._chunks

    def route(self, rule, on: Tensor) -> str:
        """ "chunks" without a kernel; with one "rescan" where repeating the prompts costs less than
        a second call, else "fork"."""
        if not takes_bounds(rule, on):
            return "chunks"
        return "rescan" if self.repeated < RESCAN_TOKENS else "fork"


def branches(layout, device: torch.device) -> Branches:
    """The tables of a layout, built by its first recurrent layer."""
    if "branches" not in layout.cache:
        layout.cache["branches"] = Branches(layout, device)
    return layout.cache["branches"]


def convolve(original, mixed: Tensor, weight: Tensor, bias, activation, layout) -> Tensor:
    """(1, C, T) causal depthwise convolution whose windows stay inside each sequence.

    One plain convolution over a row where the inputs that precede each segment stand before it;
    any implementation serves.
    """
    source, own = branches(layout, mixed.device).convolution(weight.shape[-1])
    if mixed.is_cpu:
        return _shifted(mixed, weight, bias, activation, source, own)
    row = F.pad(mixed, (0, 1)).index_select(2, source)
    return original(row, weight, bias, activation=activation).index_select(2, own)


def _shifted(mixed: Tensor, weight: Tensor, bias, activation, source, own) -> Tensor:
    """The same with tokens in rows, as the mixers have them before and after."""
    from transformers.activations import ACT2FN

    compute = torch.promote_types(weight.dtype, torch.float32)
    row = _with_zero_row(mixed[0].T.to(compute)).index_select(0, source)
    out = depthwise(row, weight.to(compute)).index_select(0, own - weight.shape[-1] + 1)
    if bias is not None:
        out = out + bias
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(mixed.dtype).T[None]


def delta_rule(rule, inputs: Sequence[Tensor], layout, **options) -> Tensor:
    """(1, T, H, V) gated delta rule; `inputs` are query, key, value, g and beta, (1, T, ...)."""
    table = branches(layout, inputs[0].device)
    route = table.route(rule, inputs[0])
    if route == "chunks":
        return _in_chunks(inputs, table, **options)[0]
    if route == "rescan":
        sequences, first = table.rescan()
        out, _ = sequences.run(rule, inputs, None, False, **options)
        return out.index_select(0, first)[None]
    prompts, completions, owner, order = table.fork()
    out, state = prompts.run(rule, inputs, None, completions is not None, **options)
    if completions is not None:
        state = state.index_select(0, owner)
        out = torch.cat([out, completions.run(rule, inputs, state, False, **options)[0]])
    return out.index_select(0, order)[None]


def prompt_states(rule, inputs: Sequence[Tensor], layout, **options) -> tuple[Tensor, Tensor]:
    """Outputs as `delta_rule` and (P, H, K, V) final states of a row that holds prompts alone."""
    table = branches(layout, inputs[0].device)
    if table.route(rule, inputs[0]) == "chunks":
        return _in_chunks(inputs, table, **options)
    prompts, _, _, order = table.fork()
    out, state = prompts.run(rule, inputs, None, True, **options)
    return out.index_select(0, order)[None], state


def _in_chunks(
    inputs: Sequence[Tensor], table: Branches, *, use_qk_l2norm_in_kernel: bool
) -> tuple[Tensor, Tensor]:
    """What a kernel gives, in float32 as they compute: outputs, and the prompts' last states."""
    dtype = inputs[0].dtype
    compute = torch.promote_types(dtype, torch.float32)
    q, k, v, g, beta = (x[0].to(compute) for x in inputs)
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    out, states = gated_delta_rule(q, k, v, g, beta, table.chunks())
    return out.to(dtype)[None], states


def last_inputs(mixed: Tensor, width: int, layout) -> Tensor:
    """(P, C, W - 1) what the convolution of a token after each prompt still sees of it."""
    segments = branches(layout, mixed.device).segments
    start, end = segments[:, 0], segments[:, 1]
    tail = end[:, None] + np.arange(1 - width, 0)
    tail = np.where(tail < start[:, None], layout.total, tail)
    table = torch.from_numpy(tail).to(mixed.device)
    return _with_zero_row(mixed[0].T)[table].transpose(1, 2)


def has_kernel(function: Callable) -> bool:
    """Whether transformers' seam runs a library's kernel, not its own PyTorch fallback."""
    call = function.forward if isinstance(function, nn.Module) else function
    names = getattr(getattr(call, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(call, "__closure__", None) or (), strict=False))
    return "is_new_implementation" in cells and bool(cells["is_new_implementation"].cell_contents)


def takes_bounds(rule: Callable, on: Tensor) -> bool:
    """Whether sequences go to `rule` end to end with their bounds: fla's kernels on a GPU."""
    return has_kernel(rule) and on.is_cuda


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
