"""The structure of one packed row, built once and used by every layer and every pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.ops.gather_rows import RowIndex, row_index

_TABLES = (
    "cu_q",
    "cu_k",
    "seg_start",
    "seg_end",
    "prefix_start",
    "prefix_end",
    "group_id",
    "seg_id",
    "is_prefix",
    "text_pos",
    "kv_index",
    "keep_rows",
    "pred_index",
    "pred_rows",
    "tgt_rows",
    "completion_id",
)


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
      seg_start, seg_end (S,)        the segment's own tokens
      prefix_start, prefix_end (S,)  its prefix; empty for a prompt
      group_id, seg_id, text_pos (T,), is_prefix (T,) bool
      pred_rows, tgt_rows (N,) int64 packed token whose hidden state predicts, and the predicted one
      keep_rows (U,) int64, pred_index (N,) int64   pred_rows == keep_rows[pred_index]
      completion_id (N,) int64       completion of each predicted token, counted over the row

    `segments` is the same table as Python tuples (start, end, prefix_start, prefix_end); `backend`
    names the attention implementation that serves the row. `blocks` are the (start, end) of packed
    tokens inside a prompt that see one another in both directions, whatever a sliding window says:
    an image's, or a whole prompt. It is a plain class on purpose: FSDP rebuilds dataclasses it
    finds among a module's arguments.
    """

    __slots__ = (
        *(*_TABLES, "total", "max_q", "max_k", "segments", "lengths", "backend", "blocks"),
        "cache",
    )

    def __init__(
        self,
        lengths: Sequence[tuple[int, Sequence[int]]],
        *,
        device: torch.device | str = "cpu",
        backend: str = "dense",
        blocks: Sequence[tuple[int, int]] = (),
    ):
        """`lengths`: for each group the prompt's length and those of its completions."""
        self.lengths = [(int(p), [int(c) for c in cs]) for p, cs in lengths]
        self.backend, self.cache = backend, {}
        self.blocks = [(int(start), int(end)) for start, end in blocks]
        self.segments, groups, offset = [], [], 0
        for group, (prompt, completions) in enumerate(self.lengths):
            start, offset = offset, offset + prompt
            self.segments.append((start, offset, start, start))
            groups.append(group)
            for length in completions:
                self.segments.append((offset, offset + length, start, start + prompt))
                groups.append(group)
                offset += length
        self.total = offset
        self._check_blocks()
        keys = sum(end - start + p_end - p_start for start, end, p_start, p_end in self.segments)
        if keys >= 2**31:
            raise InputError(f"one packed row has {keys} keys, 2^31 at most; lower max_tokens")
        tables = _tables(np.array(self.segments, dtype=np.int64), np.array(groups), offset)
        wide = ("kv_index", "keep_rows", "pred_index", "pred_rows", "tgt_rows", "completion_id")
        for name in _TABLES:
            table = tables[name]
            if name not in wide and table.dtype != bool:
                table = table.astype(np.int32)
            setattr(self, name, torch.from_numpy(table).to(device))
        self.max_q = int(max(e - s for s, e, _, _ in self.segments))
        self.max_k = int(max(e - s + pe - ps for s, e, ps, pe in self.segments))

    def predictors(self) -> RowIndex:
        """`pred_index` as gather_rows takes it: which kept row predicts each completion token."""
        if "predictors" not in self.cache:
            self.cache["predictors"] = row_index(self.pred_index, len(self.keep_rows))
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

    def dense_mask(self, window: int | None = None) -> Tensor:
        """(T, T) bool, True where query (row) sees key (column); the definition of the layout."""
        key = ("dense", window)
        if key not in self.cache:
            row = torch.arange(self.total, device=self.group_id.device)
            same_group = self.group_id[:, None] == self.group_id[None, :]
            same_segment = self.seg_id[:, None] == self.seg_id[None, :]
            mask = same_group & (same_segment | self.is_prefix[None, :])
            mask &= row[:, None] >= row[None, :]
            if window is not None:
                mask &= self.text_pos[:, None] - self.text_pos[None, :] < window
            if self.blocks:
                block = self.block_ids()
                mask |= (block[:, None] == block[None, :]) & (block >= 0)
            self.cache[key] = mask
        return self.cache[key]


def _tables(segments: np.ndarray, groups: np.ndarray, total: int) -> dict[str, np.ndarray]:
    start, end, prefix_start, prefix_end = segments.T
    own, prefix = end - start, prefix_end - prefix_start
    is_prompt = np.r_[True, groups[1:] != groups[:-1]]
    seg_id = np.repeat(np.arange(len(segments)), own)
    text_pos = np.arange(total) - start[seg_id] + prefix[seg_id]

    key_seg = np.repeat(np.arange(len(segments)), own + prefix)
    cu_k = np.r_[0, np.cumsum(own + prefix)]
    nth_key = np.arange(cu_k[-1]) - cu_k[key_seg]
    kv_index = np.where(
        nth_key < prefix[key_seg],
        prefix_start[key_seg] + nth_key,
        start[key_seg] + nth_key - prefix[key_seg],
    )

    is_prefix = is_prompt[seg_id]
    tgt_rows = np.flatnonzero(~is_prefix)
    first = tgt_rows == start[seg_id[tgt_rows]]
    # A completion's first token is predicted by the prompt's last row, which the group shares.
    pred_rows = np.where(first, prefix_end[seg_id[tgt_rows]] - 1, tgt_rows - 1)
    keep_rows, pred_index = np.unique(pred_rows, return_inverse=True)
    completion_of_segment = np.cumsum(~is_prompt) - 1
    return dict(
        cu_q=np.r_[0, np.cumsum(own)],
        cu_k=cu_k,
        seg_start=start,
        seg_end=end,
        prefix_start=prefix_start,
        prefix_end=prefix_end,
        group_id=groups[seg_id],
        seg_id=seg_id,
        is_prefix=is_prefix,
        text_pos=text_pos,
        kv_index=kv_index,
        keep_rows=keep_rows,
        pred_index=pred_index.reshape(-1),
        pred_rows=pred_rows,
        tgt_rows=tgt_rows,
        completion_id=completion_of_segment[seg_id[tgt_rows]],
    )
