"""Sessions of the demo: each has a folder for its media, deleted when it has not been used for a
while.

The server keeps the conversation; any number of pages may show one session.
"""

from __future__ import annotations

import contextlib
import mimetypes
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from mmllm import media
from mmllm.conversation import MEDIA, Image, Medium, Message, Video
from mmllm.errors import ConfigError, MediaError, MmllmError
from mmllm.media import isolated
from mmllm.server.settings import INPUT_LIMITS, ServerSettings

UPLOADS = replace(INPUT_LIMITS, pixels=24_000_000)
"""Limits of an uploaded file: the server's, but images up to the size of a camera's."""
SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4"}
"""Modality -> format of generated media, one that every browser shows."""
FILE = re.compile(r"\d{3,6}\.[a-z0-9]{1,5}")
"""Names of media files in a session's folder."""

MAX_TEXT, MAX_TOGETHER = ServerSettings.max_characters, ServerSettings.max_input_media
"""Most characters and media of one message, the server's limits."""
MAX_TURNS, MAX_WORDS, MAX_FILES, MAX_BYTES = 1000, 1_000_000, 400, 2 * UPLOADS.bytes
"""Limits of one conversation: messages, characters, media, and bytes of their files."""
MAX_SESSIONS = 200
"""Most sessions at the same time."""
MAX_UPLOADED = 8 * UPLOADS.bytes
"""Bytes of uploads that belong to no message yet, of all sessions; the oldest go first."""
_BROWSERS_SHOW = {"PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "ICO", "AVIF"}
_LOOKS = 4
"""Frames of a video that are decoded before it is accepted."""
PATIENCE = 10.0
"""Seconds to wait for the end of a cancelled reply."""
_CUT_OFF = 600.0
"""Seconds without a write after which a file counts as a broken upload."""


Piece: TypeAlias = str | Medium
"""A part of a reply on the page, in order: text, a medium or a preview."""


@dataclass
class Turn:
    """One message as the page shows it. `seed`: of a reply; `note`: the line below it."""

    message: Message
    seed: int | None = None
    note: str = ""


def clean(text: str) -> str:
    """Remove lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def check_text(text: str) -> str:
    """Return the text, cleaned. Raises ConfigError if it exceeds the limit of a message."""
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{len(text)} characters of text, more than {MAX_TEXT}: shorten it")
    return clean(text)


def checked(path: Path) -> Medium:
    """The medium in a file that can be decoded: pictures and sounds are, whole, and of clips a few
    frames, since the encoders take those that they want. It is done in a process that is ended if
    it takes too long.

    Raises MediaError for what is none, is too large or damaged.
    """
    with media.limits(UPLOADS):
        medium = MEDIA[isolated.probe(path).modality](source=path)
        if isinstance(medium, Video):
            medium.sample_frames(_LOOKS, isolated.sample_frames)
        else:
            medium.decoded(isolated.decode)
    return medium


def as_png(picture: Image, target: Path) -> Image | None:
    """Save an image losslessly as a PNG at `target`; None if the file would be too large."""
    with media.limits(UPLOADS):
        picture.decoded(isolated.decode).save(target)
    if target.stat().st_size <= UPLOADS.bytes:
        return Image(source=target)
    target.unlink()
    return None


@dataclass
class BrowserSession:
    """One session. `replying` is locked during a reply and while the conversation is changed;
    setting `cancel` ends the reply."""

    token: str
    folder: Path
    turns: list[Turn] = field(default_factory=list)
    used: float = field(default_factory=time.monotonic)
    cancel: threading.Event = field(default_factory=threading.Event)
    replying: threading.Lock = field(default_factory=threading.Lock)
    partial: list[Piece] = field(default_factory=list)
    """The partial reply."""
    retries: int = 0
    """Number of replies to the last message that were replaced by another."""
    _files: int = 0

    @property
    def conversation(self) -> list[Message]:
        return [turn.message for turn in self.turns]

    @property
    def sources(self) -> list[Path]:
        """The files of the conversation's media."""
        media = (medium for message in self.conversation for medium in message.media)
        return [medium.source for medium in media if isinstance(medium.source, Path)]

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Return a context in which the conversation may be changed: a running reply is cancelled,
        and the next one waits. Raises ConfigError if the running one does not end."""
        self.cancel.set()
        if not self.replying.acquire(timeout=PATIENCE):
            raise ConfigError("the answer in the making has not ended yet; try again in a moment")
        try:
            self.cancel = threading.Event()
            yield
        finally:
            self.replying.release()

    def check_space(self, files: Sequence[Path] = ()) -> None:
        """Raise ConfigError if one more message with these files would exceed a limit.

        A conversation within the limits can be saved and loaded again.
        """
        files = [*self.sources, *files]
        words = sum(len(message.text) for message in self.conversation)
        size = sum(file.stat().st_size for file in files if file.is_file())
        for count, most, what in (
            (len(self.turns) + 1, MAX_TURNS, "messages"),
            (words, MAX_WORDS, "characters"),
            (len(files), MAX_FILES, "files"),
            (size, MAX_BYTES, "bytes of files"),
        ):
            if count > most:
                raise ConfigError(
                    f"this conversation is full (at most {most} {what}): save it, clear it and "
                    "begin another"
                )

    def take(self, paths: Sequence[str | Path]) -> tuple[list[Medium], list[MmllmError]]:
        """Copy files that were sent into the folder: the media that they hold, not decoded, and
        what is wrong with the others. The files themselves stay: the same one may be sent again,
        and Gradio names it by its contents.

        MediaError of what is no medium, is too large or damaged, or was not sent to the demo;
        ConfigError if there are too many for a message or for the conversation.
        """
        media: list[Medium] = []
        errors: list[MmllmError] = []
        if len(paths) > MAX_TOGETHER:
            error = f"{len(paths)} files, more than the {MAX_TOGETHER} of one message"
            errors.append(ConfigError(f"{error}: the others were left out"))
        for path in paths[:MAX_TOGETHER]:
            try:
                media.append(self._take(Path(path).resolve(), media))
            except MmllmError as error:
                errors.append(error)
        return media, errors

    def _take(self, path: Path, others: Sequence[Medium]) -> Medium:
        if not path.is_relative_to(self.folder.parent) or not path.is_file():
            raise MediaError(f"{path.name}: no file that was sent, or one that was deleted since")
        used = {*self.sources, *(medium.source for medium in others)}
        self.check_space([*(path for path in used - {*self.sources} if path), path])
        medium = checked(path)
        if path.parent == self.folder and path not in used and FILE.fullmatch(path.name):
            return medium  # of a message that was undone and is sent again
        if (
            isinstance(medium, Image)
            and media.probe(path).format not in _BROWSERS_SHOW
            and (made := as_png(medium, self.new_file(".png")))
        ):
            return made
        suffix = path.suffix.lower()
        known, _ = mimetypes.guess_type(f"x{suffix}")
        if known is None or not known.startswith(f"{medium.modality}/"):
            suffix = SUFFIX[medium.modality]
        target = self.new_file(suffix)
        shutil.copyfile(path, target)
        return replace(medium, source=target)

    def keep(self, medium: Medium) -> Medium:
        """Save a generated medium; it keeps its array, so that later turns use the exact values."""
        path = self.new_file(SUFFIX[medium.modality])
        medium.save(path)
        return replace(medium, source=path)

    def preview(self, picture: Image) -> Image:
        """Save a preview of an image; it is kept until `drop_previews`."""
        self._files += 1
        path = self.folder / f"preview-{self._files}.png"
        picture.save(path)
        return replace(picture, source=path)

    def drop_previews(self) -> None:
        """Delete previews that no page can request any more."""
        for old in self.folder.glob("preview-*"):
            old.unlink()

    def clear(self) -> None:
        """Clear the conversation and delete its files."""
        self.turns = []
        for path in self.folder.iterdir():
            path.unlink()

    def drop_unsaid(self, age: float = 0.0) -> None:
        """Delete files that are older than `age` seconds and of no message: of answers that were
        replaced, of messages that were taken back."""
        late = time.time() - age
        for path in set(self.folder.iterdir()) - set(self.sources):
            if path.stat().st_mtime < late:
                path.unlink(missing_ok=True)

    def new_file(self, suffix: str) -> Path:
        """A name for a new file in the folder."""
        self._files += 1
        return self.folder / f"{self._files:03d}{suffix}"


class SessionStore:
    """All sessions, in folders below `root` with random names."""

    def __init__(self, root: Path, *, expires: float):
        self.root = root
        self.expires = expires
        self._sessions: dict[str, BrowserSession] = {}
        self._own: set[str] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def open(self, token: str | None) -> BrowserSession:
        """Return the session of a token, or a new one if there is none (any more)."""
        with self._lock:
            session = self._sessions.get(token) if isinstance(token, str) else None
            if session is None:
                if len(self._sessions) >= MAX_SESSIONS:
                    self._drop_one()
                token = secrets.token_urlsafe(24)
                session = self._sessions[token] = BrowserSession(token, self.root / token)
                session.folder.mkdir(parents=True)
            session.used = time.monotonic()
            return session

    @property
    def all(self) -> list[BrowserSession]:
        """Every session that is kept."""
        return list(self._sessions.values())

    def keep_present(self) -> None:
        """Never sweep what is in the folder now: the page's own images."""
        self._own = {path.name for path in self.root.iterdir()}

    def sweep(self) -> None:
        """Delete what has not been used for `expires` seconds: sessions, files in them that no
        message has, and files that were sent and then not used; of the latter also the oldest,
        while they are too many."""
        with self._lock:
            late = time.monotonic() - self.expires
            for session in list(self._sessions.values()):
                if session.replying.locked():
                    continue
                if session.used < late or not session.folder.is_dir():
                    self._drop(session)
                else:
                    session.drop_unsaid(self.expires)
            now, size = time.time(), 0
            for made, path in sorted(self._uploaded(), reverse=True):
                size += _size(path)
                if (
                    now - made > (self.expires if path.is_dir() else _CUT_OFF)
                    or size > MAX_UPLOADED
                ):
                    _delete(path)

    def _uploaded(self) -> Iterator[tuple[float, Path]]:
        """(the time of its last change, what was sent and belongs to no session)."""
        for path in self.root.iterdir():
            if path.name not in self._sessions and path.name not in self._own:
                with contextlib.suppress(FileNotFoundError):
                    yield path.stat().st_mtime, path

    def _drop(self, session: BrowserSession) -> None:
        del self._sessions[session.token]
        shutil.rmtree(session.folder, ignore_errors=True)

    def _drop_one(self) -> None:
        """Delete an empty session or, if there is none, the least recently used one."""
        idle = [session for session in self._sessions.values() if not session.replying.locked()]
        if not idle:
            raise ConfigError(f"more than {MAX_SESSIONS} people talk here; try again later")
        self._drop(min(idle, key=lambda session: (bool(session.turns), session.used)))

    def _watch(self) -> None:
        while self.root.exists():
            time.sleep(min(self.expires / 4, 60.0))
            with contextlib.suppress(FileNotFoundError):  # the folder goes when the page ends
                self.sweep()


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
