# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo check --config x.yaml [--field value] [--json]`: what a run will do, before it does it.

Nothing is trained, no weight is loaded, nothing is written. The exit status is 1 when something
would stop the run.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgrpo.checkpoints import fault_of, newest_complete
from fastgrpo.cli import doctor
from fastgrpo.cli.checkpoints import load_hf_config
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.cli.data import check_rows, load_data
from fastgrpo.cli.estimate import Memory, estimate
from fastgrpo.cli.processor import image_tokens, load_processor
from fastgrpo.cli.settings import parse
from fastgrpo.cli.train import reward_settings
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.interruptions import writer_of
from fastgrpo.models.frames import frame_columns, model_frame, seen_sizes
from fastgrpo.models.registry import family_of
from fastgrpo.rewards.core.check import check_truth, has_truth, parts_of, refuse_unstated

SAMPLED_ROWS, SHOWN_FAULTS = 32, 3
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `state` is "ok", "note" or "fault"."""

    part: str
    state: str
    text: str


class Stop(Exception):
    """What follows cannot be looked at."""


def main(arguments: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    findings = check([text for text in arguments if text != "--json"])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print("\n".join(f"{f.state:<6}{f.part:<12}{f.text}" for f in findings))
    if any(finding.state == "fault" for finding in findings):
        raise SystemExit(1)


class Findings(list[Finding]):
    """What was found so far."""

    def look(self, part: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; raises `Stop` where it refuses."""
        try:
            return work()
        except InputError as error:
            self.append(Finding(part, "fault", str(error)))
            raise Stop from error

    def say(self, part: str, lines: Iterable[tuple[str, str]]) -> None:
        self.extend(Finding(part, state, text) for state, text in lines)


def check(arguments: list[str]) -> list[Finding]:
    """Everything there is to say about a run with these arguments, in the order it would matter."""
    findings = Findings()
    log = logging.getLogger("fastgrpo.data")
    verbosity = log.level
    log.setLevel(logging.ERROR)  # what it would say is found below, in full
    try:
        _look_at_all(findings, arguments)
    except Stop:
        pass
    finally:
        log.setLevel(verbosity)
    return findings


def _look_at_all(findings: Findings, arguments: list[str]) -> None:
    look, say, notes = findings.look, findings.say, []
    config, model_config = look("settings", lambda: parse(arguments, notes.append))
    say("settings", [("note", text) for text in notes])
    say("settings", [("ok", f"model {model_config.model_name_or_path}")])
    processor = look("model", lambda: load_processor(config, model_config))
    hf_config = look("model", lambda: load_hf_config(config, model_config))
    say("model", _packing(hf_config))
    say("batch", _batch(config))
    train, held_out = look("data", lambda: _load(config, processor))
    say("data", _data(train, held_out))
    look("batch", lambda: check_rows(config, len(train)))
    say("batch", _steps(config, len(train)))
    rows = _spread(train)
    prompt_tokens, lines = look("prompts", lambda: _prompts(rows, processor))
    say("prompts", lines)
    say("prompts", _context(config, hf_config, prompt_tokens))
    frame = model_frame(hf_config)
    asked = look("rewards", lambda: reward_settings(config))
    functions = asked["reward_funcs"]
    own = {"environments"} if asked.get("environment_factory") else set()
    say("rewards", _rewards(functions, train, own))
    say("rewards", look("rewards", lambda: list(_truth(functions, rows, processor, frame))))
    memory = look("memory", lambda: estimate(config, model_config, hf_config, prompt_tokens))
    say("memory", _memory(memory))
    say("output", _output(config, memory))
    say("engine", _engine(config))


def _packing(hf_config) -> Iterator[tuple[str, str]]:
    try:
        yield "ok", f"{family_of(hf_config).name}: prompts and images once per group"
    except InputError as error:
        yield "note", f"not packed: {error}"


def _load(config: FastGRPOConfig, processor):
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = load_data(config, image_tokens(processor), Path(folder))
        train.quarantined = list(train.quarantined)
    return train, held_out


def _data(train, held_out) -> Iterator[tuple[str, str]]:
    images = ""
    if "image_path" in train.column_names:
        counts = [len(own or ()) for own in train.with_format(None)["image_path"]]
        images = f"{sum(counts)} images, {_span(counts)} a row, "
    yield "ok", f"{len(train)} rows, {images}columns {', '.join(train.column_names)}"
    if held_out is not None:
        yield "ok", f"{len(held_out)} rows to evaluate on"
    for row in train.quarantined[:SHOWN_FAULTS]:
        yield "note", f"{row.file}:{row.line} set aside, {row.reason}: {row.message}"
    if len(train.quarantined) > SHOWN_FAULTS:
        yield "note", f"{len(train.quarantined)} rows set aside in all"


def _spread(train) -> list[dict]:
    """Rows from all over the data, evenly."""
    step = max(1, len(train) // SAMPLED_ROWS)
    return [train[index] for index in range(0, len(train), step)][:SAMPLED_ROWS]


def _prompts(rows: list[dict], processor) -> tuple[int, list[tuple[str, str]]]:
    """(the longest prompt met, what to say)."""
    lengths = []
    for row in rows:
        images, prompt = row.get("images") or [], row["prompt"]
        if not isinstance(prompt, str):
            prompt = processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False
            )
        given = {"images": images} if images else {}
        lengths.append(len(processor(text=[prompt], **given)["input_ids"][0]))
    lines = [("ok", f"{_span(lengths)} tokens a prompt, of {len(rows)} rows looked at")]
    lines += _images([image for row in rows for image in row.get("images") or []], processor)
    broken = [row["quarantine_reason"] for row in rows if row.get("quarantine_reason")]
    if broken:
        lines.append(("note", f"{len(broken)} of these rows hold an image that breaks"))
    return max(lengths), lines


def _images(images: list, processor) -> list[tuple[str, str]]:
    """Sizes before and after the processor, and those beyond its own limit."""
    if not images:
        return []
    fields = processor.image_processor(images=images, return_tensors="pt")
    seen = [size for size in seen_sizes(processor, fields, len(images)) if size is not None]
    pixels = [width * height for width, height in seen]
    text = f"images of {_span([image.width * image.height for image in images])} pixels"
    if not pixels:
        return [("ok", text)]
    lines = [("ok", f"{text}, seen as {_span(pixels)}")]
    limit = dict(processor.image_processor.size).get("longest_edge")
    over = sum(count > limit for count in pixels) if limit is not None else 0
    if over:
        lines.append(("note", f"{over} of {len(pixels)} long images exceed {limit} pixels there"))
    return lines


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high} (median {statistics.median(values):g})"


def _rewards(functions: list[Callable], train, own: set[str]) -> Iterator[tuple[str, str]]:
    """Columns that neither the data nor the trainer (`own`) hands over."""
    names = set(train.column_names) | {"images", "image_path"} | own
    for function in functions:
        needed = [name for name in getattr(function, "columns", ()) if name not in names]
        if needed:
            yield "fault", f"{_name(function)} reads column {needed[0]!r}, which the data has not"


def _name(function: Callable) -> str:
    return getattr(function, "name", None) or getattr(function, "__name__", repr(function))


def _truth(
    functions: list[Callable], rows: list[dict], processor, frame: str | None
) -> Iterator[tuple[str, str]]:
    """Each reward is asked what it pays an answer made from the solution, as before training."""
    images = [row.get("images") or [] for row in rows]
    flat = [image for own in images for image in own]
    fields = processor.image_processor(images=flat, return_tensors="pt") if flat else {}
    told = frame_columns(frame, processor, images, fields)
    whole = [own | row for own, row in zip(told, rows, strict=True)]
    columns = {key: [row.get(key) for row in whole] for key in whole[0]}
    for part in (part for function in functions for part in parts_of(function)):
        name = _name(part)
        try:
            refuse_unstated(part, columns, len(rows))
        except InputError as error:
            yield "fault", str(error)
            continue
        if not has_truth(part):
            yield "ok", f"{name}: no answer can be made to ask it about"
            continue
        if any(column not in columns for column in part.columns):
            continue  # said already
        verdicts = check_truth(part, columns, range(len(rows)))
        wrong = [verdict for verdict in verdicts if verdict.fault is not None]
        stops = [verdict for verdict in wrong if verdict.value is not None]
        if wrong:
            first = (stops or wrong)[0]
            at = rows[first.row]["data_row"]
            state = "fault" if stops else "note"
            yield state, f"{name}: {len(wrong)} of {len(rows)} rows: {first.fault} ({at})"
        else:
            yield "ok", f"{name}: pays an answer made from the solution its top"


def _batch(config: FastGRPOConfig) -> Iterator[tuple[str, str]]:
    per_device, processes = config.per_device_train_batch_size, config.world_size
    micro, size = config.gradient_accumulation_steps, config.num_generations
    completions = per_device * processes * micro
    yield (
        "ok",
        f"{per_device} completions a device x {processes} process(es) x {micro} accumulated = "
        f"{completions} completions, {completions / size:g} prompts x {size}, an optimizer step",
    )
    batch, steps = config.generation_batch_size, config.steps_per_generation
    yield (
        "ok",
        f"{batch} completions of {batch // size} prompts are sampled at once, for {steps} "
        f"micro-batches, and used {config.num_iterations} time(s)",
    )


def _steps(config: FastGRPOConfig, rows: int) -> Iterator[tuple[str, str]]:
    """How many optimizer steps an epoch and the run take: TRL's sampler leaves out a last batch of
    prompts that is not full.
    """
    prompts = config.generation_batch_size // config.num_generations
    completions = rows // prompts * config.generation_batch_size * config.num_iterations
    at_once = config.per_device_train_batch_size * config.world_size
    epoch = max(1, completions // at_once // config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(epoch * config.num_train_epochs)
    used, times = rows // prompts * prompts, steps / epoch
    yield (
        "ok",
        f"{used} of {rows} rows make an epoch of {epoch} optimizer step(s); the run takes {steps}, "
        f"{times:.3g} epoch(s)",
    )


def _context(config: FastGRPOConfig, hf_config, prompt: int) -> Iterator[tuple[str, str]]:
    longest = prompt + config.max_completion_length
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    text = f"{longest} tokens at most with a completion of {config.max_completion_length}"
    if limit is not None and longest > limit:
        yield "note", f"{text}, more than the {limit} positions the model was made for"
    else:
        yield "ok", text


def _memory(memory: Memory) -> Iterator[tuple[str, str]]:
    share = ", ".join(f"{n} {b / GIB:.2g}" for n, b in memory.parts.items() if b)
    enough = memory.total <= memory.available
    yield (
        "ok" if enough else "note",
        f"about {memory.total / GIB:.2g} of {memory.available / GIB:.3g} GiB of {memory.device}: "
        f"{share}; {memory.trainable / 1e6:.3g} of {memory.parameters / 1e6:.3g} million "
        "parameters are trained" + ("" if enough else "; this will not fit on one device"),
    )


def _output(config: FastGRPOConfig, memory: Memory) -> Iterator[tuple[str, str]]:
    output = Path(config.output_dir).absolute()
    checkpoint, skipped = newest_complete(output)
    for path, fault in skipped:
        yield "note", f"{path} is incomplete and would be skipped: {fault}"
    named = config.resume_from_checkpoint
    if named and (fault := fault_of(Path(named))):
        yield "fault", f"resume_from_checkpoint: {named} is incomplete: {fault}"
    elif named or (config.resume and checkpoint is not None):
        yield "note", f"continues from {named or checkpoint}"
    else:
        yield "ok", f"starts anew in {output}"
    if writer := writer_of(output):
        yield "fault", f"output_dir: {output} is being written by {writer}; give each run its own"
    exists = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(exists).free
    needed = memory.parts["weights"] + memory.parts["optimizer"]
    state = "ok" if needed < free else "fault"
    yield state, f"{free / GIB:.3g} GiB free, a checkpoint takes about {needed / GIB:.2g}"


def _engine(config: FastGRPOConfig) -> Iterator[tuple[str, str]]:
    used = doctor.ops()
    chosen = dict.fromkeys(entry["uses"] for entry in used.values())
    for name in chosen:
        ops = ", ".join(op for op, entry in used.items() if entry["uses"] == name)
        yield "ok", f"{name}: {ops}"
    attention = doctor.attention()
    for name, reason in attention["others"].items():
        if name == config.backend and reason:
            yield "fault", f"backend: {name}: {reason}"
    yield "ok", f"packed attention: {config.backend or attention['uses']}"
    unused = [entry["others"] for entry in (*used.values(), attention)]
    reasons = dict.fromkeys((n, why) for others in unused for n, why in others.items() if why)
    for name, reason in reasons:
        yield "ok", f"{name} does not run: {reason}"
