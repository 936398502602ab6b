# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's JSONL and ShareGPT's JSON as a dataset TRL's trainers take, images opened lazily."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from tqdm import tqdm

from fastgrpo.data.conversation import IMAGE_TOKENS, QUESTION, TAG, RowFault, read_conversation
from fastgrpo.data.files import read_rows
from fastgrpo.data.mixture import ALL, sampled
from fastgrpo.data.opened import check_columns, check_verification, finish, located, verify_image
from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.errors import InputError
from fastgrpo.images import MAX_PIXELS, ImageFault
from fastgrpo.images.read import embedded_bytes, resolve_inside

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
TURNS, IMAGES = ("conversations", "messages"), ("image", "images")


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
    image_folders: str | Sequence[str | Path] | None = None,
    *,
    reward_method: str | Sequence[str] | None = None,
    sampling: Sequence[str] | None = None,
    seed: int = 0,
    task_type: str = "rec",
    question_template: str | None = None,
    image_tokens: Iterable[str] = IMAGE_TOKENS,
    max_image_pixels: int = MAX_PIXELS,
    verify_images: str = "header",
    quarantine_file: str | Path | None = None,
):
    """Reads VLM-R1, ShareGPT or LLaVA files into a `datasets.Dataset` with TRL's columns.

    `data_file_paths`, `image_folders` and `reward_method` are lists of equal length, or VLM-R1's
    strings with ":" between the entries; no folders: each file's own; an empty folder: names are
    paths from the working folder. A file holds one JSON object
    a line, or one JSON array (`.json`). A row is `{"image" or "images": name, data URI or list of
    them (optional), "conversations" or "messages": turns, ...}`, or, without turns, `"problem"` and
    `"solution"`, the images before the problem. `sampling` says how much of each file is read, in
    the words of `data.mixture`, a random choice being that of `seed`. Turns are read by
    `read_conversation`: roles decide what is system, question and answer, earlier turns stay in the
    prompt, every `<image>` keeps its place and needs its file.

    It becomes `prompt` (the last question in `question_template`, or in the template of
    `task_type`), `images` (opened when the row is read, RGB), `image_path` (list), `problem` (the
    last question without tags), `solution` (`<answer> ... </answer>` around the last answer),
    `accu_reward_method` (the row's own, else the file's, else "default"), `data_row` ("file:line"),
    and the row's other columns as they are.

    A broken row or image is set aside: listed in `dataset.quarantined`, written to
    `quarantine_file`, counted in the log. `verify_images` is "header" (size and kind of every
    image), "decode" (every pixel) or "none". A text that holds one of `image_tokens`, the literal
    placeholders of the model's processor, is broken. An image that breaks only when it is opened
    for training is replaced by a blank one and the row's `quarantine_reason` says so, which
    excludes it from the loss under `FastGRPOTrainer`; it is None otherwise. Rows found broken by
    dataloader workers and other processes are listed too, each once.

    Raises `InputError` for files that cannot be read, lists of different lengths, columns whose
    names TRL uses itself, and files in which no row is usable.

    Source of the format: om-ai-lab/VLM-R1, `grpo_jsonl.py`; the templates are our own words.
    """
    files, folders, methods = sources(data_file_paths, image_folders, reward_method)
    template = template_of(task_type, question_template)
    check_verification(verify_images, max_image_pixels)
    quarantine, table, aside = Quarantine(quarantine_file), _Table(), []
    checks = (image_tokens, verify_images, max_image_pixels)
    shares = [ALL] * len(files) if sampling is None else list(sampling)
    if len(shares) != len(files):
        raise InputError(f"data_sampling: {len(shares)} for the {len(files)} of data_file_paths")
    for file, folder, method, share in zip(files, folders, methods, shares, strict=True):
        reader = RowReader(file, folder, template, method, *checks)
        rows = sampled(read_rows(file), share, seed)
        for line, row in tqdm(rows, file.name, unit=" rows", delay=2, disable=None, leave=False):
            read = reader.read(line, row)
            aside.append(read) if isinstance(read, SetAside) else table.append(read)
    quarantine.add(*aside)
    where = f"data_file_paths: {', '.join(map(str, files))}"
    num_rows = table.num_rows + len(aside)
    return finish(_dataset(table), quarantine, num_rows, where, "image_path", max_image_pixels)


@dataclass(frozen=True)
class RowReader:
    """The rows of one file in the columns of `load_vlm_r1`."""

    file: Path
    folder: Path | None
    template: str
    method: str
    image_tokens: Iterable[str]
    verify_images: str
    max_image_pixels: int

    def read(self, line: int, row: dict | RowFault) -> dict | SetAside:
        """The columns of a row, or why it is set aside; `InputError` for a column TRL needs."""
        try:
            if isinstance(row, RowFault):
                raise row
            check_columns(list(row), f"{self.file}:{line}")
            columns = _to_columns(row, self.folder, self.template, self.method, self.image_tokens)
            for source in columns["image_path"]:
                verify_image(source, self.verify_images, self.max_image_pixels)
        except (RowFault, ImageFault) as fault:
            own_id = row.get("id") if isinstance(row, dict) else None
            return SetAside(str(self.file), line, own_id, fault.reason, str(fault))
        return columns | {"data_row": f"{self.file}:{line}"}


def split_validation(dataset, ratio: float, seed: int = 0):
    """(train, validation): a random share `ratio` of the rows set apart; validation None for 0."""
    if not 0 <= ratio < 1:
        raise InputError(f"val_split_ratio must be in [0, 1), got {ratio}")
    if ratio == 0:
        return dataset, None
    if len(dataset) < 2:
        raise InputError("val_split_ratio: a single row cannot be split")
    parts = dataset.train_test_split(test_size=ratio, seed=seed)
    for part in parts.values():
        part.quarantined = dataset.quarantined
    return parts["train"], parts["test"]


def template_of(task_type: str, question_template: str | None) -> str:
    """The question template of a run, checked."""
    template = question_template or QUESTION_TEMPLATES.get(task_type, QUESTION_TEMPLATES["default"])
    if template.count(QUESTION) != 1:
        raise InputError(f"question_template must contain {QUESTION} once, got {template!r:.200}")
    return template


def sources(data_file_paths, image_folders, reward_method) -> tuple[list, list, list]:
    """(files, folders, methods) of equal length, all of them there."""

    def entries(value):
        return value.split(":") if isinstance(value, str) else list(value)

    files = [Path(path) for path in entries(data_file_paths)]
    folders = [f.parent for f in files] if image_folders is None else entries(image_folders)
    folders = [Path(folder) if str(folder) else None for folder in folders]
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
        if folder is not None and not folder.is_dir():
            raise InputError(f"image_folders: {folder} is not a folder")
    return files, [folder and folder.resolve() for folder in folders], methods


def _only(row: dict, names: Sequence[str], reason: str) -> object:
    """The value of the one of two columns that holds something."""
    present = [name for name in names if row.get(name) not in (None, [], "")]
    if len(present) > 1:
        raise RowFault(reason, f"the row has both {' and '.join(present)}: which one is meant?")
    return row[present[0]] if present else next((row[n] for n in names if n in row), None)


def _source(name: object, folder: Path | None) -> str:
    """Where an image is read from: its file inside `folder` (anywhere for None), or a data URI."""
    if isinstance(name, dict) and name.get("bytes") is None:
        name = name.get("path")
    if isinstance(name, str) and embedded_bytes(name) is not None:
        return name
    if folder is None and isinstance(name, str):
        return located(name, Path.cwd())
    return str(resolve_inside(folder or Path.cwd(), name))


def _to_columns(
    row: dict, folder: Path | None, template: str, method: str, image_tokens: Iterable[str]
) -> dict:
    names = _only(row, IMAGES, "images")
    names = [] if names is None else names if isinstance(names, list) else [names]
    resolve = functools.partial(_source, folder=folder)
    system = row.get("system")
    turns = _only(row, TURNS, "conversations")
    if turns is None and isinstance(row.get("problem"), str) and row.get("solution") is not None:
        turns = [{"value": TAG * len(names) + row["problem"]}, {"value": row["solution"]}]
    read = read_conversation(
        turns,
        [resolve(name) for name in names],
        template=template,
        system=system if isinstance(system, str) and system.strip() else None,
        image_tokens=image_tokens,
        resolve=resolve,
    )
    own = row.get("accu_reward_method") or method
    if not isinstance(own, str):
        raise RowFault("accu_reward_method", f"expected a string, got {own!r:.200}")
    extra = {k: v for k, v in row.items() if k not in (*IMAGES, *TURNS, *COLUMNS)}
    return extra | {
        "prompt": read.prompt,
        "problem": read.problem,
        "solution": f"<answer> {answer_text(read.answer)} </answer>",
        "accu_reward_method": own,
        "image_path": read.images,
    }


def answer_text(answer: object) -> str:
    if isinstance(answer, str):
        answer = answer.replace("<answer>", "").replace("</answer>", "").strip()
        if not answer:
            raise RowFault("answer", "the answer is empty")
        return answer
    if isinstance(answer, bool | int | float | list):
        return orjson.dumps(answer).decode()
    raise RowFault("answer", f"an answer must be a string, number or list, got {answer!r:.200}")


def _dataset(table: _Table):
    from datasets import Dataset, Features, Json, List, Value

    text = {
        name: Value("string") for name in ("problem", "solution", "accu_reward_method", "data_row")
    }
    known = {"prompt": Json(), "image_path": List(Value("string")), **text}
    features = Features({name: known.get(name, Json()) for name in table.columns})
    return Dataset.from_dict(table.columns, features=features)
