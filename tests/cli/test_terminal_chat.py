"""The chat in a terminal: words as they come, commands, files, Ctrl-C, and no escape codes in a
file."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmllm import console, terminal
from mmllm.cli.reply_printer import ReplyPrinter
from mmllm.cli.terminal_chat import TerminalChat, TerminalOptions, file_named
from mmllm.conversation import Audio, Image, Text
from mmllm.errors import MediaError
from mmllm.inference.chat import Chat
from mmllm.inference.events import MediumReady, MediumStarted, Progress, TextDelta
from mmllm.model import AnyToAny
from tests import processes

ROOT = Path(__file__).parents[2]
COLOURS = np.array(
    [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]], [[13, 14, 15], [16, 17, 18]]], np.uint8
)
"""An image of two columns and three rows."""


@pytest.mark.parametrize("typed", ["a b.png", "'a b.png'", '"a b.png"', r"a\ b.png", "./a b.png"])
def test_a_file_is_named_as_people_type_or_drag_it(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a b.png").touch()
    assert file_named(typed) == Path("a b.png")
    assert file_named("~/a b.png") == tmp_path / "a b.png"


# --- one conversation -----------------------------------------------------------------------------


@pytest.fixture
def chat(tiny_model: AnyToAny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TerminalChat:
    monkeypatch.chdir(tmp_path)
    return TerminalChat(Chat(tiny_model), TerminalOptions())


def test_parts_are_printed_in_order_as_they_come(
    chat: TerminalChat, capsys: pytest.CaptureFixture[str]
) -> None:
    printer = ReplyPrinter(chat.save_and_show)
    picture = Image(COLOURS, provenance={"seed": 5})
    expected = [
        (TextDelta(0, " Here"), "Here"),
        (TextDelta(0, " it "), " it"),
        (TextDelta(0, "is: "), " is:"),
        (MediumStarted(1, "image"), "\n"),
        (TextDelta(2, " And"), ""),  # it waits for the picture
        (Progress(1, "image", 1, 2), ""),
        (MediumStarted(3, "audio"), ""),
        (MediumReady(3, Audio(np.zeros(160, np.float32), sample_rate=16000)), ""),
        (
            MediumReady(1, picture),
            "[image: mmllm-chat/reply-001.png] seed 5\nAnd\n[audio: mmllm-chat/reply-001.wav]\n",
        ),
        (TextDelta(4, " done.\n"), "done."),
    ]
    for event, printed in expected:
        printer.print(event)
        assert capsys.readouterr().out == printed, event
    printer.close()
    assert capsys.readouterr().out == "\n"
    assert (Image("mmllm-chat/reply-001.png").to_numpy() == COLOURS).all()
    assert chat.last_medium is not None
    assert chat.last_medium.modality == "audio"


def test_what_is_printed_is_the_reply(
    chat: TerminalChat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as `Chat.reply`, and not one escape code where the output is no terminal."""
    monkeypatch.setenv("COLORTERM", "truecolor")
    chat.options = TerminalOptions({"image": "force", "audio": "force"}, seed=3)
    reply = chat.turn("draw")
    same = chat.chat.reply("draw", modalities=chat.options.modalities, seed=3)
    assert reply.message.text == same.message.text
    lines = []
    for part in reply.message.parts:
        if isinstance(part, Text):
            lines += [text] if (text := console.strip_controls(part.text).strip()) else []
        else:
            suffix = {"image": "png", "audio": "wav"}[part.modality]
            lines.append(f"[{part.modality}: mmllm-chat/reply-001.{suffix}] seed 3")
    shown = capsys.readouterr()
    assert shown.out == "".join(f"{line}\n" for line in lines)
    assert "\x1b" not in shown.out + shown.err


def test_no_file_is_overwritten_and_a_failed_one_leaves_nothing(chat: TerminalChat) -> None:
    picture = Image(COLOURS)
    assert [chat.save(picture).name for _ in range(3)] == [
        f"reply-00{number}.png" for number in (1, 2, 3)
    ]
    with pytest.raises(MediaError):
        chat.save(Image("nothing.png"))
    assert len(list(Path("mmllm-chat").iterdir())) == 3


def test_a_reply_that_cannot_be_saved_is_kept(
    chat: TerminalChat, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    chat.out = Path("file")
    chat.options = TerminalOptions({"image": "force"}, seed=1)
    with pytest.raises(MediaError, match="file: is a file; name a folder"):
        chat.turn("draw")
    assert [message.role for message in chat.session] == ["user", "assistant"]
    assert chat.run_command("/save kept.png")
    assert (Image("kept.png").to_numpy() == chat.session.messages[1].media[0].to_numpy()).all()
    assert "kept.png" in capsys.readouterr().err


def test_open_opens_the_last_medium(chat: TerminalChat, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.media import display

    opened: list[object] = []
    monkeypatch.setattr(display, "show", opened.append)
    chat.options = TerminalOptions({"image": "force"}, seed=1)
    reply = chat.turn("draw")
    assert chat.run_command("/open")
    assert opened == [reply.media[-1]]


def test_what_an_encoding_lacks_is_replaced(system_tree: dict, tmp_path: Path) -> None:
    """Bytes that are no text come in, and characters that the encoding lacks go out."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"system": system_tree}))
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "mmllm", "chat", "tiny.yaml", "--trust", "tests.parts"],
        input=b"caf\xe9 \xff\nexit\n",
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the reply"
    assert b"mmllm:" not in done.stderr
    assert b"Traceback" not in done.stderr


# --- a real terminal ----------------------------------------------------------------------------


class Person:
    """A user at a pseudo-terminal, who reads and types."""

    def __init__(self, master: int):
        self._master = master
        self.read = ""

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What was written up to the pattern, and it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.read, re.DOTALL)):
            ready, _, _ = select.select([self._master], [], [], 1)
            if ready:
                self.read += os.read(self._master, 65536).decode(errors="replace")
            assert time.monotonic() < end, f"no {pattern!r} in {self.read[-2000:]!r}"
        text, self.read = self.read[: found.end()], self.read[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())


@pytest.fixture
def at_terminal(system_tree: dict, tmp_path: Path) -> Iterator[Callable[..., Person]]:
    """Start `mmllm chat` with the tiny model on a pseudo-terminal of its own."""
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals of this kind")
    started: list[processes.Process] = []
    master, slave = os.openpty()
    terminal = os.ttyname(slave)

    def start(*arguments: str, **environment: str) -> Person:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"system": system_tree}))
        kept = {k: v for k, v in os.environ.items() if k not in ("TMUX", "NO_COLOR")}
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        command = ["-m", "mmllm", "chat", "tiny.yaml", "--trust", "tests.parts"]
        started.append(
            processes.Process(
                [*command, *arguments],
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                terminal=True,  # so that ^C is a signal
                cwd=tmp_path,
                env={**kept, **variables, **environment},
            )
        )
        return Person(master)

    yield start
    for process in started:
        process.kill()
        process.wait()
    os.close(master)
    os.close(slave)


def test_a_chat_at_a_terminal(at_terminal: Callable[..., Person], tmp_path: Path) -> None:
    person = at_terminal("--seed", "1", "--steps", "900", COLORTERM="truecolor")
    person.wait_for("you> ")
    person.type("/force picture\n")
    person.wait_for(r"force image.*you> ")

    person.type("draw\n")
    person.wait_for(r"\r\x1b\[Kimage \d+/900")  # one line that overwrites itself
    person.type("\x03")
    stopped = person.wait_for(r"\(stopped; the conversation is as it was before\).*you> ")
    assert "mmllm-chat" not in stopped
    assert not (tmp_path / "mmllm-chat").exists()

    person.type("draw\n")
    shown = person.wait_for(r"you> ")
    assert (tmp_path / "mmllm-chat" / "reply-001.png").is_file()
    assert "\x1b[2m[image: mmllm-chat/reply-001.png] seed 1\x1b[0m\r\n" in shown
    picture = Image(tmp_path / "mmllm-chat" / "reply-001.png")
    blocks = terminal.preview(picture, "blocks").replace("\n", "\r\n")
    assert blocks in shown
    assert not re.search(r"[^\n\r]\r\x1b\[K[^i\x1b\r]", shown), "a cleared line held text"

    person.type("exit\n")


def test_previews_can_be_left_out(at_terminal: Callable[..., Person]) -> None:
    person = at_terminal("--no-preview", "--force", "picture", "draw", COLORTERM="truecolor")
    assert "▀" not in person.wait_for(r"\[image: mmllm-chat/reply-001.png\] seed \d+")
