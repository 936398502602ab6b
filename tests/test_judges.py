# SPDX-License-Identifier: Apache-2.0
"""Judges over HTTP (a small server on loopback) and models in this process as rewards."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastgrpo import judges
from fastgrpo.errors import InputError


class Server(ThreadingHTTPServer):
    """Answers chat completions with ``reply(request number, body) -> (status, bytes, headers)``."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.bodies, self.active, self.peak = reply, [], 0, 0
        self.keys, self.lock = [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            number = len(server.bodies)
            server.active += 1
            server.peak = max(server.peak, server.active)
        status, data, headers = server.reply(number, body)
        with server.lock:
            server.active -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def said(text, status=200, **headers):
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
    return status, body.encode(), headers


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def chat(prompt, completion, row):
    text = f"{row.get('problem', prompt)} || {completion}"
    return [{"role": "user", "content": text}]


def judge(server, **options):
    options = {"backoff": 0.01, "timeout": 5.0} | options
    return judges.HTTPJudge(server.url, "tiny", chat, **options)


def test_scores_come_back_in_order_and_requests_are_bounded(serve):
    def reply(number, body):
        time.sleep(0.01)
        return said(f"Score: 0.{body['messages'][0]['content'].rsplit(' ', 1)[1]}")

    server = serve(reply)
    reward = judge(server, concurrency=3)
    completions = [[{"role": "assistant", "content": str(i % 10)}] for i in range(20)]
    scores = reward(["q"] * 20, completions, problem=["p"] * 20)
    reward.close()
    assert scores == [(i % 10) / 10 for i in range(20)]
    assert len(server.bodies) == 10  # equal requests are sent once
    assert server.peak <= 3
    assert server.bodies[0]["temperature"] == 0.0 and server.bodies[0]["model"] == "tiny"


def test_retries_then_falls_back_and_counts(serve):
    server = serve(lambda n, b: said("1", 503) if n < 3 else said("0.5"))
    reward = judge(server, tries=3)
    assert reward(["q"], ["a"]) == [0.5] and not reward.failures
    reward.close()
    server = serve(lambda n, b: said("1", 500))
    reward = judge(server, tries=2, fallback=None)
    assert reward(["q"], ["a"]) == [None]
    assert reward.failures == {"HTTP 500": 1} and len(server.bodies) == 2
    reward.close()


def test_a_refused_request_is_not_repeated(serve):
    server = serve(lambda n, b: said("", 401))
    reward = judge(server, fallback=0.25)
    assert reward(["q"], ["a"]) == [0.25] and len(server.bodies) == 1
    assert reward.failures == {"HTTP 401": 1}
    reward.close()


def test_retry_after_is_respected(serve):
    server = serve(lambda n, b: said("", 429, **{"Retry-After": "1"}) if n == 1 else said("1"))
    reward = judge(server)
    start = time.perf_counter()
    assert reward(["q"], ["a"]) == [1.0]
    assert time.perf_counter() - start >= 1.0
    reward.close()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"["]
)
def test_malformed_replies_fall_back(serve, data):
    reward = judge(serve(lambda n, b: (200, data, {})), tries=2)
    assert reward(["q"], ["a"]) == [0.0]
    assert reward.failures == {"malformed reply": 1}
    reward.close()


def test_time_out_and_dead_server_fall_back(serve):
    reward = judge(serve(lambda n, b: time.sleep(0.5) or said("1")), timeout=0.1, tries=1)
    assert reward(["q"], ["a"]) == [0.0] and reward.failures == {"ReadTimeout": 1}
    reward.close()
    dead = judges.HTTPJudge("http://127.0.0.1:9/v1", "m", chat, tries=2, backoff=0.01)
    assert dead(["q"], ["a"]) == [0.0] and dead.failures == {"ConnectError": 1}
    dead.close()


def test_unreadable_and_out_of_range_replies(serve):
    replies = {"a": "no idea", "b": "0.7", "c": "nan"}
    server = serve(lambda n, b: said(replies[b["messages"][0]["content"][-1]]))
    reward = judge(server, range=(0.0, 0.5))
    assert reward(["q"] * 3, ["a", "b", "c"]) == [0.0, 0.5, 0.0]
    assert reward.failures == {"unreadable reply": 2}
    reward.close()


def test_prefetch_overlaps_with_other_work(serve):
    allowed = threading.Event()
    server = serve(lambda n, b: allowed.wait(30) and said("1"))
    reward = judge(server, timeout=60.0)
    reward.prefetch(["q"] * 4, list("abcd"))  # returns though no reply can come yet
    while len(server.bodies) < 4:
        time.sleep(0.01)
    allowed.set()
    assert reward(["q"] * 4, list("abcd")) == [1.0] * 4
    assert len(server.bodies) == 4
    reward.close()


def test_cache_lives_across_runs(serve, tmp_path):
    server = serve(lambda n, b: said("0.5"))
    for _ in range(2):
        reward = judge(server, cache=tmp_path / "replies.sqlite")
        assert reward(["q"], ["a"]) == [0.5]
        reward.close()
    assert len(server.bodies) == 1


def test_key_comes_from_the_environment(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = serve(lambda n, b: said("1"))
    reward = judge(server, api_key_env="JUDGE_KEY")
    reward(["q"], ["a"])
    reward.close()
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [("0.8", 0.8), ("Score: 1.", 1.0), ("1.0/10 no", 1.0), ("7", None), ("", None),
     ("x" * 10**6, None), ("10", None), ("0.5 or 0.7", 0.5)],
)  # fmt: skip
def test_score_parser(reply, score):
    assert judges.score_between_0_and_1(reply) == score


def test_chat_text_of_chats_with_images():
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": None},
    ]
    assert judges.http.chat_text(turns) == "a\nb"


def scorer():
    torch.manual_seed(0)
    model = torch.nn.Linear(26, 1)

    def score(texts):
        counts = torch.tensor([[t.count(chr(97 + i)) for i in range(26)] for t in texts])
        return model(counts.float())[:, 0]

    return model, score


def test_model_reward_batches_keep_order_and_prefetch_is_used():
    _, score = scorer()
    sizes = []

    def counted(texts):
        sizes.append(len(texts))
        return score(texts)

    reward = judges.ModelReward(counted, batch_size=3, transform=torch.sigmoid)
    texts = ["abc" * i for i in range(8)]
    with torch.no_grad():
        expected = torch.sigmoid(score([f"q\n{t}" for t in texts])).tolist()
    reward.prefetch(["q"] * 8, texts)
    assert reward(["q"] * 8, texts) == pytest.approx(expected)
    assert sizes == [3, 3, 2]
    assert reward(["q"], ["abc"]) == pytest.approx(expected[1:2])


def test_classifier_reward_is_the_first_logit():
    transformers = pytest.importorskip("transformers")
    from fastgrpo.testing.processors import tiny_tokenizer

    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, num_labels=2,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(config)
    config.pad_token_id = tokenizer.pad_token_id
    model = transformers.Qwen2ForSequenceClassification(config).eval()
    reward = judges.ModelReward.from_classifier(model, tokenizer, batch_size=2)
    got = reward(["find the 7"] * 3, ["1 2 3", "4", ""])
    ids = tokenizer("find the 7\n1 2 3", return_tensors="pt")
    assert got[0] == pytest.approx(model(**ids).logits[0, 0].item(), abs=1e-5)


def test_bradley_terry_loss_values():
    loss = judges.bradley_terry_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((0.3132617 + 0.6931472) / 2)
    assert judges.bradley_terry_loss(torch.zeros(0), torch.zeros(0)).item() == 0.0


def test_co_trained_reward_learns_the_rule():
    model, score = scorer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def rule(prompts, completions, **columns):
        return [float("z" in c) for c in completions]

    reward = judges.CoTrainedReward(score, rule, optimizer, group_size=2)
    before = reward(["q"] * 4, ["az", "ab", "bz", "b"])
    for _ in range(30):
        reward(["q"] * 4, ["az", "ab", "bz", "b"])
    after = reward(["q"] * 4, ["az", "ab", "bz", "b"])
    assert (
        after[0] > after[1] and after[2] > after[3] and after[0] - after[1] > before[0] - before[1]
    )
    assert reward.losses[-1] < reward.losses[0]
    steps = len(reward.losses)
    reward(["q"] * 2, ["az", "bz"])  # no wrong answer, no pair, no step
    assert len(reward.losses) == steps


def test_group_pairs_stay_inside_groups_and_skip_unscored():
    pairs = judges.group_pairs(list("abcd"), [1.0, None, 0.0, 1.0], 2)
    assert pairs == [("d", "c")]


def test_refuses_bad_settings():
    with pytest.raises(InputError, match="tries"):
        judges.HTTPJudge("http://127.0.0.1:9", "m", chat, tries=0)
    with pytest.raises(InputError, match="batch_size"):
        judges.ModelReward(lambda t: t, batch_size=0)


def test_implicit_process_reward_scores_then_learns_to_prefer_what_wins():
    torch.manual_seed(0)
    policy, reference = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    reference.load_state_dict(policy.state_dict())

    def logp(model, prompts, completions):
        return [
            -torch.nn.functional.softplus(model(torch.eye(3)[: len(c)])[:, 0]) for c in completions
        ]

    def rule(prompts, completions, **columns):
        return [1.0, 0.0, 1.0, None]

    reward = judges.ImplicitProcessReward(
        policy, reference, logp, rule, torch.optim.SGD(policy.parameters(), lr=1.0), group_size=2
    )
    texts = ["a", "ab", "abc", "a"]
    assert reward(["q"] * 4, texts) == [0.0] * 4  # phi starts as the reference
    for _ in range(20):
        after = reward(["q"] * 4, texts)
    assert after[0] > after[1]
    assert reward.losses[-1] < reward.losses[0]
    assert all(p.grad is None for p in reference.parameters())
