# SPDX-License-Identifier: Apache-2.0
"""Runs the functions of a file in one process or in several, as `accelerate launch` would.

The configurations are those the package ships. One server process imports the file once; a run is
forked from it, with the environment that `accelerate launch` itself makes of the configuration.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

MODES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


class Launcher:
    """A server process that runs functions of the file `job`; `with` ends it.

    Without a GPU the file calls `cpu_processes.install` when it is imported.
    """

    def __init__(self, job: Path):
        self.job = job

    def __enter__(self) -> Launcher:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "fastgrpo.testing.launch", str(self.job)],
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def __call__(
        self,
        mode: str,
        function: str,
        *arguments,
        processes: int = 2,
        seconds: float = 300,
        kill_after: tuple[Path, float] | None = None,
        dies: bool = False,
        options: tuple[str, ...] = (),
    ) -> bool:
        """`function(*arguments)` in `processes` processes of `mode`, or alone for "one".

        `options` are more of `accelerate launch`. `kill_after`: a file, and the seconds after it
        is there when all are killed (SIGKILL); `dies`: one of them kills itself. Whether they came
        to their end; an exception in one of them is an AssertionError with what it printed.
        """
        task = dict(mode=mode, function=function, arguments=[str(a) for a in arguments])
        task |= dict(processes=processes, seconds=seconds, dies=dies, options=options)
        task["kill_after"] = kill_after and (str(kill_after[0]), kill_after[1])
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        reply = json.loads(self._server.stdout.readline())
        assert reply["ended"] or reply["killed"], f"{mode} {function}\n{reply['log'][-12000:]}"
        return reply["ended"]


def serve(job: Path) -> None:
    sys.path.insert(0, str(job.parent))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions = importlib.import_module(job.stem)
    gc.collect()
    gc.freeze()  # every run begins with a collection, which need not look through all of it

    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(_run(functions, **task)), file=replies, flush=True)


def _run(job, mode, function, arguments, processes, options, **ends):
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run

    ranks = _Ranks(lambda: getattr(job, function)(*arguments), **ends)
    if mode == "one":
        return ranks.fork(1, None)
    config = files("fastgrpo") / "accelerate_configs" / f"{mode}.yaml"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = ["--config_file", str(config), "--num_processes", str(processes)]
    own += ["--mixed_precision", "no", "--main_process_port", str(port)]
    options = [*own, *options, "job.py"]
    torchrun, run.run = run.run, lambda args: ranks.fork(int(args.nproc_per_node), port)
    try:
        launch_command(launch_command_parser().parse_args(options))
    finally:
        run.run = torchrun
    return ranks.reply


class _Ranks:
    """The processes of one run, forked from this one."""

    def __init__(self, work, seconds, kill_after, dies):
        self.work, self.seconds, self.dies = work, seconds, dies
        self.mark, self.delay = kill_after or (None, 0)

    def fork(self, processes: int, port: int | None) -> dict:
        with open(os.memfd_create("log"), "w+") as log:
            pids = [self._forked(rank, processes, port, log.fileno()) for rank in range(processes)]
            killed, failed = self._wait(pids)
            log.seek(0)
            self.reply = {"ended": not (killed or failed), "killed": killed, "log": log.read()}
        return self.reply

    def _wait(self, pids: list[int]) -> tuple[bool, bool]:
        """Whether the run was killed as it should be, and whether it failed otherwise."""
        limit, kill_at = time.monotonic() + self.seconds, None
        running, killed, failed = set(pids), False, False
        while running:
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.remove(pid)
                    failed |= status != 0
                    killed |= self.dies and status == signal.SIGKILL
            now = time.monotonic()
            if kill_at is None and self.mark and os.path.exists(self.mark):
                kill_at = now + self.delay
            if running and not failed and kill_at is not None and now >= kill_at:
                killed = True
            if now > limit and not (failed or killed):
                failed = True
                for pid in running:  # where they hang
                    os.kill(pid, signal.SIGUSR1)
                time.sleep(1)
            if killed or failed:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return killed, failed and not killed

    def _forked(self, rank: int, processes: int, port: int | None, log: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            if port is not None:
                world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank}
                world |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in world.items()}
            self.work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # gloo's threads may outlive the interpreter


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
