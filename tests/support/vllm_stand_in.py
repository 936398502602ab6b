# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `vllm serve`, and for the part of the vllm package that TRL's client imports.

The server answers the requests TRL 1.16 makes (health, models, server_info, image features,
generation from token ids with and without images, weight transfer) with a transformers model on
the CPU. Weights travel through a socket in place of NCCL, in the order they were announced.
"""

from __future__ import annotations

import base64
import dataclasses
import http.server
import importlib.machinery
import io
import json
import os
import socket
import sys
import threading
import types

import torch


def pretend_installed() -> None:
    """Puts a `vllm` with the names TRL imports among the modules; before trl is imported."""
    names = {
        "vllm": dict(__version__="0.25.0", LLM=None, RequestOutput=None, SamplingParams=None),
        "vllm.sampling_params": dict(StructuredOutputsParams=None),
        "vllm.utils": {},
        "vllm.utils.network_utils": dict(get_ip=lambda: "127.0.0.1"),
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_engine": dict(
            NCCLTrainerSendWeightsArgs=SendArguments, NCCLWeightTransferEngine=WeightTransferEngine
        ),
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(values)
        sys.modules[name] = module


@dataclasses.dataclass
class SendArguments:
    group: socket.socket
    packed: bool


class WeightTransferEngine:
    """The trainer's end: rank 0, which the server's worker connects to."""

    @staticmethod
    def trainer_init(info: dict) -> socket.socket:
        with socket.create_server((info["master_address"], info["master_port"])) as waiting:
            return waiting.accept()[0]

    @staticmethod
    def trainer_send_weights(iterator, trainer_args: SendArguments) -> None:
        for _, weight in iterator:
            trainer_args.group.sendall(weight.detach().contiguous().numpy().tobytes())


def let_the_client_sync_from_a_cpu() -> None:
    """TRL's client refuses a device without NCCL; the socket needs none."""
    from trl.generation.vllm_client import VLLMClient

    def init_communicator(self, device=0):
        from concurrent.futures import ThreadPoolExecutor

        assert self.get_server_info()["weight_transfer_config"] is not None
        world = {"rank_offset": 1, "world_size": self.get_world_size() + 1}
        info = {"master_address": "127.0.0.1", "master_port": self.group_port} | world
        with ThreadPoolExecutor(max_workers=1) as executor:
            url = f"{self.base_url}/init_weight_transfer_engine"
            future = executor.submit(self._post, url, json={"init_info": info})
            self.communicator = WeightTransferEngine.trainer_init(info)
            future.result()

    VLLMClient.init_communicator = init_communicator
    VLLMClient.close_communicator = lambda self: self.communicator and self.communicator.close()


def start(checkpoint, *, temperature_error: float = 0.0) -> tuple[str, int]:
    """A server of `checkpoint` in a process of its own: its URL and process id.

    `temperature_error`: its log-probs are those of a temperature off by that share, as another
    engine's differ a little from the trainer's.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    pid = os.fork()
    if pid:
        listening.close()
        return url, pid
    try:
        worker = _Worker(checkpoint, temperature_error)
        server = http.server.ThreadingHTTPServer(("", 0), _handler(worker), False)
        server.socket.close()
        server.socket = listening
        server.serve_forever()
    finally:
        os._exit(1)


class _Worker:
    def __init__(self, checkpoint, temperature_error):
        import transformers

        config = transformers.AutoConfig.from_pretrained(checkpoint)
        self.model = getattr(transformers, config.architectures[0]).from_pretrained(checkpoint)
        self.model.eval()
        self.processor = transformers.AutoProcessor.from_pretrained(checkpoint)
        self.temperature_error, self.updates, self.group = temperature_error, 0, None
        self.sampling = threading.Lock()  # TRL's client sends the prompts of a batch at once

    def connect(self, init_info: dict) -> dict:
        address = init_info["master_address"], init_info["master_port"]
        for attempt in range(200):  # the trainer may not listen yet
            try:
                self.group = socket.create_connection(address)
                break
            except ConnectionRefusedError:
                assert attempt < 199
                import time

                time.sleep(0.05)
        self.group.settimeout(None)
        return {}

    def update(self, update_info: dict) -> dict:
        parameters = dict(self.model.named_parameters())
        stream = self.group.makefile("rb")
        fields = (update_info[name] for name in ("names", "dtype_names", "shapes"))
        for name, dtype, shape in zip(*fields, strict=True):
            dtype = getattr(torch, dtype)
            count = torch.Size(shape).numel()
            data = bytearray(stream.read(count * dtype.itemsize))
            with torch.no_grad():
                parameters[name].copy_(torch.frombuffer(data, dtype=dtype).view(shape))
        self.updates += 1
        return {}

    def features(self, messages: list) -> dict:
        """The images of a conversation as the processor makes them; where they lie is not known."""
        from PIL import Image

        urls = [part["image_url"]["url"] for part in messages[0]["content"]]
        images = [Image.open(io.BytesIO(base64.b64decode(u.split(",", 1)[1]))) for u in urls]
        values = self.processor.image_processor(images, return_tensors="pt")
        buffer = io.BytesIO()
        torch.save(dict(values), buffer)
        placeholders = [{"offset": 0, "length": 0} for _ in images]
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"mm_placeholders": {"image": placeholders}, "kwargs_data": {"image": data}}

    def generate(self, prompt: list[int], features: dict | None, settings: dict) -> list[dict]:
        with self.sampling:
            return self._generate(prompt, features, settings)

    def _generate(self, prompt: list[int], features: dict | None, settings: dict) -> list[dict]:
        import fastgrpo as fg

        vision = {}
        if features is not None:
            data = io.BytesIO(base64.b64decode(features["kwargs_data"]["image"]))
            vision = torch.load(data, weights_only=True)
            for place in features["mm_placeholders"]["image"]:
                run = prompt[place["offset"] : place["offset"] + place["length"]]
                assert run and set(run) == {self.processor.image_token_id}, (place, prompt)
        group = fg.Group(torch.tensor(prompt), [], vision)
        suppressed = settings.get("suppress_tokens") or ()
        (group,) = fg.generate(
            self.model,
            [group],
            settings["n"],
            max_new_tokens=settings["max_tokens"],
            temperature=settings["temperature"],
            suppress_token_ids=suppressed,
            seed=self.updates,
        )
        off = settings["temperature"] * (1 + self.temperature_error)
        (scores,) = fg.score(self.model, [group], temperature=off)
        choices = []
        for ids, logp in zip(group.completions, scores.logp, strict=True):
            content = [
                {"token": f"token_id:{i}", "logprob": x, "top_logprobs": []}
                for i, x in zip(ids.tolist(), logp.tolist(), strict=True)
            ]
            choices.append({"token_ids": ids.tolist(), "logprobs": {"content": content}})
        return choices

    def weights(self) -> bytes:
        buffer = io.BytesIO()
        torch.save({n: p.detach() for n, p in self.model.named_parameters()}, buffer)
        return buffer.getvalue()


def _handler(worker: _Worker):
    """One request of TRL's client a method call; a path it does not know is a 404."""

    def completions(body: dict) -> dict:
        choices = []
        for prompt in body["prompt"]:
            for choice in worker.generate(prompt, None, body):
                content = choice["logprobs"]["content"]
                tokens = [entry["token"] for entry in content]
                values = [entry["logprob"] for entry in content]
                logprobs = {"tokens": tokens, "token_logprobs": values}
                logprobs["top_logprobs"] = [None] * len(tokens)
                choices.append(choice | {"prompt_token_ids": prompt, "logprobs": logprobs})
        return {"choices": choices}

    def from_features(body: dict) -> dict:
        settings = body["sampling_params"]
        assert settings["output_kind"] == 2  # else vLLM drops all but the last of n samples
        return {"choices": worker.generate(body["token_ids"], body["features"], settings)}

    answers = {
        "/health": lambda body: {},
        "/v1/models": lambda body: {"data": [{"id": "tiny"}]},
        "/server_info": lambda body: {
            "vllm_config": {
                "weight_transfer_config": {"backend": "nccl"},
                "model_config": {"logprobs_mode": "processed_logprobs"},
            }
        },
        "/get_world_size": lambda body: {"world_size": 1},
        "/init_weight_transfer_engine": lambda body: worker.connect(body["init_info"]),
        "/start_weight_update": lambda body: {},
        "/update_weights": lambda body: worker.update(body["update_info"]),
        "/finish_weight_update": lambda body: {},
        "/reset_prefix_cache": lambda body: {"success": True},
        "/v1/chat/completions/render": lambda body: {"features": worker.features(body["messages"])},
        "/v1/completions": completions,
        "/inference/v1/generate": from_features,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            path = self.path.split("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if path == "/weights":  # for tests: what the last transfer left
                return self._send(200, worker.weights())
            if path not in answers:
                return self._send(404, b"")
            self._send(200, json.dumps(answers[path](json.loads(body or b"null"))).encode())

        do_GET = do_POST

        def _send(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler
