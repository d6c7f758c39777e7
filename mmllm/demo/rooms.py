"""Sessions of the demo: each has a folder for its media, deleted when it has not been used for a
while, and its conversation can be saved as a zip and loaded from one.

A zip holds `conversation.json` and the media beside it:
    {"format": 1, "model": "mini", "turns": [{"role": "user", "parts": [{"text": "…"}]}, {"role":
    "assistant", "parts": [{"image": "001.png"}], "seed": 3, "note": ""}]}
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmllm import media
from mmllm.conversation import MEDIA, Image, Medium, Message, Part, Text
from mmllm.errors import ConfigError, MediaError

UPLOADS = media.Limits(
    bytes=32 * 2**20, pixels=24_000_000, seconds=60.0, frames=2000, decoded_bytes=2**29
)
"""The largest file that is taken."""
SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4"}
"""What made media are saved as: what every browser shows."""

_FORMAT = 1
_INDEX = "conversation.json"
_FILE = re.compile(r"\d{3,6}\.[a-z0-9]{1,5}")
_MOST_FILES, _MOST_BYTES = 500, 8 * UPLOADS.bytes
_PATIENCE = 10.0
"""Seconds to wait until an answer that was stopped has ended."""


@dataclass
class Turn:
    """One message as the page shows it. `seed`: of an answer; `note`: what is said below it."""

    message: Message
    seed: int | None = None
    note: str = ""


@dataclass
class Room:
    """One session. `answering` is held while an answer is made; setting `cancel` ends that."""

    token: str
    folder: Path
    turns: list[Turn] = field(default_factory=list)
    used: float = field(default_factory=time.monotonic)
    cancel: threading.Event = field(default_factory=threading.Event)
    answering: threading.Lock = field(default_factory=threading.Lock)
    _files: int = 0

    @property
    def conversation(self) -> list[Message]:
        return [turn.message for turn in self.turns]

    def stop(self) -> None:
        """End the answer in the making, if there is one, and wait for its end; the next one has a
        `cancel` of its own."""
        self.cancel.set()
        if self.answering.acquire(timeout=_PATIENCE):
            self.answering.release()
        self.cancel = threading.Event()

    def take(self, path: str | Path) -> Medium:
        """Move a file that was sent into the folder; the medium that it holds, not decoded.

        Raises MediaError for what is none, is too large or damaged, or was not sent to the demo.
        """
        path = Path(path).resolve()
        if not path.is_relative_to(self.folder.parent) or not path.is_file():
            raise MediaError(f"{path.name}: no file that was sent")
        with media.limits(UPLOADS):
            kind = media.probe(path).modality
            MEDIA[kind](source=path).decoded()
        suffix = path.suffix.lower()
        target = self._name(suffix if _FILE.fullmatch(f"000{suffix}") else SUFFIX[kind])
        shutil.move(path, target)
        return MEDIA[kind](source=target)

    def keep(self, medium: Medium) -> Medium:
        """Save a medium that was made; it keeps its array, so that later turns see it exactly."""
        path = self._name(SUFFIX[medium.modality])
        medium.save(path)
        return replace(medium, source=path)

    def preview(self, picture: Image) -> Image:
        """Save a picture in the making; it stays until `drop_previews`."""
        self._files += 1
        path = self.folder / f"preview-{self._files}.png"
        picture.save(path)
        return replace(picture, source=path)

    def drop_previews(self) -> None:
        """Delete pictures in the making, once no page can ask for them any more."""
        for old in self.folder.glob("preview-*"):
            old.unlink()

    def clear(self) -> None:
        """Forget the conversation and delete its files."""
        self.turns = []
        for path in self.folder.iterdir():
            path.unlink()

    def pack(self, model: str) -> Path:
        """The conversation as a zip in the folder."""
        files: list[Path] = []

        def part(part: Part) -> dict[str, str]:
            if isinstance(part, Text):
                return {"text": part.text}
            assert isinstance(part.source, Path)
            files.append(part.source)
            return {part.modality: part.source.name}

        turns = [
            {
                "role": turn.message.role,
                "parts": [part(entry) for entry in turn.message.parts],
                "seed": turn.seed,
                "note": turn.note,
            }
            for turn in self.turns
        ]
        tree = {"format": _FORMAT, "model": model, "turns": turns}
        path = self.folder / "conversation.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_INDEX, json.dumps(tree, indent=1, ensure_ascii=False))
            for file in files:
                archive.write(file, file.name)
        return path

    def unpack(self, path: str | Path) -> None:
        """Take the conversation of a zip in place of the one here.

        Raises ConfigError or MediaError, and leaves what is here, if it is not one of `pack`.
        """
        draft = Room(self.token, self.folder, _files=self._files)
        try:
            with zipfile.ZipFile(path) as archive:
                infos = {info.filename: info for info in archive.infolist()}
                size = sum(info.file_size for info in infos.values())
                if len(infos) > _MOST_FILES or size > _MOST_BYTES:
                    raise ConfigError(f"too large: {len(infos)} files, {size / 2**20:.0f} MiB")
                tree = json.loads(archive.read(_INDEX))
                if tree["format"] != _FORMAT:
                    raise ConfigError(f"format {tree['format']!r} is not known")
                draft.turns = [draft._turn(turn, archive, infos) for turn in tree["turns"]]
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, NotImplementedError) as error:
            if isinstance(error, MediaError):
                raise
            raise ConfigError(f"this file holds no conversation: {error}") from error
        else:
            self.turns = draft.turns
        finally:
            self._files = draft._files
            kept = {part.source for message in self.conversation for part in message.media}
            for file in set(self.folder.iterdir()) - kept:
                file.unlink()

    def _turn(
        self, tree: dict[str, Any], archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo]
    ) -> Turn:
        parts: list[Part] = []
        for entry in tree["parts"]:
            ((kind, value),) = entry.items()
            if kind == "text":
                parts.append(Text(str(value)))
                continue
            if kind not in MEDIA or not _FILE.fullmatch(value):
                raise ConfigError(f"unknown part {entry}")
            if infos[value].file_size > UPLOADS.bytes:
                raise ConfigError(f"{value} is too large")
            target = self._name(Path(value).suffix)
            target.write_bytes(archive.read(value))
            medium = MEDIA[kind](source=target)
            try:
                with media.limits(UPLOADS):
                    medium.decoded()
            except MediaError:
                target.unlink()
                raise
            parts.append(medium)
        if tree["role"] not in ("user", "assistant"):
            raise ConfigError(f"unknown role {tree['role']!r}")
        seed = tree["seed"]
        if seed is not None and not isinstance(seed, int):
            raise ConfigError(f"unknown seed {seed!r}")
        return Turn(Message(tree["role"], tuple(parts)), seed, str(tree["note"]))

    def _name(self, suffix: str) -> Path:
        """A new file in the folder."""
        self._files += 1
        return self.folder / f"{self._files:03d}{suffix}"


class Rooms:
    """All sessions, in folders below `root` whose names nobody can guess."""

    def __init__(self, root: Path, *, expires: float):
        self.root = root
        self.expires = expires
        self._rooms: dict[str, Room] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def open(self, token: str | None) -> Room:
        """The session of a token; a new one if there is none (any more)."""
        with self._lock:
            room = self._rooms.get(token or "")
            if room is None:
                token = secrets.token_urlsafe(24)
                room = self._rooms[token] = Room(token, self.root / token)
                room.folder.mkdir(parents=True)
            room.used = time.monotonic()
            return room

    def sweep(self) -> None:
        """Delete what has not been used for `expires` seconds: sessions, and files that were sent
        and then not used."""
        with self._lock:
            late = time.monotonic() - self.expires
            for token, room in list(self._rooms.items()):
                if room.used < late and not room.answering.locked():
                    del self._rooms[token]
                    shutil.rmtree(room.folder, ignore_errors=True)
            old = time.time() - self.expires
            for path in self.root.iterdir():
                if path.name not in self._rooms and path.is_dir() and path.stat().st_mtime < old:
                    shutil.rmtree(path, ignore_errors=True)

    def _watch(self) -> None:
        while self.root.exists():
            time.sleep(min(self.expires / 4, 60.0))
            if self.root.exists():
                self.sweep()
