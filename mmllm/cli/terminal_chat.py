"""A conversation in the terminal: its commands, its files, and one turn after the other."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mmllm import console, terminal
from mmllm.cli.reply_printer import ReplyPrinter
from mmllm.conversation import MEDIA, Medium, Text
from mmllm.errors import ConfigError, MediaError, MmllmError, quoted
from mmllm.inference.events import Done, Event
from mmllm.inference.inputs import MEDIA_SUFFIXES
from mmllm.inference.options import SYNONYMS, ModalityChoice, modality_key
from mmllm.inference.replies import Reply
from mmllm.utils.hints import did_you_mean

if TYPE_CHECKING:
    from mmllm.inference.chat import Chat

DEFAULT_FOLDER = Path("mmllm-chat")
"""Where media are saved unless another place is given."""

DEFAULT_SUFFIXES = {"image": ".png", "audio": ".wav", "video": ".mp4"}
"""Formats of media that no file was named for."""

HELP = """\
/picture FILE  /sound FILE  /clip FILE   show or play a file with the next message
/force KIND  /forbid KIND  /auto   what the replies hold; KIND: picture, sound or clip
/seed N   repeat a reply; /seed alone: a new one each time
/open     open the last picture, sound or clip    /save FILE   write it to another file
/undo     take back the last turn                 /new   forget the conversation
/help     this list                               /quit  leave (or Ctrl-D)"""

COMMANDS = ("force", "forbid", "auto", "seed", "open", "save", "undo", "new", "help", "quit")
_QUIT = {"exit", "quit", "/exit", "/quit", "/q"}


@dataclass(frozen=True)
class TerminalOptions:
    """How replies are generated, see `Chat.reply`; `steps`: denoising steps of the decoders."""

    modalities: Mapping[str, ModalityChoice] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None


class TerminalChat:
    """One conversation with one model in the terminal.

    Args:
        chat: the model.
        options: how replies are generated.
        out: a file for the first medium that can be saved as such, or a folder.
        previews: show images in the terminal, if it can.

    Attributes:
        session: the conversation so far.
        pending: media that go with the next message.
        last_medium: what /open opens and /save writes.
    """

    def __init__(
        self,
        chat: Chat,
        options: TerminalOptions,
        out: Path | None = None,
        *,
        previews: bool = True,
    ):
        self.chat = chat
        self.options = options
        self.out = out
        self.session = chat.conversation()
        self.pending: list[Medium] = []
        self.last_medium: Medium | None = None
        self._protocol: terminal.Protocol | None = (
            terminal.protocol(sys.stdout) if previews else None
        )

    def turn(self, text: str, media: Sequence[Medium] = ()) -> Reply:
        """Send a message, print the reply as it is generated, and keep both.

        Raises:
            MediaError: a medium cannot be saved; raised at the end, the reply is kept.
        """
        steps = self.options.steps
        modalities = self.chat.model.renderer.output_keys
        parts = [*media, *([Text(text)] if text or not media else [])]
        decoders = None if steps is None else {name: {"steps": steps} for name in modalities}
        options = {"modalities": self.options.modalities, "seed": self.options.seed}
        events = cast("Generator[Event]", self.session.stream(*parts, decoders=decoders, **options))
        printer = ReplyPrinter(self.save_and_show)
        reply = None
        with contextlib.closing(events), contextlib.closing(printer):
            for event in events:
                printer.print(event)
                if isinstance(event, Done):
                    reply = event.reply
        assert reply is not None, "a stream that is not cancelled ends with Done"
        for note in reply.notes:
            console.note(f"({note})")
        if printer.failure:
            raise printer.failure
        return reply

    def run(self) -> None:
        """Read lines until /quit or Ctrl-D. Ctrl-C cancels the reply that is being generated."""
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
            if line.lower() in _QUIT:
                return
            media = self.pending
            try:
                if not self.run_command(line) and (line or media):
                    self.pending = []
                    self.turn(line, media)
            except KeyboardInterrupt:
                self.pending = media
                console.status()  # the terminal's ^C
                console.note("(stopped; the conversation is as it was before)")
            except (MmllmError, ValueError) as error:
                console.error(error)

    def run_command(self, line: str) -> bool:
        """Run a line that begins with a slash, or attach the media file whose name is the whole
        line (dragged into the terminal). False for any other line: a message."""
        if is_media_file(line):
            from mmllm import media

            path = file_named(line)
            self._attach(media.probe(path).modality, path)
            return True
        if line.startswith("/"):
            name, _, words = line[1:].partition(" ")
            self._run(name.lower(), words.strip())
            return True
        return False

    def save(self, medium: Medium) -> Path:
        """Save a medium to the requested file, once, if the format fits; else to a new file in the
        folder. Returns the file."""
        out = self.out
        if out is not None and out.suffix and not out.is_dir():
            if out.suffix.lower() in _suffixes()[medium.modality]:
                self.out = out.parent
                return medium.save(out)
            out = out.parent
        return _save_new(medium, DEFAULT_FOLDER if out is None else out)

    def save_and_show(self, medium: Medium) -> Path:
        """Save a medium of a reply and show it; it is what /open and /save mean from now on."""
        self.last_medium = medium
        path = self.save(medium)
        self._show(medium)
        return path

    def _show(self, medium: Medium) -> None:
        """Write an image, or a video's first frame, to a terminal that can show it."""
        if self._protocol:
            console.write(terminal.preview(medium, self._protocol))

    def _run(self, name: str, words: str) -> None:
        """One command and the rest of its line."""
        if modality_key(name) in MEDIA:
            if not words:
                raise ConfigError(f"/{name}: expected the name of a file, as in /{name} FILE")
            self._attach(modality_key(name), file_named(words))
        elif name in ("force", "forbid"):
            key = check_modality(words, self.chat.model.renderer.output_keys)
            choices: dict[str, ModalityChoice] = {**self.options.modalities}
            choices[key] = "force" if name == "force" else "forbid"
            self.options = replace(self.options, modalities=choices)
            console.note(f"({', '.join(f'{c} {k}' for k, c in choices.items())}; /auto ends it)")
        elif name == "auto":
            self.options = replace(self.options, modalities={})
        elif name == "seed":
            self.options = replace(self.options, seed=_parse_seed(words) if words else None)
        elif name == "open":
            self._last().show()
        elif name == "save":
            if not words:
                raise ConfigError("/save: expected the name of a file, as in /save FILE")
            console.note(f"({self._last().save(file_named(words))})")
        elif name == "undo":
            removed = self.session.undo()
            console.note("(the last turn is taken back)" if removed else "(there is no turn)")
        elif name == "new":
            self.session.clear()
            self.pending = []
        elif name == "help":
            console.note(HELP)
        else:
            known = [f"/{other}" for other in (*COMMANDS, *MEDIA, *SYNONYMS)]
            hint = did_you_mean(f"/{name}", known, cutoff=0.7)
            raise ConfigError(f"unknown command {quoted(f'/{name}')}{hint}; /help lists them")

    def _attach(self, modality: str, path: Path) -> None:
        """Send a file with the next message."""
        known = self.chat.model.renderer.input_keys
        if modality not in known:
            raise ConfigError(f"this model takes {', '.join(['text', *known])}, got {modality}")
        medium = MEDIA[modality](path).decoded()
        self.pending = [*self.pending, medium]
        self._show(medium)
        console.note(f"(goes with your next message: {path})")

    def _last(self) -> Medium:
        if self.last_medium is None:
            raise ConfigError("there is no picture, sound or clip yet")
        return self.last_medium


def check_out(out: Path | None) -> None:
    """Raise MediaError for a file that no medium can be saved as, before anything is generated."""
    known = sorted({suffix for suffixes in _suffixes().values() for suffix in suffixes})
    if out is not None and out.suffix and not out.is_dir() and out.suffix.lower() not in known:
        raise MediaError(f"--out {out}: unknown suffix; known are {', '.join(known)}, or a folder")


def check_modality(name: str, known: Iterable[str] = MEDIA) -> str:
    """The key of a modality; `picture`, `sound` and `clip` are synonyms.

    Raises:
        ConfigError: for a name that is not known.
    """
    key, known = modality_key(name), list(known)
    if key not in known:
        hint = did_you_mean(name, [*known, *SYNONYMS], cutoff=0.7)
        raise ConfigError(
            f"unknown modality {quoted(name)}{hint}; known are "
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


def is_media_file(line: str) -> bool:
    """Whether a line is the name of a media file and nothing else: an existing file, or a path."""
    if not line or len(line) > 1000:
        return False
    try:
        path = file_named(line)
        known = path.suffix.lower() in MEDIA_SUFFIXES
        return known and (path.is_file() or (path.is_absolute() and " " not in line))
    except (MediaError, OSError, ValueError):
        return False


def _parse_seed(words: str) -> int:
    try:
        seed = int(words)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise ConfigError(f"/seed: expected a whole number from 0 on, got {quoted(words)}")
    return seed


def _save_new(medium: Medium, folder: Path) -> Path:
    """Save a medium as a new file, for example `reply-001.png`, and return it."""
    number = 1
    while True:
        path = folder / f"reply-{number:03d}{DEFAULT_SUFFIXES[medium.modality]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)  # no other process takes this name
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


def _suffixes() -> dict[str, Sequence[str]]:
    """Modality -> suffixes of files that it can be saved as."""
    from mmllm.media import audio, image, video

    return {
        "image": tuple(image.SUFFIXES),
        "audio": tuple(audio.SUFFIXES),
        "video": video.SUFFIXES,
    }
