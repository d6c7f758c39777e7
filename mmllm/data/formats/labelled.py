"""Reader of labelled media: a folder of files, or a table of files and their labels.

`read_labelled` reads all of them, for `mmllm teach`; LabelledConfig is a dataset of them in a
training stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmllm import media
from mmllm.conversation import MEDIA, Medium, Message
from mmllm.data.formats.caption_turns import CaptionTurns, CaptionTurnsConfig
from mmllm.data.sources import Rows, inside, open_rows, resolve
from mmllm.data.text_fields import is_nothing, text_of
from mmllm.errors import ConfigError, MediaError, RowError

TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")
FILE_COLUMNS = ("file_name", "file", "filename", "path", "image", "audio", "video")
LABEL_COLUMNS = ("label", "name", "caption", "text", "title", "class", "category")
MAX_FILES = 10_000
"""Maximum number of files in a folder or table that `read_labelled` accepts."""

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_DETERMINERS = frozenset(
    ("a", "an", "the", "my", "our", "your", "his", "her", "its", "their", "some", "two", "three")
)
_SOUNDED_VOWEL = re.compile(r"(?!eu|one\b|once\b|uni|use|usu|ubi)[aeiou]|hour|hono|heir", re.I)


@dataclass(frozen=True)
class LabelledMedium:
    """A media file and its label."""

    medium: Medium
    """The file; its `caption` is the label as a noun phrase: "a red panda"."""
    label: str
    """The label of the folder or table, with blanks for underscores: "red panda"."""


@dataclass(frozen=True)
class LabelledMedia:
    """The labelled media of a folder or table."""

    items: list[LabelledMedium]
    skipped: list[str]
    """One line for each file or row that cannot be used, with the reason."""


def read_labelled(source: str | Path) -> LabelledMedia:
    """Read the media files of a folder or table with their labels.

    A folder has one subfolder per label (`red_panda/1.jpg`), files named by label
    (`red panda 1.jpg`), or a `metadata.csv` (or .jsonl, .parquet) as in Hugging Face's
    `imagefolder`. A table (.csv, .tsv, .parquet, .json, .jsonl) has a column of files, which are
    below its own folder, and a column of labels.

    Args:
        source: the folder, or the table.

    Returns:
        The media, decoded, in the order of their names, and the files that were skipped.

    Raises:
        ConfigError: neither a folder nor a table, no such columns, or no media at all.

    Example:
        ```python
        read_labelled("my/pictures").items[0].medium.caption  # "a red panda"
        ```
    """
    items: list[LabelledMedium] = []
    skipped: list[str] = []
    for number, entry in enumerate(_list_files(source)):
        if number >= MAX_FILES:
            raise ConfigError(
                f"{source}: more than {MAX_FILES:,} files; train on so many by a stage of "
                "their own (docs/training.md)"
            )
        if isinstance(entry, str):
            skipped.append(entry)
            continue
        file, label = entry
        try:
            modality = media.probe(file).modality
            medium = MEDIA[modality](source=file, caption=caption_of_label(label))
            items.append(LabelledMedium(medium.decoded(), label))
        except MediaError as error:
            skipped.append(str(error))
    if not items:
        first = f"; the first that was skipped: {skipped[0]}" if skipped else ""
        raise ConfigError(
            f"{source}: no media with labels; expected subfolders named by what their files show "
            f"(red_panda/1.jpg), or a table with columns file and label{first}"
        )
    return LabelledMedia(items, skipped)


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(CaptionTurnsConfig):
    """Settings of a dataset of labelled media.

    Prompts and replies may use `{caption}` ("a red panda") and `{label}` ("red panda"). A file is
    opened only when its row is used.

    Attributes:
        source: a folder or table, see `read_labelled`.
    """

    source: str


class Labelled:
    """A dataset of labelled media, see LabelledConfig; each file is a conversation of two turns."""

    def __init__(self, config: LabelledConfig, where: str):
        entries = _list_files(resolve(config.source))
        self.files = [entry for entry in entries if not isinstance(entry, str)]
        if not self.files:
            raise ConfigError(f"{where}.source: {config.source}: no labelled files")
        self.turns = CaptionTurns(
            config.direction, config.prompts, config.replies, where, ("label", "caption")
        )
        self.config = config
        self.share = config.share

    def __len__(self) -> int:
        return len(self.files)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        file, label = self.files[index]
        caption = caption_of_label(label)
        shown = MEDIA[self.config.modality](source=file, caption=caption)
        return self.turns.conversation(shown, {"label": label, "caption": caption}, rng)

    def name(self, index: int) -> str:
        """See DataSource."""
        return str(self.files[index][0])


def build(config: LabelledConfig, *, where: str) -> Labelled:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Labelled(config, where)


def caption_of_label(label: str) -> str:
    """Return the noun phrase of a label: "red panda" -> "a red panda", "umbrella" -> "an umbrella".

    A label that has a determiner ("my bicycle", "the moon") or begins with a capital letter or a
    digit ("Rex") is returned unchanged.
    """
    first = label.split()[0]
    if first.casefold() in _DETERMINERS or not first[0].islower():
        return label
    return f"{'an' if _SOUNDED_VOWEL.match(label) else 'a'} {label}"


def _list_files(source: str | Path) -> Iterator[tuple[Path, str] | str]:
    """Yield (file, label) of each medium, or a text with the reason why a file cannot be used."""
    path = Path(source).expanduser()
    if path.is_dir():
        table = next((path / name for name in _METADATA if (path / name).is_file()), None)
        return _in_table(table) if table else _in_folder(path)
    elif path.is_file() and path.suffix.lower() in TABLES:
        return _in_table(path)
    elif path.exists():
        raise ConfigError(f"{path}: expected a folder of media, or a table ({', '.join(TABLES)})")
    else:
        raise ConfigError(f"{path}: no such folder or file")


def _in_folder(folder: Path) -> Iterator[tuple[Path, str] | str]:
    """As `_list_files`, for a folder without metadata: labels are names of subfolders or files."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            label = _spoken(entry.name)
            for file in sorted(entry.rglob("*")):
                if file.is_file() and not file.name.startswith("."):
                    yield (file, label) if label else f"{file}: its folder names no label"
        elif entry.suffix.lower() not in (".txt", ".md"):
            label = _spoken(re.sub(r"[\s_()-]*\d*[\s()]*$", "", entry.stem))
            yield (entry, label) if label else f"{entry}: its name is no label"


def _in_table(path: Path) -> Iterator[tuple[Path, str] | str]:
    """As `_list_files`, for a table."""
    rows, root = open_rows(str(path), None, str(path))
    file_column = _column(rows, FILE_COLUMNS, path, "files")
    label_column = _column(rows, LABEL_COLUMNS, path, "labels")
    rng = np.random.default_rng(0)
    for number in range(len(rows)):
        try:
            row = rows[number]
            label = _spoken(text_of(row.get(label_column), rng, label_column))
            if not label or is_nothing(row.get(file_column)):
                raise RowError("no file or no label")
            yield inside(root, row[file_column]), label
        except MediaError as error:
            yield f"{path}, row {number + 1}: {error}"


def _column(rows: Rows, known: tuple[str, ...], path: Path, what: str) -> str:
    """Return the first known column that the rows have. Raises ConfigError if they have none."""
    for name in known:
        if rows.has(name):
            return name
    raise ConfigError(
        f"{path}: no column of {what}; expected one of {', '.join(known)}, got "
        f"{', '.join(map(str, rows.columns))}"
    )


def _spoken(name: str) -> str:
    """Return the label in a name: underscores become blanks, outer blanks and dots are removed."""
    return " ".join(name.replace("_", " ").split()).strip(" .")
