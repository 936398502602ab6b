# SPDX-License-Identifier: Apache-2.0
"""The structure of one packed row, built once and used by every layer and every pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.ops.gather_rows import RowIndex
from fastgrpo.packing.host import device_copies

_NARROW, _WIDE = ("cu_q", "cu_k"), ("kv_index", "keep_rows", "pred_index")


class GroupLayout:
    """Which tokens of a packed row belong to which prompt and completion.

    The row holds, for each group, the prompt once and then its completions one after another. A
    segment is a prompt or a completion; the keys a completion sees are its prompt's (the prefix)
    and its own up to the query. Letters: T tokens of the row, S segments, N completion tokens,
    U distinct rows that predict one.

    Plain tables on the model's device, int32 unless said:
      cu_q (S+1,), cu_k (S+1,)       bounds of queries, and of keys (prefix then own) per segment
      kv_index (sum of keys,) int64  packed token of each key, segment after segment
      max_q, max_k                   the longest segment and the longest key list (int)
      keep_rows (U,) int64, pred_index (N,) int64   the packed token whose hidden state predicts
                                     completion token n is keep_rows[pred_index[n]]

    `segments` are Python tuples (start, end, prefix_start, prefix_end) on the host; `backend`
    names the attention implementation that serves the row. `blocks` are the (start, end) of packed
    tokens inside a prompt that see one another in both directions, whatever a sliding window says:
    an image's, or a whole prompt; with `local_blocks` only where there is a window, inside it.
    `continued`: nobody asks for what the prompts' queries find. It is a plain class on purpose:
    FSDP rebuilds dataclasses it finds among a module's arguments.
    """

    __slots__ = (
        *(*_NARROW, *_WIDE, "total", "max_q", "max_k", "segments", "lengths", "backend", "blocks"),
        "local_blocks",
        "continued",
        "cache",
    )

    def __init__(
        self,
        lengths: Sequence[tuple[int, Sequence[int]]],
        *,
        device: torch.device | str = "cpu",
        backend: str = "dense",
        blocks: Sequence[tuple[int, int]] = (),
        local_blocks: bool = False,
    ):
        """`lengths`: for each group the prompt's length and those of its completions."""
        self.lengths = [(int(p), [int(c) for c in cs]) for p, cs in lengths]
        self.backend, self.cache, self.local_blocks = backend, {}, local_blocks
        self.continued = False
        self.blocks = [(int(start), int(end)) for start, end in blocks]
        self.segments, offset = [], 0
        for prompt, completions in self.lengths:
            start, offset = offset, offset + prompt
            self.segments.append((start, offset, start, start))
            for length in completions:
                self.segments.append((offset, offset + length, start, start + prompt))
                offset += length
        self.total = offset
        self._check_blocks()
        keys = sum(end - start + p_end - p_start for start, end, p_start, p_end in self.segments)
        if keys >= 2**31:
            raise InputError(f"one packed row has {keys} keys, 2^31 at most; lower max_tokens")
        tables = _tables(np.array(self.segments, dtype=np.int64))
        sent = [torch.from_numpy(tables[name].astype(np.int32)) for name in _NARROW]
        sent += [torch.from_numpy(tables[name]) for name in (*_WIDE, "order", "first")]
        *columns, order, first = device_copies(sent, device)
        for name, column in zip((*_NARROW, *_WIDE), columns, strict=True):
            setattr(self, name, column)
        self.cache["predictors"] = RowIndex(self.pred_index, order, first)
        self.max_q = int(max(e - s for s, e, _, _ in self.segments))
        self.max_k = int(max(e - s + pe - ps for s, e, ps, pe in self.segments))

    def predictors(self) -> RowIndex:
        """`pred_index` as gather_rows takes it: which kept row predicts each completion token."""
        return self.cache["predictors"]

    def _check_blocks(self) -> None:
        prompts = [(start, end) for start, end, p_start, p_end in self.segments if p_start == p_end]
        at = 0
        for start, end in self.blocks:
            inside = any(low <= start < end <= high for low, high in prompts)
            if not inside or start < at:
                raise InputError(
                    f"blocks: [{start}, {end}) must lie inside one prompt and after the block "
                    f"before it; the prompts are {prompts}"
                )
            at = end

    def block_ids(self) -> Tensor:
        """(T,) int64: which of `blocks` each token is in, -1 for none."""
        if "block_ids" not in self.cache:
            ids = torch.full((self.total,), -1, device="cpu")
            for i, (start, end) in enumerate(self.blocks):
                ids[start:end] = i
            self.cache["block_ids"] = ids.to(self.kv_index.device)
        return self.cache["block_ids"]

    def has_blocks(self, window: int | None) -> bool:
        """Whether a layer with this window has tokens that see both ways."""
        return bool(self.blocks) and not (self.local_blocks and window is None)

    def dense_mask(self, window: int | None = None) -> Tensor:
        """(T, T) bool, True where query (row) sees key (column); the definition of the layout."""
        key = ("dense", window)
        if key not in self.cache:
            group, segment, is_prefix, position = self.token_tables()
            row = torch.arange(self.total, device=group.device)
            mask = group[:, None] == group[None, :]
            mask &= (segment[:, None] == segment[None, :]) | is_prefix[None, :]
            mask &= row[:, None] >= row[None, :]
            if window is not None:
                mask &= position[:, None] - position[None, :] < window
            if self.has_blocks(window):
                block = self.block_ids()
                both = (block[:, None] == block[None, :]) & (block >= 0)
                if self.local_blocks:
                    both &= position[:, None] - position[None, :] < window
                mask |= both
            self.cache[key] = mask
        return self.cache[key]

    def token_tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(T,) of each token: its group, its segment, whether it is a prompt's, and its text
        position (a completion continues its prompt's). For masks over all pairs of tokens."""
        start, end, prefix_start, prefix_end = torch.tensor(self.segments).unbind(1)
        segment = torch.repeat_interleave(end - start)
        is_prompt = prefix_start == prefix_end
        position = torch.arange(self.total) + (prefix_end - prefix_start - start)[segment]
        group = is_prompt.cumsum(0)[segment] - 1
        columns = (group, segment, is_prompt[segment], position)
        return tuple(device_copies(columns, self.kv_index.device))


def _tables(segments: np.ndarray) -> dict[str, np.ndarray]:
    start, end, prefix_start, prefix_end = segments.T
    own, prefix = end - start, prefix_end - prefix_start
    key_seg = np.repeat(np.arange(len(segments)), own + prefix)
    cu_k = np.r_[0, np.cumsum(own + prefix)]
    nth_key = np.arange(cu_k[-1]) - cu_k[key_seg]
    kv_index = np.where(
        nth_key < prefix[key_seg],
        prefix_start[key_seg] + nth_key,
        start[key_seg] + nth_key - prefix[key_seg],
    )

    seg_id = np.repeat(np.arange(len(segments)), own)
    targets = np.flatnonzero((prefix > 0)[seg_id])
    of = seg_id[targets]
    # A completion's first token is predicted by the prompt's last row, which the group shares.
    predicting = np.where(targets == start[of], prefix_end[of] - 1, targets - 1)
    keep_rows, pred_index = np.unique(predicting, return_inverse=True)
    pred_index = pred_index.reshape(-1)
    order = np.argsort(pred_index, kind="stable")
    return dict(
        cu_q=np.r_[0, np.cumsum(own)],
        cu_k=cu_k,
        kv_index=kv_index,
        keep_rows=keep_rows,
        pred_index=pred_index,
        order=order,
        first=np.searchsorted(pred_index[order], np.arange(len(keep_rows) + 1)),
    )
