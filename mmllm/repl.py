"""Talking to a model on a terminal: a turn, or a conversation in turns. Media become files."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmllm import console
from mmllm.conversation import MEDIA, Medium, Message, Text, user
from mmllm.errors import MediaError, MmllmError

if TYPE_CHECKING:
    from mmllm.chat import Chat, Reply

Choice = Literal["auto", "force", "forbid"]

SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4"}
"""What a medium is saved as when no file is named."""

HELP = """\
/image FILE  /audio FILE  /video FILE   show or play a file with the next message
/force MODALITY  /forbid MODALITY  /auto   what the replies hold
/seed N   repeat a reply        /new   forget the conversation
/help     this list             /quit  leave (or Ctrl-D)"""


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


class Session:
    """One conversation with one model; its media are saved to `out` (a file for the first that
    fits, or a folder; the current folder unless given) and their names are shown."""

    def __init__(self, chat: Chat, answering: Answering, out: Path | None = None):
        self.chat = chat
        self.answering = answering
        self.out = out
        self.conversation: list[Message] = []
        self.waiting: list[Medium] = []

    def turn(self, text: str, media: Sequence[Medium] = ()) -> Reply:
        """Say something, print the reply in its order, and remember both."""
        said = user(*media, *([text] if text else []))
        steps = self.answering.steps
        outputs = self.chat.model.renderer.output_keys
        reply = self.chat.reply(
            [*self.conversation, said],
            modalities=self.answering.modalities,
            seed=self.answering.seed,
            decoders=None if steps is None else {name: {"steps": steps} for name in outputs},
            on_step=console.show_step,
        )
        self.conversation += [said, reply.message]
        for note in reply.notes:
            console.tell(f"({note})")
        for part in reply.message.parts:
            if isinstance(part, Text):
                console.say(part.text.strip())
            else:
                console.say(f"[{part.modality}: {part.save(self._name(part))}]")
        return reply

    def talk(self) -> None:
        """Read lines until /quit or Ctrl-D. Ctrl-C drops the reply in the making."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` its history and editing)

        console.tell("Say something; /help lists the commands.")
        while True:
            try:
                line = input("you> ").strip()
            except EOFError:
                console.say()
                return
            except KeyboardInterrupt:
                console.tell("\n(/quit or Ctrl-D leaves)")
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*shlex.split(line[1:]))
                elif line or self.waiting:
                    media, self.waiting = self.waiting, []
                    self.turn(line, media)
            except KeyboardInterrupt:
                console.tell("\n(stopped; the conversation is as it was before)")
            except (MmllmError, ValueError) as error:
                console.fail(error)

    def _command(self, name: str = "help", *arguments: str) -> None:
        """One line that begins with a slash."""
        if name in MEDIA and len(arguments) == 1:
            self.waiting.append(MEDIA[name](source=Path(arguments[0])).decoded())
            console.tell(f"(goes with your next message: {arguments[0]})")
        elif name in ("force", "forbid") and len(arguments) == 1:
            choices = {**self.answering.modalities, arguments[0]: name}
            self.answering = replace(self.answering, modalities=choices)
        elif name == "auto" and not arguments:
            self.answering = replace(self.answering, modalities={})
        elif name == "seed" and len(arguments) == 1:
            self.answering = replace(self.answering, seed=int(arguments[0]))
        elif name == "new" and not arguments:
            self.conversation, self.waiting = [], []
        else:
            console.tell(HELP)

    def _name(self, medium: Medium) -> Path:
        """The file that was asked for, once, if it fits; else a new one in the folder."""
        out = self.out
        if out is not None and out.suffix and not out.is_dir():
            if out.suffix.lower() in _suffixes()[medium.modality]:
                self.out = out.parent
                return out
            out = out.parent
        folder, number = out or Path(), 1
        while (name := folder / f"reply-{number:03d}{SUFFIX[medium.modality]}").exists():
            number += 1
        return name


def _suffixes() -> dict[str, Sequence[str]]:
    """Modality -> suffixes it can be saved as."""
    from mmllm.media import audio, image, video

    return {
        "image": tuple(image.SUFFIXES),
        "audio": tuple(audio.SUFFIXES),
        "video": video.SUFFIXES,
    }
