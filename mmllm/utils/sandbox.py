"""Untrusted chat templates and regular expressions, run in a subprocess with bounded resources.

A chat template is a program: nested loops, `9 ** 9 ** 9` or a text that doubles forty times block
the thread that renders it, and a thread cannot be killed. Therefore each process starts one small
subprocess (this file as a script: the standard library and jinja2, no torch) that renders templates
and matches patterns in bounded CPU time and memory. Its jinja environment is that of transformers
(utils/chat_template_utils.py).
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
"""CPU time limit for one template or pattern."""
_WAIT = 60.0
"""Seconds of wall clock after which the subprocess is killed, where it cannot limit its CPU time.
"""
_MEMORY = 2**29
"""Bytes of address space of the subprocess."""
_CHARACTERS = 2**20
"""Maximum length of a rendered text, plus four times that of its variables: a tokenizer takes
seconds for more."""


class InputRejected(Exception):
    """The template raised an error for its variables, or the pattern is invalid.

    Args:
        message: the error of the template or of the pattern's compiler.
        syntax: whether the template itself is invalid, for all variables.
    """

    def __init__(self, message: str, *, syntax: bool = False):
        super().__init__(message)
        self.syntax = syntax


class ResourcesExhausted(Exception):
    """The template or pattern exceeded its time or memory limit."""


def start() -> None:
    """Start the subprocess, so that the first request does not wait for it."""
    with _lock:
        _process()


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a jinja template.

    Args:
        template: the text of the template.
        variables: JSON-like data by variable name.

    Returns:
        The rendered text.

    Raises:
        InputRejected: the template is invalid, or raises an error.
        ResourcesExhausted: rendering takes too much time or memory.
    """
    return _ask({"template": template, "variables": dict(variables)})


def full_matches(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a regular expression matches completely.

    Args:
        pattern: the regular expression, which may be hostile.
        names: the names.

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
        except BaseException:  # interrupted: its late response would answer the next request
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
    """Return the running subprocess, or start a new one. The caller holds the lock."""
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
            start_new_session=True,  # Ctrl-C does not reach it
        )
        assert _running.stdin is not None
        # Import paths, except the working folder, which may hold files of a checkpoint.
        places = [place for place in sys.path if place and not _is_working_folder(place)]
        with suppress(OSError):  # it ended at once: the first request reports that
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
    """Forget the subprocess after a fork: it belongs to the parent."""
    global _running, _lock
    _lock = threading.Lock()
    if _running is not None:
        for pipe in (_running.stdin, _running.stdout):
            if pipe is not None:
                os.close(pipe.fileno())
        _running.returncode = 0  # the parent waits for it
        _running = None


if __name__ != "__main__":
    atexit.register(_end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


# --- in the subprocess --------------------------------------------------------------------------


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until the input ends.

    Args:
        requests: JSON lines; the first is the list of import paths.
        answers: receives one JSON line per request.
    """
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
                    compiled = {text: environment.from_string(text)}  # a model has one template
                result = compiled[text].render(**request["variables"])
                given = len(json.dumps(request["variables"]))
                if len(result) > _CHARACTERS + 4 * given:
                    raise ValueError(f"it writes {len(result)} characters")
            answer = {"result": result}
        except MemoryError:
            return  # the caller reports it; ending frees the memory
        except Exception as error:  # templates raise any exception
            syntax = type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError")
            message = " ".join(str(error).split())[:300] or type(error).__name__
            answer = {"refused": message, "syntax": syntax}
        _count_time(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not available on every system
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, most))


def _count_time(seconds: float) -> None:
    """Let the system end this process after so many seconds of CPU time; 0 removes the limit."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _environment() -> Any:
    """Return the jinja environment in which transformers renders chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}`, which marks replies; it has no effect here."""

        tags = {"generation"}  # noqa: RUF012 - as in jinja's own extensions

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_render_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _render_body(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """jinja's namespace without attributes whose names begin with an underscore."""

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
        """A callable like `dict` without the attributes of a class."""

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
