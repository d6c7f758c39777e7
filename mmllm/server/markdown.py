"""Convert media in a reply to Markdown and back, for clients that read only `content`."""

from __future__ import annotations

import re
from collections.abc import Iterator

SEPARATOR = "\n\n"
_WORDS = {"image": "picture", "audio": "sound", "video": "clip"}
_MODALITIES = {word: modality for modality, word in _WORDS.items()}
_LINK = re.compile(
    rf"(?:\n\n)?!?\[({'|'.join(_MODALITIES)})\]\(([a-z]{{1,8}}:[^()\s]+)\)(?:\n\n)?", re.ASCII
)


def link(modality: str, url: str) -> str:
    """Write a medium in Markdown: an image inline, audio and video as links."""
    return f"{'!' if modality == 'image' else ''}[{_WORDS[modality]}]({url})"


def split(text: str) -> Iterator[tuple[str | None, str]]:
    """Split the Markdown that `Content` writes into (None, text) and (modality, URL), in order."""
    end = 0
    for found in _LINK.finditer(text):
        if found.start() > end:
            yield None, text[end : found.start()]
        yield _MODALITIES[found[1]], found[2]
        end = found.end()
    if end < len(text):
        yield None, text[end:]


class Content:
    """The text of a streamed reply with its media in place; text after a medium waits for it."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[bool, str]] = {}
        """Index of a part -> (whether it is a medium, text that can be written)."""
        self._pending: set[int] = set()
        """Indices of media that are not ready."""
        self._last: tuple[int, bool] | None = None
        """(index, whether it is a medium) of the part that was written last."""

    def text(self, place: int, text: str) -> str:
        """Append to a text part; return the text that can be written now."""
        self._parts[place] = (False, self._parts.get(place, (False, ""))[1] + text)
        return self._ready()

    def started(self, place: int) -> None:
        """Announce a medium at this index."""
        self._pending.add(place)

    def medium(self, place: int, link: str) -> str:
        """Set the link of a medium; return the text that can be written now."""
        self._pending.discard(place)
        self._parts[place] = (True, link)
        return self._ready()

    def rest(self) -> str:
        """Return the remaining text at the end of the reply."""
        self._pending.clear()
        return self._ready()

    def _ready(self) -> str:
        until = min(self._pending, default=None)
        written = ""
        for place in sorted(self._parts):
            if until is not None and place > until:
                break
            is_medium, text = self._parts.pop(place)
            if not text:
                continue
            last = self._last
            if last is not None and last[0] != place and (is_medium or last[1]):
                written += SEPARATOR
            self._last = (place, is_medium)
            written += text
        return written
