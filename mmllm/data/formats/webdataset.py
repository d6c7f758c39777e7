"""Reader of pairs in webdataset shards (.tar): `000123.jpg`, `000123.txt`, `000123.json` in a row.

The headers of a shard are read once; the offsets of its files are stored in an Arrow file next to
it. After that any sample is one read at a known offset, so the order is shuffled over all shards
like that of any other dataset, and training resumes at any step without a sampler state.
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
    """Settings of a dataset of webdataset shards.

    Attributes:
        shards: a pattern of local .tar files, `cc3m-{00000..00331}.tar` or `cc3m/*.tar`.
        media: the extensions of the medium; by default the usual ones of the modality.
        caption: the extension of the caption, or `json:KEY` for a field of the sample's .json,
            whose fields can be used as `{names}` in prompts and replies.
        index: a folder for the index; by default the folder of the shards, which must be writable.
    """

    shards: str
    media: tuple[str, ...] = ()
    caption: str = "txt"
    index: str | None = None


class WebDataset:
    """A dataset of webdataset shards, see WebDatasetConfig; a sample is a two-turn conversation."""

    def __init__(self, config: WebDatasetConfig, where: str):
        paths = find_shards(config.shards, f"{where}.shards")
        folder = resolve(config.index) if config.index else None
        self.shards = [Shard(path, folder, f"{where}.shards") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        if not self._ends[-1]:
            raise ConfigError(f"{where}.shards: {config.shards}: no samples")
        self.media = config.media or EXTENSIONS[config.modality]
        # A sample's .json may have any fields; a text caption has no further fields.
        fields = None if ":" in config.caption else ()
        self.turns = CaptionTurns(config.direction, config.prompts, config.replies, where, fields)
        self.config = config
        self.share = config.share

    def __len__(self) -> int:
        return int(self._ends[-1])

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
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
        """See DataSource."""
        shard, number = self._find(index)
        return f"{shard.path.name}/{shard.key(number)}"

    def _find(self, index: int) -> tuple[Shard, int]:
        """Return the shard of a sample and its number in the shard."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[which], index - (int(self._ends[which - 1]) if which else 0)

    def _words(
        self, shard: Shard, number: int, files: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Return the fields of a sample: the caption and, if it is in a .json, the other fields."""
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
    """A tar file with random access to its samples.

    Its index is an Arrow table with one row per sample: lists of the files' extensions, offsets and
    sizes.

    Args:
        path: the tar file.
        folder: the folder of the index; None: the folder of the shard.
        where: the dataset's place in the config, for messages.

    Raises:
        ConfigError: the file is no uncompressed tar.
    """

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
        """Return the name of a sample: that of its files without extension."""
        return self._table.column("key")[number].as_py()

    def files(self, number: int) -> dict[str, tuple[int, int]]:
        """Return the files of a sample: extension -> (offset, size) in bytes."""
        row = self._table.slice(number, 1).to_pylist()[0]
        return {
            name: (offset, size)
            for name, offset, size in zip(row["extension"], row["offset"], row["size"], strict=True)
        }

    def read(self, number: int, extension: str) -> bytes:
        """Read one file of a sample.

        Args:
            number: the sample's place in the shard, from 0.
            extension: that of the file, lower case and without the dot.

        Raises:
            OversizedMediaError: the file exceeds `Limits.bytes`; it is not read.
            MediaError: the tar cannot be read, or has been truncated since it was indexed.
        """
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
    """Return the shards that match a pattern.

    Args:
        pattern: a path with ranges `{00..31}` and wildcards.
        where: the dataset's place in the config, for messages.

    Raises:
        ConfigError: no file matches, or one is no local .tar file.
    """
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
    """Yield the names of a pattern with ranges: `a-{00..02}` -> a-00, a-01, a-02."""
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
    """Build the index of a tar file from its headers. As in webdataset, a sample consists of
    consecutive files with the same name up to the first dot; links and folders are ignored."""
    keys: list[str] = []
    columns: dict[str, list[list[Any]]] = {"extension": [], "offset": [], "size": []}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg():
                continue
            # Names in a tar are bytes: those that are not UTF-8 are escaped.
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
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - frees their memory
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
    """Memory-map an index; None if there is none, or it is of another version of the shard."""
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException):
        return None
    return table if (table.schema.metadata or {}).get(b"tar") == stamp else None


def _write_index(file: Path, table: pa.Table) -> None:
    """Write an index; if that is not possible, log a warning."""
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
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return WebDataset(config, where)
