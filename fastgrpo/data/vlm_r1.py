"""VLM-R1's JSONL as a dataset TRL's trainers take: conversational prompts, lazily opened images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from PIL import Image

from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.errors import InputError
from fastgrpo.images import MAX_PIXELS, ImageFault, image_size, load_image
from fastgrpo.images.read import resolve_inside

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 * 2**20
QUESTION = "{Question}"
_THINK_THEN_ANSWER = (
    "Reason between <think> and </think>, then answer between <answer> and </answer>"
)
# By VLM-R1's task types; another task type takes the last one.
QUESTION_TEMPLATES = {
    "rec": f"{QUESTION} {_THINK_THEN_ANSWER}. Write the answer as JSON.",
    "ic": f"{QUESTION} {_THINK_THEN_ANSWER}, like this: <think> the reasoning </think>"
    "<answer> the answer as JSON </answer>",
    "odLength": f"{_THINK_THEN_ANSWER}, like this: <think> the reasoning </think>"
    f"<answer> the answer </answer>\n{QUESTION}",
    "default": f"{QUESTION} {_THINK_THEN_ANSWER}.",
}
COLUMNS = ("prompt", "problem", "solution", "accu_reward_method", "image_path", "data_row")
# Names TRL passes to a reward function itself.
RESERVED = (
    *("prompts", "completion", "completions", "completion_ids", "images"),
    *("trainer_state", "log_extra", "log_metric", "environments", "quarantine_reason"),
)


class RowFault(Exception):
    """One row that cannot be used."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class _Table:
    """The rows read so far, column by column."""

    columns: dict[str, list] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    num_rows: int = 0

    def append(self, row: dict) -> None:
        for name in row.keys() - self.columns.keys():
            self.columns[name] = [None] * self.num_rows
        for name, values in self.columns.items():
            values.append(row.get(name))
        self.num_rows += 1


def load_vlm_r1(
    data_file_paths: str | Sequence[str | Path],
    image_folders: str | Sequence[str | Path],
    *,
    reward_method: str | Sequence[str] | None = None,
    task_type: str = "rec",
    question_template: str | None = None,
    max_image_pixels: int = MAX_PIXELS,
    verify_images: str = "header",
    quarantine_file: str | Path | None = None,
):
    """Reads VLM-R1 JSONL files into a `datasets.Dataset` with TRL's columns.

    `data_file_paths`, `image_folders` and `reward_method` are lists of equal length, or VLM-R1's
    strings with ":" between the entries. A row is `{"image": name or list (optional),
    "conversations": [{"value": question}, {"value": answer}], ...}`. It becomes `prompt` (the
    images first, then `question_template` or the template of `task_type` with every `<image>`
    taken out of the question), `images` (opened when the row is read, RGB), `image_path` (list),
    `problem`, `solution` (`<answer> ... </answer>`), `accu_reward_method` (the row's own, else the
    file's, else "default"), `data_row` ("file:line"), and the row's other columns as they are.

    A broken row or image is set aside: listed in `dataset.quarantined`, written to
    `quarantine_file`, counted in the log. `verify_images` is "header" (size and kind of every
    image), "decode" (every pixel) or "none". An image that breaks only when it is opened for
    training is replaced by a blank one and the row's `quarantine_reason` says so, which excludes
    it from the loss under `FastGRPOTrainer`; it is None otherwise.

    Raises `InputError` for files that cannot be read, lists of different lengths, columns whose
    names TRL uses itself, and files in which no row is usable.

    Source of the format: om-ai-lab/VLM-R1, `grpo_jsonl.py`; the templates are our own words.
    """
    files, folders, methods = _sources(data_file_paths, image_folders, reward_method)
    template = question_template or QUESTION_TEMPLATES.get(task_type, QUESTION_TEMPLATES["default"])
    if QUESTION not in template:
        raise InputError(f"question_template must contain {QUESTION}, got {template!r:.200}")
    if verify_images not in ("header", "decode", "none"):
        raise InputError(
            f'verify_images must be "header", "decode" or "none", got {verify_images!r}'
        )
    quarantine = Quarantine(quarantine_file)
    table = _Table()
    for file, folder, method in zip(files, folders, methods, strict=True):
        for line, raw in _lines(file):
            row: object = None
            try:
                row = _parse(raw)
                _check_names(row, file, line)
                paths = _image_paths(row, folder, verify_images, max_image_pixels)
                table.append(_to_columns(row, paths, template, method, f"{file}:{line}"))
            except (RowFault, ImageFault) as fault:
                own_id = row.get("id") if isinstance(row, dict) else None
                quarantine.add(SetAside(str(file), line, own_id, fault.reason, str(fault)))
    return _dataset(table, quarantine, max_image_pixels, files)


def split_validation(dataset, ratio: float, seed: int = 0):
    """(train, validation): a random share `ratio` of the rows set apart; validation None for 0."""
    if not 0 <= ratio < 1:
        raise InputError(f"val_split_ratio must be in [0, 1), got {ratio}")
    if ratio == 0:
        return dataset, None
    parts = dataset.train_test_split(test_size=ratio, seed=seed)
    for part in parts.values():
        part.quarantined = dataset.quarantined
    return parts["train"], parts["test"]


def _sources(data_file_paths, image_folders, reward_method) -> tuple[list, list, list]:
    def entries(value):
        return value.split(":") if isinstance(value, str) else list(value)

    files = [Path(path) for path in entries(data_file_paths)]
    folders = [Path(path) for path in entries(image_folders)]
    methods = ["default"] * len(files) if reward_method is None else entries(reward_method)
    if not len(files) == len(folders) == len(methods):
        raise InputError(
            f"data_file_paths has {len(files)} entries, image_folders {len(folders)}, reward_method"
            f" {len(methods)}: they must be equal, one folder and method per file"
        )
    for file in files:
        if not file.is_file():
            raise InputError(f"data_file_paths: {file} is not a file")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"image_folders: {folder} is not a folder")
    return files, [folder.resolve() for folder in folders], methods


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank; an overlong line is cut short."""
    try:
        with file.open("rb") as stream:
            number = 0
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                tail = raw
                while tail and not tail.endswith(b"\n") and len(tail) > MAX_LINE_BYTES:
                    tail = stream.readline(MAX_LINE_BYTES + 1)
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise InputError(f"data_file_paths: {file} cannot be read: {error}") from None


def _parse(raw: bytes) -> dict:
    if len(raw) > MAX_LINE_BYTES:
        raise RowFault("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RowFault("bad_json", f"{error}") from None
    if not isinstance(row, dict):
        raise RowFault("not_an_object", f"expected a JSON object, got {type(row).__name__}")
    return row


def _check_names(row: dict, file: Path, line: int) -> None:
    taken = sorted(row.keys() & set(RESERVED))
    if taken:
        raise InputError(
            f"{file}:{line}: column {taken[0]!r} has a name the trainer uses itself; rename it"
        )


def _image_paths(row: dict, folder: Path, verify: str, max_pixels: int) -> list[str]:
    names = row.get("image")
    if names is None:
        return []
    names = names if isinstance(names, list) else [names]
    paths = [resolve_inside(folder, name) for name in names]
    for path in paths:
        if verify == "header":
            image_size(path, max_pixels)
        elif verify == "decode":
            load_image(path, max_pixels)
    return [str(path) for path in paths]


def _to_columns(row: dict, paths: list[str], template: str, method: str, data_row: str) -> dict:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise RowFault(
            "conversations", f"expected a list of a question and an answer, got {turns!r:.200}"
        )
    question, answer = (turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2])
    if not isinstance(question, str):
        raise RowFault(
            "question", f"conversations[0].value must be a string, got {question!r:.200}"
        )
    if isinstance(answer, str):
        answer = answer.replace("<answer>", "").replace("</answer>", "").strip()
    elif isinstance(answer, bool | int | float | list):
        answer = orjson.dumps(answer).decode()
    else:
        raise RowFault(
            "answer",
            f"conversations[1].value must be a string, number or list, got {answer!r:.200}",
        )
    problem = question.replace("<image>", "")
    own = row.get("accu_reward_method") or method
    if not isinstance(own, str):
        raise RowFault("accu_reward_method", f"expected a string, got {own!r:.200}")
    text = {"type": "text", "text": template.replace(QUESTION, problem)}
    content = [*({"type": "image"} for _ in paths), text]
    extra = {k: v for k, v in row.items() if k not in ("image", "conversations", *COLUMNS)}
    return extra | {
        "prompt": [{"role": "user", "content": content}],
        "problem": problem,
        "solution": f"<answer> {answer} </answer>",
        "accu_reward_method": own,
        "image_path": paths,
        "data_row": data_row,
    }


def _dataset(table: _Table, quarantine: Quarantine, max_pixels: int, files: list[Path]):
    from datasets import Dataset, Features, Json, List, Value

    aside = quarantine.rows
    if not table.num_rows:
        first = f"; the first: {aside[0].file}:{aside[0].line}: {aside[0].message}" if aside else ""
        raise InputError(
            f"data_file_paths: no usable row in {', '.join(map(str, files))} "
            f"({len(aside)} set aside{first})"
        )
    if aside:
        logger.warning(
            "%d of %d rows set aside: %s",
            len(aside),
            len(aside) + table.num_rows,
            quarantine.counts(),
        )
    text = {
        name: Value("string") for name in ("problem", "solution", "accu_reward_method", "data_row")
    }
    known = {"prompt": Json(), "image_path": List(Value("string")), **text}
    features = Features({name: known.get(name, Json()) for name in table.columns})
    dataset = Dataset.from_dict(table.columns, features=features)
    dataset = dataset.with_transform(_OpenImages(quarantine, max_pixels))
    dataset.quarantined = aside
    return dataset


class _OpenImages:
    """The dataset's transform: adds `images` and `quarantine_reason` to the rows being read."""

    def __init__(self, quarantine: Quarantine, max_pixels: int):
        self.quarantine, self.max_pixels = quarantine, max_pixels

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        if "image_path" not in rows:  # a single column was asked for
            return rows
        opened = [self._open(rows, index) for index in range(len(rows["image_path"]))]
        return rows | {
            "images": [images for images, _ in opened],
            "quarantine_reason": [reason for _, reason in opened],
        }

    def _open(self, rows: dict[str, list], index: int) -> tuple[list[Image.Image], str | None]:
        paths = rows["image_path"][index]
        try:
            return [load_image(Path(path), self.max_pixels) for path in paths], None
        except ImageFault as fault:
            file, _, line = rows["data_row"][index].rpartition(":")
            own_id = rows["id"][index] if "id" in rows else None
            self.quarantine.add(SetAside(file, int(line), own_id, fault.reason, str(fault)))
            return [Image.new("RGB", (56, 56)) for _ in paths], fault.reason
