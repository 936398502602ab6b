# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the part of verl 0.9 that our engine builds on, with verl's names and parameters.

What runs here is ours: the stand-in's engine has no forward of its own. Batches are dicts, jagged
tensors and lists in place of a TensorDict.
"""

import contextlib
import importlib.machinery
import sys
import types

import torch


class Batch(dict):
    """A mini-batch: tensors, jagged tensors, one list entry per row, and settings."""

    def to(self, device):
        return Batch({k: v.to(device) if torch.is_tensor(v) else v for k, v in self.items()})


def assign_non_tensor(tensor_dict, **kwargs):
    tensor_dict.update(kwargs)


def get(tensordict, key, default=None):
    return dict.get(tensordict, key, default)


def index_select_tensor_dict(batch, indices):
    def chosen(value):
        if torch.is_tensor(value) and value.is_nested:
            rows = value.unbind()
            picked = torch.nested.as_nested_tensor([rows[i] for i in indices], layout=torch.jagged)
            picked._ragged_idx = value._ragged_idx
            return picked
        if torch.is_tensor(value) and value.ndim:
            return value[indices]
        return [value[i] for i in indices] if isinstance(value, list) else value

    return Batch({key: chosen(value) for key, value in batch.items()})


def detach_tree(obj):
    return {key: value.detach() for key, value in obj.items()}


def postprocess_batch_func(output_lst, indices, data):
    """Rows of the micro-batches in the mini-batch's order, and lists of losses and metrics."""
    assert data["use_dynamic_bsz"]
    order = [row for rows in indices for row in rows]
    assert sorted(order) == list(range(len(order)))
    back = [order.index(row) for row in range(len(order))]
    outputs = [out.get("model_output", {}) for out in output_lst]
    found = {key: [row for out in outputs for row in out[key].unbind()] for key in outputs[0]}
    jagged = {
        key: torch.nested.as_nested_tensor([rows[i] for i in back], layout=torch.jagged)
        for key, rows in found.items()
    }
    losses = [out["loss"] for out in output_lst]
    return {"model_output": jagged, "loss": losses, "metrics": output_lst[0]["metrics"]}


class BaseEngine:
    pass


class FSDPEngineWithLMHead(BaseEngine):
    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.model_config, self.engine_config = model_config, engine_config
        self.device_mesh, self.scaler, self._autocast_dtype = None, None, torch.float32

    def initialize(self):
        self.module = self._build_module()

    def get_data_parallel_size(self):
        return torch.distributed.get_world_size()

    def get_data_parallel_group(self):
        return torch.distributed.group.WORLD

    @contextlib.contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch):
        self.synchronized = is_last_micro_batch
        yield

    def _build_module(self):
        raise NotImplementedError

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        raise NotImplementedError

    def forward_step(self, micro_batch, loss_function, forward_only):
        raise NotImplementedError


class EngineRegistry:
    """Classes by strategy and machine; a vendor's own come before the device's."""

    engines: dict = {}

    @classmethod
    def register(cls, model_type, backend, device="cuda", vendor=None):
        def decorator(engine):
            for name in backend:
                key = (model_type, name, device, vendor)
                assert key not in cls.engines
                cls.engines[key] = engine
            return engine

        return decorator

    @classmethod
    def get_engine_cls(cls, model_type, backend):
        where = (model_type, backend, get_device_name())
        return cls.engines.get((*where, get_vendor())) or cls.engines[(*where, None)]


def get_device_id():
    return torch.device("cpu")


def get_device_name():
    return "cpu"


def get_vendor():
    return "cpu"


def get_init_weight_context_manager(use_meta_tensor=True, mesh=None):
    return contextlib.nullcontext


def get_hf_auto_model_class(hf_config):
    import transformers

    vision = hasattr(hf_config, "vision_config")
    name = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    return getattr(transformers, name)


class PrecisionType:
    @staticmethod
    def to_dtype(precision):
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def pretend_installed() -> None:
    """Puts this verl among the modules, before `fastgrpo.integrations.verl` is imported."""
    EngineRegistry.register(
        model_type="language_model", backend=["fsdp", "fsdp2", "megatron"], device="cpu"
    )(FSDPEngineWithLMHead)
    own = globals()
    names = {
        "tensordict": "",
        "verl": "",
        "verl.utils": "",
        "verl.utils.tensordict_utils": "assign_non_tensor get index_select_tensor_dict",
        "verl.utils.device": "get_device_id get_device_name get_vendor",
        "verl.utils.fsdp_utils": "get_init_weight_context_manager",
        "verl.utils.model": "get_hf_auto_model_class",
        "verl.utils.torch_dtypes": "PrecisionType",
        "verl.workers": "",
        "verl.workers.engine": "BaseEngine EngineRegistry FSDPEngineWithLMHead",
        "verl.workers.engine.utils": "detach_tree postprocess_batch_func",
    }
    for name, held in names.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__, module.__version__ = [], "0.9.1"
        vars(module).update({key: own[key] for key in held.split()})
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
