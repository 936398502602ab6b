# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on a data set: answers, scores and figures, each left as a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from fastgrpo.errors import InputError
from fastgrpo.evaluation.answer_file import AnswerFile
from fastgrpo.evaluation.answers import Answer, Answerer
from fastgrpo.evaluation.tasks import Scored, Task

ANSWERS, RESULT = "answers.jsonl", "result.json"


@dataclass(frozen=True)
class Evaluation:
    """`figures` by name; of every row, in order: its columns (no images), answer and score."""

    name: str
    figures: dict[str, float]
    rows: list[dict]
    answers: list[Answer]
    scored: list[Scored]


def evaluate(
    name: str,
    dataset,
    task: Task,
    answerer: Callable[[], Answerer],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 8,
    frames: Mapping[str, str] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Evaluation:
    """Evaluates one checkpoint, called `name`, on a data set of `fastgrpo.data`.

    Leaves `folder`/answers.jsonl and result.json. Rows that answers.jsonl holds are not asked
    again; what its `settings` say must be the same. A batch is always the same rows, so that a run
    that was cut leaves the same bytes as one that was not. `answerer()` loads the model, and is
    called only where an answer is missing. `frames`: `answer_frame`, `solution_frame` of rows that
    state none. Raises `InputError` when rows stay without an answer, or none can be scored.
    """
    answers = AnswerFile(folder / ANSWERS, {**settings, "batch_size": batch_size})
    _answer(dataset, answers, answerer, batch_size, progress)
    rows = _plain_rows(dataset)
    kept = [answers.answers[i] for i in range(len(rows))]
    told = [answer.told | row for row, answer in zip(rows, kept, strict=True)]
    broken = {i: a.told["broken"] for i, a in enumerate(kept) if "broken" in a.told}
    usable = [i for i in range(len(rows)) if i not in broken]
    scored, figures = task([told[i] for i in usable], [kept[i].text for i in usable],
                           **(frames or {}))  # fmt: skip
    found = dict(zip(usable, scored, strict=True))
    scored = [found.get(i) or Scored(None, f"image: {broken[i]}") for i in range(len(rows))]
    figures["not_scored"] += len(broken)
    figures |= _lengths(kept)
    result = Evaluation(name, figures, told, kept, scored)
    (folder / RESULT).write_bytes(_result(result, task, settings))
    return result


def _answer(dataset, answers: AnswerFile, answerer, batch_size: int, progress) -> None:
    batches = [
        range(start, min(start + batch_size, len(dataset)))
        for start in range(0, len(dataset), batch_size)
    ]
    batches = [rows for rows in batches if any(row not in answers.answers for row in rows)]
    if not batches:
        return
    answer, silent = answerer(), 0
    for members in progress(batches):
        rows = [dataset[i] for i in members]
        given = zip(members, answer(rows), rows, strict=True)
        told = {i: _with_fault(one, row) for i, one, row in given if one is not None}
        silent += len(members) - len(told)
        answers.add(told)
    if silent:
        why = ", ".join(f"{n} x {reason}" for reason, n in getattr(answer, "failures", {}).items())
        raise InputError(
            f"server: {silent} rows got no answer ({why}); the others are kept, run again to ask "
            "for these"
        )


def _with_fault(answer: Answer, row: dict) -> Answer:
    if row.get("quarantine_reason"):
        answer.told["broken"] = row["quarantine_reason"]
    return answer


def _plain_rows(dataset) -> list[dict]:
    """The rows without their images: those are opened by the data set's transform."""
    plain = dataset.with_format(None)
    shown = [name for name in plain.column_names if name not in ("image", "images")]
    return plain.select_columns(shown).to_list()


def _lengths(answers: list[Answer]) -> dict[str, float]:
    tokens = [answer.tokens for answer in answers if answer.tokens is not None]
    if not tokens:
        return {}
    return {
        "mean_tokens": sum(tokens) / len(tokens),
        "truncated": sum(answer.ended is False for answer in answers),
    }


def _result(result: Evaluation, task: Task, settings: Mapping[str, Any]) -> bytes:
    rows = [
        {
            "data_row": row.get("data_row"),
            "value": score.value,
            "fault": score.fault,
            "text": answer.text,
            "truth": score.truth,
            "said": score.said,
        }
        for row, answer, score in zip(result.rows, result.answers, result.scored, strict=True)
    ]
    whole = {
        "model": result.name,
        "task": task.name,
        "figures": result.figures,
        "settings": dict(settings),
        "rows": rows,
    }
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2) + b"\n"


def fingerprint(dataset) -> str:
    """A hash of the prompts, solutions and image names of a data set, in order."""
    digest = hashlib.sha256()
    plain = dataset.with_format(None)
    names = [n for n in ("prompt", "solution", "image_path", "data_row") if n in plain.column_names]
    for row in plain.select_columns(names):
        digest.update(orjson.dumps(row, default=str) + b"\n")
    return digest.hexdigest()[:16]


def weights_fingerprint(folder: Path, pieces: int = 16, size: int = 1 << 16) -> str:
    """A hash of the size and of evenly spaced pieces of each weight file of a local checkpoint, and
    of what an adapter says about its base."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]):
        length = path.stat().st_size
        digest.update(f"{path.name} {length}\n".encode())
        with path.open("rb") as file:
            for piece in range(pieces):
                file.seek(max(0, length - size) * piece // max(pieces - 1, 1))
                digest.update(file.read(size))
    return digest.hexdigest()[:16]
