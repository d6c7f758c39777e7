"""Chat templates and patterns that others wrote, run in a process that ends itself.

A template is a program: two loops inside each other, `9 ** 9 ** 9` or a text that doubles forty
times keep whoever renders it, and no thread can be given up. So one small process per process of
ours (this file as a script: the standard library and jinja2, no torch) renders for it, in bounded
computing time and memory. It knows jinja as transformers has it (utils/chat_template_utils.py).
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import IO, Any

SECONDS = 1.0
"""Of computing, for one template or pattern."""
_WAIT = 60.0
"""Seconds until the process is ended from outside: where it cannot count its own."""
_MEMORY = 2**29
_CHARACTERS = 2**20
"""Of a template's text, beside four times what it is given: a tokenizer takes seconds for more."""


class InputRejected(Exception):
    """What a template, or the reader of a pattern, says against what it was given."""

    def __init__(self, message: str, *, syntax: bool = False):
        super().__init__(message)
        self.syntax = syntax
        """Whether no input at all would do."""


class ResourcesExhausted(Exception):
    """The time or the memory that it may take was not enough."""


def start() -> None:
    """Have the process begin, so that nobody waits for it later."""
    with _lock:
        _process()


def render(template: str, variables: Mapping[str, Any]) -> str:
    """A jinja template's text; raises InputRejected and ResourcesExhausted."""
    return _ask({"template": template, "variables": dict(variables)})


def full_matches(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a regular expression matches completely.

    Raises:
        InputRejected: the pattern is invalid.
        ResourcesExhausted: matching takes too much time or memory.
    """
    return _ask({"pattern": pattern, "names": list(names)})


_lock = threading.Lock()
_running: subprocess.Popen[str] | None = None


def _ask(request: dict[str, Any]) -> Any:
    line = json.dumps(request, default=str)
    with _lock:
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        overdue = threading.Timer(_WAIT, process.kill)
        overdue.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        except BaseException:  # interrupted: what it still says belongs to nobody
            _end()
            raise
        finally:
            overdue.cancel()
        if not answer.endswith("\n"):
            _end()
            raise ResourcesExhausted(
                f"it takes more than {SECONDS:g} s of computing, or too much memory"
            )
    found = json.loads(answer)
    if "refused" in found:
        raise InputRejected(found["refused"], syntax=found["syntax"])
    return found["result"]


def _process() -> subprocess.Popen[str]:
    """The running process, or a new one; under the lock."""
    global _running
    if _running is None or _running.poll() is not None:
        _end()
        _running = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert _running.stdin is not None
        # Where libraries are, but for the working folder, where a checkpoint may lie.
        places = [place for place in sys.path if place and not _is_working_folder(place)]
        with suppress(OSError):  # it ended at once: the first answer tells
            _running.stdin.write(json.dumps(places) + "\n")
            _running.stdin.flush()
    return _running


def _is_working_folder(place: str) -> bool:
    with suppress(OSError):
        return os.path.samefile(place, ".")
    return False


def _end() -> None:
    global _running
    if _running is not None:
        _running.kill()
        _running.communicate()
        _running = None


def _forget() -> None:
    """After a fork: the process answers the parent."""
    global _running, _lock
    _lock = threading.Lock()
    if _running is not None:
        for pipe in (_running.stdin, _running.stdout):
            if pipe is not None:
                os.close(pipe.fileno())
        _running.returncode = 0  # not ours to wait for
        _running = None


if __name__ != "__main__":
    atexit.register(_end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


# --- in the process -----------------------------------------------------------------------------


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer until there are no more requests. The first line says where libraries are."""
    sys.path[:] = json.loads(requests.readline())
    environment = _environment()
    _limit_memory()
    compiled: dict[str, Any] = {}
    for line in requests:
        request = json.loads(line)
        _count_time(SECONDS)
        try:
            if "pattern" in request:
                pattern = re.compile(request["pattern"])
                result: Any = [name for name in request["names"] if pattern.fullmatch(name)]
            else:
                text = request["template"]
                if text not in compiled:
                    compiled = {text: environment.from_string(text)}  # one model, one template
                result = compiled[text].render(**request["variables"])
                given = len(json.dumps(request["variables"]))
                if len(result) > _CHARACTERS + 4 * given:
                    raise ValueError(f"it writes {len(result)} characters")
            answer = {"result": result}
        except MemoryError:
            return  # which tells it, and gives back what there is
        except Exception as error:  # whatever a template raises
            syntax = type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError")
            said = " ".join(str(error).split())[:300] or type(error).__name__
            answer = {"refused": said, "syntax": syntax}
        _count_time(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, most))


def _count_time(seconds: float) -> None:
    """After so much computing the system ends this process, whatever it does; 0: never."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _environment() -> Any:
    """jinja as transformers sets it up for chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant says; here nothing asks for it."""

        tags = {"generation"}  # noqa: RUF012 - as jinja has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_said")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class Dictionary:
        """`dict`, without the attributes of a class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda wanted: datetime.now().strftime(wanted),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
