# SPDX-License-Identifier: Apache-2.0
"""What a process of a run with `use_vllm` does; `fastgrpo.testing.launch` starts it.

The server is the stand-in. Its samples are a function of its weights and of the number of weight
transfers, so that runs with other numbers of processes see the same rollouts.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import vllm_stand_in  # noqa: E402

vllm_stand_in.pretend_installed()

from job import give_adapters_weights, whole_parameters  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.models import IMAGE_ID, VIDEO_ID  # noqa: E402
from fastgrpo.testing.trl import build_trainer, image_row, steps_of  # noqa: E402

vllm_stand_in.let_the_client_sync_from_a_cpu()

CASES = {
    "sequence_mask": {},
    "token_truncate": {"vllm_importance_sampling_mode": "token_truncate"},
    "uncorrected": {"vllm_importance_sampling_correction": False},
    "lora": {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "qkv"], "lora_alpha": 8}},
}


def train(output: str, kind: str, name: str) -> None:
    """A case of this file, with a server of its own."""
    output, case = Path(output), dict(CASES[name])
    checkpoint = output.parent / "model_images"
    first = os.environ.get("RANK", "0") == "0"
    url, server = "", 0
    if first:
        url, server = vllm_stand_in.start(checkpoint, temperature_error=0.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if lora := case.pop("lora", None):
        from peft import LoraConfig

        case["peft_config"] = LoraConfig(**lora)
    options = dict(
        rows=[image_row(i) for i in range(8)],
        use_cpu=False,
        max_steps=3,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url or "http://127.0.0.1:1",
        vllm_group_port=port,
        generation_kwargs={"suppress_tokens": [IMAGE_ID, VIDEO_ID]},
    )
    torch.manual_seed(0)
    cls = FastGRPOTrainer if kind == "fast" else GRPOTrainer
    try:
        trainer = build_trainer(cls, checkpoint, output / "run", **options | case)
        give_adapters_weights(trainer.model)
        trainer.train()
        trainer.vllm_generation.sync_weights()
        parameters = whole_parameters(trainer)
        if first:
            with urllib.request.urlopen(f"{url}/weights") as reply:
                received = torch.load(io.BytesIO(reply.read()), weights_only=True)
            torch.save({"trainer": parameters, "server": received}, output / f"{name}.pt")
            (output / f"{name}.json").write_text(json.dumps(steps_of(trainer)))
        trainer.accelerator.wait_for_everyone()
    finally:
        if first:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
