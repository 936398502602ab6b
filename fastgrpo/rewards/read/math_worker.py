# SPDX-License-Identifier: Apache-2.0
"""A process that verifies mathematical answers and may be killed: runs as a script, stdlib pipes.

The parent imports math-verify once and forks one child. Each request is one JSON line; the child
answers with one JSON line, or dies of what SymPy raised. An alarm with its default action kills the
child when time is up, even inside native code, and an address-space limit bounds its memory; the
parent then reports the failure and forks the next child, which takes milliseconds because
everything is imported.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys


def main(memory_mb: int) -> None:
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing a library prints may end up among the replies
    import latex2sympy2_extended  # noqa: F401
    import math_verify

    # The first call imports and builds parsers; done here, children inherit it.
    _verify(math_verify, {"a": "$\\frac{1}{2}$", "b": "0.5", "style": "default"})
    child = None
    replies.write(b"{}\n")
    for line in sys.stdin.buffer:
        child = child or _fork(math_verify, memory_mb)
        reply = _ask(child, line)
        if reply is None:
            signum = os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1])
            timed_out = signum == -signal.SIGALRM
            reply = b'{"error": "timeout"}\n' if timed_out else b'{"error": "crash"}\n'
            child[1].close(), child[2].close()
            child = None
        replies.write(reply)


def _ask(child, line: bytes) -> bytes | None:
    _, to_child, from_child = child
    try:
        to_child.write(line)
        to_child.flush()
    except BrokenPipeError:
        return None
    return from_child.readline() or None


def _fork(math_verify, memory_mb: int):
    request_read, request_write = os.pipe()
    reply_read, reply_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(request_write), os.close(reply_read)
        status = 1
        try:
            _serve(math_verify, memory_mb, request_read, reply_write)
            status = 0
        finally:
            os._exit(status)
    os.close(request_read), os.close(reply_write)
    return pid, os.fdopen(request_write, "wb"), os.fdopen(reply_read, "rb")


def _serve(math_verify, memory_mb: int, request_read: int, reply_write: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    limit = used + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(request_read, "rb") as requests, os.fdopen(reply_write, "wb", 0) as replies:
        for line in requests:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["timeout"])
            try:
                reply = {"equal": _verify(math_verify, request)}
            except MemoryError:
                reply = {"error": "memory"}
            signal.setitimer(signal.ITIMER_REAL, 0)
            replies.write(json.dumps(reply).encode() + b"\n")


def _verify(math_verify, request: dict) -> bool:
    """`verify(parse(a), parse(b))`; style "latex" reads b as strict LaTeX, boxed first."""
    a, b = request["a"], request["b"]
    if request["style"] == "default":
        a = math_verify.parse(a, parsing_timeout=None)
        b = math_verify.parse(b, parsing_timeout=None)
    else:
        a = math_verify.parse(a, extraction_mode="first_match", parsing_timeout=None)
        b = math_verify.parse(
            b,
            extraction_config=[_strict_latex(math_verify)],
            extraction_mode="first_match",
            parsing_timeout=None,
        )
    if not a or not b:
        return False
    return bool(math_verify.verify(a, b, timeout_seconds=None))


def _strict_latex(math_verify):
    from latex2sympy2_extended import NormalizationConfig

    return math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True
        ),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
