# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine with the forwards of policy and reference model by packed rows.

Configuration, sharding, optimizer, checkpoints, weights for the rollout and the loss are verl's.
Ours are the log-probs and entropies the loss reads, and which rows form a micro-batch.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.utils.fsdp_utils import get_init_weight_context_manager
from verl.utils.model import get_hf_auto_model_class
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import BaseEngine, EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.utils import detach_tree, postprocess_batch_func

from fastgrpo.engine import score
from fastgrpo.engine.parallel import busiest
from fastgrpo.errors import InputError
from fastgrpo.integrations.verl.rows import (
    check_positions,
    on_jagged,
    plan_micro_batches,
    read_groups,
)
from fastgrpo.integrations.verl.support import FOREIGN, check_batch, check_configuration
from fastgrpo.models.adapter import Adapter


class FastGRPOEngine(FSDPEngineWithLMHead):
    """verl's engine for language models; rows with equal prompts and images share one encoding.

    Raises `InputError` naming the field of a configuration that packed rows cannot obey.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        check_configuration(model_config, engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_module(self):
        """The model as transformers has it: verl's own method replaces forwards that ours calls."""
        model, engine = self.model_config, self.engine_config
        given = engine.model_dtype or ("bf16" if engine.forward_only else "fp32")
        dtype = PrecisionType.to_dtype(given)
        context = get_init_weight_context_manager(
            use_meta_tensor=not model.hf_config.tie_word_embeddings, mesh=self.device_mesh
        )
        with context():
            module = get_hf_auto_model_class(model.hf_config).from_pretrained(
                model.local_path,
                dtype=dtype,
                config=model.hf_config,
                trust_remote_code=model.trust_remote_code,
            )
        module.to(dtype)
        if model.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        return module

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        """verl's pass over a mini-batch, in micro-batches of whole groups wherever they fit.

        A rank that has fewer micro-batches repeats its last one to no effect: forwards of a sharded
        model are collective.
        """
        tu.assign_non_tensor(
            data,
            dp_size=self.get_data_parallel_size(),
            batch_num_tokens=self._loss_tokens(data),
        )
        plan = self._plan(data)
        count, outputs = busiest(len(plan), get_device_id()), []
        for i in range(count):
            micro_batch = tu.index_select_tensor_dict(data, plan[min(i, len(plan) - 1)])
            with self._pass(forward_only, last=i == count - 1):
                if i < len(plan):
                    loss, output = self.forward_step(micro_batch, loss_function, forward_only)
                    outputs.append(output)
                else:
                    loss = self._idle(micro_batch)
                if not forward_only:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                    if not tu.get(data, "return_model_output", False) and i < len(plan):
                        output.pop("model_output")
        reordered = {"use_dynamic_bsz": True}  # whatever the sizes were: rows go back in order
        return postprocess_batch_func(output_lst=outputs, indices=plan, data=reordered)

    def forward_step(self, micro_batch, loss_function, forward_only):
        """(loss, what verl reports) of one micro-batch, the loss verl's own."""
        with self._autocast():
            micro_batch, output = self._model_output(micro_batch, forward_only)
            loss, metrics = torch.ones((), device=get_device_id()), {}
            if loss_function is not None:
                group = self.get_data_parallel_group()
                loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=group)
        report = {"model_output": detach_tree(output), "loss": loss.item(), "metrics": metrics}
        return loss, report

    def _model_output(self, micro_batch, forward_only: bool) -> tuple:
        """The micro-batch on the device, and its jagged log-probs (and entropies if asked for).

        Where a pass has no gradient every token of a response has its value, as in verl; else those
        that the loss reads.
        """
        check_batch(micro_batch, tu.get)
        groups = self._groups(micro_batch)
        if "position_ids" in micro_batch:
            check_positions(Adapter(self.module), groups, micro_batch["position_ids"])
        micro_batch = micro_batch.to(get_device_id())
        names = {"logp": "log_probs"}
        if tu.get(micro_batch, "calculate_entropy", False):
            names["entropy"] = "entropy"
        if forward_only:
            for group in groups:
                group.mask = None
        scores = score(
            self.module,
            groups,
            temperature=_temperature(micro_batch),
            outputs=tuple(names),
            max_tokens=_budget(micro_batch),
            entropy_grad=not forward_only,
        )
        output = {}
        for field, name in names.items():
            values = [getattr(of_row, field)[0] for of_row in scores]
            output[name] = on_jagged(micro_batch["input_ids"], groups, values)
        return micro_batch, output

    def _idle(self, micro_batch) -> Tensor:
        """A loss of 0 that every parameter's backward runs for."""
        with self._autocast():
            return self._model_output(micro_batch, False)[1]["log_probs"].values()[:0].sum()

    def _groups(self, data) -> list:
        return read_groups(Adapter(self.module), data, tu.get(data, "multi_modal_inputs"))

    def _plan(self, data) -> list[list[int]]:
        check_batch(data, tu.get)
        size = tu.get(data, "micro_batch_size_per_gpu")
        return plan_micro_batches(self._groups(data), max_tokens=_budget(data), num_rows=size)

    def _loss_tokens(self, data) -> int | float:
        """The tokens of all ranks that the loss counts."""
        count = data["loss_mask"].sum().to(get_device_id())
        torch.distributed.all_reduce(count, group=self.get_data_parallel_group())
        return count.item()

    @contextlib.contextmanager
    def _pass(self, forward_only: bool, *, last: bool):
        """Without a gradient, or with its reduction over ranks left to the last micro-batch."""
        with (
            torch.no_grad()
            if forward_only
            else self._gradient_sync_context(is_last_micro_batch=last)
        ):
            yield

    def _autocast(self):
        if self._autocast_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(get_device_name(), dtype=self._autocast_dtype)


class ForeignEngine(BaseEngine):
    """Stands for the engines of other strategies, so that none of them runs unnoticed."""

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        raise InputError(
            f"actor.strategy={engine_config.strategy}: fastgrpo serves fsdp2; change it, or remove "
            "model.external_lib=fastgrpo.integrations.verl"
        )


def register() -> None:
    """Our engines in verl's registry, by vendor: what verl looks up before its own."""
    here = {"model_type": "language_model", "device": get_device_name(), "vendor": get_vendor()}
    EngineRegistry.register(backend=["fsdp2"], **here)(FastGRPOEngine)
    EngineRegistry.register(backend=list(FOREIGN), **here)(ForeignEngine)


def _budget(data) -> int | None:
    """The most tokens of a dynamic micro-batch; None: they have a fixed number of rows."""
    if not tu.get(data, "use_dynamic_bsz", True):
        return None
    return tu.get(data, "max_token_len_per_gpu")


def _temperature(data) -> float:
    given = tu.get(data, "temperature", 1.0)
    if isinstance(given, Tensor) and given.numel() > 1 and bool((given != given[0]).any()):
        raise InputError("temperature: the rows of a micro-batch must have the same one")
    return float(given.flatten()[0] if isinstance(given, Tensor) else given)
