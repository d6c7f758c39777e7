"""`mmllm data check CONFIG`: validate every row and every medium of a stage's datasets.

    report = check(sources, folder)     writes folder/index.html and folder/problems.jsonl
    check_report.table(report)          the lines that are printed

A row is read and rendered as in training; a medium is decoded within the limits, once however many
rows use it. The check finds the rows that training would skip before training starts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmllm import media
from mmllm.conversation import Audio, Image, Medium, Message, Text, Video
from mmllm.data.check_report import DataReport, DatasetFindings, RowProblem
from mmllm.data.checked_source import check_length, render
from mmllm.data.protocol import DataSource
from mmllm.data.rendering import Renderer
from mmllm.errors import (
    EmptyCaptionError,
    LongRowError,
    MediaError,
    MissingMediaError,
    OutsideRootError,
    OversizedMediaError,
    PlaceholderError,
    RowError,
)
from mmllm.gallery import GalleryEntry, write_gallery
from mmllm.media import Embedded

KINDS: dict[str, type[Exception]] = {
    "missing": MissingMediaError,
    "oversized": OversizedMediaError,
    "outside": OutsideRootError,
    "caption": EmptyCaptionError,
    "placeholder": PlaceholderError,
    "too long": LongRowError,
    "row": RowError,
    "corrupt": MediaError,
}
"""Kind of problem -> class of its error; the first match counts. The kinds `duplicate` and `tag`
have no error class."""

TAG = re.compile(
    r"</?\|?(image|img|im|picture|audio|aud|sound|speech|video|vid|clip)"
    r"([_-]?(start|end|patch|pad|token|placeholder|\d+))?\|?>",
    re.IGNORECASE,
)
"""Text that looks like an unfilled media placeholder: the model would learn to write it."""

_WINDOW = 256
_SAMPLE_FRAMES, _SAMPLE_SECONDS, _SAMPLE_SIDE = 16, 10, 320


def check(
    sources: Mapping[str, DataSource],
    folder: Path,
    *,
    samples: int = 12,
    limit: int | None = None,
    headers_only: bool = False,
    workers: int = 4,
    progress: bool = True,
    renderer: Renderer | None = None,
    max_length: int | None = None,
) -> DataReport:
    """Check the rows and media of datasets; write a page of samples and problems.jsonl to `folder`.

    Ctrl-C ends the check early; the report then holds the results so far.

    Args:
        sources: the datasets by name.
        folder: receives index.html and problems.jsonl.
        samples: rows of each dataset that the page shows.
        limit: check this many rows of each dataset, drawn at random; None checks all.
        headers_only: whether media are only opened, not decoded: damage after the header is missed.
        workers: threads that decode media.
        progress: whether to show a progress bar.
        renderer: that of the model to be trained, which finds rows that the model cannot process,
            or that have more than `max_length` tokens; None skips these checks.
        max_length: maximum number of tokens of a row.

    Returns:
        The report, see `check_report.table`.
    """
    findings = {name: DatasetFindings(len(source)) for name, source in sources.items()}
    report = DataReport(findings, folder, max_length)
    entries: list[GalleryEntry] = []
    plan = {name: _rows(len(source), limit) for name, source in sources.items()}
    bar = tqdm(total=sum(map(len, plan.values())), unit="row", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            for name, source in sources.items():
                bar.set_description(name)
                entries += _check(
                    name,
                    source,
                    report.findings[name],
                    plan[name],
                    samples=samples,
                    look=functools.partial(
                        _within, media.current_limits(), _glance if headers_only else _look
                    ),
                    render=functools.partial(_tokens, renderer, max_length),
                    pool=pool,
                    bar=bar,
                )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            report.complete = False
    report.page = write_gallery(folder, "Samples of the data", entries)
    with (folder / "problems.jsonl").open("w", encoding="utf-8") as file:
        for problem in report.problems:
            file.write(json.dumps(vars(problem), ensure_ascii=False) + "\n")
    return report


def _check(
    name: str,
    source: DataSource,
    found: DatasetFindings,
    rows: Sequence[int],
    *,
    samples: int,
    look: Callable[[Medium], str | Exception],
    render: Callable[[Sequence[Message], DatasetFindings], None],
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> list[GalleryEntry]:
    """Check one dataset, a window of rows at a time; return the samples to show."""
    seen: dict[bytes, str] = {}  # hash of a conversation -> the first row that has it
    known: dict[str, str | Exception] = {}  # medium -> hash of its content, or its error
    shown = set(rows[:: max(len(rows) // max(samples, 1), 1)][:samples])
    entries = []
    waiting = iter(rows)
    while window := list(islice(waiting, _WINDOW)):
        read: dict[int, list[Message]] = {}
        for index in window:
            try:
                read[index] = list(source.conversation(index, np.random.default_rng([index, 0])))
                render(read[index], found)
            except MediaError as error:
                found.problems.append(_problem(name, source, index, error))
        fresh = {
            key: medium
            for messages in read.values()
            for medium in _files(messages)
            if (key := _key(medium)) not in known
        }
        known |= zip(fresh, pool.map(look, fresh.values()), strict=True)
        for index, messages in read.items():
            row = source.name(index)
            found.media.update(
                f"{medium.modality} {'out' if message.role == 'assistant' else 'in'}"
                for message in messages
                for medium in message.media
            )
            found.problems += _of_texts(name, row, messages)
            bad = [known[_key(medium)] for medium in _files(messages)]
            bad = [error for error in bad if isinstance(error, Exception)]
            found.problems += [_problem(name, source, index, error) for error in bad]
            digest = _digest(messages, known)
            if digest in seen:
                what = f"says and shows the same as {seen[digest]}"
                found.problems.append(RowProblem(name, row, "duplicate", what))
            seen.setdefault(digest, row)
            if index in shown and not bad:
                try:
                    entries.append(GalleryEntry(tuple(map(_preview, messages)), f"{name}: {row}"))
                except MediaError as error:  # of a medium of which only the header was checked
                    found.problems.append(_problem(name, source, index, error))
        found.read += len(window)
        bar.update(len(window))
    return entries


def _tokens(
    renderer: Renderer | None,
    longest: int | None,
    messages: Sequence[Message],
    found: DatasetFindings,
) -> None:
    """Render a row and record its number of tokens. Raises RowError if it cannot be rendered,
    LongRowError if it has more than `longest` tokens."""
    if renderer is None:
        return
    rendered = render(renderer, messages)
    found.tokens.append(len(rendered))
    check_length(rendered, longest)


def _rows(count: int, limit: int | None) -> Sequence[int]:
    """Return the indices of all rows, or of `limit` rows drawn at random."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(np.random.default_rng(0).choice(count, limit, replace=False).tolist())


def _files(messages: Sequence[Message]) -> list[Medium]:
    return [medium for message in messages for medium in message.media if medium.source is not None]


def _key(medium: Medium) -> str:
    """Return a key that identifies the source of a medium."""
    source = medium.source
    if isinstance(source, bytes):
        return f"{medium.modality}:{hashlib.sha256(source).hexdigest()}"
    return f"{medium.modality}:{source}"


def _within(
    limits: media.Limits, look: Callable[[Medium], str | Exception], medium: Medium
) -> str | Exception:
    """Call `look` in a worker thread, which does not inherit the caller's limits."""
    with media.limits(limits):
        return look(medium)


def _look(medium: Medium) -> str | Exception:
    """Decode a medium and return the hash of its file's content, or the error."""
    try:
        if isinstance(medium, Video):  # long videos are read frame by frame, as in training
            medium.sample_frames(_SAMPLE_FRAMES)
        else:
            medium.decoded()
        return _content(medium)
    except MediaError as error:
        return error


def _glance(medium: Medium) -> str | Exception:
    """As `_look`, but read the header only."""
    try:
        assert medium.source is not None
        facts = media.probe(medium.source)
        if facts.modality != medium.modality:
            raise MediaError(f"{medium!r}: expected {medium.modality}, got {facts.modality}")
        return _content(medium)
    except MediaError as error:
        return error


def _content(medium: Medium) -> str:
    """Return the SHA-256 of a medium's file."""
    source = medium.source
    if isinstance(source, Embedded):
        source = source.read()
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with Path(str(source)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(messages: Sequence[Message], known: Mapping[str, str | Exception]) -> bytes:
    """Return a hash of a conversation's texts and media contents, whatever the file names."""
    content = [
        [message.role]
        + [
            part.text
            if isinstance(part, Text)
            else f"{part.modality}:{known.get(_key(part))}:{part.caption}"
            for part in message.parts
        ]
        for message in messages
    ]
    return hashlib.sha256(json.dumps(content).encode()).digest()


def _of_texts(dataset: str, row: str, messages: Sequence[Message]) -> Iterator[RowProblem]:
    """Yield a problem for each unfilled placeholder in the texts."""
    for message in messages:
        for match in TAG.finditer(message.text):
            what = f"{match[0]!r} stands in the text of {message.role!r} and means nothing"
            yield RowProblem(dataset, row, "tag", what)


def _problem(dataset: str, source: DataSource, index: int, error: Exception) -> RowProblem:
    kind = next(kind for kind, cls in KINDS.items() if isinstance(error, cls))
    return RowProblem(dataset, source.name(index), kind, str(error))


def _preview(message: Message) -> Message:
    """Return a message with small images, the beginnings of audio and a few frames of videos."""
    return message.with_parts([_short(p) if isinstance(p, Medium) else p for p in message.parts])


def _short(medium: Medium) -> Medium:
    if isinstance(medium, Image) and medium.has_data:
        picture = medium.to_pil()
        picture.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
        return Image.from_pil(picture, caption=medium.caption)
    if isinstance(medium, Video) and medium.has_data:
        frames = medium.sample_frames(_SAMPLE_FRAMES)
        return Video.from_numpy(frames, 4.0, caption=medium.caption)
    if isinstance(medium, Audio) and medium.has_data:
        sound = medium.decoded()
        assert isinstance(sound, Audio)
        assert sound.sample_rate
        end = _SAMPLE_SECONDS * sound.sample_rate
        return replace(sound, source=None, array=sound.to_numpy()[:, :end])
    return medium
