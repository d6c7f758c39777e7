"""Python programs in processes of their own that need not import PyTorch again.

`import torch` and its companions take seconds of CPU time in every process. The programs here are
forked from one server process (multiprocessing's forkserver) that has imported them once, and
nothing of mmllm. A test of imports, of the interpreter or of a launcher itself starts a real
`sys.executable` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
IMPORTED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "torchaudio.functional",
    "accelerate",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha",
    "diffusers.pipelines.stable_audio.pipeline_stable_audio",
    "diffusers.pipelines.wan.pipeline_wan",
    "peft",
    "pydantic",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
_FORKED = multiprocessing.get_context("forkserver")


class Process:
    """A Python program that runs, with the interface of `subprocess.Popen`.

    Args:
        arguments: those of the interpreter: `-m MODULE …`, `-c CODE …` or `SCRIPT …`.
        cwd: its working folder.
        env: its whole environment; None: this process's.
        stdin: a file.
        stdout: a file, made if there is none.
        stderr: a file, made if there is none.
        terminal: whether stdin is a terminal that becomes the one that controls the process.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdin: Path | str = os.devnull,
        stdout: Path | str = os.devnull,
        stderr: Path | str = os.devnull,
        terminal: bool = False,
    ):
        self.args = list(arguments)
        _FORKED.set_forkserver_preload(IMPORTED)
        variables = mock.patch.dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        with variables, contextlib.chdir(ROOT):  # what counts while the server imports
            forkserver.ensure_running()
        environment = dict(os.environ if env is None else env)
        streams = [os.fspath(stream) for stream in (stdin, stdout, stderr)]
        self._process = _FORKED.Process(
            target=_program, args=(self.args, os.fspath(cwd), environment, streams, terminal)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    typed: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end and return what it printed, as `subprocess.run` does."""
    with tempfile.TemporaryDirectory() as folder:
        stdin, stdout, stderr = (Path(folder) / name for name in ("stdin", "stdout", "stderr"))
        stdin.write_text(typed, encoding="utf-8")
        process = Process(arguments, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
        try:
            process.wait(timeout)
        finally:
            process.kill()
            code = process.wait()
        out, err = (stream.read_text(encoding="utf-8") for stream in (stdout, stderr))
    return subprocess.CompletedProcess(process.args, code, out, err)


def restore_signal_handlers() -> None:
    """In a new process: a program whose parent ignores signals (nohup, a job in the background)
    would ignore them too."""
    for name in ("SIGINT", "SIGHUP", "SIGTERM"):
        number = getattr(signal, name)
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


# --- in the new process -------------------------------------------------------------------------


def _program(
    arguments: list[str], cwd: str, environment: dict[str, str], streams: list[str], terminal: bool
) -> None:
    restore_signal_handlers()
    if terminal:
        os.setsid()  # the first terminal that is opened from here on is the one that controls it
    for number, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        _execute(arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _execute(arguments: list[str]) -> None:
    """Do what the interpreter does with its arguments."""
    first, *rest = arguments
    if first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
