# SPDX-License-Identifier: Apache-2.0
"""A local table or a hub data set in TRL's columns, its rows checked and its images lazy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastgrpo.data.conversation import (
    IMAGE_TOKENS,
    QUESTION,
    RowFault,
    as_user_turn,
    read_conversation,
    read_prompt,
)
from fastgrpo.data.files import read_rows
from fastgrpo.data.opened import check_columns, check_verification, finish, located, verify_image
from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.data.vlm_r1 import IMAGES, TURNS, answer_text
from fastgrpo.errors import InputError
from fastgrpo.images import MAX_PIXELS, ImageFault

PROBLEMS = ("problem", "question")
ROW = "__row__"
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_JSON = (".json", ".jsonl")


def load_table(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    image_folder: str | Path | None = None,
    question_template: str = QUESTION,
    image_tokens: Iterable[str] = IMAGE_TOKENS,
    max_image_pixels: int = MAX_PIXELS,
    verify_images: str = "header",
    quarantine_file: str | Path | None = None,
):
    """Reads rows in TRL's columns into a `datasets.Dataset` like that of `load_vlm_r1`.

    `name`: a .parquet, .arrow, .json or .jsonl file, a folder of them, a folder written by
    `save_to_disk`, or a data set of the hub (`config`, `split`). A row has `prompt` (a text or
    messages), or `conversations` / `messages` (turns, the last answer becomes `solution` unless
    there is one), or `problem` / `question` (put into `question_template`); and `image` or
    `images`: paths (relative ones below `image_folder`, by default the table's own), bytes, data
    URIs, or a `datasets.Image` feature. A text may hold one `<image>` per image; without any, the
    images of a `prompt` or a `problem` come first, as TRL puts them. Other columns stay.

    Rows and images that cannot be used are set aside as `load_vlm_r1` does. Raises `InputError` for
    a name that cannot be opened, a table without those columns, and one without a usable row.
    """
    check_verification(verify_images, max_image_pixels)
    quarantine = Quarantine(quarantine_file)
    table, aside, base = _open(name, split, config)
    folder = Path(image_folder).resolve() if image_folder is not None else base
    check_columns(table.column_names, f"dataset_name: {name}")
    table = _undecoded(table)
    reader = _RowReader(table.column_names, folder, question_template, list(image_tokens), name)
    rows = table.select_columns(reader.reads)
    kept: list[int] = []
    columns: dict[str, list] = {}
    by_name = reader.image_column is not None
    shown = tqdm(rows, Path(name).name, unit=" rows", delay=2, disable=None, leave=False)
    for index, row in enumerate(shown):
        line = row[ROW] if ROW in row else index + 1
        try:
            read, sources = reader.read(row)
            for source in sources:
                verify_image(source, verify_images, max_image_pixels)
        except (RowFault, ImageFault) as fault:
            aside.append(SetAside(name, line, row.get("id"), fault.reason, str(fault)))
            continue
        kept.append(index)
        if sources and not isinstance(sources[0], str):
            by_name = False
        read["image_path"] = sources
        for column, value in (read | {"data_row": f"{name}:{line}"}).items():
            columns.setdefault(column, []).append(value)
    quarantine.add(*aside)
    num_rows = len(kept) + len(aside)
    opened_from = "image_path" if by_name else reader.image_column
    dropped = [*reader.consumed, ROW, *([reader.image_column] if by_name else [])]
    if not by_name:
        columns.pop("image_path", None)
    result = _with_columns(
        table if len(kept) == len(table) else table.select(kept), columns, dropped
    )
    where = f"dataset_name: {name}"
    return finish(result, quarantine, num_rows, where, opened_from, max_image_pixels, folder)


class _RowReader:
    """One row's prompt and images from the columns the table has."""

    def __init__(self, names: list[str], folder: Path, template: str, tokens: list[str], where):
        self.folder, self.template, self.tokens = folder, template, tokens
        images = [name for name in IMAGES if name in names]
        if len(images) > 1:
            raise InputError(f"dataset_name: {where} has both image and images; drop one of them")
        self.image_column = images[0] if images else None
        forms = ("prompt", *TURNS, *PROBLEMS)
        self.form = next((name for name in forms if name in names), None)
        if self.form is None:
            raise InputError(
                f"dataset_name: {where} has no column {', '.join(forms[:-1])} or {forms[-1]}; its "
                f"columns are {', '.join(n for n in names if n != ROW)}"
            )
        if template.count(QUESTION) != 1:
            raise InputError(
                f"question_template must contain {QUESTION} once, got {template!r:.200}"
            )
        wanted = {self.form, self.image_column, "solution", "system", "id", ROW}
        self.reads = [name for name in names if name in wanted]
        self.consumed = [self.form] if self.form in ("prompt", *TURNS) else []

    def read(self, row: dict) -> tuple[dict, list]:
        """(columns to set, where each image is read from)."""
        sources = row[self.image_column] if self.image_column else []
        if not isinstance(sources, list):
            sources = [] if sources is None else [sources]
        found = [located(source, self.folder) for source in sources]
        value = row[self.form]
        if self.form in TURNS:
            return self._turns(row, value, sources), found
        if self.form in PROBLEMS:
            if not isinstance(value, str) or not value.strip():
                raise RowFault(self.form, f"expected a text, got {value!r:.200}")
            value = self.template.replace(QUESTION, value)
        if isinstance(value, str) and self.image_column is None and self.form == "prompt":
            if not value.strip():
                raise RowFault("prompt", "the prompt is empty")
            read_prompt(as_user_turn(value, 0), [], image_tokens=self.tokens)
            return {"prompt": value}, found
        messages = as_user_turn(value, len(sources))
        prompt, _ = read_prompt(messages, sources, image_tokens=self.tokens, resolve=_no_inline)
        return {"prompt": prompt}, found

    def _turns(self, row: dict, turns: Any, sources: list) -> dict:
        system = row.get("system")
        read = read_conversation(
            turns,
            sources,
            template=self.template,
            system=system if isinstance(system, str) and system.strip() else None,
            image_tokens=self.tokens,
            resolve=_no_inline,
        )
        columns = {"prompt": read.prompt, "problem": read.problem}
        if "solution" not in row:
            columns["solution"] = f"<answer> {answer_text(read.answer)} </answer>"
        return columns


def _no_inline(source: Any):
    raise RowFault("prompt", "an image inside a message: a table keeps them in its column images")


def _open(name: str, split: str, config: str | None):
    """(the table, faults found while reading it, the folder relative image names start from)."""
    path = Path(name)
    if path.suffix in _JSON and path.is_file():
        return *_from_json(path), path.parent.resolve()
    if path.is_file() and path.suffix not in _TABLES:
        raise InputError(
            f"dataset_name: {name} must be one of {', '.join((*_TABLES, *_JSON))}, or a folder"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in _TABLES
    if (looks_local or path.suffix in _JSON) and not path.exists():
        raise InputError(f"dataset_name: {name} does not exist")
    base = (path if path.is_dir() else path.parent).resolve() if path.exists() else Path.cwd()
    return _load(path, name, split, config), [], base


def _load(path: Path, name: str, split: str, config: str | None):
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    try:
        if path.is_file():
            kind = _TABLES[path.suffix]
            return load_dataset(kind, data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = load_from_disk(str(path))
        else:
            found = load_dataset(name, config, split=split)
    except (OSError, ValueError, ConnectionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"dataset_name: {name} cannot be loaded: {reason:.300}") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise InputError(f"dataset_train_split: {split!r} is none of {', '.join(found)}")
        found = found[split]
    if not isinstance(found, Dataset):
        raise InputError(f"dataset_name: {name} is streamed; a data set must have a length")
    return found


def _from_json(path: Path):
    """A JSON file as a table of its usable rows, each with its line, and the faults of the rest."""
    from datasets import Dataset, Features, Json, Value

    lines: list[int] = []
    rows: list[dict] = []
    aside: list[SetAside] = []
    for line, row in read_rows(path):
        if isinstance(row, RowFault):
            aside.append(SetAside(str(path), line, None, row.reason, str(row)))
        else:
            lines.append(line)
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names} | {ROW: lines}
    features = Features({name: Json() for name in names} | {ROW: Value("int64")})
    return Dataset.from_dict(columns, features=features), aside


def _undecoded(table):
    """The table with its image columns as {bytes, path}: opened, and judged, by our own reader."""
    from datasets import Image, List

    for name in IMAGES:
        feature = table.features.get(name)
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table


def _with_columns(table, columns: dict[str, list], dropped: Iterable[str]):
    """The table with `columns` set and `dropped` gone."""
    from datasets import Dataset, Features, Json, Value, concatenate_datasets

    text = {n for n, values in columns.items() if all(isinstance(v, str) for v in values)}
    features = Features({n: Value("string") if n in text else Json() for n in columns})
    own = [n for n in table.column_names if n not in {*dropped, *columns}]
    added = Dataset.from_dict(columns, features=features)
    return concatenate_datasets([table.select_columns(own), added], axis=1) if own else added
