# SPDX-License-Identifier: Apache-2.0
"""The log of a run line by line as it is made, for whoever looks at it before it ends.

transformers writes `trainer_state.json` with a checkpoint and at the end; `log.jsonl` in the output
folder holds every entry of the same log from the moment it is made.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from fastgrpo.report.run import RUN_LOG


class RunLog(TrainerCallback):
    """A resumed run goes on behind the entries of the steps it has kept."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir) / RUN_LOG
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [e for e in state.log_history if e.get("step", 0) <= state.global_step]
        self._path.write_text("".join(map(_line, kept)))

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and state.log_history:
            with self._path.open("a") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: dict) -> str:
    return json.dumps(entry, default=float) + "\n"
