# SPDX-License-Identifier: Apache-2.0
"""One ledger of rows set aside for any number of workers and processes."""

import copy
import json
import multiprocessing
import os
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("datasets")

from fastgrpo.data import Quarantine, SetAside, load_vlm_r1, split_validation  # noqa: E402


def aside(line, reason="broken"):
    return SetAside("rows.jsonl", line, None, reason, "why")


def test_each_row_once_in_order_and_counted(tmp_path):
    quarantine = Quarantine(tmp_path / "deep" / "q.jsonl")
    quarantine.add(aside(3), aside(1, "missing"), aside(3))
    quarantine.add(aside(1), aside(2))
    assert [(row.line, row.reason) for row in quarantine] == [
        (3, "broken"),
        (1, "missing"),
        (2, "broken"),
    ]
    assert quarantine == [aside(3), aside(1, "missing"), aside(2)]
    assert quarantine.counts() == {"broken": 2, "missing": 1}
    assert len((tmp_path / "deep" / "q.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kept", [True, False])
def test_copies_write_to_one_ledger(tmp_path, kept):
    quarantine = Quarantine(tmp_path / "q.jsonl" if kept else None)
    quarantine.add(aside(1))
    copies = [pickle.loads(pickle.dumps(quarantine)), copy.deepcopy(quarantine)]  # noqa: S301
    for line, other in enumerate(copies, 2):
        other.add(aside(1), aside(line))
    assert [row.line for row in quarantine] == [1, 2, 3]


def test_a_new_run_begins_a_new_ledger_and_copies_notice(tmp_path):
    old = Quarantine(tmp_path / "q.jsonl")
    old.add(aside(1))
    new = Quarantine(tmp_path / "q.jsonl")
    assert new == [] and old == []
    new.add(aside(2))
    assert old == new == [aside(2)]


def test_other_processes_join_the_ledger_of_the_first(tmp_path, monkeypatch):
    first = Quarantine(tmp_path / "q.jsonl")
    first.add(aside(1))
    monkeypatch.setenv("RANK", "1")
    second = Quarantine(tmp_path / "q.jsonl")
    second.add(aside(1), aside(2))
    assert first == second == [aside(1), aside(2)]


def test_a_temporary_ledger_goes_with_its_owner():
    quarantine = Quarantine()
    path = quarantine._path
    quarantine.add(aside(1))
    child = multiprocessing.get_context("fork").Process(target=quarantine.__repr__)
    child.start()
    child.join()
    assert path.exists() and len(quarantine) == 1
    del quarantine, child
    assert not path.exists()


@pytest.fixture
def broken(tmp_path):
    """Six rows of four images; rows 3 and 5 share one that is cut in half."""
    lines = []
    for i in range(4):
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / f"{i}.jpg")
    data = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(data[: len(data) // 2])
    for i in (0, 1, 2, 3, 2, 0):
        turns = [{"value": f"<image>{i}"}, {"value": "[1, 2, 3, 4]"}]
        lines.append(json.dumps({"id": i, "image": f"{i}.jpg", "conversations": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_an_image_that_breaks_in_a_worker_is_listed_once(broken, workers, kept):
    file = broken / "q.jsonl" if kept else None
    dataset = load_vlm_r1([broken / "rows.jsonl"], [broken], quarantine_file=file)
    assert dataset.quarantined == []
    loader = DataLoader(
        dataset, batch_size=1, num_workers=workers, collate_fn=list, sampler=[*range(6)] * 4
    )
    reasons = [row["quarantine_reason"] for (row,) in loader]
    assert reasons == [None, None, "broken", None, "broken", None] * 4
    assert sorted(row.line for row in dataset.quarantined) == [3, 5]
    if kept:
        assert len(file.read_text().splitlines()) == 2


def test_parts_of_a_split_share_the_ledger(broken):
    dataset = load_vlm_r1([broken / "rows.jsonl"], [broken])
    for part in split_validation(dataset, 0.5):
        list(part)
        assert part.quarantined is dataset.quarantined
    assert len(dataset.quarantined) == 2


def test_processes_of_one_run_list_an_image_once(broken):
    """Two ranks load at the same time, then both read every row."""
    context = multiprocessing.get_context("fork")
    loaded, found = context.Barrier(2), context.Queue()

    def run(rank):
        os.environ["RANK"] = str(rank)
        file = broken / "q.jsonl"
        dataset = load_vlm_r1([broken / "rows.jsonl"], [broken], quarantine_file=file)
        loaded.wait(60)
        list(dataset)
        loaded.wait(60)
        found.put(len(dataset.quarantined))

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert [found.get(timeout=60) for _ in ranks] == [2, 2]
    for rank in ranks:
        rank.join()
    lines = (broken / "q.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["line"] for line in lines) == [3, 5]
