# SPDX-License-Identifier: Apache-2.0
"""Whole optimizer steps of TRL's GRPOTrainer against the drop-in as shipped, split by phase.

A Qwen2.5-VL built from a config (a Qwen2 for the shape of text alone), P prompts, G completions of
exactly C tokens, a reference model, TRL's defaults, gradient checkpointing among them; all rows are
one micro-batch but where the shape says otherwise. Each trainer trains in a process of its own,
from the same weights with the same seed, and they take turns step by step: a step meets the machine
as it is then. The first step, which also runs the self-check, is not measured, the median of the
following ones is. Reading the rows of a batch from the data set is not in it, and the same for all.
The peak of memory is that of all steps. `error` is the relative difference of the first gradient
norm above 0 from TRL's, on the same completions: the samplers take the same random numbers. (In
bfloat16, on a GPU, roundings decide some tokens, and it is that of two batches.)

Proportions on a CPU ("full"), in multiply-adds of the 480-image-token prompt, beside Qwen2.5-VL-3B:
width 256 and 6 layers (2048 and 36), the tower's share 61 % (46 %: one layer in four attends to
whole images, there one in eight, and the heads are narrow), the head 12 % of the decoder for each
completion token (11 %), with a vocabulary of 8 times the width (74 times, below 36 layers). The
tower's share works for the packed side. On a GPU the model is Qwen2.5-VL-3B's own shape, random,
in bfloat16, each trainer has the GPU to itself, and no floor is measured.

The floor of a phase is the time of stock forwards over its distinct tokens, each prompt and its
images once, every completion token once and nothing padded: for generation the prompts and then C
forwards of one token per completion, for scoring one forward of all tokens, for the loss one
forward and backward of them, nothing recomputed.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.managers import AcquirerProxy
from pathlib import Path
from typing import NamedTuple

import common
import torch
from bench_step import SHAPES as MODELS

from fastgrpo.testing import models as tm
from fastgrpo.testing.memory import StepMemory
from fastgrpo.testing.processors import tiny_processor, tiny_tokenizer

PHASES = ("generation", "scoring", "loss", "optimizer")
_LONGEST_TURN = 1800  # seconds: a trainer that failed passes no turn on
VOCABULARY = {"full": 2048}  # by size, where it is not that of bench_step
QWEN_3B = dict(  # Qwen2.5-VL-3B-Instruct's sub-configs
    text=dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    vision=dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    ),
    tie_word_embeddings=True,
)


class Shape(NamedTuple):
    """`image`: (height, width) of each prompt's in patches; None: a text model."""

    image: tuple[int, int] | None
    text: int  # tokens of a prompt
    prompts: int
    generations: int
    new_tokens: int
    micro_batches: int = 1
    checkpointing: bool = True


_480 = Shape((40, 48), 40, 4, 8, 64)
SHAPES = {
    "4 x 8, 480 image tokens": _480,
    "4 x 4, 480 image tokens": _480._replace(generations=4),
    "4 x 8, text": _480._replace(image=None, text=520),
    "4 x 8, 480 image tokens, a micro-batch a group, nothing recomputed": _480._replace(
        micro_batches=4, checkpointing=False
    ),
}
CUDA_SHAPES = {
    "Qwen2.5-VL-3B, 4 x 8, 256 image tokens": Shape((32, 32), 200, 4, 8, 128),
}
SMALL = {
    "2 x 4, 32 image tokens": Shape((8, 16), 8, 2, 4, 4),
    "2 x 4, text": Shape(None, 24, 2, 4, 4, micro_batches=2, checkpointing=False),
}


class Phases:
    """Seconds by phase; a phase inside another counts for itself alone."""

    def __init__(self, device: str):
        self.device = device
        self.open: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self.open[-1] if self.open else "rest"] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def phase(self, name: str):
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def watch(self, owner, method: str, name: str) -> None:
        """Calls of this instance's method are this phase."""
        original = getattr(owner, method)

        def watched(*args, **kwargs):
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, watched)


@dataclass
class Job:
    """A checkpoint on disk and what every trainer trains on."""

    folder: Path
    rows: list[dict]
    shape: Shape
    device: str


def build(shape: Shape, size: str, device: str) -> torch.nn.Module:
    """The policy: Qwen2.5-VL-3B's shape on a GPU, else the proportions of bench_step's models."""
    if size == "cuda":
        from transformers import AutoModelForImageTextToText

        with torch.device(device):
            config = tm.tiny_config("qwen2_5_vl", **QWEN_3B)
            return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    hidden, heads, layers, vocabulary = MODELS[size][:4]
    decoder = dict(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=VOCABULARY.get(size, vocabulary),
    )
    tower = dict(
        depth=4,
        hidden_size=hidden * 5 // 8,
        intermediate_size=hidden * 7 // 4 // 8 * 8,
        num_heads=heads[2],
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[3],
    )
    family = "qwen2" if shape.image is None else "qwen2_5_vl"
    options = {} if shape.image is None else {"vision": tower}
    model = tm.tiny_model(family, text=decoder, **options)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32)


def prepare(folder: Path, shape: Shape, size: str, device: str) -> Job:
    image, model = shape.image, build(shape, size, device)
    model.save_pretrained(folder)
    if image is None:
        tiny_tokenizer(model.config).save_pretrained(folder)
    else:
        processor = tiny_processor(model.config)
        processor.image_processor.size["longest_edge"] = 14 * 14 * 4096
        processor.save_pretrained(folder)
    rows = []
    for index in range(shape.prompts):
        words = f"{index} ".ljust(shape.text, "abcdefghij "[index % 10])
        rows.append({"prompt": [{"role": "user", "content": words}]})
        if image is not None:
            rows[-1]["images"] = [_picture(image, index)]
    return Job(folder, rows, shape, device)


def _picture(patches: tuple[int, int], index: int):
    from PIL import Image

    pixels = torch.rand(patches[0] * 14, patches[1] * 14, 3, generator=_seeded(index))
    return Image.fromarray((pixels * 255).byte().numpy())


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(shape: Shape, processes: int = 1) -> dict:
    """What a trainer of so many processes is told of the shape, beside TRL's defaults."""
    return dict(
        per_device_train_batch_size=(
            shape.prompts * shape.generations // shape.micro_batches // processes
        ),
        gradient_accumulation_steps=shape.micro_batches,
        num_generations=shape.generations,
        max_completion_length=shape.new_tokens,
        generation_kwargs={
            "min_new_tokens": shape.new_tokens,
            "suppress_tokens": [tm.IMAGE_ID, tm.VIDEO_ID],
        },
        gradient_checkpointing=shape.checkpointing,
        learning_rate=1e-6,
    )


def variants() -> dict[str, type]:
    from trl import GRPOTrainer

    from fastgrpo.integrations.trl import FastGRPOTrainer

    class PerToken(FastGRPOTrainer):
        """A class with a loss of its own: the trainer hands it per-token log-probs."""

        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    return {"TRL": GRPOTrainer, "fastgrpo": FastGRPOTrainer, "fastgrpo, per-token loss": PerToken}


class Run(NamedTuple):
    """Seconds by phase, `whole` included, of the steps after the first, the gradient norms of all,
    and `StepMemory`'s figures."""

    seconds: list[dict]
    norms: list[float]
    memory: dict[str, float]


class Turn(NamedTuple):
    """A process's gate, and that of the one whose turn is next."""

    own: AcquirerProxy
    following: AcquirerProxy


def spread(completion_ids, **columns) -> list[float]:
    """A reward that differs within a group whatever the policy writes."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def steps(cls: type, job: Job, output: Path, count: int, turn: Turn) -> Run:
    """`count` steps after the first, each when it is this process's turn."""
    from transformers import TrainerCallback

    from fastgrpo.testing.trl import build_trainer, steps_of

    phases, measured, shape = Phases(job.device), [], job.shape

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            phases.watch(optimizer, "step", "optimizer")

        def on_step_begin(self, args, state, control, **kwargs):
            if not turn.own.acquire(timeout=_LONGEST_TURN):
                raise TimeoutError("the trainers before this one have not ended their step")
            phases.restart()

        def on_step_end(self, args, state, control, **kwargs):
            with phases.phase("rest"):
                pass
            measured.append(phases.seconds | {"whole": sum(phases.seconds.values())})
            if state.global_step <= count:
                turn.following.release()

    memory = StepMemory()
    trainer = build_trainer(
        cls,
        job.folder,
        output,
        rows=job.rows,
        reward=spread,
        callbacks=[Stopwatch()],
        max_steps=1 + count,
        **settings(shape),
        use_cpu=job.device == "cpu",
        bf16=job.device == "cuda",
    )
    for method, name in (
        ("training_step", "loss"),
        ("_prepare_inputs", "rest"),
        ("_generate_and_score_completions", "scoring"),
        ("_tokenize_prompts", "rest"),
        ("_generate_single_turn", "generation"),
        ("_calculate_rewards", "rest"),
    ):
        phases.watch(trainer, method, name)
    trainer.train()
    run = Run(measured[1:], [s["grad_norm"] for s in steps_of(trainer)], memory.figures())
    turn.following.release()
    return run


def in_turns(job: Job, scratch: Path, count: int, names: list[str]) -> dict[str, Run]:
    """`steps` of the variants, each in a process of its own, so that no trainer works in the heap
    that another left, and one at a time, so that all meet the machine as it is at the time."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, contextlib.ExitStack() as pools:
        gates = [manager.Semaphore(int(i == 0)) for i in range(len(names))]
        runs = {}
        for i, name in enumerate(names):
            pool = pools.enter_context(ProcessPoolExecutor(1, context))
            turn = Turn(gates[i], gates[(i + 1) % len(gates)])
            told = (torch.get_num_threads(), name, job, scratch / f"out-{i}", count, turn)
            runs[name] = pool.submit(_steps_of, *told)
        return {name: run.result() for name, run in runs.items()}


def _steps_of(threads: int, variant: str, *args) -> Run:
    torch.set_num_threads(threads)
    return steps(variants()[variant], *args)


def floors(job: Job, repeats: int) -> dict[str, float]:
    """Seconds of stock forwards over the distinct tokens of each phase."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(job.folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(job.folder)
    model.to(job.device)
    reader = transformers.AutoProcessor if "images" in job.rows[0] else transformers.AutoTokenizer
    processor = reader.from_pretrained(job.folder)
    prompts = [_prompt_inputs(processor, row, job.device) for row in job.rows]
    sizes = (job.shape.prompts * job.shape.generations, job.shape.new_tokens)
    tokens = torch.randint(0, tm.TEXT_VOCAB, sizes, generator=_seeded(0))
    tokens = tokens.to(job.device)

    def forward(backward: bool) -> None:
        with contextlib.nullcontext() if backward else torch.no_grad():
            for inputs in prompts:
                last = model(**inputs, logits_to_keep=1, use_cache=False).logits
                if backward:
                    last.float().logsumexp(-1).sum().backward()
            logits = model(input_ids=tokens, use_cache=False).logits
            if backward:
                logits.float().logsumexp(-1).sum().backward()
        model.zero_grad(set_to_none=True)

    def generation() -> None:
        with torch.no_grad():
            for inputs in prompts:
                model(**inputs, logits_to_keep=1, use_cache=False)
            for column in tokens.split(1, 1):
                model(input_ids=column, use_cache=False)

    runs = {
        "generation": generation,
        "scoring": partial(forward, False),
        "loss": partial(forward, True),
    }
    return {k: ms / 1e3 for k, ms in common.median_ms(runs, job.device, repeats).items()}


def _prompt_inputs(processor, row: dict, device: str) -> dict[str, torch.Tensor]:
    """The stock model's inputs for one prompt."""
    text = processor.apply_chat_template(
        _with_images(row), add_generation_prompt=True, tokenize=False
    )
    given = {"images": row["images"]} if "images" in row else {}
    inputs = processor(text=[text], return_tensors="pt", **given)
    inputs = {k: v.to(device) for k, v in inputs.items() if k != "token_type_ids"}
    if given:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tm.IMAGE_ID).int()
    return inputs


def _with_images(row: dict) -> list[dict]:
    message = row["prompt"][0]
    parts = [{"type": "image"} for _ in row.get("images", ())]
    return [message | {"content": [*parts, {"type": "text", "text": message["content"]}]}]


def rows(args: argparse.Namespace) -> Iterator[common.Row]:
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else SHAPES
    size = "small" if args.small else "cuda" if args.device == "cuda" else "full"
    names = [args.only] if args.only in shapes else [name for name in shapes if args.only in name]
    for name in names:
        yield from _measured(name, shapes[name], size, args)


def _measured(name: str, shape: Shape, size: str, args) -> list[common.Row]:
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(Path(scratch) / "model", shape, size, args.device)
        names = [name for name in variants() if name == "TRL" or args.variant in ("", name)]
        if args.device == "cuda":  # the memory of each is its own
            torch.cuda.empty_cache()
            runs, floor = {}, {}
            for name in names:
                runs |= in_turns(job, Path(scratch), args.rounds, [name])
        else:
            runs = in_turns(job, Path(scratch), args.rounds, names)
            floor = floors(job, args.rounds)
    medians = {
        variant: {
            phase: statistics.median(step.get(phase, 0.0) for step in run.seconds)
            for phase in (*PHASES, "rest", "whole")
        }
        for variant, run in runs.items()
    }
    return [
        common.Row(
            "whole_step",
            f"{name}, {shape.new_tokens} new, {size}",
            variant,
            seconds["whole"] * 1e3,
            peak_mib=runs[variant].memory["peak MiB"],
            error=_difference(runs[variant].norms, runs["TRL"].norms) if variant != "TRL" else None,
            note="one optimizer step, reference model, every parameter trained",
            extra=_figures(seconds, floor, medians["TRL"]["whole"]),
        )
        for variant, seconds in medians.items()
    ]


def _difference(norms: list[float], expected: list[float]) -> float:
    """Relative, of the first gradient norm above 0: the weights are the same until then."""
    return next(abs(a - b) / b for a, b in zip(norms, expected, strict=True) if b)


def _figures(seconds: dict, floor: dict, trl: float) -> dict[str, float]:
    figures = {f"{phase} ms": seconds[phase] * 1e3 for phase in (*PHASES, "rest")}
    figures |= {f"{phase} / floor": seconds[phase] / floor[phase] for phase in floor}
    if floor:
        figures["step / floor"] = seconds["whole"] / sum(floor.values())
    figures["TRL / this"] = trl / seconds["whole"]
    return figures


if __name__ == "__main__":
    common.main(
        rows,
        only=dict(default="", help="run only this shape, or those whose name has this in it"),
        variant=dict(default="", help="beside TRL run only this variant"),
        rounds=dict(type=int, default=2, help="steps of each trainer, and floors, measured"),
    )
