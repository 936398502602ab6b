# SPDX-License-Identifier: Apache-2.0
"""The figures of one or more checkpoints as JSON and Markdown, and a page of the worst answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import orjson

from fastgrpo.evaluation.run import Evaluation
from fastgrpo.evaluation.tasks import Scored, Task
from fastgrpo.report import html
from fastgrpo.report.pictures import images_shown, thumbnail
from fastgrpo.rewards.read.chat import content_text

SUMMARY_JSON, SUMMARY_MARKDOWN, WORST = "eval.json", "eval.md", "worst.html"
SIDE = 320


def write_summary(folder: Path, task: Task, evaluations: Sequence[Evaluation]) -> Path:
    """Writes eval.json and eval.md, a line a checkpoint in the order given; returns the latter."""
    entries = [{"model": one.name, "figures": one.figures} for one in evaluations]
    whole = {"task": task.name, "checkpoints": entries}
    data = orjson.dumps(whole, option=orjson.OPT_INDENT_2) + b"\n"
    (folder / SUMMARY_JSON).write_bytes(data)
    path = folder / SUMMARY_MARKDOWN
    path.write_text(f"# {task.name}\n\n{table(task, evaluations)}", encoding="utf-8")
    return path


def table(task: Task, evaluations: Sequence[Evaluation]) -> str:
    """A Markdown table, the best value of the task's own figure in bold."""
    names = list(dict.fromkeys(name for one in evaluations for name in one.figures))
    best = max(one.figures[task.orders] for one in evaluations)

    def cell(one: Evaluation, name: str) -> str:
        value = one.figures.get(name)
        text = "" if value is None else f"{value}" if isinstance(value, int) else f"{value:.4f}"
        chosen = name == task.orders and value == best and len(evaluations) > 1
        return f"**{text}**" if chosen else text

    rows = [["checkpoint", *(name.replace("_", " ") for name in names)]]
    rows += [["---", *("---:" for _ in names)]]
    rows += [[one.name, *(cell(one, name) for name in names)] for one in evaluations]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_worst(
    folder: Path, task: Task, one: Evaluation, images: Callable[[int], Sequence], count: int
) -> Path:
    """Writes worst.html: the `count` rows of least value, and those that do not count behind them.

    `images(row)` opens the images of a row; one whose size is known has both kinds of box on it.
    """
    order = sorted(range(len(one.scored)), key=lambda row: (_key(one.scored[row]), row))[:count]
    figures = [
        (f"{value}" if isinstance(value, int) else f"{value:.4f}", name.replace("_", " "))
        for name, value in one.figures.items()
    ]
    legend = (
        '<p class="soft">Boxes: <b class="truth">solution</b>, <b class="predicted">answer</b>.</p>'
    )
    body = "".join(_row(one, row, images(row)) for row in order)
    heads = '<th>image</th><th>question and answer</th><th class="number">value</th>'
    page = html.page(
        f"{task.name}: {one.name}",
        f"the {len(order)} worst of {len(one.scored)} rows",
        html.tiles(figures),
        legend,
        f"<table><tr>{heads}</tr>{body}</table>",
    )
    path = folder / WORST
    path.write_text(page, encoding="utf-8")
    return path


def _key(score: Scored) -> float:
    return float("inf") if score.value is None else score.value


def _row(one: Evaluation, index: int, images: Sequence) -> str:
    row, answer, score = one.rows[index], one.answers[index], one.scored[index]
    named = row.get("image_index") or 0
    shown = images_shown(len(images), named)
    pictures = "".join(
        html.image(png, f"image {i + 1}")
        for i in shown
        if (png := _drawn(images[i], score if i == named else Scored(None)))
    )
    pictures += html.chosen(shown, len(images))
    fault = f'<p class="down">{html.text(score.fault)}</p>' if score.fault else ""
    asked = html.text(str(row.get("problem") or _asked(row.get("prompt"))))
    solution = html.text(str(row.get("solution")))
    return (
        f'<tr><td>{pictures or "none"}</td><td class="text"><p>{asked}</p>'
        f'<p class="truth">{solution}</p><p>{html.text(answer.text)}</p>{fault}'
        f'<p class="soft">{escape(str(row.get("data_row", "")))}</p></td>'
        f'<td class="number">{html.number(score.value)}</td></tr>'
    )


def _drawn(image, score: Scored) -> bytes | None:
    return thumbnail(image, score.truth, score.said, SIDE)


def _asked(prompt) -> str:
    return prompt if isinstance(prompt, str) else content_text(prompt[-1]["content"])
