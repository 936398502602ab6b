# SPDX-License-Identifier: Apache-2.0
"""The forwards of a rollout's decoding steps, on a GPU as a CUDA graph.

A step of few rows is thousands of kernels of microseconds each: launched one by one from Python
they take several times as long as they run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgrpo.engine.next_token import keep_logits
from fastgrpo.engine.parallel import in_shards
from fastgrpo.models.adapter import Adapter
from fastgrpo.rollout.state import DecodeState, FixedDecodeState

logger = logging.getLogger(__name__)

# A graph costs about two steps to make; one serves rows of so many own tokens, the next twice as
# many.
FIRST_WIDTH = 128

_not_recorded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that failed once


def replays(adapter: Adapter, steps: int) -> bool:
    """Whether a rollout of so many steps is worth a graph, and this model's step can be one."""
    on_gpu = adapter.device.type == "cuda" and steps > 8
    return on_gpu and not (in_shards(adapter.core) or adapter.core in _not_recorded)


class Steps:
    """`steps(token)`: (B, V) float32 logits after each row's next token (B,).

    position (B,): that of the first token.
    """

    def __init__(self, adapter: Adapter, state: DecodeState, position: Tensor):
        self.adapter, self.state = adapter, state
        self.token, self.position = torch.empty_like(position), position.clone()
        self.mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=position.device)

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        logits = self._logits()
        self.position += 1
        self.state.steps_done += 1
        return logits

    def _logits(self) -> Tensor:
        axes = self.adapter.family.axes
        where = self.position[None]
        inputs = {
            "input_ids": self.token[None],
            "position_ids": where.expand(axes, 1, -1) if axes > 1 else where,
            "attention_mask": self.mask,
            "fg_layout": self.state,
            "use_cache": False,
        }
        return keep_logits(self.adapter, inputs)


class ReplayedSteps(Steps):
    """The first step as it is, those after it by a graph of `state.width` own tokens, made anew
    where rows outgrow it. A model whose forward a graph cannot hold decodes as it would without.
    """

    state: FixedDecodeState

    def __init__(self, adapter: Adapter, state: FixedDecodeState, position: Tensor):
        super().__init__(adapter, state, position)
        self.count, self.room = 0, state.width
        state.width = min(FIRST_WIDTH, self.room)
        self.step: Callable[[], Tensor] = super()._logits

    def _logits(self) -> Tensor:
        self.count += 1
        grown = self.count > self.state.width
        if grown:
            self.state.width = min(2 * self.state.width, self.room)
        if (grown or self.count == 2) and self.adapter.core not in _not_recorded:
            self.step = self._recorded()
        return self.step()

    def _recorded(self) -> Callable[[], Tensor]:
        eager = super()._logits
        try:
            return record(eager, self.adapter.device)
        except RuntimeError as error:
            _not_recorded.add(self.adapter.core)
            self.state.restart()
            logger.warning(
                "rollout: the decoding steps of %s cannot be a CUDA graph, so each is launched "
                "kernel by kernel, several times slower: %s",
                type(self.adapter.core).__name__,
                str(error).partition("\n")[0],
            )
            return eager


def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What `step` launches, as one launch that writes into the same tensor each time.

    All graphs of a device share their memory, so one is dead where the next is made.
    """
    graph, result = _captured(step, device, _keeper(device)[0].pool())

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _keeper(device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph that is never dead, for the pool of memory that it has: a rollout's graphs use what
    those of the one before it left."""
    return _captured(lambda: torch.zeros(1, device=device), device, None)


def _captured(
    step: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`torch.cuda.graph` without its emptying of the caches, which the step's next phase would have
    to fill again; a step that fails leaves the device as it was."""
    graph = torch.cuda.CUDAGraph()
    here, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        try:
            graph.capture_begin(pool, capture_error_mode="thread_local")
            result = step()
            graph.capture_end()
        except BaseException:
            _abandon(graph, stream, pool)
            raise
    here.wait_stream(stream)
    return graph, result


def _abandon(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool) -> None:
    """Ends a capture that failed. What `capture_end` then leaves undone would break the next draw
    of a random number, and the next capture."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError, TypeError):  # it had not begun, or has ended
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    _keeper.cache_clear()  # the next capture has a pool of its own
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
