"""Media within the text of a reply, as Markdown, and back: for clients that know only `content`."""

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
    """A medium in Markdown: a picture is shown in its place, a sound or a clip is a link."""
    return f"{'!' if modality == 'image' else ''}[{_WORDS[modality]}]({url})"


def split(text: str) -> Iterator[tuple[str | None, str]]:
    """The inverse of what `Content` writes: (None, a text) and (modality, URL), in order."""
    end = 0
    for found in _LINK.finditer(text):
        if found.start() > end:
            yield None, text[end : found.start()]
        yield _MODALITIES[found[1]], found[2]
        end = found.end()
    if end < len(text):
        yield None, text[end:]


class Content:
    """The text of a reply with its media in their places, as it becomes known: a text that
    follows a medium waits for it."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[bool, str]] = {}
        """The place of a part -> (it is a medium, what can be written of it)."""
        self._owing: set[int] = set()
        """Places of media that are not ready."""
        self._last: tuple[int, bool] | None = None
        """(place, it is a medium) of what was written last."""

    def text(self, place: int, text: str) -> str:
        """Add to a text; returns what can be written now."""
        self._parts[place] = (False, self._parts.get(place, (False, ""))[1] + text)
        return self._ready()

    def started(self, place: int) -> None:
        """A medium comes here."""
        self._owing.add(place)

    def medium(self, place: int, link: str) -> str:
        """The link of a medium; returns what can be written now."""
        self._owing.discard(place)
        self._parts[place] = (True, link)
        return self._ready()

    def rest(self) -> str:
        """What still waits, at the end of the reply."""
        self._owing.clear()
        return self._ready()

    def _ready(self) -> str:
        until = min(self._owing, default=None)
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
