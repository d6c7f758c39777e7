"""Generated media behind URLs of this server, for clients that show a link in the text."""

from __future__ import annotations

import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from mmllm.server.settings import ServerSettings

PATH = "/made/"
"""URL prefix of the files. An image in Markdown cannot send a token, so its name is the secret."""
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.[a-z0-9]{2,4}", re.ASCII)


def is_name(name: str) -> bool:
    """Return whether this is a possible name of a file."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class File:
    """One file. `until`: when it expires, by `time.monotonic`."""

    data: bytes
    suffix: str
    until: float


class GeneratedFiles:
    """The newest files, bounded in number, bytes and age; the oldest is evicted first."""

    def __init__(self, settings: ServerSettings):
        self._settings = settings
        self._files: OrderedDict[str, File] = OrderedDict()

    def add(self, data: bytes, suffix: str) -> str:
        """Store a file and return the path of its URL."""
        settings = self._settings
        self._forget_old()
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._files[name] = File(data, suffix, time.monotonic() + settings.retention_seconds)
        while len(self._files) > 1 and (
            len(self._files) > settings.max_files or self.size > settings.max_file_bytes
        ):
            self._files.popitem(last=False)
        return PATH + name

    def get(self, name: str) -> File | None:
        """Return a file by its name, or None once it has expired."""
        self._forget_old()
        return self._files.get(name)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(file.data) for file in self._files.values())

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._files and next(iter(self._files.values())).until <= now:
            self._files.popitem(last=False)
