# SPDX-License-Identifier: Apache-2.0
"""Examples in processes of their own; `fastgrpo.testing.launch` starts them.

Where an example asks a vLLM server, the stand-in is there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import vllm_stand_in  # noqa: E402

vllm_stand_in.pretend_installed()

from fastgrpo.cli import main  # noqa: E402
from fastgrpo.testing import cpu_processes  # noqa: E402

cpu_processes.install()
vllm_stand_in.let_the_client_sync_from_a_cpu()


def train(*arguments: str) -> None:
    main(["train", *arguments])


def train_with_server(checkpoint: str, *arguments: str) -> None:
    """`train` with a server of `checkpoint` beside it."""
    url, server = vllm_stand_in.start(checkpoint)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = ["--vllm_server_base_url", url, "--vllm_group_port", str(port)]
    try:
        main(["train", *arguments, *own])
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
