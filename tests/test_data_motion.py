# SPDX-License-Identifier: Apache-2.0
"""Stages in order and a dataset that grows while it is read."""

import itertools
import json
import threading
import time

import pytest
from datasets import Dataset
from PIL import Image

from fastgrpo.data.growing import load_growing
from fastgrpo.data.motion import DataFeed, GrowingDataset, in_stages, staged
from fastgrpo.data.vlm_r1 import RowReader
from fastgrpo.errors import InputError


def rows(start, stop):
    return [{"prompt": str(i), "level": 0} for i in range(start, stop)]


def test_stages_stay_in_order_and_shuffle_inside():
    easy, hard = Dataset.from_list(rows(0, 20)), Dataset.from_list(rows(20, 40))
    data = [int(p) for p in staged([easy, hard], seed=0)["prompt"]]
    assert sorted(data[:20]) == list(range(20)) != data[:20]
    assert sorted(data[20:]) == list(range(20, 40))
    assert list(staged([easy, hard])["prompt"]) == [str(i) for i in range(40)]
    twice = [int(p) for p in staged([easy, hard], seed=0, epochs=[2, 1])["prompt"]]
    assert len(twice) == 60 and twice[:20] != twice[20:40]


def test_staged_refuses():
    with pytest.raises(InputError, match="at least one"):
        staged([])
    with pytest.raises(InputError, match=r"stages\[1\]"):
        staged([Dataset.from_list(rows(0, 2)), Dataset.from_list([{"prompt": "a"}])])
    with pytest.raises(InputError, match="epochs"):
        staged([Dataset.from_list(rows(0, 2))], epochs=[1, 2])


def test_growing_dataset_reaches_new_rows():
    data = GrowingDataset(rows(0, 2), length=10)
    assert len(data) == 10 and [data[i]["prompt"] for i in (0, 1, 2, 9)] == ["0", "1", "0", "1"]
    assert data.append(rows(2, 5)) == 5
    assert data[4]["prompt"] == "4" and data[9]["prompt"] == "4"
    with pytest.raises(InputError, match=r"rows\[1\]"):
        data.append([rows(0, 1)[0], {"prompt": "x"}])
    assert data.num_rows == 5
    for bad in (dict(rows=[], length=1), dict(rows=rows(0, 1), length=0)):
        with pytest.raises(InputError):
            GrowingDataset(**bad)


def test_growing_dataset_is_read_and_written_at_once():
    data = GrowingDataset(rows(0, 1), length=1000)

    def write(start):
        for i in range(start, start + 200):
            data.append(rows(i, i + 1))

    writers = [threading.Thread(target=write, args=(1000 * (n + 1),)) for n in range(4)]
    for writer in writers:
        writer.start()
    for i in itertools.cycle(range(1000)):
        assert "prompt" in data[i]
        if not any(w.is_alive() for w in writers):
            break
    assert data.num_rows == 801


def test_feed_appends_until_closed_and_raises_what_the_source_raised():
    data = GrowingDataset(rows(0, 1), length=5)
    asked = []

    def source():
        for i in itertools.count(1):
            asked.append(i)
            yield rows(i, i + 1)
            time.sleep(0.005)

    with DataFeed(data, source()):
        while data.num_rows < 4:
            time.sleep(0.005)
    count = len(asked)
    time.sleep(0.05)
    assert len(asked) == count and data.num_rows >= 4

    def broken():
        yield rows(1, 2)
        raise OSError("server gone")

    with pytest.raises(OSError, match="server gone"), DataFeed(data, broken()):
        time.sleep(0.05)


def test_stages_of_one_data_set_follow_the_row_counts():
    data = Dataset.from_list(rows(0, 6))
    order = [int(p) for p in in_stages(data, [2, 4], seed=1, epochs=[2, 1])["prompt"]]
    assert sorted(order[:2]) == sorted(order[2:4]) == [0, 1] and sorted(order[4:]) == [2, 3, 4, 5]
    assert [int(p) for p in in_stages(data, [2, 4], epochs=[0, 1])["prompt"]] == [2, 3, 4, 5]
    with pytest.raises(InputError, match="one is above 0"):
        in_stages(data, [2, 4], epochs=[0, 0])


def test_a_file_that_grows_is_read_as_it_grows(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"

    def line(question, **extra):
        turns = [{"value": f"<image>{question}"}, {"value": "y"}]
        return json.dumps({"image": "a.png", "conversations": turns} | extra) + "\n"

    file.write_text(line("first") + line("half")[:20])
    reader = RowReader(file, tmp_path, "{Question}", "default", (), "header", 10_000)
    dataset, feed = load_growing(reader, 6, quarantine_file=tmp_path / "q.jsonl", seconds=0.01)
    assert len(dataset) == 6
    assert {dataset[i]["problem"] for i in range(6)} == {"first"}
    assert dataset[5]["images"][0].size == (8, 6)
    with feed:
        with file.open("a") as stream:
            stream.write(line("half")[20:] + line("lost", image="b.png") + line("third"))
        while dataset[2]["problem"] != "third":
            time.sleep(0.01)
    assert [dataset[i]["problem"] for i in range(4)] == ["first", "half", "third", "first"]
    assert [(row.line, row.reason) for row in dataset.quarantined] == [(3, "missing")]
