"""A conversation as a zip: `conversation.json` and its media files.

    {"format": 1, "model": "mini", "turns": [{"role": "user", "parts": [{"text": "…"}]}, {"role":
    "assistant", "parts": [{"image": "001.png"}], "seed": 3, "note": ""}]}

A zip that is loaded may come from anywhere. What it announces is compared with limits before it is
read or written; it is written under names of our own; and whatever is wrong with it is one error,
after which the conversation and the disk are as before.
"""

from __future__ import annotations

import io
import json
import shutil
import stat
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO, Any

from mmllm.conversation import MEDIA, ContentPart, Message, Role, Text
from mmllm.demo.sessions import (
    FILE,
    MAX_FILES,
    MAX_TURNS,
    UPLOADS,
    BrowserSession,
    Turn,
    check_text,
    checked,
)
from mmllm.errors import ConfigError, MediaError, MmllmError, quoted

MAX_ZIPPED = 80 * 2**20
"""Most bytes of a zip and of its contents: above a conversation's limit, which the last reply may
exceed."""
_MOST_ENTRIES = MAX_FILES + 100
_MOST_INDEX = 8 * 2**20
"""Most bytes of `conversation.json`."""
_MOST_READ = 2**17
"""Most bytes of a single read: zipfile reads the central directory at once."""
_MOST_PARTS = 2000
_MOST_SECONDS = 60.0
"""Most seconds to load one."""
_BLOCK = 2**16

_FORMAT = 1
_INDEX = "conversation.json"


def pack(session: BrowserSession, model: str) -> Path:
    """Write the conversation as a zip in its session's folder; return its path."""
    files: list[Path] = []

    def part(part: ContentPart) -> dict[str, str]:
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
        for turn in list(session.turns)
    ]
    tree = {"format": _FORMAT, "model": model, "turns": turns}
    with tempfile.TemporaryDirectory(dir=session.folder.parent) as draft:
        path = Path(draft) / "conversation.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_INDEX, json.dumps(tree, indent=1, ensure_ascii=False))
            for file in files:
                archive.write(file, file.name)
        return path.replace(session.folder / path.name)


def unpack(session: BrowserSession, path: str | Path) -> None:
    """Replace a session's conversation by that of a zip.

    Raises ConfigError or MediaError, and leaves what is here, if it is not one of `pack`.
    """
    with tempfile.TemporaryDirectory(dir=session.folder.parent) as draft:
        turns = _read(Path(path), Path(draft))
        with session.change():
            session.turns = [_moved(turn, session) for turn in turns]
            session.drop_unsaid()


def _moved(turn: Turn, session: BrowserSession) -> Turn:
    """Move the files of a turn into the session and return the turn."""
    parts: list[ContentPart] = []
    for part in turn.message.parts:
        if not isinstance(part, Text):
            assert isinstance(part.source, Path)
            target = part.source.rename(session.new_file(part.source.suffix))
            part = MEDIA[part.modality](source=target)
        parts.append(part)
    return Turn(turn.message.with_parts(parts), turn.seed, turn.note)


def _read(path: Path, draft: Path) -> list[Turn]:
    """Unpack the turns of a zip, their media in the folder `draft`."""
    try:
        with _File(path) as file, zipfile.ZipFile(file) as archive:
            return _Reader(archive, draft).turns()
    except MmllmError:
        raise
    except Exception as error:  # zipfile, zlib and json raise many kinds
        why = quoted(str(error) or type(error).__name__)
        raise ConfigError(f"this file is damaged or holds no conversation ({why})") from error


class _File(io.BufferedReader):
    """A file that limits a single read: zipfile reads the central directory at once."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._length = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._length - self.tell()
        if min(left, left if size is None or size < 0 else size) > _MOST_READ:
            raise ConfigError(f"this file holds no conversation: more than {_MOST_ENTRIES} files")
        return super().read(size)


class _Reader:
    """The contents of a zip, validated step by step."""

    def __init__(self, archive: zipfile.ZipFile, draft: Path):
        self._archive = archive
        self._draft = draft
        self._infos: dict[str, zipfile.ZipInfo] = {}
        self._parts = 0
        self._until = time.monotonic() + _MOST_SECONDS
        infos = archive.infolist()
        size = sum(info.file_size for info in infos)
        if len(infos) > _MOST_ENTRIES or size > MAX_ZIPPED:
            raise ConfigError(f"too large: {len(infos)} files, {size / 2**20:.0f} MiB")
        for info in infos:
            self._check(info)
            self._infos[info.filename] = info

    def _check(self, info: zipfile.ZipInfo) -> None:
        """Raise ConfigError for an entry that `pack` does not write."""
        name = quoted(info.filename)
        plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
        if info.filename != _INDEX and not FILE.fullmatch(info.filename):
            raise ConfigError(f"this file holds no conversation: unknown file {name}")
        if info.filename in self._infos:
            raise ConfigError(f"this file holds {name} twice")
        if info.flag_bits & 1:
            raise ConfigError(f"{name} is encrypted: save the conversation without a password")
        if not plain or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ConfigError(f"{name} is no plain file, or compressed in an unknown way")
        if info.file_size > (_MOST_INDEX if info.filename == _INDEX else UPLOADS.bytes):
            raise ConfigError(f"{name} is too large ({info.file_size} bytes)")

    def turns(self) -> list[Turn]:
        if _INDEX not in self._infos:
            raise ConfigError(f"this file holds no conversation: there is no {_INDEX} in it")
        index = io.BytesIO()
        self._copy(self._infos.pop(_INDEX), index)
        tree = json.loads(index.getvalue())
        if (known := _field(tree, "format", int)) != _FORMAT:
            raise ConfigError(f"format {quoted(known)} is not known; known is {_FORMAT}")
        turns = _field(tree, "turns", list)
        if len(turns) > MAX_TURNS:
            raise ConfigError(f"{len(turns)} messages, more than {MAX_TURNS}")
        return [self._turn(turn) for turn in turns]

    def _turn(self, tree: Any) -> Turn:
        role: Role = _field(tree, "role", str)  # pyright: ignore[reportAssignmentType]
        if role not in ("user", "assistant"):
            raise ConfigError(f"unknown role {quoted(role)}")
        entries = _field(tree, "parts", list)
        self._parts += len(entries)
        if self._parts > _MOST_PARTS:
            raise ConfigError(f"more than {_MOST_PARTS} parts in its messages")
        seed = tree.get("seed")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise ConfigError(f"unknown seed {quoted(seed)}")
        note = check_text(_field(tree, "note", str)) if "note" in tree else ""
        return Turn(Message(role, tuple(self._part(entry) for entry in entries)), seed, note)

    def _part(self, entry: Any) -> ContentPart:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(f"unknown part {quoted(entry)}")
        ((kind, value),) = entry.items()
        if not isinstance(value, str) or (kind != "text" and kind not in MEDIA):
            raise ConfigError(f"unknown part {quoted(entry)}")
        if kind == "text":
            return Text(check_text(value))
        info = self._infos.pop(value, None)
        if info is None:
            raise ConfigError(f"{quoted(value)} is not in this file, or named by several parts")
        if time.monotonic() > self._until:
            raise ConfigError(f"this conversation takes more than {_MOST_SECONDS:.0f} s to load")
        return self._medium(kind, info)

    def _medium(self, kind: str, info: zipfile.ZipInfo) -> ContentPart:
        target = self._draft / info.filename
        with target.open("wb") as file:
            self._copy(info, file)
        medium = checked(target)
        if medium.modality != kind:
            raise MediaError(f"{info.filename}: declared as {kind}, but holds {medium.modality}")
        return medium

    def _copy(self, info: zipfile.ZipInfo, file: IO[bytes]) -> None:
        """Unpack a file, at most the bytes that its entry declares, which are within the limits."""
        with self._archive.open(info) as packed:
            shutil.copyfileobj(packed, file, _BLOCK)
        if file.tell() != info.file_size:
            raise ConfigError(f"this file is damaged: {quoted(info.filename)} is not whole in it")


def _field(tree: Any, name: str, kind: type) -> Any:
    """Return a field of an object of the index; its type is checked."""
    value = tree.get(name) if isinstance(tree, dict) else None
    if type(value) is not kind:
        raise ConfigError(f"this file holds no conversation: expected {name!r}, a {kind.__name__}")
    return value
