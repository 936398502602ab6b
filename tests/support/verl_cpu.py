# SPDX-License-Identifier: Apache-2.0
"""The installed verl on the CPU: a platform of its plugin kind, and its engines on tiny models."""

import contextlib
import os
from functools import partial
from unittest import mock

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding


class PlatformCPU(PlatformCUDA):
    """What verl asks of a device, of the CPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def empty_cache(self):
        pass

    def communication_backend_name(self):
        return "gloo"


def install() -> None:
    """verl runs on the CPU, with its own engine registered there as it is for a GPU."""
    set_platform(PlatformCPU())
    EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
        FSDPEngineWithLMHead
    )


def engine_of(cls, folder, *, model=None, engine=None):
    """An initialised engine of `cls` for the checkpoint in `folder`, in float32."""
    built = cls(**configs(folder, model=model, engine=engine))
    built.initialize()
    return built


def configs(folder, *, model=None, engine=None) -> dict:
    """verl's configurations of a worker, by name."""
    precision = dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32")
    strategy = {"strategy": "fsdp2", "mixed_precision": precision, "use_torch_compile": False}
    whole = {"load_tokenizer": False, "override_config": {"attn_implementation": "sdpa"}}
    return {
        "model_config": HFModelConfig(path=str(folder), **whole, **(model or {})),
        "engine_config": FSDPEngineConfig(**(strategy | (engine or {}))),
        "optimizer_config": FSDPOptimizerConfig(lr=1e-2),
        "checkpoint_config": CheckpointConfig(),
    }


def worker_of(folder, loss, **options):
    """verl's `TrainingWorker` of an actor, with the engine its registry gives it."""
    from verl.workers.engine_workers import TrainingWorker  # and servers of the rollout

    alone = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with mock.patch.dict(os.environ, alone):
        config = TrainingWorkerConfig(model_type="language_model", **configs(folder, **options))
        worker = TrainingWorker(config)
    worker.reset()
    worker.set_loss_fn(loss)
    return worker


def actor_loss(**options):
    """verl's loss of the actor."""
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, **options
    )
    return partial(ppo_loss, config=config)


def whole(tensor):
    """A parameter or gradient of FSDP2, gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(engine, fields, loss, **settings):
    """(loss, gradients by name) of verl's pass over a mini-batch."""
    data = batch_of(fields, **settings)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss, forward_only=False)
        named = engine.module.named_parameters()
        grads = {n: None if p.grad is None else whole(p.grad).clone() for n, p in named}
    return sum(output["loss"]), grads


def batch_of(fields: dict, **settings):
    """A batch as verl's trainer hands it to its workers."""
    fields = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    data = tu.get_tensordict(fields)
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(data, **settings)
    return data


@contextlib.contextmanager
def processes(folder, rank=0, world_size=1):
    """The process group of this many."""
    store = torch.distributed.FileStore(str(folder / "store"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
