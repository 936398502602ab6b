# SPDX-License-Identifier: Apache-2.0
"""Lets accelerate take its FSDP2, DeepSpeed and DDP branches with gloo processes on a CPU."""

import importlib.util
import os


def install() -> None:
    """Turns it on in this process; before the first TrainingArguments.

    accelerate uses FSDP and DeepSpeed on accelerator devices only. After this each launched
    process reports itself as MULTI_GPU with backend gloo, while every tensor stays on the CPU;
    nothing else changes.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP without device_ids
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    import accelerate.state
    import torch
    import transformers.training_args
    from accelerate.utils import DistributedType

    choose = accelerate.state.PartialState._prepare_backend

    def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
        if launched and not cpu and not torch.cuda.is_available():
            return "gloo", DistributedType.MULTI_GPU
        return choose(self, cpu, sagemaker_dp, backend)

    accelerate.state.PartialState._prepare_backend = _prepare_backend
    # bf16=True is refused on a machine without a GPU unless use_cpu is set, which turns FSDP off.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True

    if importlib.util.find_spec("deepspeed"):
        import deepspeed

        # Its shared-memory collectives would be compiled on first use, for minutes; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
