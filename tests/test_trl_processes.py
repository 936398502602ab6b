# SPDX-License-Identifier: Apache-2.0
"""Two processes: groups that straddle them, ranks with nothing to learn, TRL's numbers."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("trl")

from fastgrpo.testing.trl import save_checkpoint  # noqa: E402

JOB = textwrap.dedent(
    """
    import json, sys, torch
    from pathlib import Path
    from trl import GRPOTrainer
    from fastgrpo.integrations.trl import FastGRPOTrainer
    from fastgrpo.testing.trl import build_trainer, image_row, steps_of

    torch.set_num_threads(1)
    kind, folder, output = sys.argv[1:]

    def reward(completions, prompts, **columns):
        # Prompt 0 always has equal rewards, so a rank may hold no gradient at all.
        texts = [p[0]["content"][-1]["text"] for p in prompts]
        return [0.5 if t.endswith("0") else float(len(set(c[0]["content"])))
                for t, c in zip(texts, completions)]

    options = dict(rows=[image_row(i) for i in range(4)], reward=reward, max_steps=3,
                   per_device_train_batch_size=6, num_generations=4, beta=0.0)
    if kind == "fast":
        trainer = build_trainer(FastGRPOTrainer, Path(folder), Path(output), **options,
                                fast={"keep_groups": False, "exact_zero_advantages": True,
                                      # A process's rows are no whole groups: packed, they would
                                      # be drawn with other random numbers than TRL's.
                                      "packed_rollout": False})
    else:
        trainer = build_trainer(GRPOTrainer, Path(folder), Path(output), **options)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    gathered = trainer.accelerator.gather(weights[None])
    assert torch.equal(gathered[0], gathered[1]), "the processes' weights differ"
    if trainer.accelerator.is_main_process:
        Path(output, "steps.json").write_text(json.dumps(steps_of(trainer)))
    trainer.end()
    """
)


def launch(script, *arguments):
    """The script in two processes of one group; the launcher's own store chooses a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_two_processes_log_what_trl_logs(tmp_path):
    import json

    checkpoint = save_checkpoint(tmp_path / "model")
    script = tmp_path / "job.py"
    script.write_text(JOB)
    steps = {}
    for kind in ("stock", "fast"):
        launch(script, kind, checkpoint, tmp_path / kind)
        steps[kind] = json.loads((tmp_path / kind / "steps.json").read_text())
    assert len(steps["fast"]) == len(steps["stock"]) == 3
    for ours, theirs in zip(steps["fast"], steps["stock"], strict=True):
        for metric in ("loss", "grad_norm", "reward", "entropy"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-5), metric
