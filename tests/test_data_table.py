# SPDX-License-Identifier: Apache-2.0
"""Tables in TRL's columns, wherever they are and whatever their images are."""

import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")

import datasets  # noqa: E402

from fastgrpo import InputError  # noqa: E402
from fastgrpo.data import load_table  # noqa: E402

WIDTHS = (40, 20, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    for i, width in enumerate(WIDTHS):
        Image.new("RGB", (width, 30), (10 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def encoded(i):
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTHS[i], 30), (10 * i, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


IMAGES = {
    "paths": lambda folder: [str(folder / f"{i}.png") for i in range(3)],
    "relative paths": lambda folder: [f"{i}.png" for i in range(3)],
    "bytes": lambda folder: [encoded(i) for i in range(3)],
    "features": lambda folder: [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(3)],
    "PIL": lambda folder: [Image.open(io.BytesIO(encoded(i))) for i in range(3)],
}


def table(images, **columns):
    rows = {"prompt": [[{"role": "user", "content": f"find {i}"}] for i in range(3)]}
    data = datasets.Dataset.from_dict(
        rows | {"image": images, "solution": [[i, 2, 3, 4] for i in range(3)]} | columns
    )
    if isinstance(images[0], dict):
        data = data.cast_column("image", datasets.Image())
    return data


def shown(prompt):
    return [m["role"] + ": " + "".join(p.get("text", "<i>") for p in m["content"]) for m in prompt]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("form", ["parquet", "disk", "arrow"])
def test_a_table_with_any_kind_of_image(folder, tmp_path, kind, form):
    data, place = table(IMAGES[kind](folder)), tmp_path / f"rows.{form}"
    if form == "parquet":
        data.to_parquet(place)
    else:
        data.save_to_disk(tmp_path / "disk")
        place = next((tmp_path / "disk").glob("*.arrow")) if form == "arrow" else tmp_path / "disk"
    if kind.startswith("relative"):
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(encoded(i))
            (tmp_path / "disk").mkdir(exist_ok=True)
            (tmp_path / "disk" / f"{i}.png").write_bytes(encoded(i))
    loaded = load_table(str(place))
    assert loaded.quarantined == [] and len(loaded) == 3
    for i in range(3):
        row = loaded[i]
        (image,) = row["images"]
        assert (image.size, image.getpixel((0, 0))) == ((WIDTHS[i], 30), (10 * i, 0, 0))
        assert shown(row["prompt"]) == [f"user: <i>find {i}"]
        assert row["solution"] == [i, 2, 3, 4] and row["quarantine_reason"] is None
        assert "image" not in row and row["data_row"].endswith(f":{i + 1}")
        assert ("image_path" in row) == (kind in ("paths", "relative paths"))


def write(folder, *rows, name="rows.jsonl"):
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return str(folder / name)


FORMS = {
    "a text": ({"prompt": "x", "image": "0.png"}, ["user: <i>x"]),
    "a text with its tag": ({"prompt": "x <image> y", "image": "0.png"}, ["user: x <i> y"]),
    "messages": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
            "images": ["0.png", "1.png"],
        },
        ["system: s", "user: <i><i>x"],
    ),
    "parts": (
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}
            ],
            "images": ["0.png"],
        },
        ["user: x<i>"],
    ),
    "turns": (
        {
            "conversations": [
                {"from": "human", "value": "<image>x"},
                {"from": "gpt", "value": "y"},
            ],
            "image": "0.png",
        },
        ["user: <i>x"],
    ),
    "a problem": ({"problem": "x", "image": "0.png", "prompt_id": 3}, ["user: <i>Q: x"]),
    "a question without an image": ({"question": "x", "image": None}, ["user: Q: x"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_forms_a_row_may_have(folder, form, name):
    row, prompt = FORMS[form]
    template = "Q: {Question}" if form.startswith("a ") and "prompt" not in row else "{Question}"
    loaded = load_table(write(folder, row, name=name), question_template=template)
    assert shown(loaded[0]["prompt"]) == prompt
    assert len(loaded[0]["images"]) == sum(text.count("<i>") for text in prompt)
    if form == "turns":
        assert loaded[0]["solution"] == "<answer> y </answer>" and loaded[0]["problem"] == "x"


def test_text_rows_keep_their_prompt(folder):
    loaded = load_table(write(folder, {"prompt": "x"}, {"prompt": "a <image>"}, {"prompt": " "}))
    assert loaded["prompt"][:] == ["x"] and "images" not in loaded[0]
    assert loaded.quarantined.counts() == {"image_tags": 1, "prompt": 1}


BAD = {
    "image_tags": {"prompt": "<image><image>x", "image": "0.png"},
    "image_token": {"prompt": "x <|image_pad|>", "image": "0.png"},
    "missing": {"prompt": "x", "image": "none.png"},
    "url": {"prompt": "x", "image": "https://example.com/0.png"},
    "roles": {"prompt": [{"role": "narrator", "content": "x"}], "image": None},
    "prompt": {"prompt": 3, "image": None},
    "bad_name": {"prompt": "x", "image": 7},
}


@pytest.mark.parametrize("reason", BAD)
def test_rows_that_cannot_be_used_are_set_aside(folder, tmp_path, reason):
    good = {"id": 1, "prompt": "x", "image": "0.png"}
    name = write(folder, good, BAD[reason] | {"id": 2}, good | {"id": 3}, "text")
    loaded = load_table(name, quarantine_file=tmp_path / "q.jsonl")
    assert loaded["id"][:] == [1, 3]
    assert [(row.line, row.reason) for row in loaded.quarantined] == [
        (4, "not_an_object"),
        (2, reason),
    ]
    assert loaded["data_row"][1].endswith(":3")


def test_bytes_that_break_while_decoding_are_listed_when_opened(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="JPEG")
    images = [encoded(0), buffer.getvalue()[:2000], encoded(2)]
    table(images).to_parquet(tmp_path / "rows.parquet")
    loaded = load_table(str(tmp_path / "rows.parquet"))
    assert loaded.quarantined == []
    assert [row["quarantine_reason"] for row in loaded] == [None, "broken", None]
    assert [(row.line, row.reason) for row in loaded.quarantined] == [(2, "broken")]


def test_names_that_cannot_be_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    table([encoded(0)] * 3).remove_columns("prompt").to_parquet(tmp_path / "no_prompt.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "rows.txt").touch()
    both = write(folder, {"prompt": "x", "image": "0.png", "images": ["0.png"]})
    datasets.DatasetDict(train=table([encoded(0)] * 3)).save_to_disk(tmp_path / "dict")
    for name, options, message in (
        ("./nowhere.parquet", {}, "nowhere.parquet does not exist"),
        ("nobody/nothing", {}, "dataset_name: nobody/nothing cannot be loaded"),
        ("rows.jsonl", {}, "rows.jsonl does not exist"),
        (str(tmp_path / "rows.txt"), {}, "must be one of"),
        (str(tmp_path / "no_prompt.parquet"), {}, "has no column prompt.*columns are image"),
        (str(tmp_path / "broken.parquet"), {}, "cannot be loaded"),
        (both, {}, "both image and images"),
        (both, {"question_template": "none"}, "question_template|both image"),
        (both, {"verify_images": "all"}, "verify_images"),
        (both, {"max_image_pixels": 0}, "max_image_pixels"),
        (str(tmp_path / "dict"), {"split": "test"}, "dataset_train_split: 'test' is none of train"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_table(name, **options)
        assert "\n" not in str(caught.value)
