# SPDX-License-Identifier: Apache-2.0
"""A row is read whole: every turn, tag and image has its place, or the row is set aside."""

import base64
import io
import json

import pytest
from PIL import Image

pytest.importorskip("datasets")

from fastgrpo.data import load_vlm_r1  # noqa: E402

SIZES = {"a.png": (40, 30), "b.png": (20, 50), "cam:1.png": (8, 9)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, size in SIZES.items():
        Image.new("RGB", size).save(folder / name)
    return folder


def load(folder, *rows, name="rows.jsonl", **options):
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    options = {"question_template": "{Question}"} | options
    return load_vlm_r1([folder / name], [folder], **options)


def turns(*texts, kinds="human gpt"):
    kinds = kinds.split()
    return [{"from": kinds[i % len(kinds)], "value": text} for i, text in enumerate(texts)]


def of_roles(**contents):
    return [{"role": role.rstrip("_"), "content": content} for role, content in contents.items()]


def uri():
    buffer = io.BytesIO()
    Image.new("RGB", (5, 7)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(prompt):
    """`role: text` per message, an image as <i>."""
    return [m["role"] + ": " + "".join(p.get("text", "<i>") for p in m["content"]) for m in prompt]


# row -> (prompt, problem, answer, image sizes), each written out by hand
READ = {
    "question and answer": (
        {"image": "a.png", "conversations": turns("<image>find the cat", "[1]")},
        (["user: <i>find the cat"], "find the cat", "[1]", [(40, 30)]),
    ),
    "a system turn first": (
        {"conversations": turns("Be brief.", "find the cat", "[1]", kinds="system human gpt")},
        (["system: Be brief.", "user: find the cat"], "find the cat", "[1]", []),
    ),
    "a system column": (
        {"system": "Be brief.", "conversations": turns("find", "[1]")},
        (["system: Be brief.", "user: find"], "find", "[1]", []),
    ),
    "a history of turns": (
        {
            "image": "a.png",
            "conversations": turns("<image>what is it?", "a cat", "where?", "[1]"),
        },
        (
            ["user: <i>what is it?", "assistant: a cat", "user: where?"],
            "where?",
            "[1]",
            [(40, 30)],
        ),
    ),
    "images over several turns": (
        {
            "images": ["a.png", "b.png"],
            "conversations": turns("<image>this?", "a cat", "and <image> this?", "a dog"),
        },
        (
            ["user: <i>this?", "assistant: a cat", "user: and <i> this?"],
            "and  this?",
            "a dog",
            [(40, 30), (20, 50)],
        ),
    ),
    "tags inside and at the end of the text": (
        {
            "image": ["b.png", "a.png"],
            "conversations": turns("is <image> left of <image>", "yes"),
        },
        (["user: is <i> left of <i>"], "is  left of ", "yes", [(20, 50), (40, 30)]),
    ),
    "a tag on a line of its own": (
        {"image": "a.png", "conversations": turns("<image>\nfind", "[1]")},
        (["user: <i>\nfind"], "\nfind", "[1]", [(40, 30)]),
    ),
    "roles by OpenAI's names": (
        {
            "messages": of_roles(system="Be brief.", user="<image>x", assistant="y"),
            "images": "a.png",
        },
        (["system: Be brief.", "user: <i>x"], "x", "y", [(40, 30)]),
    ),
    "roles in capitals, of another bot": (
        {
            "image": "a.png",
            "conversations": turns("s", "<image>x", "y", kinds="System USER Bard"),
        },
        (["system: s", "user: <i>x"], "x", "y", [(40, 30)]),
    ),
    "parts with their own image": (
        {
            "messages": of_roles(
                user=[{"type": "text", "text": "see "}, {"type": "image", "image": "a.png"}],
                assistant="y",
            )
        },
        (["user: see <i>"], "see ", "y", [(40, 30)]),
    ),
    "parts with and without their own image": (
        {
            "images": ["b.png"],
            "messages": of_roles(
                user=[
                    {"type": "image"},
                    {"type": "image_url", "image_url": {"url": uri()}},
                    {"type": "text", "text": "differ?"},
                ],
                assistant="y",
            ),
        },
        (["user: <i><i>differ?"], "differ?", "y", [(20, 50), (5, 7)]),
    ),
    "turns without a role": (
        {"conversations": [{"value": "q"}, {"value": 3}]},
        (["user: q"], "q", "3", []),
    ),
    "a data URI": (
        {"image": uri(), "conversations": turns("<image>x", "y")},
        (["user: <i>x"], "x", "y", [(5, 7)]),
    ),
    "a name with a colon": (
        {"image": "cam:1.png", "conversations": turns("<image>x", "y")},
        (["user: <i>x"], "x", "y", [(8, 9)]),
    ),
    "a feature's dictionary": (
        {"image": {"bytes": None, "path": "a.png"}, "conversations": turns("<image>x", "y")},
        (["user: <i>x"], "x", "y", [(40, 30)]),
    ),
    "a number in scientific notation": (
        {"conversations": turns("x", [1e-07, 2])},
        (["user: x"], "x", "[1e-7,2]", []),
    ),
    "text that looks like a tag": (
        {"conversations": turns("a < image > b", "y")},
        (["user: a < image > b"], "a < image > b", "y", []),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_row_is_read_whole(folder, case):
    given, (prompt, problem, answer, sizes) = READ[case]
    dataset = load(folder, given)
    row = dataset[0]
    assert dataset.quarantined == []
    assert shown(row["prompt"]) == prompt
    assert row["problem"] == problem
    assert row["solution"] == f"<answer> {answer} </answer>"
    assert [image.size for image in row["images"]] == sizes


SET_ASIDE = {
    "image_tags a tag without a file": {"conversations": turns("<image>x", "y")},
    "image_tags two tags, one file": {
        "image": "a.png",
        "conversations": turns("<image><image>x", "y"),
    },
    "image_tags one tag, two files": {
        "image": ["a.png", "b.png"],
        "conversations": turns("<image>x", "y"),
    },
    "image_tags a file without a tag": {"image": "a.png", "conversations": turns("x", "y")},
    "image_tags in the answer": {
        "image": ["a.png", "b.png"],
        "conversations": turns("<image>x", "like <image>"),
    },
    "image_tags a video": {"conversations": turns("<video>x", "y")},
    "image_tags an extra in the history": {
        "image": "a.png",
        "conversations": turns("<image>x", "y", "<image>z", "w"),
    },
    "image_token": {"image": "a.png", "conversations": turns("<image>say <|image_pad|>", "y")},
    "image_token alone": {"conversations": turns("what is <|vision_start|>?", "y")},
    "image_token in the history": {"conversations": turns("a", "<|video_pad|>", "b", "c")},
    "image_token in the system turn": {
        "conversations": turns("<|image_pad|>", "x", "y", kinds="system human gpt")
    },
    "roles starts with the model": {"conversations": turns("hi", "x", "y", kinds="gpt human gpt")},
    "roles an answer without a question": {"conversations": turns("sys", "y", kinds="system gpt")},
    "roles asks twice": {"conversations": turns("x", "x", "y", kinds="human human gpt")},
    "roles answers twice": {"conversations": turns("x", "y", "y", kinds="human gpt gpt")},
    "roles a late system turn": {
        "conversations": turns("x", "y", "s", "x", "y", kinds="human gpt system human gpt")
    },
    "roles two system turns": {
        "conversations": turns("s", "s", "x", "y", kinds="system system human gpt")
    },
    "roles system turn and column": {
        "system": "s",
        "conversations": turns("s", "x", "y", kinds="system human gpt"),
    },
    "roles a tool": {"conversations": turns("x", "f()", "y", kinds="human function_call gpt")},
    "roles unknown": {"conversations": turns("x", "y", kinds="human narrator")},
    "roles half of them named": {"conversations": [{"value": "x"}, {"from": "gpt", "value": "y"}]},
    "answer none after the last question": {"conversations": turns("x", "y", "z")},
    "answer blank": {"conversations": turns("x", "  ")},
    "question blank": {"conversations": turns("", "y")},
    "question only an image": {"image": "a.png", "conversations": turns("<image>", "y")},
    "conversations an image in a turn": {
        "conversations": [
            {"from": "human", "value": "x", "image": "a.png"},
            *turns("y", kinds="gpt"),
        ]
    },
    "conversations both names": {"conversations": turns("x", "y"), "messages": turns("x", "y")},
    "images both names": {
        "image": "a.png",
        "images": ["b.png"],
        "conversations": turns("<image>x", "y"),
    },
    "url": {"image": "https://example.com/a.png", "conversations": turns("<image>x", "y")},
    "url in a part": {
        "messages": of_roles(
            user=[
                {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}},
                {"type": "text", "text": "x"},
            ],
            assistant="y",
        )
    },
    "missing with a colon": {"image": "cam:2.png", "conversations": turns("<image>x", "y")},
    "not_an_image data URI": {
        "image": "data:image/png;base64,AAAA",
        "conversations": turns("<image>x", "y"),
    },
}


@pytest.mark.parametrize("case", SET_ASIDE)
def test_a_row_that_cannot_be_read_whole_is_set_aside_with_its_reason(folder, case):
    good = {"id": "good", "conversations": turns("x", "y")}
    dataset = load(folder, good, SET_ASIDE[case] | {"id": "bad"})
    assert dataset["id"][:] == ["good"]
    (aside,) = dataset.quarantined
    assert (aside.line, aside.id, aside.reason) == (2, "bad", case.split()[0])


def test_the_template_wraps_the_last_question_only_and_leading_images_stay_first(folder):
    row = {
        "image": ["a.png", "b.png"],
        "conversations": turns("<image>what?", "a cat", "<image>where?", "[1]"),
    }
    dataset = load(folder, row, question_template="Think.\n{Question} Answer.")
    assert shown(dataset[0]["prompt"]) == [
        "user: <i>what?",
        "assistant: a cat",
        "user: <i>Think.\nwhere? Answer.",
    ]


def test_tokens_of_another_family_are_refused_for_that_family(folder):
    row = {"conversations": turns("say <image_soft_token>", "y")}
    assert len(load(folder, row)) == 1
    dataset = load(
        folder, row, {"conversations": turns("x", "y")}, image_tokens=["<image_soft_token>"]
    )
    assert [aside.reason for aside in dataset.quarantined] == ["image_token"]


def test_a_json_array_is_read_as_rows(folder):
    rows = [{"id": i, "image": "a.png", "conversations": turns("<image>x", "y")} for i in range(3)]
    dataset = load(folder, *rows, "no row", name="llava.json")
    assert dataset["id"][:] == [0, 1, 2]
    assert dataset["data_row"][2].endswith("llava.json:3")
    assert [(aside.line, aside.reason) for aside in dataset.quarantined] == [(4, "not_an_object")]


def test_folders_default_to_that_of_each_file(folder):
    (folder / "own.jsonl").write_text(
        json.dumps({"image": "a.png", "conversations": turns("<image>x", "y")})
    )
    assert load_vlm_r1(str(folder / "own.jsonl"))[0]["images"][0].size == (40, 30)
