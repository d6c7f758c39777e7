"""Options under their former names: still understood, with a warning, until version 0.3."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm import console

RENAMED: dict[str, dict[str, str]] = {
    "data": {"--workers": "--num-workers"},
    "evaluate": {"--beside": "--baseline", "--rows": "--tasks"},
    "plan": {"--processes": "--num-processes"},
    "serve": {
        "--batch": "--max-batch-size",
        "--prefixes": "--prefix-cache-size",
        "--waiting": "--max-queue-size",
    },
}
"""Command -> former name of an option -> its name."""


def with_present_names(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line with renamed options replaced; each is noted on stderr."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    renamed = RENAMED.get(command, {})
    present = []
    for number, word in enumerate(arguments):
        if word == "--":  # positional arguments only from here on
            return [*present, *arguments[number:]]
        former, equals, value = word.partition("=")
        if former in renamed:
            name = renamed[former]
            console.note(f"mmllm {command}: {former} is now called {name}; please rename it")
            word = f"{name}{equals}{value}"
        present.append(word)
    return present
