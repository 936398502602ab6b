# SPDX-License-Identifier: Apache-2.0
"""The installed verl on the CPU: a platform of its plugin kind, and its engines on tiny models."""

import contextlib
from functools import partial

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


def engine_of(cls, folder, *, model=None, engine=None, optimizer=None):
    """An initialised engine of `cls` for the checkpoint in `folder`, in float32."""
    precision = dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32")
    strategy = {"strategy": "fsdp2", "mixed_precision": precision, "use_torch_compile": False}
    built = cls(
        model_config=HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            override_config={"attn_implementation": "sdpa"},
            **(model or {}),
        ),
        engine_config=FSDPEngineConfig(**(strategy | (engine or {}))),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, **(optimizer or {})),
        checkpoint_config=CheckpointConfig(),
    )
    built.initialize()
    return built


def actor_loss(**options):
    """verl's loss of the actor."""
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, **options
    )
    return partial(ppo_loss, config=config)


def batch_of(fields: dict, **settings):
    """A batch as verl's trainer hands it to its workers."""
    fields = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    data = tu.get_tensordict(fields)
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(data, **settings)
    return data


@contextlib.contextmanager
def one_process(folder):
    """A process group of one."""
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
