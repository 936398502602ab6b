# SPDX-License-Identifier: Apache-2.0
"""How much of each data file is read."""

import json

import pytest
from PIL import Image

pytest.importorskip("datasets")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.data import load_vlm_r1  # noqa: E402
from fastgrpo.data.mixture import sampled  # noqa: E402

ROWS = list(range(9))


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        ("all", ROWS),
        ("first:2", [0, 1]),
        ("end:2", [7, 8]),
        ("first:50%", [0, 1, 2, 3, 4]),  # 4.5 rows, rounded up
        ("end:0", []),
        ("first:99", ROWS),
    ],
)
def test_shares(share, kept):
    assert list(sampled(ROWS, share, 0)) == kept


def test_a_random_share_repeats_with_its_seed_and_keeps_the_order():
    first, again, other = (list(sampled(ROWS, "random:4", seed)) for seed in (0, 0, 1))
    assert first == again == sorted(first) and len(set(first)) == 4 and first != other


@pytest.mark.parametrize("share", ["some", "first", "first:-1", "last:3", "random:x%", "all:3"])
def test_other_words_are_refused(share):
    with pytest.raises(InputError, match="data_sampling: expected all, first:N"):
        list(sampled(ROWS, share, 0))


def test_rows_without_turns_and_the_share_of_each_file(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "problem": f"find {i}", "solution": [1, 2, 3, i]} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"problem": "x"}])))
    files = [tmp_path / "a.json", tmp_path / "b.jsonl"]
    read = load_vlm_r1(files, sampling=["end:1", "all"], question_template="Q: {Question}")
    assert [row["problem"] for row in read] == ["find 2", "find 0", "find 1", "find 2"]
    assert read[0]["prompt"][0]["content"] == [
        {"type": "image"}, {"type": "text", "text": "Q: find 2"},
    ]  # fmt: skip
    assert read[0]["solution"] == "<answer> [1,2,3,2] </answer>"
    assert [row.line for row in read.quarantined] == [4]
    with pytest.raises(InputError, match="data_sampling: 1 for the 2 of data_file_paths"):
        load_vlm_r1(files, sampling=["all"])
