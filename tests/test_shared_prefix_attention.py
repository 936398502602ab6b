"""The definition of shared-prefix attention, its tables and what the public op refuses."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import fastgrpo as fg
from fastgrpo.ops.shared_prefix_attention import (
    BLOCK_ROWS,
    prefix_tables,
    shared_prefix_attention,
)
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.reference.shared_prefix_attention import visible_keys

LENGTHS = [(7, [3, 1, 0, 5]), (4, []), (0, [2]), (2, [6])]


def tables(lengths):
    return prefix_tables(torch.tensor(GroupLayout(lengths).segments))


def one_by_one(q, k, v, lengths, scale):
    """Each completion after a copy of its prompt, by PyTorch's own causal attention."""
    outs, at = [], 0
    for prompt, completions in lengths:
        start, at = at, at + prompt
        for length in [0, *completions]:
            rows = torch.cat([torch.arange(start, start + prompt), torch.arange(at, at + length)])
            x, y, z = (t[rows].transpose(0, 1) for t in (q, k, v))
            share = q.shape[1] // k.shape[1]
            y, z = y.repeat_interleave(share, 0), z.repeat_interleave(share, 0)
            out = scaled_dot_product_attention(x, y, z, is_causal=True, scale=scale)
            out = out.transpose(0, 1)
            outs.append(out[prompt:] if (at, length) != (start + prompt, 0) else out)
            at += length
    return torch.cat(outs)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)])
def test_reference_equals_one_sequence_at_a_time(heads):
    lengths = [(7, [3, 1, 5]), (2, [6])]
    total = GroupLayout(lengths).total
    q = torch.randn(total, heads[0], 8, dtype=torch.float64)
    k, v = (torch.randn(total, heads[1], 8, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for out in (
        shared_prefix_attention(q, k, v, tables(lengths), scale=0.3, impl="reference"),
        one_by_one(q, k, v, lengths, 0.3),
    ):
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_reference_mask_equals_the_layouts(window):
    layout = GroupLayout(LENGTHS)
    ours = visible_keys(torch.tensor(layout.segments), layout.total, window)
    assert torch.equal(ours, layout.dense_mask(window))


def test_reference_softcap_flattens_the_logits():
    q, v = 1e4 * torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    layout = GroupLayout([(4, [2, 3])])
    out = shared_prefix_attention(q, q, v, tables([(4, [2, 3])]), softcap=1e-7, scale=1.0)
    seen = layout.dense_mask().float()  # capped to nothing, all visible keys weigh the same
    mean = torch.einsum("qk,khd->qhd", seen / seen.sum(1, keepdim=True), v)
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-6)


def test_tables_cover_every_row_once_and_start_with_the_most_work():
    lengths = [(3 * BLOCK_ROWS + 5, [BLOCK_ROWS, 1, 0, BLOCK_ROWS + 1]), (1, []), (9, [2])]
    made = tables(lengths)
    total = len(made.positions)
    for order in made.blocks:
        covered = torch.zeros(total, dtype=torch.int64)
        for start, _, seg_end, *_ in order.tolist():
            covered[start : min(start + BLOCK_ROWS, seg_end)] += 1
        assert (covered == 1).all()
    start, seg_start, _, _, prefix_len, query_end = made.blocks.long().unbind(2)
    keys = (prefix_len + start - seg_start)[0]
    queries = (query_end - start)[1]
    assert (keys.diff() <= 0).all() and (queries.diff() <= 0).all()


def test_tables_do_not_depend_on_the_default_device():
    segments = torch.tensor(GroupLayout(LENGTHS).segments)
    want = prefix_tables(segments)
    with torch.device("meta"):
        got = prefix_tables(segments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_tables_name_the_last_query_of_every_key():
    layout = GroupLayout(LENGTHS)
    made = tables(LENGTHS)
    seen = layout.dense_mask()
    last = torch.arange(layout.total).expand_as(seen).t().masked_fill(~seen, -1).amax(0)
    for start, _, seg_end, _, _, query_end in made.blocks[1].tolist():
        assert (last[start:seg_end] == query_end - 1).all()
    assert torch.equal(made.positions, layout.text_pos)


@pytest.mark.parametrize(
    "segments, word",
    [
        ([[1, 3, 1, 1]], "row 0"),  # does not start at 0
        ([[0, 3, 0, 0], [4, 5, 0, 3]], "row 1"),  # a gap
        ([[0, 3, 0, 0], [3, 2, 0, 3]], "row 1"),  # ends before it starts
        ([[0, 3, 0, 0], [3, 5, 0, 2]], "prefix"),  # half a prompt
        ([[0, 3, 0, 0], [3, 5, 3, 3], [5, 6, 0, 3]], "prefix"),  # not behind its prompt
        ([[0, 3, 0, 2]], "prefix"),  # no prompt at all
    ],
)
def test_tables_name_the_segment_that_is_wrong(segments, word):
    with pytest.raises(fg.InputError, match=f"segments: .*{word}"):
        prefix_tables(torch.tensor(segments))


def test_shared_prefix_attention_names_what_does_not_fit():
    made = tables([(4, [5])])
    q, k = torch.randn(9, 4, 8), torch.randn(9, 2, 8)
    with pytest.raises(fg.InputError, match="k: .*divides"):
        shared_prefix_attention(q, torch.randn(9, 3, 8), torch.randn(9, 3, 8), made)
    with pytest.raises(fg.InputError, match="v: "):
        shared_prefix_attention(q, k, k[:8], made)
    with pytest.raises(fg.InputError, match="v: expected dtype"):
        shared_prefix_attention(q, k, k.double(), made)
    with pytest.raises(fg.InputError, match="tables.positions"):
        shared_prefix_attention(q, k, k, tables([(4, [4])]))
    with pytest.raises(fg.InputError, match="window"):
        shared_prefix_attention(q, k, k, made, window=0)
    with pytest.raises(fg.InputError, match="softcap"):
        shared_prefix_attention(q, k, k, made, softcap=-1.0)
    with pytest.raises(fg.InputError, match="scale"):
        shared_prefix_attention(q, k, k, made, scale=float("nan"))
    with pytest.raises(fg.InputError, match="impl"):
        shared_prefix_attention(q, k, k, made, impl="cuda")
