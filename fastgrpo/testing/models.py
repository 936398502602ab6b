# SPDX-License-Identifier: Apache-2.0
"""Tiny real transformers models, synthetic groups, and the plain computation they are compared
with.

Everything here is for tests, benchmarks and demonstrations: the models are the stock
transformers classes built from small configs with random weights, and `naive_logp` is one
ordinary forward per (prompt, completion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgrpo.models.registry import families
from fastgrpo.packing.group import Group

FAMILIES = tuple(families())
VLM_FAMILIES = tuple(name for name, family in families().items() if family.vision_inputs)
TEXT_FAMILIES = tuple(name for name in FAMILIES if name not in VLM_FAMILIES)

VOCAB, TEXT_VOCAB = 128, 90
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 101, 102, 103, 104
_IDS = dict(image=IMAGE_ID, video=VIDEO_ID, vision_start=VISION_START_ID, vision_end=VISION_END_ID)
_TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


def tiny_config(family: str, *, text: dict | None = None, vision: dict | None = None, **top):
    """A small config of one family; `text` and `vision` override fields of the sub-configs, `top`
    of the whole.
    """
    return families()[family].tiny_config(_TEXT | (text or {}), vision or {}, _IDS, **top)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 1, **config):
    """A stock transformers model of `family` with random weights of a size that makes mistakes
    visible.
    """
    import transformers

    auto = transformers.AutoModelForCausalLM
    if families()[family].vision_inputs:
        auto = transformers.AutoModelForImageTextToText
    with torch.random.fork_rng():
        model = auto.from_config(tiny_config(family, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("A_log"):  # slow decay: a state remembers its whole prompt
                p.copy_((0.02 + 0.3 * torch.rand(p.shape, generator=generator)).log())
            elif p.ndim > 1:
                p.copy_(noise * (1.2 / math.sqrt(p[0].numel())))
            else:  # about the class's own start: norms scale by 1 or by 1 + weight
                p.add_(0.1 * noise)
    model.set_attn_implementation("sdpa")
    if dtype == torch.float64 and hasattr(model.config.get_text_config(), "num_experts"):
        model.set_experts_implementation("eager")  # torch._grouped_mm has no float64
    return model.to(dtype).eval()


def synthetic_group(
    model,
    images: Sequence[tuple[int, int]],
    text: int,
    lengths: Sequence[int],
    videos: Sequence[tuple[int, int, int]] = (),
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Group:
    """A random group: images of (height, width) in the family's units, `text` leading tokens,
    completions of these lengths, and videos of (frames, height, width).
    """

    def random_ids(count: int) -> list[int]:
        return torch.randint(0, TEXT_VOCAB, (count,), generator=generator).tolist()

    ids, family = random_ids(text), families()[model.config.model_type]
    blanks = family.blank_images(model.config, images)
    for blank in blanks:
        ids += family.image_text(blank, model.config) + random_ids(3)
    moving = [family.blank_video(model.config, size) for size in videos]
    for video in moving:
        ids += family.video_text(video, model.config) + random_ids(2)
    vision = {}
    for media in filter(None, (blanks, moving)):
        vision |= family.join_images(media)
    for key, value in vision.items():
        if key.startswith("pixel_values"):
            pixels = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            vision[key] = pixels.to(dtype)
    completions = [torch.tensor(random_ids(n), dtype=torch.int64) for n in lengths]
    advantages = None  # of a prompt to sample from
    if completions:
        advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    return Group(torch.tensor(ids), completions, vision, advantages=advantages)


# (images, text tokens, completion lengths): 0, 1 and 2 images of different sizes; ragged, one-token
# and single completions
SPECS = (
    ([(4, 6)], 5, [7, 3, 9, 1]),
    ([(8, 8)], 3, [5]),
    ([(4, 4), (6, 10)], 4, [6, 2]),
    ([], 11, [4, 8, 1]),
)


def synthetic_groups(
    model, specs: Sequence[tuple] = SPECS, *, seed: int = 7, dtype: torch.dtype | None = None
) -> list[Group]:
    """Groups for `model` from (images, text, lengths) triples, or four with videos; images are left
    out for a text model.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or next(model.parameters()).dtype
    vlm = bool(families()[model.config.model_type].vision_inputs)
    return [
        synthetic_group(
            model, images if vlm else (), text, lengths, *videos, generator=generator, dtype=dtype
        )
        for images, text, lengths, *videos in specs
    ]


def forward_inputs(model, group: Group, completion: Tensor) -> dict[str, Tensor]:
    """The stock model's own inputs for one unpadded (prompt, completion) sequence."""
    ids = torch.cat([group.prompt_ids, completion])[None]
    family = families()[model.config.model_type]
    given = family.stock_inputs(model.config, ids, group.vision, group.prompt_ids.numel())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}


def naive_logits(model, group: Group, completion: Tensor) -> Tensor:
    """(C, V) logits that predict each token of `completion`, from one ordinary forward."""
    logits = model(**forward_inputs(model, group, completion), use_cache=False).logits[0]
    return logits[group.prompt_ids.numel() - 1 : -1]


def naive_logp(model, groups: Sequence[Group], temperature: float = 1.0) -> list[list[Tensor]]:
    """Log-probs of every completion, one unpadded forward per (prompt, completion), images encoded
    each time.
    """
    out = []
    for group in groups:
        rows = []
        for completion in group.completions:
            logits = naive_logits(model, group, completion) / temperature
            logits = logits if logits.dtype == torch.float64 else logits.float()
            rows.append(torch.log_softmax(logits, -1).gather(-1, completion[:, None])[:, 0])
        out.append(rows)
    return out


def random_weights(groups: Sequence[Group], seed: int = 3) -> list[list[Tensor]]:
    """Signed per-token weights, so that a weighted sum of log-probs has a telling gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(n, generator=generator, dtype=torch.float64) for n in g.lengths]
        for g in groups
    ]


def weighted_sum(logp: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[Tensor]]) -> Tensor:
    return sum(
        (lp * w.to(lp)).sum()
        for row, w_row in zip(logp, weights, strict=True)
        for lp, w in zip(row, w_row, strict=True)
    )


def checkpoint_activations(model, *, reentrant: bool) -> None:
    """Turn on activation checkpointing under the name this transformers has for it."""
    name = "activation_checkpointing_enable"
    if not hasattr(model, name):  # before 5.23
        name = "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": reentrant})


def take_grads(model) -> dict[str, Tensor | None]:
    """Gradients by parameter name; they are removed from the model."""
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def grad_error(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest error over all parameters, relative to each one's largest gradient, and the
    parameter's name.

    A parameter whose true gradient is zero (a key bias) is measured against 1e-3 of the largest
    gradient of all. A missing gradient counts as zero.
    """
    floor = 1e-3 * max((float(w.abs().max()) for w in want.values() if w is not None), default=0.0)
    worst, where = 0.0, ""
    for name, w in want.items():
        g = got[name]
        if w is None and g is None:
            continue
        w = torch.zeros_like(g) if w is None else w
        g = torch.zeros_like(w) if g is None else g
        error = float((g - w).abs().max()) / max(float(w.abs().max()), floor, 1e-300)
        if not error <= worst:  # also when it is NaN
            worst, where = error, name
    return worst, where


class float64_norms(TorchFunctionMode):  # noqa: N801, used as a function is
    """Inside, the parts of the stock models that always compute in float32 keep float64, also where
    a checkpoint computes them again in `loss.backward()`.

    Norms, rotary embeddings, routers and recurrences round to float32 even in a float64 model;
    without this, that rounding hides what a float64 comparison is meant to show.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.backward:  # which would run without this mode, as all functions here
            return self._backward(*args, **kwargs)

        def widened(value):
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        kwargs = {key: widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(widened, args), **kwargs)

    def _backward(self, loss, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        gradient = torch.ones_like(loss) if gradient is None else gradient
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (gradient,), bool(retain_graph), create_graph, tuple(inputs or ()),
                allow_unreachable=True, accumulate_grad=True,
            )  # fmt: skip
