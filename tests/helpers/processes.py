"""Programs in processes of their own."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, TextIO

from helpers.models import ROOT

PROGRAM = "import runpy; runpy.run_module('llava_lite', run_name='__main__', alter_sys=True)"
PRELOAD = ["torch", "llava_lite.cli.program", "llava_lite.checkpoints.load"]


def run_python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this package and no default model."""
    env = {key: value for key, value in os.environ.items() if key != "LLAVA_LITE_MODEL"}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=120)


class Fork:
    """A process that runs code as `python -c code *args` does, with the methods of `Popen`.

    It is forked from a process that has imported torch. That import is most of a fresh start."""

    def __init__(self, code: str, *args: object, **environment: str) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        (out, out_end), (err, err_end) = (context.Pipe(duplex=False) for _ in range(2))
        task = (code, tuple(map(str, args)), environment, out_end, err_end)
        self.process = context.Process(target=run_code, args=task)
        self.process.start()
        out_end.close()
        err_end.close()
        self.stdout, self.stderr = text_of(out), text_of(err)

    @property
    def returncode(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        self.process.join(timeout)
        assert self.returncode is not None, "it still runs"
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
        self.process.join(60)


def start_program(*words: object, **environment: str) -> Fork:
    """Run `llava-lite *words`."""
    return Fork(PROGRAM, *words, **environment)


def run_code(
    code: str,
    args: tuple[str, ...],
    environment: Mapping[str, str],
    out: Connection,
    err: Connection,
) -> None:
    """Do in the new process what its interpreter would do."""
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(environment)
    sys.argv = ["-c", *args]
    exec(compile(code, "<fork>", "exec"), {"__name__": "__main__"})


def text_of(pipe: Connection) -> TextIO:
    """The pipe as a text file."""
    with pipe:
        return os.fdopen(os.dup(pipe.fileno()))
