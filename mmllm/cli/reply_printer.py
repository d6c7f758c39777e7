"""Prints the events of one reply as they come, its parts in their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmllm import console
from mmllm.conversation import Medium
from mmllm.errors import MmllmError
from mmllm.inference.events import Event, MediumReady, MediumStarted, Progress, TextDelta


class ReplyPrinter:
    """Prints one reply: text that follows a medium waits until the medium is complete, and the
    progress is shown in the last line of the terminal.

    Args:
        save_and_show: saves a medium, shows it and returns its file.

    Attributes:
        failure: why a medium could not be saved or shown.
    """

    def __init__(self, save_and_show: Callable[[Medium], Path]):
        self.failure: MmllmError | None = None
        self._save_and_show = save_and_show
        self._texts: dict[int, str] = {}
        self._media: dict[int, Medium | None] = {}
        self._progress: dict[int, str] = {}
        self._status = ""
        self._index = 0
        self._num_printed = 0
        """Characters of the text part at `_index` that are printed."""

    def print(self, event: Event) -> None:
        """Take one event, and print all parts that are complete up to the first that is not."""
        if isinstance(event, TextDelta):
            self._texts[event.part_index] = self._texts.get(event.part_index, "") + event.text
        elif isinstance(event, MediumStarted):
            self._media[event.part_index] = None
            self._progress[event.part_index] = event.modality
        elif isinstance(event, Progress):
            self._progress[event.part_index] = f"{event.modality} {event.step}/{event.steps}"
        elif isinstance(event, MediumReady):
            self._media[event.part_index] = event.medium
            self._progress.pop(event.part_index, None)
        self._advance()
        if not self._num_printed:  # else the line belongs to the text
            self._show_status(" · ".join(self._progress.values()))

    def close(self) -> None:
        """End the line: the reply is complete or was stopped."""
        self._show_status("")
        self._end_line()

    def _advance(self) -> None:
        """Print what is complete, up to the first medium that is still being generated."""
        last = max([*self._texts, *self._media], default=0)
        while self._index <= last:
            if self._index in self._media:
                medium = self._media[self._index]
                if medium is None:
                    return
                self._print_medium(medium)
            else:
                self._print_text()
                if self._index == last:  # more of it may follow
                    return
                self._end_line()
            self._index += 1

    def _print_text(self) -> None:
        text = console.strip_controls(self._texts.get(self._index, "")).lstrip()
        length = len(text.rstrip())  # blanks at the end of a part are left out
        if length > self._num_printed:
            self._show_status("")
            console.write(text[self._num_printed : length])
            self._num_printed = length

    def _print_medium(self, medium: Medium) -> None:
        self._show_status("")
        try:
            path = self._save_and_show(medium)
        except MmllmError as error:
            self.failure = error
            return
        seed = (medium.provenance or {}).get("seed")
        suffix = "" if seed is None else f" seed {seed}"
        console.echo(console.dim(f"[{medium.modality}: {path}]{suffix}"))

    def _show_status(self, status: str) -> None:
        if status != self._status:  # clearing a line that holds no status would clear text
            console.status(status)
        self._status = status

    def _end_line(self) -> None:
        if self._num_printed:
            console.echo()
        self._num_printed = 0
