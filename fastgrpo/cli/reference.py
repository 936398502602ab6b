# SPDX-License-Identifier: Apache-2.0
"""`python -m fastgrpo.cli.reference`: every setting, in Markdown, from the dataclasses."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields

from trl import GRPOConfig, ModelConfig

from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.advantages.rule import AdvantageRule, GroupFilter
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.integrations.trl import FastOptions
from fastgrpo.objective import Objective

INTRO = """# Settings

This page is made by `make guide` from the dataclasses; a test compares it with them.

A setting stands in the YAML file of `--config` (`name: value`) or on the command line (`--name value`, which wins). Those below are
fastgrpo's own. Every field of TRL's `GRPOConfig` and `ModelConfig` is a setting too; the ones of GRPO and of the model are listed by
name at the end, TRL's documentation explains them, and `fastgrpo train --help` prints all.

Some defaults are not TRL's: `bf16` only where there is a GPU that has it, `lora_dropout` 0 (a prompt shared by its completions has
one dropout mask), `lora_target_modules` all linear layers, sampling settings neutral unless they are set.
"""  # noqa: E501
SECTIONS = (
    ("With `trainer = FastGRPOTrainer(..., fast={...})`", FastOptions),
    ("`fg.Objective`", Objective),
    ("`advantages` of a recipe, `rule=` of the trainer", AdvantageRule),
    ("Each of its `filters`", GroupFilter),
    ("`perception` of a recipe, `perception=` of the trainer", PerceptionRule),
    ("TRL's `GRPOConfig`", GRPOConfig),
    ("TRL's `ModelConfig`", ModelConfig),
)


def page() -> str:
    """The Markdown page."""
    parts = [INTRO, "## Of `fastgrpo train`\n", table(FastGRPOConfig, with_help=True)]
    for title, cls in SECTIONS:
        parts += [f"## {title}\n", table(cls, with_help=False)]
    return "\n".join(parts)


def table(cls: type, *, with_help: bool) -> str:
    """One line per field the class itself defines: name, type, default, and its help."""
    types = inspect.get_annotations(cls)  # a parser of command lines changes those of the fields
    columns = ["setting", "type", "default"] + ["what it does"] * with_help
    lines = [columns, ["---"] * len(columns)]
    for field in (field for field in fields(cls) if field.name in types):
        cells = [f"`{field.name}`", f"`{_type(types[field.name])}`", f"`{_default(field)}`"]
        lines.append(cells + [field.metadata.get("help", "")] * with_help)
    return "".join(f"| {' | '.join(_cell(c) for c in cells)} |\n" for cells in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _default(field: Field) -> str:
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return "required" if field.default is MISSING else repr(field.default)


if __name__ == "__main__":
    print(page(), end="")
