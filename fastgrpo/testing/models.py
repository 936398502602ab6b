"""Tiny real transformers models, synthetic groups, and the plain computation they are compared
with.

Everything here is for tests, benchmarks and demonstrations: the models are the stock
transformers classes built from small configs with random weights, and `naive_logp` is one
ordinary forward per (prompt, completion).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgrpo.packing.group import Group

VLM_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT_FAMILIES = ("qwen2", "qwen3", "llama")
FAMILIES = VLM_FAMILIES + TEXT_FAMILIES

VOCAB, TEXT_VOCAB = 128, 90
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 101, 102, 103, 104

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
_VISION = dict(depth=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=2)


def tiny_config(family: str, *, text: dict | None = None, vision: dict | None = None, **top):
    """A small config of one family; `text` and `vision` override fields of the sub-configs, `top`
    of the whole.
    """
    import transformers

    text = _TEXT | (text or {})
    if family in TEXT_FAMILIES:
        cls = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "llama": "LlamaConfig"}[family]
        if family == "qwen3":
            text = {"head_dim": 8} | text
        return getattr(transformers, cls)(**text, **top)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    section = [head_dim // 2 - 2 * (head_dim // 2 * 3 // 8)] + 2 * [head_dim // 2 * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    if family == "qwen3_vl":
        text = {"head_dim": head_dim} | text
        rope["mrope_interleaved"] = True
    if "mrope_section" not in text["rope_parameters"]:
        text = text | {"rope_parameters": rope}
    hidden = text["hidden_size"]
    extra = {
        "qwen2_vl": dict(embed_dim=16, hidden_size=hidden, mlp_ratio=2),
        "qwen2_5_vl": dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=hidden,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        "qwen3_vl": dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=hidden,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 2],
        ),
    }[family]
    cls = {
        "qwen2_vl": "Qwen2VLConfig",
        "qwen2_5_vl": "Qwen2_5_VLConfig",
        "qwen3_vl": "Qwen3VLConfig",
    }[family]
    ids = dict(
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )
    vision = _VISION | extra | (vision or {})
    return getattr(transformers, cls)(text_config=text, vision_config=vision, **(ids | top))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 1, **config):
    """A stock transformers model of `family` with random weights of a size that makes mistakes
    visible.
    """
    import transformers

    cls = {
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama": "LlamaForCausalLM",
    }[family]
    with torch.random.fork_rng():
        model = getattr(transformers, cls)(tiny_config(family, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * (1.2 / math.sqrt(p[0].numel())))
            else:
                p.copy_(0.1 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))
    model.set_attn_implementation("sdpa")
    return model.to(dtype).eval()


def synthetic_group(
    model,
    images: Sequence[tuple[int, int]],
    text: int,
    lengths: Sequence[int],
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Group:
    """A random group: images of (height, width) patches, `text` leading tokens, completions of
    these lengths.
    """

    def random_ids(count: int) -> list[int]:
        return torch.randint(0, TEXT_VOCAB, (count,), generator=generator).tolist()

    ids, vision = random_ids(text), {}
    if images:
        cfg = model.config.vision_config
        for h, w in images:
            ids += (
                [VISION_START_ID]
                + [IMAGE_ID] * (h * w // cfg.spatial_merge_size**2)
                + [VISION_END_ID]
            )
            ids += random_ids(3)
        width = cfg.in_channels * cfg.temporal_patch_size * cfg.patch_size**2
        pixels = torch.randn(
            sum(h * w for h, w in images), width, generator=generator, dtype=torch.float64
        )
        vision = {
            "pixel_values": pixels.to(dtype),
            "image_grid_thw": torch.tensor([[1, h, w] for h, w in images]),
        }
    completions = [torch.tensor(random_ids(n), dtype=torch.int64) for n in lengths]
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
    """Groups for `model` from (images, text, lengths) triples; images are left out for a text
    model.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or next(model.parameters()).dtype
    vlm = hasattr(model.config, "vision_config")
    return [
        synthetic_group(
            model, images if vlm else (), text, lengths, generator=generator, dtype=dtype
        )
        for images, text, lengths in specs
    ]


def forward_inputs(model, group: Group, completion: Tensor) -> dict[str, Tensor]:
    """The stock model's own inputs for one unpadded (prompt, completion) sequence."""
    ids = torch.cat([group.prompt_ids, completion])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **group.vision}
    if group.vision:
        config = model.config
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (
            ids == config.video_token_id
        )
    return inputs


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


@contextlib.contextmanager
def float64_norms() -> Iterator[None]:
    """Inside, the parts of the stock models that always compute in float32 keep float64.

    RMSNorm and the vision tower's rotary embedding round to float32 even in a float64 model;
    without this, that rounding hides what a float64 comparison is meant to show.
    """
    import importlib

    saved = []

    def patch(owner, name, value):
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in dir(module):
            if name.endswith("RMSNorm"):
                patch(getattr(module, name), "forward", _rms_norm)
        if hasattr(module, "apply_rotary_pos_emb_vision"):
            patch(module, "apply_rotary_pos_emb_vision", _rotate_vision)
    try:
        yield
    finally:
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)


def _rms_norm(self, hidden: Tensor) -> Tensor:
    return (
        self.weight
        * hidden
        * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    )


def _rotate_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)

    def rotate(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    return rotate(q), rotate(k)
