# SPDX-License-Identifier: Apache-2.0
"""A run's report: complete, self-contained, safe with hostile text, clear about what is missing."""

import base64
import importlib.util
import io
import json
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")
parquet = pytest.importorskip("pyarrow.parquet")

import pyarrow  # noqa: E402
from PIL import Image  # noqa: E402

from fastgrpo.cli import main as cli  # noqa: E402
from fastgrpo.errors import InputError  # noqa: E402
from fastgrpo.report import curves, write_report  # noqa: E402
from fastgrpo.report import page as pages  # noqa: E402
from fastgrpo.report.pictures import PREDICTED, TRUTH, drawn_shapes, shapes_of, thumbnail  # noqa: E402
from fastgrpo.report.run import read_run  # noqa: E402

HOSTILE = (
    '<script>alert("x")</script><img src="http://example.org/x.png"><answer>[1,2,9,8]</answer>'
)
PICTURES = set("reward reward_std zero_variance kl entropy length truncated step_time".split())


class Page(HTMLParser):
    """Tags, image bytes, and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.images, self.resources, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "src" and value.startswith("data:image/png;base64,"):
                self.images.append(base64.b64decode(value.split(",", 1)[1], validate=True))
            elif name in ("src", "href"):
                self.resources.append(value)

    def handle_data(self, data):
        self.text += data


def log_entry(step: int) -> dict:
    return {
        "step": step,
        "reward": 1 + 0.1 * step,
        "rewards/vlm_r1_iou/mean": 0.1 * step,
        "reward_std": 0.3,
        "frac_reward_zero_std": 0.25,
        "kl": None if step == 1 else 0.01,
        "entropy": 1.5,
        "completions/mean_length": 16.0,
        "completions/clipped_ratio": 0.5,
        "step_time": 2.0,
        "time/generate": 1.0,
        "time/backward": 0.7,
    }


def completion_row(index: int, image: str, text: str) -> dict:
    return {
        "step": 1,
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "find the 7"}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
        "vlm_r1_iou": 0.5 if index else None,
        "image_path": [image],
        "solution": "<answer> [3, 4, 20, 25] </answer>",
        "advantage": 1.0 - index,
    }


def write_completions(folder, rows, step=1):
    folder = folder / "completions"
    folder.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / f"completions_{step:05d}.parquet")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run<b>"
    folder.mkdir()
    history = [log_entry(1), log_entry(2), log_entry(3), {"step": 3, "train_runtime": 9.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    image = tmp_path / "canvas.png"
    Image.new("RGB", (56, 84), "white").save(image)
    texts = ["<think>7</think><answer>[2,3,19,26]</answer>", HOSTILE]
    write_completions(folder, [completion_row(i, str(image), t) for i, t in enumerate(texts)])
    figures = {"sampled_iou": 0.123, "greedy_iou": 0.2, "sampled_format": 1.0, "num_images": 300}
    held_out = {"before": figures, "after": figures | {"sampled_iou": 0.456}}
    (folder / "heldout.json").write_text(json.dumps(held_out))
    return folder


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing takes a second; a test that looks at the page alone does without."""
    for draw in ("draw_curves", "draw_histograms"):
        monkeypatch.setattr(pages, draw, lambda run: {})


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_write_report_shows_everything_in_one_file(run):
    page = read(write_report(run))
    assert page.resources == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert {path.stem for path in (run / "report").glob("*.png")} == PICTURES
    assert len(page.images) == len(PICTURES) + 3  # a reward's histogram, a picture a row
    for png in page.images:
        assert Image.open(io.BytesIO(png)).format == "PNG"
    for text in (
        "0.123 → 0.456",
        "(3.71 times)",
        "300",
        "find the 7",
        "not scored",
        "+1.00",
        "run<b>",
    ):
        assert text in page.text
    assert "Not in this report" not in page.text


def test_write_report_escapes_model_text(run, no_curves):
    source = write_report(run).read_text()
    assert "<script>" not in source and "&lt;script&gt;" in source
    assert HOSTILE in Page(source).text


def test_write_report_elsewhere_leaves_the_run_alone(run, tmp_path, no_curves):
    assert write_report(run, tmp_path / "out") == tmp_path / "out" / "report.html"
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    "gone, said",
    [
        ("trainer_state.json", "No trainer_state.json"),
        ("heldout.json", "no held-out figures"),
        ("completions", "log_completions=True"),
    ],
)
def test_write_report_names_what_is_missing(run, gone, said, no_curves):
    path = run / gone
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    assert said in read(write_report(run)).text


def test_write_report_of_a_stock_trl_run(run):
    """No recorder: no image column, no step times, a state only in checkpoints, plain text rows."""
    state = run / "trainer_state.json"
    for step, reward in ((2, 0.0), (10, 0.875)):
        entry = {"step": step, "reward": reward}
        (run / f"checkpoint-{step}").mkdir()
        target = run / f"checkpoint-{step}" / "trainer_state.json"
        target.write_text(json.dumps({"log_history": [entry]}))
    state.unlink()
    (run / "heldout.json").unlink()
    write_completions(
        run, [{"step": 1, "prompt": "2+2?", "completion": "4", "exact": 1.0, "advantage": 0.0}]
    )
    page = read(write_report(run))
    for text in ("name no image", "No step times", "10 optimizer steps", "0.875", "2+2?", "exact"):
        assert text in page.text
    assert len(page.images) == 2  # the rewards' curve and a histogram


def test_write_report_says_when_an_image_is_gone(run, tmp_path, no_curves):
    (tmp_path / "canvas.png").write_bytes(b"not an image")
    assert "not readable: " in read(write_report(run)).text


def test_write_report_shows_the_first_and_the_last_step(run, tmp_path, no_curves):
    for step in (2, 3):
        row = completion_row(1, str(tmp_path / "canvas.png"), f"from step {step}")
        write_completions(run, [row | {"step": step}], step)
    text = read(write_report(run)).text
    assert "from step 3" in text and "from step 2" not in text and "Step 1" in text


def test_without_matplotlib_the_page_has_all_but_the_curves(run, monkeypatch):
    real = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "matplotlib" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", absent)
    page = read(write_report(run))
    assert "No curves: matplotlib is not installed" in page.text and len(page.images) == 2


def test_write_report_refuses_what_is_no_run(run, tmp_path, capsys, no_curves):
    with pytest.raises(InputError, match="not one"):
        write_report(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match="nothing to report"):
        cli(["report", str(empty)])
    (run / "trainer_state.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        write_report(run)


def test_write_report_opens_a_run_that_goes_on(run, tmp_path, no_curves):
    """Ahead of its checkpoint by the log, a line and a completions file under the pen."""
    (run / "trainer_state.json").unlink()
    (run / "checkpoint-2").mkdir()
    state = {"log_history": [log_entry(1), log_entry(2)]}
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    lines = [json.dumps(log_entry(step)) for step in (1, 2, 3, 4)]
    (run / "log.jsonl").write_text("\n".join([*lines, '{"step": 5, "rew']))
    row = completion_row(1, str(tmp_path / "canvas.png"), "from step 2")
    write_completions(run, [row | {"step": 2}], 2)
    write_completions(run, [row | {"step": 3}], 3)
    path = run / "completions" / "completions_00003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    text = read(write_report(run)).text
    assert "4 optimizer steps" in text and "from step 2" in text and "Step 3" not in text
    assert "completions_00003.parquet is no complete parquet file" in text
    for path in (run / "completions").iterdir():
        path.write_bytes(b"PAR1")
    assert "No completions/*.parquet" in read(write_report(run)).text


def test_histograms_are_of_the_first_and_the_last_step(run, tmp_path):
    for step, value in ((2, 0.25), (9, 1.0)):
        row = completion_row(1, str(tmp_path / "canvas.png"), "x")
        write_completions(run, [row | {"step": step, "vlm_r1_iou": value, "format": None}], step)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_histogram", lambda name, spread: drawn.append((name, spread)))
        curves.draw_histograms(read_run(run))
    assert drawn == [("vlm_r1_iou", {"step 1": [0.5], "step 9": [1.0]})]


def test_every_image_of_a_row_is_shown_with_the_frames_of_its_boxes(run, tmp_path, no_curves):
    paths = []
    for index in range(2):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.new("RGB", (40, 40), "white").save(paths[-1])
    told = {"answer": "thousandths", "solution": "image", "image": [40, 40], "seen": None}
    row = completion_row(1, "", "<answer>[250, 250, 750, 750]</answer>")
    row |= {"image_path": paths, "frames": json.dumps(told | {"index": 1}), "solution": "[1,1,9,9]"}
    write_completions(run, [row])
    page = read(write_report(run))
    colours = [colours_of(png) for png in page.images]
    assert colours[0] == {"#ffffff"} and {TRUTH, PREDICTED} <= colours[1]
    assert "answer in thousandths, solution in image; image 40 x 40" in page.text


def test_of_many_frames_those_evenly_spaced_are_shown_and_the_one_with_the_box(
    run, tmp_path, no_curves
):
    paths = [str(tmp_path / f"{i}.png") for i in range(21)]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(path)
    told = {"answer": "image", "solution": "image", "image": [16, 16], "seen": None, "index": 7}
    row = completion_row(1, "", "<answer>[2, 2, 9, 9]</answer>")
    row |= {"image_path": paths, "frames": json.dumps(told), "solution": "[1, 1, 8, 8]"}
    write_completions(run, [row])
    page = read(write_report(run))
    assert "images 1, 5, 8, 9, 13, 17, 21 of 21" in page.text
    numbers = [f"#{i:02x}0000" for i in (0, 4, 7, 8, 12, 16, 20)]
    shown = [colours_of(png) for png in page.images]
    assert all(number in colours for number, colours in zip(numbers, shown, strict=True))
    assert [TRUTH in colours for colours in shown] == [i == 2 for i in range(7)]


def test_report_command_prints_the_page(run, capsys, no_curves):
    cli(["report", str(run)])
    assert capsys.readouterr().out.strip() == str((run / "report" / "report.html").resolve())


@pytest.mark.parametrize(
    "value, shapes",
    [
        ("<answer>[1,2,3,4]</answer>", [[1, 2, 3, 4]]),
        ("[9,9,9,9] <answer>{'bbox': [1, -2.5, 3, 4]}</answer>", [[1, -2.5, 3, 4]]),
        ("<answer>[[1,2,3,4],[5,6,7,8]]</answer>", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([1, 2, 3, 4], [[1, 2, 3, 4]]),
        ([1, 2, 3], []),
        ("[1,2,3]", []),
        ([5, 6], [[5, 6]]),
        ('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3.5]}]', [[1, 2, 3, 4], [2, 3.5]]),
        (None, []),
        ("[1," * 100_000, []),
    ],
)
def test_shapes_of(value, shapes):
    assert shapes_of(value) == shapes


def colours_of(png):
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return {f"#{bytes(colour).hex()}" for _, colour in picture.getcolors(maxcolors=100)}


def test_thumbnail_draws_points_where_they_are_and_nothing_that_lies_outside(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (80, 40), "white").save(path)
    picture = Image.open(io.BytesIO(thumbnail(str(path), [[20, 10]], []))).convert("RGB")
    ring = [picture.getpixel(at) for at in ((36, 20), (44, 20), (40, 16), (40, 24))]  # scaled by 2
    assert {f"#{bytes(colour).hex()}" for colour in ring} == {TRUTH}
    assert picture.getpixel((40, 20)) == (255, 255, 255)
    huge = 9e8  # PIL draws the whole of an outline: half a minute for one of this size
    outside = [[-huge, -huge, huge, huge], [huge, 5], [85, 2, 99, 9], [3, -40, 9, -20], [-7, 4]]
    assert colours_of(thumbnail(str(path), [], outside)) == {"#ffffff"}
    assert PREDICTED in colours_of(thumbnail(str(path), [], [[-huge, 5, huge, 9]]))


def test_thumbnail_draws_both_boxes_and_survives_any_numbers(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (80, 40), "white").save(path)
    wild = [[70, 30, 10, 5], [-1e5, 0, 1e5, 1], [3, 3, 3, 3]]
    png = thumbnail(str(path), [[10, 10, 30, 30]], wild)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.size == (160, 80)
    assert {TRUTH, PREDICTED} <= colours_of(png)
    assert thumbnail(str(tmp_path / "absent.png"), [], []) is None


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ("seen", "[112, 70, 224, 210]"),
        ("thousandths", "[250, 250, 500, 750]"),
        ("unit", "[0.25, 0.25, 0.5, 0.75]"),
        ("image", "[80, 60, 160, 180]"),
    ],
)
def test_boxes_are_drawn_in_pixels_of_the_image(frame, said):
    told = {"answer": frame, "solution": "image", "image": [320, 240], "seen": [448, 280]}
    row = {"solution": "[80, 60, 160, 180]", "frames": json.dumps(told)}
    truth, predicted = drawn_shapes(row, f"<answer>{said}</answer>")
    assert truth == [[80, 60, 160, 180]] and predicted[0] == pytest.approx(truth[0])
    unknown = json.dumps(told | {"image": None, "seen": None, "answer": "seen"})
    assert drawn_shapes(row | {"frames": unknown}, f"<answer>{said}</answer>") == ([], [])
    assert drawn_shapes(row | {"frames": ""}, f"<answer>{said}</answer>") == ([], [])
    assert drawn_shapes({"solution": "[80, 60, 160, 180]"}, "none") == (truth, [])
