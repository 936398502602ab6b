# SPDX-License-Identifier: Apache-2.0
"""`python examples/tiny.py NAME`: examples/NAME.yaml on a tiny random model, in seconds on a CPU.

It shows that the settings fit together; the rewards of a random model mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from fastgrpo.cli import main
from fastgrpo.testing.trl import save_checkpoint

HERE = Path(__file__).resolve().parent
FAMILIES = {"math": "qwen3", "qwen3_5": "qwen3_5"}  # of the others: qwen2_5_vl
BOXES = '```json\n[{"bbox_2d": [1, 2, 9, 9], "label": "cat"}]\n```'
# (number of images, answer) of the rows in VLM-R1's form
ROWS = {
    "rec_lora": (1, "[1, 2, 9, 9]"),
    "qwen3_5": (1, "[1, 2, 9, 9]"),
    "vllm_server": (1, "[1, 2, 9, 9]"),
    "fsdp2": (1, "[1, 2, 9, 9]"),
    "detection": (1, BOXES),
    "several_images": (2, "A"),
    "judge": (1, "a cat"),
}
SIZE = {
    "max_steps": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "max_completion_length": 6,
    "max_pixels": 16 * 64,
    "gradient_checkpointing": "false",
    "save_strategy": "no",
    "logging_steps": 1,
}


def overrides(name: str, folder: Path) -> list[str]:
    """Writes a model and four rows for the example into `folder`; the settings that name them."""
    family = FAMILIES.get(name, "qwen2_5_vl")
    settings = SIZE | {"model_name_or_path": save_checkpoint(folder / "model", family)}
    # Without the example's instructions: a token is a character here.
    settings |= {"output_dir": folder / "run", "question_template": "{Question}"}
    if name == "math":
        rows = [{"problem": f"what is {i} + {i}?", "solution": str(2 * i)} for i in range(4)]
        (folder / "rows.json").write_text(json.dumps(rows))
        settings |= {"dataset_name": folder / "rows.json"}
        del settings["max_pixels"]
    else:
        _write_rows(folder, *ROWS[name])
        settings |= {"data_file_paths": folder / "rows.jsonl", "image_folders": folder}
    return [f"--{key}={value}" for key, value in settings.items()]


def _write_rows(folder: Path, images: int, answer: str) -> None:
    lines = []
    for i in range(4):
        names = [f"{i}_{j}.png" for j in range(images)]
        for j, file in enumerate(names):
            Image.radial_gradient("L").rotate(30 * (i + j)).resize((32, 24)).save(folder / file)
        turns = [
            {"from": "human", "value": "<image>" * images + f"find {i}"},
            {"from": "gpt", "value": answer},
        ]
        lines.append(json.dumps({"id": i, "image": names, "conversations": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines))


@contextlib.contextmanager
def judging() -> Iterator[str]:
    """A judge that finds every answer worth 0.5, at the address it gives."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            self.rfile.read(int(self.headers["Content-Length"]))
            said = {"choices": [{"message": {"content": "Score: 0.5"}}]}
            data = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *given):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def run(name: str, folder: Path) -> None:
    """Trains one step of the example."""
    config = ["--config", str(HERE / f"{name}.yaml"), *overrides(name, folder)]
    with judging() if name == "judge" else contextlib.nullcontext() as url:
        if url is not None:
            os.environ["FASTGRPO_JUDGE_URL"] = url
            config += ["--reward_funcs", f"{HERE / 'judge.py'}:agrees", "vlm_r1/format"]
        main(["train", *config])


if __name__ == "__main__":
    run(sys.argv[1], Path(tempfile.mkdtemp()))
