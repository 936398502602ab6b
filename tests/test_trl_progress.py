# SPDX-License-Identifier: Apache-2.0
"""One line a logged step: which values, from where, how fast."""

import pytest

pytest.importorskip("trl")

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl.progress import StepLines, show_lines  # noqa: E402
from fastgrpo.testing.trl import build_trainer, save_checkpoint  # noqa: E402

LOGS = {
    "loss": 0.1,
    "reward": 1.25,
    "rewards/vlm_r1_iou/mean": 0.5,
    "rewards/vlm_r1_iou/std": 0.1,
    "rewards/format/mean": 0.75,
    "kl": 0.0123,
    "completions/mean_length": 17.5,
    "step_time": 1.5,
    "num_tokens": 3000,
}


def test_the_line_of_a_step():
    times = iter([10.0, 12.0, 16.0])
    lines = StepLines(lambda: next(times))
    assert lines.line(LOGS, 5, 200) == (
        "step 5/200  reward 1.250 (vlm_r1_iou 0.500, format 0.750)  kl 0.0123  length 17.5  1.5 s"
        "  1500 tokens/s"  # 3000 in two seconds
    )
    assert lines.line(LOGS | {"num_tokens": 4000}, 6, 200).endswith("  250 tokens/s")
    assert lines.line({"eval_reward": 1.0}, 6, 200) is None
    assert lines.line({"train_runtime": 3.0}, 6, 200) is None


@pytest.mark.parametrize("bars", [True, False])
def test_a_run_prints_one_line_a_step_and_logs_everything(tmp_path, capsys, bars):
    trainer = build_trainer(
        FastGRPOTrainer,
        save_checkpoint(tmp_path / "ck"),
        tmp_path,
        max_steps=2,
        disable_tqdm=not bars,
    )
    show_lines(trainer)
    trainer.train()
    captured = capsys.readouterr()
    lines = [x for x in (captured.out + captured.err).splitlines() if "reward " in x]
    assert [line.strip().split("  ")[0][-8:] for line in lines] == ["step 1/2", "step 2/2"]
    assert "{'" not in captured.out
    assert "rewards/distinct_characters/mean" in trainer.state.log_history[0]
