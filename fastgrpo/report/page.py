# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML page that needs no other file, and its curves as PNG beside it."""

from __future__ import annotations

import importlib.util
import json
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from fastgrpo.report import html
from fastgrpo.report.curves import CURVES, draw_curves, draw_histograms
from fastgrpo.report.pictures import drawn_shapes, images_shown, thumbnail
from fastgrpo.report.run import Run, read_run

GROUPS_SHOWN = 3  # of the first and of the last logged step
ROWS_SHOWN = 8  # of a group
_WIDE = ' class="wide"'
TITLES = {curve.name: curve.title for curve in CURVES} | {
    "step_time": "Where a step's time goes, in seconds"
}


def write_report(run: Path | str, out: Path | str | None = None) -> Path:
    """Writes `out`/report.html (default: RUN/report) and the curves as PNG; returns the page's
    path.

    What the run did not leave is named on the page. Model text is escaped; no resource is loaded
    from anywhere. Raises InputError when the folder holds no run at all.
    """
    data = read_run(run)
    folder = Path(out) if out is not None else data.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    curves, histograms = {}, {}
    if importlib.util.find_spec("matplotlib") is None:
        data.missing.append(
            "No curves: matplotlib is not installed (pip install 'fastgrpo[report]')."
        )
    else:
        curves, histograms = draw_curves(data), draw_histograms(data)
    for name, png in curves.items():
        (folder / f"{name}.png").write_bytes(png)
    page = html.page(
        f"GRPO run: {data.folder.resolve().name}",
        _subtitle(data),
        html.tiles(_tiles(data)),
        html.notes("Not in this report:", data.missing),
        _curves(curves),
        _histograms(histograms),
        _completions(data),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _subtitle(run: Run) -> str:
    if not run.history:
        return "no training log"
    steps = run.history[-1]["step"]
    times = [entry["step_time"] for entry in run.history if entry.get("step_time") is not None]
    pace = f", {sum(times) / len(times):.2f} s per step" if times else ""
    return f"{steps} optimizer steps{pace}"


def _tiles(run: Run) -> list[tuple[str, str]]:
    """(value, what it is) of the figures at the top."""
    tiles = []
    if run.held_out:
        before, after = run.held_out["before"], run.held_out["after"]
        for key, label in (
            ("sampled_iou", "held-out IoU, sampled at temperature 1"),
            ("greedy_iou", "held-out IoU, greedy"),
            ("sampled_format", "held-out, well-formed samples"),
        ):
            if key in before and key in after:
                ratio = ""
                if key.endswith("iou") and before[key] > 0:
                    ratio = f" ({after[key] / before[key]:.2f} times)"
                tiles.append((f"{before[key]:.3f} → {after[key]:.3f}", label + ratio))
        tiles.append((f"{after['num_images']}", "held-out images"))
    elif run.history:
        first, last = run.history[0]["reward"], run.history[-1]["reward"]
        tiles.append((f"{first:.3f} → {last:.3f}", "training reward, first and last logged"))
    return tiles


def _curves(curves: dict[str, bytes]) -> str:
    if not curves:
        return ""
    images = "".join(
        f"<div{_WIDE if name == 'step_time' else ''}>{html.image(png, TITLES[name])}</div>"
        for name, png in curves.items()
    )
    return f'<h2>Curves</h2><div class="curves">{images}</div>'


def _histograms(pictures: dict[str, bytes]) -> str:
    if not pictures:
        return ""
    images = "".join(f"<div>{html.image(png, name)}</div>" for name, png in pictures.items())
    return f'<h2>Rewards of the completions below</h2><div class="curves">{images}</div>'


def _completions(run: Run) -> str:
    if not run.completions:
        return ""
    parts = [
        "<h2>Completions</h2>"
        '<p class="soft">Boxes and points: <b class="truth">ground truth</b>, '
        '<b class="predicted">prediction</b>. '
        "The advantage says how a completion compares with the others of its group.</p>"
    ]
    for step, rows in groupby(run.completions, key=lambda row: row["step"]):
        groups = [list(g) for _, g in groupby(rows, key=lambda row: _identity(row))]
        for group in groups[:GROUPS_SHOWN]:
            parts.append(f"<h3>Step {step}: {escape(_text(group[0]['prompt']))}</h3>")
            parts.append(_table(run, group[:ROWS_SHOWN]))
    return "".join(parts)


def _identity(row: dict[str, Any]) -> tuple[str, str]:
    """Rows of one group stand together and share prompt and image."""
    return _text(row["prompt"]), str(row.get("image_path"))


def _table(run: Run, rows: list[dict[str, Any]]) -> str:
    names = run.reward_names
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in (*names, "advantage"))
    body = "".join(_row(row, names) for row in rows)
    return f"<table><tr><th>image</th><th>completion</th>{heads}</tr>{body}</table>"


def _row(row: dict[str, Any], names: list[str]) -> str:
    text = _text(row["completion"])
    picture = _pictures(row, text) or '<span class="soft">none</span>'
    numbers = "".join(f'<td class="number">{html.number(row.get(name))}</td>' for name in names)
    advantage = row["advantage"]
    tone = "up" if advantage > 0 else "down" if advantage < 0 else "soft"
    return (
        f'<tr><td>{picture}</td><td class="text">{html.text(text)}</td>{numbers}'
        f'<td class="number {tone}">{advantage:+.2f}</td></tr>'
    )


def _pictures(row: dict[str, Any], text: str) -> str:
    """The images of a row, the boxes on the one they are about, and their frames in words."""
    paths = row.get("image_path") or []
    paths = paths if isinstance(paths, list) else [paths]
    frames = json.loads(row.get("frames") or "{}")
    about, parts = frames.get("index", 0), []
    shown = images_shown(len(paths), about)
    for index in shown:
        shapes = drawn_shapes(row, text) if index == about else ([], [])
        png = thumbnail(paths[index], *shapes)
        gone = f'<span class="soft">not readable: {escape(paths[index])}</span>'
        parts.append(html.image(png, f"image {index + 1}") if png else gone)
    parts.append(html.chosen(shown, len(paths)))
    if frames:
        parts.append(f'<span class="soft">{escape(_in_words(frames))}</span>')
    return "".join(parts)


def _in_words(frames: dict[str, Any]) -> str:
    sizes = [
        f"{name} {size[0]:g} x {size[1]:g}"
        for name, size in (("image", frames.get("image")), ("seen as", frames.get("seen")))
        if size
    ]
    frame = f"answer in {frames['answer']}, solution in {frames['solution']}"
    return "; ".join([frame, *sizes])


def _text(messages: Any) -> str:
    """The words of a prompt or completion, plain or conversational."""
    if isinstance(messages, str):
        return messages
    contents = [message.get("content") for message in messages or []]
    words = []
    for content in contents:
        if isinstance(content, str):
            words.append(content)
        else:
            words += [part["text"] for part in content or [] if part.get("text")]
    return " ".join(words)
