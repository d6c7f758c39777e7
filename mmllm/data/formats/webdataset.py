"""Pairs in webdataset shards (.tar): `000123.jpg`, `000123.txt`, `000123.json` side by side.

The headers of a shard are read once, and where each file lies is kept beside it in an Arrow file.
From then on any sample is one read at a known offset: the order is shuffled over all shards like
that of any other dataset, and training resumes at any step without a state.
"""

from __future__ import annotations

import glob
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmllm.conversation import MEDIA, Message
from mmllm.data.formats.caption_turns import CaptionTurns, CaptionTurnsConfig
from mmllm.data.formats.turns import check_size
from mmllm.data.sources import parse_json, resolve
from mmllm.data.tables import encoding_of
from mmllm.data.text_fields import caption_of
from mmllm.errors import ConfigError, MediaError, MissingMediaError, RowError
from mmllm.media import Embedded
from mmllm.utils.files import atomic_file

logger = logging.getLogger(__name__)

SUFFIX = ".index.arrow"
EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "ogg", "mp3", "m4a"),
    "video": ("mp4", "webm", "mkv", "gif"),
}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, kw_only=True)
class WebDatasetConfig(CaptionTurnsConfig):
    """`shards`: a pattern of local .tar files, `cc3m-{00000..00331}.tar` or `cc3m/*.tar`.

    `media`: the extensions of the medium, the usual ones of the modality unless given. `caption`:
    the extension of the caption, or `json:KEY` for a field of the sample's .json (whose fields can
    be used as `{names}` in prompts and replies). `index`: a folder for the index, where the
    shards' own cannot be written.
    """

    shards: str
    media: tuple[str, ...] = ()
    caption: str = "txt"
    index: str | None = None


class WebDataset:
    """See WebDatasetConfig; one conversation of two turns a sample."""

    def __init__(self, config: WebDatasetConfig, where: str):
        paths = find_shards(config.shards, f"{where}.shards")
        folder = resolve(config.index) if config.index else None
        self.shards = [Shard(path, folder, f"{where}.shards") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        if not self._ends[-1]:
            raise ConfigError(f"{where}.shards: {config.shards}: no samples")
        self.media = config.media or EXTENSIONS[config.modality]
        # A sample's .json may have any fields; beside a text there are none.
        fields = None if ":" in config.caption else ()
        self.turns = CaptionTurns(config.direction, config.prompts, config.replies, where, fields)
        self.config = config
        self.share = config.share

    def __len__(self) -> int:
        return int(self._ends[-1])

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        shard, number = self._find(index)
        files = shard.files(number)
        own = next((extension for extension in self.media if extension in files), None)
        if own is None:
            raise MissingMediaError(
                f"{self.name(index)}: none of .{', .'.join(self.media)}, but "
                f".{', .'.join(sorted(files))}"
            )
        row = self._words(shard, number, files, rng)
        name = f"{shard.path}/{shard.key(number)}.{own}"
        source = Embedded(name, partial(shard.read, number, own))
        shown = MEDIA[self.config.modality](source=source, caption=row["caption"])
        return self.turns.conversation(shown, row, rng)

    def name(self, index: int) -> str:
        shard, number = self._find(index)
        return f"{shard.path.name}/{shard.key(number)}"

    def _find(self, index: int) -> tuple[Shard, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[which], index - (int(self._ends[which - 1]) if which else 0)

    def _words(
        self, shard: Shard, number: int, files: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """The caption and, where it stands in a .json, the other fields."""
        extension, _, key = self.config.caption.partition(":")
        if extension not in files:
            return {"caption": ""}
        try:
            data = shard.read(number, extension)
            text = data.decode(encoding_of(data))
            fields = parse_json(text) if key else {"": text}
        except ValueError as error:
            raise RowError(f"{shard.path.name}/{shard.key(number)}.{extension}: {error}") from error
        if not isinstance(fields, dict):
            raise RowError(f"{shard.path.name}/{shard.key(number)}.{extension}: no JSON object")
        return {**fields, "caption": caption_of(fields.get(key), rng)}


class Shard:
    """One tar file by sample number: its index has a row a sample, with lists of the files'
    extensions, offsets and sizes."""

    def __init__(self, path: Path, folder: Path | None, where: str):
        self.path = path
        stat = path.stat()
        stamp = f"{stat.st_size}:{stat.st_mtime_ns}".encode()
        file = (folder or path.parent) / f"{path.name}{SUFFIX}"
        table = _read_index(file, stamp)
        if table is None:
            try:
                table = _index(path).replace_schema_metadata({b"tar": stamp})
            except (tarfile.TarError, OSError) as error:
                raise ConfigError(
                    f"{where}: {path} cannot be read as an uncompressed tar: {error}; unpack it or "
                    "copy it again"
                ) from error
            _write_index(file, table)
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def key(self, number: int) -> str:
        return self._table.column("key")[number].as_py()

    def files(self, number: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size)."""
        row = self._table.slice(number, 1).to_pylist()[0]
        return {
            name: (offset, size)
            for name, offset, size in zip(row["extension"], row["offset"], row["size"], strict=True)
        }

    def read(self, number: int, extension: str) -> bytes:
        """One file of a sample, its size checked before. Raises MediaError."""
        offset, size = self.files(number)[extension]
        what = f"{self.path.name}/{self.key(number)}.{extension}"
        check_size(size, what)
        try:
            with self.path.open("rb") as tar:
                tar.seek(offset)
                data = tar.read(size)
        except OSError as error:
            raise MediaError(f"{what}: cannot be read ({error.strerror or error})") from error
        if len(data) < size:
            raise MediaError(f"{what}: {size} bytes announced, {len(data)} found")
        return data


def find_shards(pattern: str, where: str) -> list[Path]:
    """The files of a pattern with ranges and wildcards; raises ConfigError for none, or for what
    is no local .tar."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ConfigError(f"{where}: {pattern!r}: shards are local files; download them first")
    found = []
    for name in _expanded(str(resolve(pattern))):
        matches = sorted(glob.glob(name))
        if not matches:
            raise ConfigError(f"{where}: {name} does not exist")
        found += [Path(match) for match in matches if not match.endswith(SUFFIX)]
    for path in found:
        if path.suffix != ".tar":
            raise ConfigError(f"{where}: {path}: expected an uncompressed .tar; unpack it first")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """`a-{00..02}` -> a-00, a-01, a-02."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        )


def _index(path: Path) -> pa.Table:
    """Read the headers. A sample is what shares its name up to the first point and stands in a
    row, as in webdataset; links and folders are no samples."""
    keys: list[str] = []
    columns: dict[str, list[list[Any]]] = {"extension": [], "offset": [], "size": []}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg():
                continue
            # Names are bytes in a tar: those that are no UTF-8 are kept as they can be shown.
            name = member.name.encode("utf-8", "backslashreplace").decode("utf-8")
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not stem or not extension:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if not keys or keys[-1] != key:
                keys.append(key)
                for column in columns.values():
                    column.append([])
            entry = (extension.lower(), member.offset_data, member.size)
            for column, value in zip(columns.values(), entry, strict=True):
                column[-1].append(value)
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
    types = {
        "extension": pa.list_(pa.dictionary(pa.int16(), pa.string())),
        "offset": pa.list_(pa.int64()),
        "size": pa.list_(pa.int64()),
    }
    return pa.table(
        {"key": pa.array(keys, pa.string())}
        | {name: pa.array(column, types[name]) for name, column in columns.items()}
    )


def _read_index(file: Path, stamp: bytes) -> pa.Table | None:
    """The index mapped into memory; None if there is none of this very shard."""
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException):
        return None
    return table if (table.schema.metadata or {}).get(b"tar") == stamp else None


def _write_index(file: Path, table: pa.Table) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_file(file) as draft,
            pa.ipc.new_file(str(draft), table.schema) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        logger.warning(
            "%s: the index cannot be kept (%s); it is made again at every start, unless `index` "
            "names a folder that can be written",
            file,
            error.strerror or error,
        )


def build(config: WebDatasetConfig, *, where: str) -> WebDataset:
    return WebDataset(config, where)
