"""The one place that writes to a terminal: results to stdout, everything else to stderr.

Logging is set up here, once, by the command line; the library itself only logs.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import unicodedata


def echo(text: str = "") -> None:
    """A result, on stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A remark, on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def error(error: BaseException) -> None:
    """An error in one message, without a stack trace, on stderr."""
    number = process_number()
    where = f"mmllm (process {number})" if number else "mmllm"
    note(f"{where}: {error}")


def write(text: str) -> None:
    """A piece of a result, on stdout, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def status(text: str = "") -> None:
    """Show a line on stderr that the next one overwrites; nothing where stderr is a file.

    Args:
        text: the line, cut to the terminal's width; an empty text clears it.
    """
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        sys.stderr.write(f"\r\x1b[K{text[: columns - 1]}")  # what wraps would not be overwritten
        sys.stderr.flush()


def show_progress(what: str, step: int, steps: int) -> None:
    """Show a counter on stderr that overwrites itself: `image 12/20`; nothing where stderr is a
    file.

    Args:
        what: what is counted.
        step: steps done.
        steps: the number of steps; the counter is cleared at the last.
    """
    status(f"{what} {step}/{steps}" if step < steps else "")


def strip_controls(text: str) -> str:
    """Remove the control characters of foreign text, which could control the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def dim(text: str) -> str:
    """Return text in the terminal's dim style; unchanged where stdout is a file."""
    dim = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.getenv("NO_COLOR")
    return f"\x1b[2m{text}\x1b[0m" if dim else text


def tolerate_encodings() -> None:
    """Let stdin and stdout replace what their encoding has no characters for, instead of failing in
    the midst of a reply."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # not a notebook's stream
            stream.reconfigure(errors="replace")


def process_number() -> int:
    """This process's number among those that `accelerate launch` started; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def set_up_logging(*, debug: bool = False) -> None:
    """Messages of mmllm on stderr, of the main process only; other packages when they warn."""
    quiet = process_number() != 0
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if debug else "%(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("mmllm").setLevel(
        logging.ERROR if quiet else logging.DEBUG if debug else logging.INFO
    )
    if not debug:
        # These packages keep a logger and bars of their own, and Python's warnings are for us.
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        for name in ("TRANSFORMERS", "HF_HUB"):
            os.environ.setdefault(f"{name}_DISABLE_PROGRESS_BARS", "1")
        logging.captureWarnings(True)
        for name in ("py.warnings", "bitsandbytes"):  # the latter of kernels that it looks for
            logging.getLogger(name).setLevel(logging.ERROR)


class _AboveBars(logging.Handler):
    """Writes a line above a progress bar that is being drawn, instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:
                from tqdm import tqdm

                tqdm.write(line, file=sys.stderr)
            else:
                note(line)
        except Exception:
            self.handleError(record)
