# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's JSONL: every row is loaded as VLM-R1 would, or named and set aside."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.data import load_vlm_r1, split_validation  # noqa: E402


def turns(question="<image>find the 7", answer="[1, 2, 3, 4]"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def good_row(**changes):
    return {"id": 1, "image": "a.png", "conversations": turns()} | changes


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(images / "a.png")
    Image.new("RGB", (20, 50), (10, 200, 10)).save(images / "sub" / "b.jpg")
    return images


def write(path, rows):
    lines = [r if isinstance(r, str | bytes) else json.dumps(r) for r in rows]
    path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in lines) + b"\n")
    return path


def load(folder, rows, **options):
    return load_vlm_r1([write(folder.parent / "data.jsonl", rows)], [folder], **options)


def test_rows_become_trl_columns(folder):
    rows = [
        good_row(height=30, boxes=[[1, 2, 3, 4]]),
        good_row(id="two", image=["a.png", "sub/b.jpg"], conversations=turns("<image><image>x", 3)),
        {
            "conversations": turns("only text", "<answer> yes </answer>"),
            "accu_reward_method": "mcq",
        },
    ]
    dataset = load(folder, rows, reward_method=["iou"], task_type="default")
    assert dataset.quarantined == []
    first, second, third = (dataset[i] for i in range(3))
    assert [image.size for image in first["images"]] == [(40, 30)]
    assert [image.size for image in second["images"]] == [(40, 30), (20, 50)]
    assert third["images"] == []
    assert [row["solution"] for row in (first, second, third)] == [
        "<answer> [1, 2, 3, 4] </answer>",
        "<answer> 3 </answer>",
        "<answer> yes </answer>",
    ]
    assert [row["accu_reward_method"] for row in (first, second, third)] == ["iou", "iou", "mcq"]
    assert (first["height"], first["boxes"], first["id"]) == (30, [[1, 2, 3, 4]], 1)
    assert (second["height"], second["id"], third["id"]) == (None, "two", None)
    content = second["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]
    assert content[-1]["text"].startswith("x ") and "<think>" in content[-1]["text"]
    assert second["problem"] == "x"
    assert first["image_path"] == [str((folder / "a.png").resolve())]
    assert first["data_row"].endswith("data.jsonl:1") and first["quarantine_reason"] is None


@pytest.mark.parametrize("task", ["rec", "ic", "odLength", "another"])
def test_every_task_template_holds_the_question_once(folder, task):
    text = load(folder, [good_row()], task_type=task)[0]["prompt"][0]["content"][-1]["text"]
    assert text.count("find the 7") == 1 and "<think>" in text and "<answer>" in text
    assert ("JSON" in text) == (task in ("rec", "ic"))
    assert text.startswith("find the 7") == (task != "odLength")


def test_a_question_with_braces_is_not_a_format_string(folder):
    row = good_row(conversations=turns("<image>{0} {Question} {x}"))
    dataset = load(folder, [row], question_template="Q: {Question}")
    assert dataset[0]["prompt"][0]["content"][-1]["text"] == "Q: {0} {Question} {x}"


def test_several_files_as_vlm_r1_writes_them(folder):
    one = write(folder.parent / "one.jsonl", [good_row()])
    two = write(folder.parent / "two.jsonl", [good_row(image="b.jpg"), good_row(image="b.jpg")])
    dataset = load_vlm_r1(f"{one}:{two}", f"{folder}:{folder / 'sub'}", reward_method="m1:m2")
    assert dataset["accu_reward_method"][:] == ["m1", "m2", "m2"]
    assert dataset[2]["images"][0].size == (20, 50)


def test_images_are_opened_when_read_not_before(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "fastgrpo.data.opened.load_image",
        lambda path, cap: opened.append(path) or Image.new("RGB", (3, 3)),
    )
    dataset = load(folder, [good_row(), good_row(image="sub/b.jpg")])
    assert opened == []
    dataset[1]
    assert [path.rpartition("/")[2] for path in opened] == ["b.jpg"]


BAD_ROWS = {
    "bad_json": '{"image": "a.png", ',
    "bad_json nesting": "[" * 100_000,
    "bad_json NaN": '{"id": NaN}',
    "bad_json encoding": b'{"image": "\xff\xfe.png"}',
    "bad_json surrogate": r'{"image": "\ud800.png"}',
    "not_an_object": "[1, 2]",
    "conversations missing": {"image": "a.png"},
    "conversations one turn": good_row(conversations=turns()[:1]),
    "conversations text": good_row(conversations="text"),
    "question number": good_row(conversations=turns(question=3)),
    "question none": good_row(conversations=[None, None]),
    "answer none": good_row(conversations=turns(answer=None)),
    "answer object": good_row(conversations=turns(answer={"x": 1})),
    "accu_reward_method": good_row(accu_reward_method=["iou"]),
    "line_too_long": '{"x": "' + "y" * (16 * 2**20) + '"}',
    "bad_name number": good_row(image=7),
    "bad_name null in list": good_row(image=["a.png", None]),
    "bad_name empty": good_row(image=""),
    "bad_name NUL": good_row(image="a.png\0.txt"),
    "url": good_row(image="http://example.com/a.png"),
    "url file": good_row(image="file:///etc/passwd"),
    "outside_folder dots": good_row(image="../secret.png"),
    "outside_folder inner dots": good_row(image="sub/../../secret.png"),
    "outside_folder absolute": good_row(image="{absolute}"),
    "outside_folder link": good_row(image="link_out.png"),
    "outside_folder linked folder": good_row(image="folder_out/secret.png"),
    "missing": good_row(image="none.png"),
    "unreadable name": good_row(image="x" * 4096),
    "unreadable loop": good_row(image="loop.png"),
    "not_a_file folder": good_row(image="sub"),
    "not_a_file pipe": good_row(image="pipe.png"),
    "outside_folder device": good_row(image="zero.png"),
    "not_an_image html": good_row(image="page.jpg"),
    "not_an_image empty": good_row(image="empty.png"),
    "not_an_image twenty bytes": good_row(image="short.png"),
    "not_an_image svg": good_row(image="drawing.svg"),
    "too_many_pixels png": good_row(image="bomb.png"),
    "too_many_pixels 81 million": good_row(image="bomb_9000.png"),
    "too_many_pixels 169 million": good_row(image="bomb_13000.png"),
    "too_many_pixels 196 million": good_row(image="bomb_14000.png"),
    "too_many_pixels gif": good_row(image="bomb.gif"),
    "aspect_ratio": good_row(image="thin.png"),
}


@pytest.fixture
def hostile(folder):
    secret = folder.parent / "secret.png"
    Image.new("RGB", (30, 30)).save(secret)
    (folder / "link_out.png").symlink_to(secret)
    (folder / "folder_out").symlink_to(folder.parent)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "page.jpg").write_text("<html><body>404</body></html>")
    (folder / "empty.png").touch()
    (folder / "short.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 12)
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "bomb.png").write_bytes(png_bomb(30_000, 30_000))
    for side in (9_000, 13_000, 14_000):
        (folder / f"bomb_{side}.png").write_bytes(png_bomb(side, side))
    Image.new("P", (5, 5)).save(folder / "bomb.gif")
    gif = (folder / "bomb.gif").read_bytes()
    (folder / "bomb.gif").write_bytes(gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:])
    Image.new("RGB", (1, 20_000)).save(folder / "thin.png")
    return folder


def png_bomb(width, height):
    """A PNG that declares width x height pixels and holds none of them."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_and_set_aside(hostile, case, caplog):
    bad = BAD_ROWS[case]
    if isinstance(bad, dict) and bad.get("image") == "{absolute}":
        bad = bad | {"image": str(hostile / "a.png")}
    report = hostile.parent / "report" / "quarantine.jsonl"
    dataset = load(hostile, [good_row(), bad, good_row(id=3)], quarantine_file=report)
    assert dataset["id"][:] == [1, 3]  # nothing else changes
    (aside,) = dataset.quarantined
    assert aside.reason == case.split()[0]
    assert (aside.file, aside.line) == (str(hostile.parent / "data.jsonl"), 2)
    assert len(aside.message) < 1000
    (written,) = map(json.loads, report.read_text().splitlines())
    assert (written["line"], written["reason"]) == (2, aside.reason)
    assert "1 of 3 rows set aside" in caplog.text


DAMAGE = {
    "c.jpg": lambda data: data[: len(data) // 2],
    "c.png": lambda data: data[:600] + bytes(255 - b for b in data[600:900]) + data[900:],
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("verify", ["header", "decode", "none"])
def test_an_image_that_breaks_while_decoding(folder, verify, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    (folder / name).write_bytes(DAMAGE[name]((folder / name).read_bytes()))
    report = folder.parent / "quarantine.jsonl"
    rows = [
        good_row(),
        good_row(id="cut", image=["a.png", name], conversations=turns("<image><image>x")),
    ]
    dataset = load(folder, rows, verify_images=verify, quarantine_file=report)
    if verify == "decode":
        assert len(dataset) == 1 and dataset.quarantined[0].id == "cut"
        return
    assert len(dataset) == 2 and dataset.quarantined == []  # the header is intact
    for _ in range(2):
        row = dataset[1]
        assert row["quarantine_reason"] == "broken"
        assert len(row["images"]) == 2  # as many as the prompt has placeholders
    assert [aside.id for aside in dataset.quarantined] == ["cut"]
    assert len(report.read_text().splitlines()) == 1
    assert dataset[0]["quarantine_reason"] is None


def test_pixel_cap_is_checked_before_anything_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    dataset = load(folder, [good_row(), good_row(image="sub/b.jpg")], max_image_pixels=1100)
    assert [aside.reason for aside in dataset.quarantined] == ["too_many_pixels"]


CONTRACT_FAULTS = {
    "equal": dict(image_folders=["{folder}", "{folder}"]),
    "one folder and method per file": dict(reward_method="a:b"),
    "is not a folder": dict(image_folders=["/nowhere"]),
    "is not a file": dict(data_file_paths=["/nowhere.jsonl"]),
    "question_template": dict(question_template="no question"),
    "verify_images": dict(verify_images="all"),
}


@pytest.mark.parametrize("message", CONTRACT_FAULTS)
def test_contract_faults_are_fatal(folder, message):
    file = write(folder.parent / "data.jsonl", [good_row()])
    options = dict(data_file_paths=[file], image_folders=[folder]) | CONTRACT_FAULTS[message]
    options["image_folders"] = [folder if f == "{folder}" else f for f in options["image_folders"]]
    with pytest.raises(InputError, match=message):
        load_vlm_r1(options.pop("data_file_paths"), options.pop("image_folders"), **options)


def test_a_column_named_like_an_argument_of_trl_is_fatal_with_file_and_line(folder):
    with pytest.raises(InputError, match=r"data.jsonl:2: column 'completions'"):
        load(folder, [good_row(), good_row(completions=[])])


def test_a_file_without_a_usable_row_is_fatal_and_names_the_first_fault(folder):
    with pytest.raises(InputError, match=r"no usable row .*2 set aside.*data.jsonl:1: .*none.png"):
        load(folder, [good_row(image="none.png"), "not json"])
    with pytest.raises(InputError, match=r"no usable row .*0 set aside"):
        load(folder, [""])


def test_byte_order_mark_and_blank_lines_are_skipped(folder):
    rows = [b"\xef\xbb\xbf" + json.dumps(good_row()).encode(), "", "  ", good_row(id=9)]
    dataset = load(folder, rows)
    assert dataset["id"][:] == [1, 9] and dataset[1]["data_row"].endswith(":4")


def test_validation_split_keeps_lazy_images(folder):
    dataset = load(folder, [good_row(id=i) for i in range(10)])
    train, validation = split_validation(dataset, 0.2, seed=1)
    assert (len(train), len(validation)) == (8, 2)
    assert set(train["id"][:]) | set(validation["id"][:]) == set(range(10))
    assert validation[0]["images"][0].size == (40, 30)
    assert train.quarantined == []
    assert split_validation(dataset, 0.0) == (dataset, None)
    with pytest.raises(InputError, match="val_split_ratio"):
        split_validation(dataset, 1.0)
