# SPDX-License-Identifier: Apache-2.0
"""Every reward on hostile text: within 20 ms and 64 MB of one megabyte, in range, no exception."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reward_rows import MATHEMATICAL, call

from fastgrpo import rewards
from fastgrpo.rewards.read import math_pool

BOUND = 0.020  # seconds of CPU per completion: the promise of every reward
PLAIN = [name for name in rewards.names() if name not in MATHEMATICAL]

_BOX = '{"bbox_2d": [10, 10, 110, 110], "label": "cat"}'


def _fenced(*items: str) -> str:
    return f"<think>t</think><answer>```json\n[{', '.join(items)}]\n```</answer>"


def _item(box: str, label: str = '"cat"') -> str:
    return _fenced(f'{{"bbox_2d": {box}, "label": {label}}}')


PARSING = {
    "million-open-brackets": "[" * 10**6,
    "million-brackets": "[" * 500_000 + "]" * 500_000,
    "nested-20k": "<answer>```json\n" + "[" * 20_000 + "]" * 20_000 + "\n```</answer>",
    "10k-digit-int": _item("[" + "9" * 10_000 + ", 1, 2, 3]"),
    "nan": _item("[NaN, NaN, NaN, NaN]"),
    "infinity": _item("[-Infinity, 0, Infinity, 1]"),
    "1e999": _item("[0, 0, 1e999, 1e999]"),
    "duplicate-keys": _fenced('{"bbox_2d": [1, 2, 3, 4], "bbox_2d": "x", "label": "cat"}'),
    "lone-surrogate": "<think>\ud800</think><answer>\udfff[1, 2, 3, 4]</answer>",
    "nul": "<think>\x00</think><answer>\x00{\x00}</answer>",
    "rtl-override": "<think>t</think><answer>\u202e[4, 3, 2, 1]\u202c</answer>",
    "arabic-digits": "<think>t</think><answer>{[١, ٢, ٣, ٤]}</answer>",
    "full-width-digits": "<think>t</think><answer>{[１, ２, ３, ４]}</answer>",
    "ten-megabytes": "a [1, 2, 3, 4] " * 700_000,
    "500k-open-objects": "[{" * 500_000,
    "boxes-200": _fenced(*[_BOX] * 200),
    "boxes-400": _fenced(*[_BOX] * 400),
    "boxes-4000": _fenced(*[_BOX] * 4000),
    "repeated-tags": "</think><answer>" * 60_000,
    "unclosed-tags": "<think><answer>[1, 2" * 20_000,
    "answer-before-think": "<answer>[1, 2, 3, 4]</answer><think>t</think>",
    "two-answers": "<think>t</think><answer>B</answer><answer>[1, 2, 3, 4]</answer>",
    "empty": "",
    "whitespace": " \t\n\r\u3000" * 100_000,
    "code-fences": "```json\n```" * 90_000,
    "single-quotes": "<answer>[{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}]</answer>",
    "trailing-comma": _fenced(_BOX, ""),
    "comments": "<answer>```json\n[1, // one\n 2 /* two */]\n```</answer>",
    "yaml-tags": "<answer>!!python/object/apply:os.system ['touch hacked']</answer>",
    "import-eval": "<answer>__import__('os').system('touch hacked')</answer>",
    "import-boxed": "\\boxed{__import__('os').system('touch hacked')}",
    "import-json": _item("\"__import__('os').system('touch hacked')\""),
    "import-literal": "<answer>[__import__('os').system('touch hacked')]</answer>",
    "pickle-base64": "<answer>gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAZ0b3VjaCBolIWU</answer>",
}
BOXES = {
    "string-coordinates": _item('["1", "2", "3", "4"]'),
    "bool-coordinates": _item("[true, false, true, true]"),
    "dict-coordinates": _item('{"x1": 1, "y1": 2, "x2": 3, "y2": 4}'),
    "nested-coordinates": _item("[[[1]], [2], 3, 4]"),
    "label-none": _item("[10, 10, 110, 110]", "null"),
    "label-int": _item("[10, 10, 110, 110]", "7"),
    "label-100k-characters": _item("[10, 10, 110, 110]", '"' + "x" * 100_000 + '"'),
    "confidence-nan": "<answer>[{'Position': [1, 2, 3, 4], 'Confidence': NaN}]</answer>",
    "confidence-1e9": "<answer>[{'Position': [10, 10, 110, 110], 'Confidence': 1e9}]</answer>",
    "confidence-minus-1e9": "<answer>[{'Position': [1, 2, 3, 4], 'Confidence': -1e9}]</answer>",
}
MATH = {
    "9^9^9^9": "$9^{9^{9^9}}$",
    "10^10^10": "$10^{10^{10}}$",
    "factorial-tower": "$((((9!)!)!)!)!$",
    "expansion": "$(x+y+z+w+1)^{200}$",
    "binomial": "$\\binom{1000000000}{500000000}$",
    "sum-to-1e12": "$\\sum_{i=1}^{1000000000000} i^i$",
    "integral": "$\\int x^{x^x} dx$",
    "3000-fractions": "$" + "\\frac{1}{" * 3000 + "1" + "}" * 3000 + "$",
    "20k-parentheses": "(" * 20_000 + "1" + ")" * 20_000,
    "million-digits": "$" + "7" * 10**6 + "$",
    "60x60-matrix": "$\\begin{pmatrix}"
    + "\\\\".join(["&".join("1" * 60)] * 60)
    + "\\end{pmatrix}^{50}$",
    "100k-dollars": "$" * 10**5,
}


def _cpu_seconds(name: str, text: str) -> tuple[float, float | None]:
    """Best of up to three runs in CPU time, which other processes do not disturb."""
    best, value = math.inf, None
    for _ in range(3):
        start = time.thread_time()
        value = call(name, [text])[0]
        best = min(best, time.thread_time() - start)
        if best < BOUND / 2:
            break
    return best, value


@pytest.mark.parametrize("case", [*PARSING, *BOXES])
def test_hostile_text_is_scored_in_time_and_range(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PARSING.get(case) or BOXES.get(case, "")
    slow, wrong = [], []
    for name in PLAIN:
        seconds, value = _cpu_seconds(name, text)
        low, high = rewards.get(name).range
        if seconds > BOUND:
            slow.append((name, round(seconds * 1000)))
        if value is not None and not low <= value <= high:
            wrong.append((name, value))
    assert not slow, f"milliseconds: {slow}"
    assert not wrong
    assert not list(tmp_path.iterdir()), "model text was executed"


@pytest.mark.parametrize("case", MATH)
def test_hostile_mathematics_ends_in_time(case):
    text = f"<think>t</think><answer>{MATH[case]}</answer> \\boxed{{{MATH[case]}}}"
    math_pool.configure(workers=2, timeout=0.3)
    try:
        verdict = math_pool.equal(MATH[case], "42")
        assert not verdict.equal
        for name in ("vlm_r1/math", "vision_sr1/accuracy"):
            assert call(name, [text]) == [0.0]
        assert call("vlm_r1/default", [text])[0] < 0.5
    finally:
        math_pool.configure()


def test_a_killed_worker_is_replaced():
    math_pool.configure(workers=1, timeout=0.3)
    try:
        pairs = [("$9^{9^{9^9}}$", "1"), ("$\\frac{1}{2}$", "0.5"), ("7", "8")]
        verdicts = math_pool.verify(pairs)
        assert [v.equal for v in verdicts] == [False, True, False]
        assert [v.reason for v in verdicts] == ["timeout", None, None]
    finally:
        math_pool.configure()


def test_a_worker_that_needs_too_much_memory_says_so():
    math_pool.configure(workers=1, timeout=5.0, memory_mb=1)
    try:
        verdict = math_pool.equal(MATH["million-digits"], "1")
        assert verdict.equal is False
        assert verdict.reason in ("memory", "crash")
    finally:
        math_pool.configure()


_MEMORY_TEST = """
import json, resource, sys
from reward_rows import call
names, texts = json.load(sys.stdin)
for name in names:
    call(name, ["<answer>[1, 2, 3, 4]</answer>"])
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
limit = used + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in names:
    for text in texts:
        call(name, [text])
"""


def test_a_megabyte_of_text_needs_less_than_64_megabytes():
    texts = [
        PARSING["million-open-brackets"],
        PARSING["500k-open-objects"],
        PARSING["boxes-4000"],
        "[" + "[1, 2, 3, 4], " * 60_000 + "1]",
    ]
    given = json.dumps([PLAIN, texts])
    command = [sys.executable, "-c", _MEMORY_TEST]
    support = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")}
    done = subprocess.run(
        command, input=given, text=True, capture_output=True, timeout=300, env=support
    )
    assert done.returncode == 0, done.stderr[-2000:]
