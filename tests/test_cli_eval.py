# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo eval` on a tiny checkpoint: whole, cut and gone on with, over HTTP, and wrong turns."""

import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from PIL import Image

pytest.importorskip("trl")

from transformers import (  # noqa: E402
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2_5_VLForConditionalGeneration,
)

from fastgrpo.cli import main  # noqa: E402
from fastgrpo.testing.processors import tiny_tokenizer  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402

NUM_ROWS = 5


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_checkpoint(folder / "model")
    rows = []
    for i in range(NUM_ROWS):
        Image.radial_gradient("L").resize((16 + 8 * (i % 2), 24)).save(folder / f"{i}.png")
        turns = [{"value": f"<image>find {i}"}, {"value": "[1, 2, 9, 9]"}]
        rows.append({"image": f"{i}.png", "conversations": turns})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "model"),
        "data_file_paths": str(folder / "rows.jsonl"),
        "question_template": "{Question}",
        "max_completion_length": 12,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def evaluate(job, out, *options, models=()):
    arguments = [*map(str, models), "--config", str(job / "config.yaml"), "--out", str(out)]
    main(["eval", *arguments, *map(str, options)])
    return json.loads((out / "eval.json").read_text())["checkpoints"]


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_whole_evaluation_twice_and_one_that_was_cut(job, tmp_path, capsys):
    options = ("--batch_size", 2, "--worst", 3)
    (one,) = evaluate(job, tmp_path / "a", *options)
    assert one["model"] == "model" and one["figures"]["rows"] == NUM_ROWS
    assert {"accuracy", "mean_iou", "no_box", "mean_tokens", "truncated"} <= set(one["figures"])
    printed = capsys.readouterr().out
    assert "| checkpoint | rows |" in printed and "| model | 5 |" in printed
    assert str(tmp_path / "a" / "model" / "worst.html") in printed
    evaluate(job, tmp_path / "b", *options)
    whole = files(tmp_path / "a")
    assert whole == files(tmp_path / "b")
    answers = tmp_path / "b" / "model" / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # settings, three answers and a part
    evaluate(job, tmp_path / "b", *options)
    assert files(tmp_path / "b") == whole
    page = whole["model/worst.html"].decode()
    assert page.count("data:image/png") == 3 and "find 0" in page and "http" not in page


def test_answers_are_those_of_transformers(job, tmp_path):
    evaluate(job, tmp_path, "--batch_size", 3)
    rows = json.loads((tmp_path / "model" / "result.json").read_text())["rows"]
    processor = AutoProcessor.from_pretrained(job / "model")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(job / "model")
    for i, row in enumerate(rows):
        parts = [{"type": "image"}, {"type": "text", "text": f"find {i}"}]
        chat = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        image = Image.open(job / f"{i}.png").convert("RGB")
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        banned = [model.config.image_token_id, model.config.video_token_id]
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=banned,
                             eos_token_id=processor.tokenizer.eos_token_id)  # fmt: skip
        said = ids[0, inputs["input_ids"].shape[1] :]
        assert row["text"] == processor.decode(said, skip_special_tokens=True)


def test_mathematics_with_a_text_model(tmp_path):
    save_checkpoint(tmp_path / "text", "qwen2")
    rows = [{"prompt": f"{i} + {i}?", "solution": str(2 * i)} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = f"--dataset_name {tmp_path}/rows.jsonl --max_completion_length 4 --task math"
    main(["eval", str(tmp_path / "text"), *options.split()])
    (one,) = json.loads((tmp_path / "text" / "eval" / "eval.json").read_text())["checkpoints"]
    assert one["figures"]["rows"] == 3 and 0 <= one["figures"]["accuracy"] <= 1


def test_a_family_that_is_not_packed_answers_by_transformers(tmp_path, caplog):
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer(config).save_pretrained(tmp_path / "gpt2")
    rows = [{"prompt": "2 + 2?" * (i + 1), "solution": "4"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = f"--dataset_name {tmp_path}/rows.jsonl --max_completion_length 5 --task math"
    main(["eval", str(tmp_path / "gpt2"), *options.split()])
    assert "gpt2 answers in padded rows" in caplog.text
    texts = [
        json.loads(line)["text"]
        for line in (tmp_path / "gpt2/eval/gpt2/answers.jsonl").read_text().splitlines()[1:]
    ]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for row, text in zip(rows, texts, strict=True):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=5,
                             eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        said = ids[0, inputs["input_ids"].shape[1] :]
        assert text == tokenizer.decode(said, skip_special_tokens=True)


def test_a_folder_of_checkpoints_in_order_the_broken_one_named(job, tmp_path, caplog):
    run = tmp_path / "run"
    for step in (10, 9):
        shutil.copytree(job / "model", run / f"checkpoint-{step}")
        state = {"global_step": step}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    shutil.copytree(job / "model", run / "checkpoint-11")
    found = evaluate(job, tmp_path / "out", "--num_samples", 2, models=[run])
    assert [one["model"] for one in found] == ["checkpoint-9", "checkpoint-10"]
    assert found[0]["figures"] == found[1]["figures"] and found[0]["figures"]["rows"] == 2
    assert "checkpoint-11 is incomplete and skipped: trainer_state.json is missing" in caplog.text
    # with seed 42 the rows are those random.shuffle takes after random.seed(42)
    rows = json.loads((tmp_path / "out" / "checkpoint-9" / "result.json").read_text())["rows"]
    assert [row["data_row"].rpartition(":")[2] for row in rows] == ["4", "2"]


def test_an_adapter_is_laid_over_its_base(job, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(job / "model")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    AutoProcessor.from_pretrained(job / "model").save_pretrained(tmp_path / "lora")
    evaluate(job, tmp_path / "out", models=[job / "model", tmp_path / "lora"])
    plain, with_lora = (
        json.loads((tmp_path / "out" / name / "result.json").read_text())["rows"]
        for name in ("model", "lora")
    )
    assert [row["text"] for row in plain] != [row["text"] for row in with_lora]


@contextmanager
def server(asked, status=200):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = body["messages"][-1]["content"][-1]["text"]
            said = f'<answer>{{"bbox_2d": [1, 2, 9, 9]}} {text}</answer>'
            reply = {"choices": [{"message": {"content": said}}]}
            data = json.dumps(reply).encode()
            self.send_response(500 if status == 500 and "find 3" in text else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}/v1"
    finally:
        served.shutdown()
        served.server_close()


def test_a_server_answers_with_every_sampling_field_set(job, tmp_path):
    pytest.importorskip("httpx2")
    asked = []
    with server(asked) as url:
        options = ("--server", url, "--served_name", "m", "--answer_frame", "image")
        (one,) = evaluate(job, tmp_path, *options)
    assert one["figures"]["accuracy"] == one["figures"]["mean_iou"] == 1.0
    assert "truncated" not in one["figures"]
    body = min(asked, key=lambda body: body["messages"][0]["content"][1]["text"])
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "m", "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "max_tokens": 12, "repetition_penalty": 1.0,
        "mm_processor_kwargs": {"min_pixels": 64, "max_pixels": 4096},
    }  # fmt: skip
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "find 0"} and len(asked) == NUM_ROWS
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_file_of_vlm_r1s_evaluation_counts_as_its_script_does(job, tmp_path):
    """Intersections end at x2 - 1 and count with + 1: 8 x 7, 8 x 2 and 8 x 4 pixels of the answer's
    8 x 7.
    """
    pytest.importorskip("httpx2")
    solutions = [[1, 2, 9, 9], [1, 2, 9, 4], [1, 2, 9, 6]]
    rows = [
        {"image": f"{i}.png", "problem": f"find {i}", "solution": box, "normal_caption": "x"}
        for i, box in enumerate(solutions)
    ]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    options = f"--data_file_paths {tmp_path}/val.json --image_folders {job} --task"
    with server([]) as url:
        asked = ("--server", url, "--answer_frame", "image")
        (one,) = evaluate(job, tmp_path, *options.split(), "vlm_r1/test_rec_r1", *asked)
    assert one["figures"]["accuracy"] == 2 / 3  # 56 / 56, 16 / 56, 32 / 56
    (one,) = evaluate(job, tmp_path, *options.split(), "rec", *asked)  # the answers are there
    assert one["figures"]["mean_iou"] == pytest.approx((1 + 16 / 56 + 32 / 56) / 3)


def test_rows_a_server_left_out_are_asked_again(job, tmp_path, monkeypatch):
    pytest.importorskip("httpx2")
    monkeypatch.setattr("fastgrpo.judges.http.time.sleep", lambda seconds: None)
    asked = []
    with server(asked, status=500) as url:
        with pytest.raises(SystemExit, match=r"server: 1 rows got no answer \(1 x HTTP 500"):
            evaluate(job, tmp_path, "--server", url, "--answer_frame", "image")
    kept = (tmp_path / "model" / "answers.jsonl").read_text().splitlines()
    assert len(kept) == 1 + NUM_ROWS - 1


WRONG = {
    "--task ocr": "task: expected one of rec, detection, .*, got 'ocr'",
    "--task choice": "task: no row can be scored for 'choice'; the first: .*",
    "--batch_size 0": "batch_size: expected at least 1, got 0",
    "--batch_size many": "batch_size: invalid int value: 'many'",
    "--num_samples 0": "num_samples: expected a number above 0, got 0",
    "--answer_frame pixels": "answer_frame: invalid choice: 'pixels'",
    "--max_completion_lenght 4": "max_completion_lenght: .* did you mean max_completion_length",
    "--data_file_paths {job}/none.jsonl": "data_file_paths: .*none.jsonl is not a file",
    "--out {job}/rows.jsonl": "out: .*rows.jsonl is a file",
    "--config {job}/none.yaml": "config: .*none.yaml cannot be read",
    "{job}/nothing --config {job}/config.yaml": "MODEL: .*nothing does not exist",
    "{job}/empty --config {job}/config.yaml": "MODEL: .*empty holds no model and no complete",
    "{job}/rows.jsonl --config {job}/config.yaml": "MODEL: .*rows.jsonl holds no model",
    "{job}/hollow --config {job}/config.yaml": "model_name_or_path: no processor in",
    "{job}/bare --config {job}/config.yaml": "model_name_or_path: no weights in",
    "--max_completion_length 4 --out {job}/done": "out: .*another max_new_tokens: 12 there, 4 now",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_turn_is_one_line(job, tmp_path, wrong):
    (job / "empty").mkdir(exist_ok=True)
    (job / "hollow").mkdir(exist_ok=True)
    (job / "hollow" / "config.json").write_text("{}")
    if not (job / "bare").exists():
        shutil.copytree(job / "model", job / "bare")
        (job / "bare" / "model.safetensors").unlink()
    if "done" in wrong and not (job / "done").exists():
        evaluate(job, job / "done")
    options = wrong.format(job=job).split()
    config = [] if "--config" in options else ["--config", str(job / "config.yaml")]
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["eval", *options, *config, *out])
    message = str(stop.value.code)
    assert message.startswith("fastgrpo eval: ") and "\n" not in message and len(message) < 800
    assert re.search(WRONG[wrong], message), message


def test_nothing_at_all_names_what_is_missing(job):
    with pytest.raises(SystemExit, match="fastgrpo eval: MODEL is required, or --config"):
        main(["eval"])
    with pytest.raises(SystemExit, match="fastgrpo eval: data_file_paths is required, or dataset"):
        main(["eval", str(job / "model")])
