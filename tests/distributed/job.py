# SPDX-License-Identifier: Apache-2.0
"""What a process of a distributed run does; `fastgrpo.testing.launch` starts it.

Each case trains a tiny model for a few steps with completions that are a function of prompt, row
in the group and step, so that runs with other numbers of processes see the same data. The output
folder gets CASE.json (the logged steps) and CASE.pt (the parameters, gathered whole).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOTrainer

from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.testing import cpu_processes
from fastgrpo.testing.memory import held_bytes, resident_bytes
from fastgrpo.testing.models import IMAGE_ID, VIDEO_ID
from fastgrpo.testing.trl import build_trainer, image_row

torch.set_num_threads(1)
cpu_processes.install()

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "qkv"], "lora_alpha": 8}
# What a case changes. `rows` and `lora` are read here, `rows_per_step` is divided by the number of
# processes, the rest are fields of GRPOConfig and of FastOptions.
CASES = {
    "full": {},
    "lora": {"lora": LORA},
    "tied": {"model": "tied"},
    "text": {"model": "text", "rows": "text"},
    "frozen_tower": {"frozen": "visual"},
    "no_reference": {"beta": 0.0},
    "mixed_rows": {"rows": "mixed"},
    "text_rows": {"rows": "text"},
    "straddling": {"rows_per_step": 12},
    "accumulation": {"gradient_accumulation_steps": 3, "num_rows": 24},
    "max_tokens": {"fast": {"max_tokens": 60}},
    "max_tokens_accumulation": {
        "fast": {"max_tokens": 60},
        "gradient_accumulation_steps": 3,
        "num_rows": 24,
    },
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluation": {
        "eval_rows": 8,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
    },
    "bf16": {"bf16": True},
    # Prompts that are no multiple of a batch: the Trainer takes the rest of its division for the
    # completions of the last batch and drops the losses beyond, so eval_loss depends on processes.
    "evaluation_rest": {
        "eval_rows": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
    },
    # What the policy would say is written down; it is trained on the script all the same.
    "greedy": {"rows": "mixed", "says": True, "max_completion_length": 12, "num_rows": 16},
    "greedy_lora": {
        "lora": LORA,
        "rows": "mixed",
        "says": True,
        "max_completion_length": 12,
        "num_rows": 16,
    },
}
SAVED = {
    "sgd": {"max_steps": 4},
    "adamw": {"optim": "adamw_torch"},
    "moving_reference": {
        "optim": "adamw_torch",
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.6,
        "steps_per_generation": 2,
        "num_iterations": 2,
    },
    "lora_saved": {"lora": LORA, "optim": "adamw_torch"},
}
GREEDY = {
    "do_sample": False,
    "stop_strings": ["a", "e", "i"],
    "suppress_tokens": [IMAGE_ID, VIDEO_ID],
}


def text_row(index: int) -> dict:
    return {"prompt": [{"role": "user", "content": f"tell {index}"}], "images": []}


def rows_of(kind: str, count: int) -> list[dict]:
    """`count` prompts: with one image each, without any, or both in turn."""
    if kind == "text":
        return [{"prompt": text_row(i)["prompt"]} for i in range(count)]
    if kind == "mixed":
        return [text_row(i) if i % 2 else image_row(i) for i in range(count)]
    return [image_row(i) for i in range(count)]


def scripted(base, said: list | None = None):
    """`base` with completions that no process layout can change.

    `said` gets what the policy itself would have said, by all processes.
    """

    def _generate_single_turn(self, prompt_ids, images, fields, num_generations, *_):
        if said is not None:
            own = base._generate_single_turn(self, prompt_ids, images, fields, num_generations)
            said.append(gather_object(own[0]))
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for i, ids in enumerate(prompt_ids):
            key = f"{list(ids)}|{(first + i) % num_generations}|{self.state.global_step}"
            draw = random.Random(int(hashlib.sha256(key.encode()).hexdigest()[:12], 16))
            length = draw.randint(1, self.max_completion_length)
            completions.append([draw.randrange(5, 60) for _ in range(length)])
        return completions, None

    name = f"Scripted{base.__name__}"
    return type(name, (base,), {"_generate_single_turn": _generate_single_turn})


def distinct(completions, prompts, **columns) -> list[float]:
    return [float(len(set(c[0]["content"]))) for c in completions]


def whole_parameters(trainer) -> dict[str, torch.Tensor]:
    """The parameters by name, gathered from their shards, in float32; a collective."""
    values = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if p.dtype == torch.bfloat16:  # DeepSpeed's, which keeps its own in float32
            from deepspeed.utils import safe_get_full_fp32_param

            values[name] = safe_get_full_fp32_param(p).clone()
        elif hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                values[name] = p.detach().float().clone()
        else:
            whole = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
            values[name] = whole.float().clone()
    return values


def train(output: str, kind: str, name: str) -> None:
    """A case of CASES."""
    said: list = []
    trainer = build(Path(output), kind, CASES[name], said)
    trainer.train()
    write(trainer, Path(output), name, said)


def resume(output: str, name: str, run: str, checkpoint: str = "") -> None:
    """A case of SAVED: two epochs with checkpoints, in folder `run`, from `checkpoint` if given."""
    case = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2} | SAVED[name]
    trainer = build(Path(output, run), "fast", case)
    trainer.train(resume_from_checkpoint=checkpoint and str(Path(output, checkpoint)) or None)
    write(trainer, Path(output), run)


def grow(output: str, steps: str) -> None:
    """So many steps of sampling and training; the resident set in KiB after each of them."""
    sizes = []

    class Resident(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            sizes.append(resident_bytes() // 1024)

    case = {"samples": True, "max_steps": int(steps), "optim": "adamw_torch", "num_rows": 40}
    trainer = build(Path(output), "fast", case)
    trainer.add_callback(Resident())
    trainer.train()
    rank = os.environ.get("RANK", "0")
    Path(output, f"resident{rank}.json").write_text(json.dumps(sizes))


def hold(output: str) -> None:
    """Two steps; the bytes that this process holds afterwards, of AdamW on every parameter."""
    case = {"max_steps": 2, "optim": "adamw_torch", "beta": 0.0}
    trainer = build(Path(output), "fast", case)
    if plugin := trainer.accelerator.state.deepspeed_plugin:
        # As small as the model: weights below a size are kept whole, a bucket is 2 GB.
        small = {"reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0}
        plugin.deepspeed_config["zero_optimization"].update(small)
    trainer.train()
    rank = os.environ.get("RANK", "0")
    Path(output, f"held{rank}.json").write_text(json.dumps(held_bytes()))
    trainer.accelerator.wait_for_everyone()


def build(output: Path, kind: str, case: dict, said: list | None = None):
    """A trainer of the case, with the share of each step's rows that is this process's."""
    case, world = dict(case), int(os.environ.get("WORLD_SIZE", "1"))
    folder = next(f for f in output.parents if (f / "model_images").exists())
    checkpoint = folder / f"model_{case.pop('model', 'images')}"
    lora, frozen = case.pop("lora", None), case.pop("frozen", None)
    rows = rows_of(case.pop("rows", "images"), case.pop("num_rows", 8))
    options = dict(
        rows=rows,
        reward=distinct,
        use_cpu=False,
        max_steps=3,
        per_device_train_batch_size=case.pop("rows_per_step", 8) // world,
        num_generations=4,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
    )
    if count := case.pop("eval_rows", 0):
        options["eval_dataset"] = Dataset.from_list(rows_of("images", count))
        case["per_device_eval_batch_size"] //= world
    if case.pop("says", False):
        options["generation_kwargs"] = GREEDY
    else:
        said = None
    fast = case.pop("fast", None)
    if kind == "fast" and fast:
        options["fast"] = fast
    if lora:
        options["peft_config"] = LoraConfig(**lora)
    torch.manual_seed(0)
    cls = FastGRPOTrainer if kind == "fast" else GRPOTrainer
    if not case.pop("samples", False):
        cls = scripted(cls, said)
    trainer = build_trainer(cls, checkpoint, output, **options | case)
    give_adapters_weights(trainer.model)
    for name, p in trainer.model.named_parameters():
        if frozen and frozen in name:
            p.requires_grad_(False)
    return trainer


def write(trainer, output: Path, name: str, said: list | None = None) -> None:
    """NAME.pt, NAME.json and NAME.said.json, of all processes, by the first."""
    parameters = whole_parameters(trainer)
    if not trainer.accelerator.is_main_process:
        return
    torch.save(parameters, output / f"{name}.pt")
    steps = [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]
    (output / f"{name}.json").write_text(json.dumps(steps))
    if said:
        (output / f"{name}.said.json").write_text(json.dumps(said))


def give_adapters_weights(model) -> None:
    """LoRA's B starts at zero: gives the adapters something to learn from."""
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
