"""Talking to a model on a terminal: a turn, or a conversation in turns. Media become files."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from mmllm import console, terminal
from mmllm.conversation import MEDIA, Medium, Text
from mmllm.errors import ConfigError, MediaError, MmllmError, quoted
from mmllm.inputs import SUFFIXES, SYNONYMS, modality_key
from mmllm.replies import Done, Event, MediumReady, MediumStarted, Progress, Reply, TextDelta
from mmllm.utils.hints import did_you_mean

if TYPE_CHECKING:
    from mmllm.chat import Chat

Choice = Literal["auto", "force", "forbid"]

FOLDER = Path("mmllm-chat")
"""Where media go unless it is said."""

SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4"}
"""What a medium is saved as when no file is named."""

HELP = """\
/picture FILE  /sound FILE  /clip FILE   show or play a file with the next message
/force KIND  /forbid KIND  /auto   what the replies hold; KIND: picture, sound or clip
/seed N   repeat a reply; /seed alone: a new one each time
/open     open the last picture, sound or clip    /save FILE   write it to another file
/undo     take back the last turn                 /new   forget the conversation
/help     this list                               /quit  leave (or Ctrl-D)"""

COMMANDS = ("force", "forbid", "auto", "seed", "open", "save", "undo", "new", "help", "quit")
_LEAVING = {"exit", "quit", "/exit", "/quit", "/q"}


@dataclass(frozen=True)
class Answering:
    """How replies are made; see Chat.reply. `steps` are the decoders' denoising steps."""

    modalities: Mapping[str, Choice] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None


def check_out(out: Path | None) -> None:
    """Raises MediaError for a file that no medium can be saved as, before anything is made."""
    known = sorted({suffix for kinds in _suffixes().values() for suffix in kinds})
    if out is not None and out.suffix and not out.is_dir() and out.suffix.lower() not in known:
        raise MediaError(f"--out {out}: unknown suffix; known are {', '.join(known)}, or a folder")


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'image'?`, where a known name is like this one."""
    return did_you_mean(name, known, cutoff=0.7)


def check_modality(name: str, known: Iterable[str] = MEDIA) -> str:
    """The key of a modality, which `picture`, `sound` and `clip` name too. Raises ConfigError for
    one that is not known."""
    key, known = modality_key(name), list(known)
    if key not in known:
        raise ConfigError(
            f"unknown modality {quoted(name)}{near(name, [*known, *SYNONYMS])}; known are "
            f"{', '.join(known) or 'none: this model makes text only'}"
        )
    return key


def file_named(words: str) -> Path:
    """The file that was typed, or dragged into the terminal: with or without quotes, backslashes
    before blanks, and `~`."""
    try:
        if not (path := Path(words).expanduser()).exists():
            path = Path(" ".join(shlex.split(words))).expanduser()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise MediaError(f"{quoted(words)}: cannot be the name of a file ({error})") from error


class Session:
    """One conversation with one model. Its media are saved to `out` (a file for the first that
    fits, or a folder; `mmllm-chat/` unless given), their names are shown, and so are pictures
    where the terminal can, unless `previews` is False."""

    def __init__(
        self,
        chat: Chat,
        answering: Answering,
        out: Path | None = None,
        *,
        previews: bool = True,
    ):
        self.chat = chat
        self.answering = answering
        self.out = out
        self.talked = chat.conversation()
        self.waiting: list[Medium] = []
        self.last: Medium | None = None
        """What /open opens and /save writes."""
        self._how: terminal.Protocol | None = terminal.protocol(sys.stdout) if previews else None

    def turn(self, text: str, media: Sequence[Medium] = ()) -> Reply:
        """Say something, print the reply as it comes, in its order, and remember both. A medium
        that cannot be saved raises MediaError at the end; the reply is remembered."""
        steps = self.answering.steps
        outputs = self.chat.model.renderer.output_keys
        said = [*media, *([Text(text)] if text or not media else [])]
        decoders = None if steps is None else {name: {"steps": steps} for name in outputs}
        options = {"modalities": self.answering.modalities, "seed": self.answering.seed}
        events = cast("Generator[Event]", self.talked.stream(*said, decoders=decoders, **options))
        printer = _Printer(self)
        reply = None
        with contextlib.closing(events), contextlib.closing(printer):
            for event in events:
                printer.take(event)
                if isinstance(event, Done):
                    reply = event.reply
        assert reply is not None, "a stream that is not cancelled ends with Done"
        for note in reply.notes:
            console.note(f"({note})")
        if printer.failure:
            raise printer.failure
        return reply

    def talk(self) -> None:
        """Read lines until /quit or Ctrl-D. Ctrl-C stops the reply in the making."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` its history and editing)

        prompt = "you> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
        console.note("Say something; /help lists the commands.")
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                if prompt:
                    console.echo()
                return
            except KeyboardInterrupt:
                console.note("\n(/quit or Ctrl-D leaves)")
                continue
            if line.lower() in _LEAVING:
                return
            media = self.waiting
            try:
                if not self._is_command(line) and (line or media):
                    self.waiting = []
                    self.turn(line, media)
            except KeyboardInterrupt:
                self.waiting = media
                console.status()  # the terminal's ^C
                console.note("(stopped; the conversation is as it was before)")
            except (MmllmError, ValueError) as error:
                console.error(error)

    def show(self, medium: Medium) -> None:
        """Write a picture, or a clip's first frame, to a terminal that can show it."""
        if self._how:
            console.write(terminal.preview(medium, self._how))

    def save(self, medium: Medium) -> Path:
        """Save a medium of a reply to the file that was asked for, once, if it fits; else to a new
        one in the folder."""
        out = self.out
        if out is not None and out.suffix and not out.is_dir():
            if out.suffix.lower() in _suffixes()[medium.modality]:
                self.out = out.parent
                return medium.save(out)
            out = out.parent
        return _save_new(medium, FOLDER if out is None else out)

    def _is_command(self, line: str) -> bool:
        """Obey a line that begins with a slash, or is the name of a media file alone (dragged into
        the terminal). False for anything else, which is to be said."""
        if _is_media_file(line):
            from mmllm import media

            path = file_named(line)
            self._attach(media.probe(path).modality, path)
            return True
        if line.startswith("/"):
            name, _, words = line[1:].partition(" ")
            self._obey(name.lower(), words.strip())
            return True
        return False

    def _obey(self, name: str, words: str) -> None:
        """One command and the rest of its line."""
        if modality_key(name) in MEDIA:
            if not words:
                raise ConfigError(f"/{name}: expected the name of a file, as in /{name} FILE")
            self._attach(modality_key(name), file_named(words))
        elif name in ("force", "forbid"):
            key = check_modality(words, self.chat.model.renderer.output_keys)
            choices: dict[str, Choice] = {**self.answering.modalities}
            choices[key] = "force" if name == "force" else "forbid"
            self.answering = replace(self.answering, modalities=choices)
            console.note(f"({', '.join(f'{c} {k}' for k, c in choices.items())}; /auto ends it)")
        elif name == "auto":
            self.answering = replace(self.answering, modalities={})
        elif name == "seed":
            self.answering = replace(self.answering, seed=_seed(words) if words else None)
        elif name == "open":
            self._last().show()
        elif name == "save":
            if not words:
                raise ConfigError("/save: expected the name of a file, as in /save FILE")
            console.note(f"({self._last().save(file_named(words))})")
        elif name == "undo":
            taken = self.talked.undo()
            console.note("(the last turn is taken back)" if taken else "(there is no turn)")
        elif name == "new":
            self.talked.clear()
            self.waiting = []
        elif name == "help":
            console.note(HELP)
        else:
            known = [f"/{other}" for other in (*COMMANDS, *MEDIA, *SYNONYMS)]
            raise ConfigError(
                f"unknown command {quoted(f'/{name}')}{near(f'/{name}', known)}; /help lists them"
            )

    def _attach(self, modality: str, path: Path) -> None:
        """Show or play a file with the next message."""
        known = self.chat.model.renderer.input_keys
        if modality not in known:
            raise ConfigError(f"this model takes {', '.join(['text', *known])}, got {modality}")
        medium = MEDIA[modality](path).decoded()
        self.waiting = [*self.waiting, medium]
        self.show(medium)
        console.note(f"(goes with your next message: {path})")

    def _last(self) -> Medium:
        if self.last is None:
            raise ConfigError("there is no picture, sound or clip yet")
        return self.last


class _Printer:
    """Prints one reply as it comes, its parts in their order: text that follows a medium waits
    until that is made, and the line of progress is the last one of the terminal."""

    def __init__(self, session: Session):
        self.failure: MmllmError | None = None
        """Why a medium could not be saved or shown."""
        self._session = session
        self._texts: dict[int, str] = {}
        self._media: dict[int, Medium | None] = {}
        self._progress: dict[int, str] = {}
        self._status = ""
        self._place = 0
        self._written = 0
        """Characters of the text at `_place` that are printed."""

    def take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._texts[event.part_index] = self._texts.get(event.part_index, "") + event.text
        elif isinstance(event, MediumStarted):
            self._media[event.part_index] = None
            self._progress[event.part_index] = event.modality
        elif isinstance(event, Progress):
            self._progress[event.part_index] = f"{event.modality} {event.step}/{event.steps}"
        elif isinstance(event, MediumReady):
            self._media[event.part_index] = event.medium
            self._progress.pop(event.part_index, None)
        self._advance()
        if not self._written:  # else the line belongs to the text
            self._show_status(" · ".join(self._progress.values()))

    def close(self) -> None:
        """The reply is complete, or was stopped."""
        self._show_status("")
        self._end_line()

    def _show_status(self, status: str) -> None:
        if status != self._status:  # clearing a line that holds no status would clear text
            console.status(status)
        self._status = status

    def _advance(self) -> None:
        """Print what is known by now, up to the first medium that is being made."""
        last = max([*self._texts, *self._media], default=0)
        while self._place <= last:
            if self._place in self._media:
                medium = self._media[self._place]
                if medium is None:
                    return
                self._print_medium(medium)
            else:
                self._print_text()
                if self._place == last:  # it may go on
                    return
                self._end_line()
            self._place += 1

    def _print_text(self) -> None:
        text = console.strip_controls(self._texts.get(self._place, "")).lstrip()
        certain = len(text.rstrip())  # blanks at the end of a part are left out
        if certain > self._written:
            self._show_status("")
            console.write(text[self._written : certain])
            self._written = certain

    def _end_line(self) -> None:
        if self._written:
            console.echo()
        self._written = 0

    def _print_medium(self, medium: Medium) -> None:
        self._session.last = medium
        self._show_status("")
        try:
            path = self._session.save(medium)
            self._session.show(medium)
        except MmllmError as error:
            self.failure = error
            return
        seed = (medium.provenance or {}).get("seed")
        told = "" if seed is None else f" seed {seed}"
        console.echo(console.dim(f"[{medium.modality}: {path}]{told}"))


def _seed(words: str) -> int:
    try:
        seed = int(words)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise ConfigError(f"/seed: expected a whole number from 0 on, got {quoted(words)}")
    return seed


def _save_new(medium: Medium, folder: Path) -> Path:
    """Save a medium as a file that was not there, `reply-001.png` say."""
    number = 1
    while True:
        path = folder / f"reply-{number:03d}{SUFFIX[medium.modality]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)  # nobody else takes this name
        except FileExistsError:
            if not folder.is_dir():
                raise MediaError(f"{folder}: is a file; name a folder") from None
            number += 1
            continue
        except OSError as error:
            raise MediaError(
                f"{folder}: cannot write there ({error.strerror}); give --out FOLDER, or /save FILE"
            ) from error
        try:
            return medium.save(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _is_media_file(line: str) -> bool:
    """Whether a line is the name of a file of a medium and nothing else: there is one, or it is
    written as a path."""
    if not line or len(line) > 1000:
        return False
    try:
        path = file_named(line)
        known = path.suffix.lower() in SUFFIXES
        return known and (path.is_file() or (path.is_absolute() and " " not in line))
    except (MediaError, OSError, ValueError):
        return False


def _suffixes() -> dict[str, Sequence[str]]:
    """Modality -> suffixes it can be saved as."""
    from mmllm.media import audio, image, video

    return {
        "image": tuple(image.SUFFIXES),
        "audio": tuple(audio.SUFFIXES),
        "video": video.SUFFIXES,
    }
