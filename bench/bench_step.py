# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of the policy log-probs of one VLM group: fastgrpo against TRL's own method.

`--family X ...` (or all) times a small model of each family instead, on the CPU; beside those with
recurrent layers also our packed row with the layers of `pip install tree-recurrence`, if that is
installed. It counts processor time, as the variants take up to minutes in which a machine has other
work; set OMP_NUM_THREADS=1, or the waiting of threads for one another counts too.

A Qwen2.5-VL built from a config, one prompt with one image, G completions. Both compute the same
log-probs of the same tokens and the gradients of every parameter; TRL pads G full rows and runs
the vision tower on G copies of the image.
"""

import argparse
import contextlib
import functools
import inspect
import time
from types import SimpleNamespace
from unittest import mock

import common
import families
import torch

import fastgrpo as fg
from fastgrpo import recurrence
from fastgrpo.testing import models as tm

# hidden size, heads (text, keys, vision), layers, vocabulary, patches, text tokens, G, lengths
SHAPES = {
    "full": (256, (8, 4, 4), 6, 8192, (40, 48), 40, 8, (64, 96)),
    # the width of Qwen2.5-VL-3B, a quarter of its layers
    "cuda": (2048, (16, 2, 16), 9, 151936, (40, 40), 600, 8, (128, 256)),
    "small": (128, (4, 2, 4), 2, 256, (16, 8), 5, 4, (3, 8)),
}


def build(shape: str, device: str) -> tuple[torch.nn.Module, fg.Group]:
    """The model and one group on `device`: bfloat16 on a GPU, float32 elsewhere."""
    hidden, heads, layers, vocabulary, image, text, count, (low, high) = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = tm.tiny_model(
        "qwen2_5_vl",
        text=dict(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            vocab_size=vocabulary,
        ),
        # the tower's width, windows and full-attention share are those of Qwen2.5-VL-3B
        vision=dict(
            depth=4,
            hidden_size=hidden * 5 // 8,
            intermediate_size=hidden * 7 // 4 // 8 * 8,
            num_heads=heads[2],
            patch_size=14,
            window_size=112,
            fullatt_block_indexes=[3],
        ),
    ).train()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(low, high, count).long().tolist()
    options = {"generator": generator, "dtype": dtype}
    group = tm.synthetic_group(model, [image], text, lengths, **options)
    model.to(device, dtype)
    tensors = {name: x.to(device) for name, x in group.vision.items()}
    return model, fg.Group(
        group.prompt_ids.to(device), [x.to(device) for x in group.completions], tensors
    )


def fastgrpo_logp(model, group: fg.Group) -> torch.Tensor:
    return torch.cat(fg.score(model, [group], self_check=False)[0].logp)


def trl_logp(model, group: fg.Group) -> torch.Tensor:
    """TRL's `_get_per_token_logps_and_entropies` on the batch its trainer would make."""
    from trl import GRPOTrainer

    count, longest = len(group.completions), max(group.lengths)
    completions = group.prompt_ids.new_zeros(count, longest)
    mask = torch.zeros_like(completions)
    for i, completion in enumerate(group.completions):
        completions[i, : len(completion)] = completion
        mask[i, : len(completion)] = 1
    prompt = group.prompt_ids.expand(count, -1)
    ids = torch.cat([prompt, completions], 1)
    family = fg.models.families()[model.config.model_type]
    images = family.split_images(group.vision) if group.vision else []
    vision = family.join_images(images * count) if images else {}
    given = family.stock_inputs(model.config, ids, vision, prompt.shape[1])
    method = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext))
    # What TRL does not pass on reaches the model all the same, so that the padded forward runs.
    known = inspect.signature(method).parameters
    beside = {name: given.pop(name) for name in list(given) if name not in known}
    logp, _, _ = method(
        trainer,
        functools.partial(model, **beside),
        ids,
        torch.cat([torch.ones_like(prompt), mask], 1),
        longest,
        num_images=[len(images)] * count if vision else None,
        **given,
    )
    return logp[mask.bool()]


def saved_mib(run, model) -> float:
    """MiB kept for backward: distinct storages autograd saves, the parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address must not be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values()) / 2**20


@contextlib.contextmanager
def tree_recurrence_layers(model):
    """Inside, the recurrent layers of a packed row follow it by tree-recurrence, not by us."""
    import tree_recurrence

    def describe(module, args, kwargs):
        layout = kwargs["fg_layout"]
        bounds = {"tree_cu_seqlens_q": layout.cu_q, "tree_cu_seqlens_k": layout.cu_k}
        return args, kwargs | bounds | {"tree_kv_index": layout.kv_index}

    recurrence.uninstall(fg.models.Adapter(model).mixers)
    ours = {"install": lambda mixers: None, "counted_calls": contextlib.nullcontext}
    with mock.patch.multiple(recurrence, **ours):
        tree_recurrence.install(model)
        hook = model.register_forward_pre_hook(describe, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            tree_recurrence.uninstall(model)


def tree_logp(model, group: fg.Group) -> torch.Tensor:
    with tree_recurrence_layers(model):
        return fastgrpo_logp(model, group)


def compare(
    variants: dict,
    group: fg.Group,
    device: str,
    repeats: int,
    warm_up: fg.Group | None = None,
    **timing: object,
) -> tuple[dict, dict, dict]:
    """Of each variant its step, its milliseconds, and how far its gradients are from TRL's.

    `variants`: name -> (model, function to the log-probs). `warm_up`: what they run on before;
    None: on `group`. `timing`: more for `common.median_ms`.
    """
    grads: dict[str, dict] = {}

    def step(name: str, group: fg.Group = group) -> None:
        owner, logp = variants[name]
        owner.zero_grad(set_to_none=True)
        weights = torch.linspace(-1, 1, sum(group.lengths), device=device)
        (logp(owner, group) * weights).sum().backward()
        grads[name] = tm.take_grads(owner)

    if warm_up is not None:
        for name in variants:
            step(name, warm_up)
    runs = {name: functools.partial(step, name) for name in variants}
    ms = common.median_ms(runs, device, repeats, warm=warm_up is not None, **timing)
    return runs, ms, {name: tm.grad_error(grads[name], grads["TRL"])[0] for name in variants}


def family_rows(name: str, args: argparse.Namespace) -> list[common.Row]:
    from trl.trainer.utils import add_fused_lm_head

    model, group, little = families.build(name, small=args.small)
    stock, *_ = families.build(name, small=args.small)
    add_fused_lm_head(stock)
    variants = {"fastgrpo": (model, fastgrpo_logp), "TRL": (stock, trl_logp)}
    if fg.models.Adapter(model).mixers and common.importable("tree_recurrence"):
        variants["packed row, tree-recurrence"] = (model, tree_logp)
    timing = {"warm_up": little, "clock": time.process_time}
    _, ms, errors = compare(variants, group, "cpu", args.repeats, **timing)
    tokens, lengths = families.image_tokens(model, group), group.lengths
    text = f"{name} P={len(group.prompt_ids)} ({tokens} of images)"
    text += f" G={len(lengths)} C={min(lengths)}-{max(lengths)}"
    found = [
        common.Row(
            f"family {name}",
            text,
            variant,
            ms[variant],
            error=None if variant == "TRL" else errors[variant],
            note="processor time",
            extra={"TRL time / this": ms["TRL"] / ms[variant]},
        )
        for variant in variants
    ]
    print(common.table(found), flush=True)
    return found


def rows(args: argparse.Namespace) -> list[common.Row]:
    from trl.trainer.utils import add_fused_lm_head

    if chosen := getattr(args, "family", None):
        names = fg.models.families() if chosen == ["all"] else chosen
        found = []
        for name in names:
            of_family = family_rows(name, args)
            if args.save:  # one by one: all of them take half an hour
                common.save(of_family, args.device, args.results)
            found += of_family
        return found
    shape = "small" if args.small else "cuda" if args.device == "cuda" else "full"
    model, group = build(shape, args.device)
    stock, _ = build(shape, args.device)
    stock.load_state_dict(model.state_dict())
    add_fused_lm_head(stock)
    variants = {"fastgrpo": (model, fastgrpo_logp), "TRL": (stock, trl_logp)}
    facts = {name: _facts(*pair, group) for name, pair in variants.items()}
    runs, ms, errors = compare(variants, group, args.device, args.repeats)
    facts["fastgrpo"]["TRL time / ours"] = ms["TRL"] / ms["fastgrpo"]
    facts["fastgrpo"]["TRL saved / ours"] = (
        facts["TRL"]["saved MiB"] / facts["fastgrpo"]["saved MiB"]
    )
    prompt, lengths = len(group.prompt_ids), group.lengths
    text = f"P={prompt} G={len(lengths)} C={min(lengths)}-{max(lengths)} {shape}"
    return [
        common.Row(
            "step",
            text,
            name,
            ms[name],
            error=errors[name] if name == "fastgrpo" else None,
            peak_mib=common.peak_mib(runs[name], args.device),
            note="forward + backward of the log-probs, every parameter trained",
            extra=facts[name],
        )
        for name in variants
    ]


def _facts(model, logp, group) -> dict[str, float]:
    """Vision-tower calls and patches of one forward, and bytes saved for backward."""
    patches: list[int] = []
    hook = model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(args[0])), with_kwargs=True
    )
    saved = saved_mib(lambda: logp(model, group), model)
    hook.remove()
    return {
        "vision calls": float(len(patches)),
        "vision patches": float(sum(patches)),
        "saved MiB": saved,
    }


if __name__ == "__main__":
    common.main(rows, family={"nargs": "+", "help": "families by model type instead, or all"})
