# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo eval [MODEL ...] [--task rec] [--config x.yaml] [--field value]`: a model's figures.

MODEL is a checkpoint, a hub name, or a folder of checkpoints; without it, the `output_dir` of the
config. The rows are the config's rows for evaluation (its training rows without any), or those that
`--data_file_paths` or `--dataset_name` name. Answers are greedy, at most `max_completion_length`
tokens; every setting of `fastgrpo train` that shapes a prompt or an image means the same here.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm
from trl import ModelConfig

from fastgrpo.cli.checkpoints import checkpoints_of, dtype_of, load_hf_config, load_model
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.cli.data import load_data
from fastgrpo.cli.processor import image_tokens, load_processor
from fastgrpo.cli.settings import OneLineErrors, parse
from fastgrpo.errors import InputError
from fastgrpo.evaluation import evaluate, task
from fastgrpo.evaluation.answers import Answerer, Server, Writing, packed, padded
from fastgrpo.evaluation.pages import (
    SUMMARY_JSON,
    SUMMARY_MARKDOWN,
    WORST,
    table,
    write_summary,
    write_worst,
)
from fastgrpo.evaluation.run import fingerprint, weights_fingerprint
from fastgrpo.models.registry import family_of
from fastgrpo.rewards.geometry.frames import FRAMES

logger = logging.getLogger(__name__)

DATA = {"__data_file_paths", "__dataset_name"}


class _Parser(OneLineErrors, argparse.ArgumentParser):
    pass


def main(arguments: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    models = list(itertools.takewhile(lambda text: not text.startswith("-"), arguments))
    options, rest = _parser().parse_known_args(arguments[len(models) :])
    chosen = task(options.task)
    for name, least in (("batch_size", 1), ("concurrency", 1), ("worst", 0)):
        if getattr(options, name) < least:
            raise InputError(f"{name}: expected at least {least}, got {getattr(options, name)}")
    config, model_config = _settings(models, rest)
    checkpoints = checkpoints_of(models or [config.output_dir])
    out = Path(options.out) if options.out else _default_out(models or [config.output_dir])
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file")
    model_config.model_name_or_path = next(iter(checkpoints.values()))
    tokens = image_tokens(load_processor(config, model_config))
    rows = _rows(config, tokens, out, rest)
    dataset = _sample(rows, options.num_samples, config.seed)
    print(f"{chosen.name}: {len(dataset)} of {len(rows)} rows, {len(checkpoints)} checkpoint(s)")
    found = []
    for name, place in checkpoints.items():
        model_config.model_name_or_path = place
        found.append(_evaluate(name, chosen, dataset, out / name, config, model_config, options))
        images = functools.partial(_images, dataset)
        write_worst(out / name, chosen, found[-1], images, options.worst)
        write_summary(out, chosen, found)
    print(table(chosen, found), end="")
    print(f"figures: {out / SUMMARY_MARKDOWN}, {out / SUMMARY_JSON}")
    for name in checkpoints:
        print(f"answers, and a page of the worst: {out / name / WORST}")


def _parser() -> _Parser:
    parser = _Parser(prog="fastgrpo eval", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--task", default="rec", help="rec, detection, choice, math, or a name of a reward")
    add("--out", help="where the results go (default: MODEL/eval)")
    add("--num_samples", type=int, help="this many rows, drawn as VLM-R1's scripts draw theirs")
    add("--batch_size", type=int, default=8, help="rows answered together")
    add("--worst", type=int, default=24, help="rows on the page of the worst")
    for side in ("answer", "solution"):
        add(f"--{side}_frame", choices=FRAMES, help=f"frame of the {side}s that state none")
    add(
        "--server", metavar="URL", help="address of a server (vllm serve), such as http://x:8000/v1"
    )
    add("--served_name", help="what the server calls the model (default: MODEL)")
    add("--concurrency", type=int, default=32, help="requests to the server at a time")
    return parser


def _settings(models: list[str], rest: list[str]) -> tuple[FastGRPOConfig, ModelConfig]:
    """The settings of `fastgrpo train`; MODEL stands in for the policy where there is no config."""
    given = [] if "--config" in rest or not models else ["--model_name_or_path", models[0]]
    if not models and "--config" not in rest:
        raise InputError("MODEL is required, or --config")
    return parse([*given, *rest])


def _default_out(models: Sequence[str]) -> Path:
    first = Path(models[0])
    return first / "eval" if first.is_dir() else Path("eval")


def _rows(config: FastGRPOConfig, tokens: list[str], out: Path, rest: list[str]):
    """The rows to evaluate on: those named on the command line, else the config's own for it."""
    if DATA & {text.partition("=")[0].replace("-", "_") for text in rest}:
        config.eval_data_file_paths = config.dataset_test_split = None
        config.val_split_ratio = 0.0
    train, held_out = load_data(config, tokens, out)
    if held_out is None and "--config" in rest:
        logger.warning("the config names no rows to evaluate on, its training rows are taken")
    return train if held_out is None else held_out


def _sample(dataset, count: int | None, seed: int):
    """The first `count` rows after a shuffle: with seed 42, those VLM-R1's scripts take."""
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise InputError(f"num_samples: expected a number above 0, got {count}")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    return dataset.select(order[:count])


def _images(dataset, row: int) -> list:
    return dataset[row].get("images") or []


def _evaluate(name, chosen, dataset, folder, config: FastGRPOConfig, model_config, options):
    """The checkpoint that `model_config` names, its figures and files."""
    place, processor = model_config.model_name_or_path, load_processor(config, model_config)
    hf_config = load_hf_config(config, model_config)
    template = config.chat_template_kwargs or {}
    writing = Writing(config.max_completion_length, config.repetition_penalty, template)
    unpacked = None if options.server else _why_not_packed(name, hf_config)
    here = f"{'padded' if unpacked else 'packed'} rows in {dtype_of(config, model_config)}"

    def answerer() -> Answerer:
        if options.server:
            named = options.served_name or place
            return Server(options.server, named, processor, hf_config, writing, options.concurrency)
        model = load_model(config, model_config, hf_config)
        if unpacked:
            return padded(model, processor, writing)
        return packed(model, processor, writing, backend=config.backend)

    frames = {f"{side}_frame": getattr(options, f"{side}_frame") for side in ("answer", "solution")}
    return evaluate(
        name, dataset, chosen, answerer, folder,
        settings=_terms(place, dataset, processor, writing, options.server or here),
        batch_size=options.batch_size,
        frames={key: value for key, value in frames.items() if value},
        progress=functools.partial(tqdm, desc=name, unit="batch", disable=config.disable_tqdm),
    )  # fmt: skip


def _terms(place: str, dataset, processor, writing: Writing, written_by: str) -> dict:
    """What answers of one file must have in common."""
    size = getattr(getattr(processor, "image_processor", None), "size", None)
    return {
        "model": weights_fingerprint(Path(place)) if Path(place).is_dir() else place,
        "data": fingerprint(dataset),
        "max_new_tokens": writing.max_new_tokens,
        "repetition_penalty": writing.repetition_penalty,
        "chat_template_kwargs": writing.template,
        "image_size": None if size is None else dict(size),
        "written_by": written_by,
    }


def _why_not_packed(name: str, hf_config) -> str | None:
    try:
        family_of(hf_config)
    except InputError as error:
        logger.warning(
            "%s answers in padded rows, by transformers' own generation: %s", name, error
        )
        return str(error)
    return None
