# SPDX-License-Identifier: Apache-2.0
"""The definition of shared-prefix attention, its tables and what the public op refuses."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import fastgrpo as fg
from fastgrpo.ops.prefix_tables import BLOCK_ROWS
from fastgrpo.ops.shared_prefix_attention import prefix_tables, shared_prefix_attention
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
    covered = torch.zeros(len(made.positions), dtype=torch.int64)
    for start, _, seg_end, *_ in made.blocks.tolist():
        covered[start : min(start + BLOCK_ROWS, seg_end)] += 1
    assert (covered == 1).all()
    start, seg_start, _, _, prefix_len = made.blocks.long().unbind(1)
    assert ((prefix_len + start - seg_start).diff() <= 0).all()


def pairs_of(item, group):
    """(head, first row, end) of an item as `_shared_prefix_dkv_kernel` finds them."""
    start, _, _, query_end, share, shares, _ = item
    span = query_end - start
    cuts = [span * group * i // shares for i in (share, share + 1)]
    (h0, r0), (h1, r1) = ((at // span, at % span // BLOCK_ROWS * BLOCK_ROWS) for at in cuts)
    for h in range(h0, min(h1 + 1, group)):
        yield h, start + (r0 if h == h0 else 0), start + r1 if h == h1 else query_end


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("processors", [1, 132])
def test_items_cover_every_visible_pair_of_rows_and_heads_once(heads, processors):
    lengths = [(700, [300, 1, 0, 129]), (1, []), (9, [2])]
    layout = GroupLayout(lengths)
    segments = torch.tensor(layout.segments)
    made = prefix_tables(segments, heads=heads, processors=processors)
    group = heads[0] // heads[1]
    seen = layout.dense_mask().long()
    covered = torch.zeros(group, layout.total, layout.total, dtype=torch.int64)
    for item in made.items.tolist():
        start, seg_end, shift, *_ = item
        keys = slice(start, min(start + BLOCK_ROWS, seg_end))
        assert torch.equal(made.positions[keys], torch.arange(keys.start, keys.stop) + shift)
        for h, begin, end in pairs_of(item, group):
            covered[h, begin:end, keys] += 1
    assert (covered * seen == seen).all() and covered.max() == 1


def test_items_of_a_cut_block_have_consecutive_slots_of_their_own():
    segments = torch.tensor(GroupLayout([(700, [300] * 4), (90, [5])]).segments)
    made = prefix_tables(segments, heads=(14, 2), processors=132)
    start_of = {item[6]: item[0] for item in made.items.tolist() if item[6] >= 0}
    assert sorted(start_of) == list(range(made.slots)) and made.slots > 0
    for start, _, first, count in made.sums.tolist():
        assert count > 1 and {start_of[first + i] for i in range(count)} == {start}
    assert made.slots == int(made.sums[:, 3].sum())


def test_items_fill_whole_rounds_of_a_large_gpu_and_are_whole_on_a_small_one():
    segments = torch.tensor(GroupLayout([(1000, [256] * 8)]).segments)
    whole = prefix_tables(segments, heads=(28, 4), processors=1)
    cut = prefix_tables(segments, heads=(28, 4), processors=132)
    assert len(whole.items) > 0 and len(whole.blocks) == 24
    assert 2 * 132 < len(cut.items) * 4 <= 3 * 132
    start, _, _, query_end, _, shares, _ = cut.items.unbind(1)
    work = 7 * (query_end - start) / shares
    assert (work.diff() <= 0).all() and work.max() < 7 * 3048 / 8


def test_tables_do_not_depend_on_the_default_device():
    segments = torch.tensor(GroupLayout(LENGTHS).segments)
    want = prefix_tables(segments)
    with torch.device("meta"):
        got = prefix_tables(segments)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, want, strict=True)
    )


def test_tables_name_the_last_query_of_every_key():
    layout = GroupLayout(LENGTHS)
    made = tables(LENGTHS)
    seen = layout.dense_mask()
    last = torch.arange(layout.total).expand_as(seen).t().masked_fill(~seen, -1).amax(0)
    for start, seg_end, _, query_end, *_ in made.items.tolist():
        assert (last[start:seg_end] == query_end - 1).all()
    assert torch.equal(made.positions, layout.token_tables()[3].int())


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
