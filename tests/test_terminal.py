"""The chat on a terminal: pictures by each protocol, words as they come, Ctrl-C, and no escape
codes where the output is a file."""

from __future__ import annotations

import base64
import io
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
from PIL import Image as PILImage

from mmllm import console, terminal
from mmllm.chat import Chat
from mmllm.conversation import Audio, Image, Text, Video
from mmllm.errors import MediaError
from mmllm.model import AnyToAny
from mmllm.repl import Answering, Session, _Printer, file_named
from mmllm.replies import MediumReady, MediumStarted, Progress, TextDelta
from tests import parts

ROOT = Path(__file__).parents[1]
COLOURS = np.array(
    [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]], [[13, 14, 15], [16, 17, 18]]], np.uint8
)
"""A picture of two columns and three rows."""


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "how"),
    [
        ({}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "NO_COLOR": "1"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "COLORTERM": "truecolor"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm", "TMUX": "/t", "TERM_PROGRAM": "iTerm.app"}, None),
    ],
)
def test_the_protocol_is_known_by_the_environment(
    environment: dict[str, str], how: str | None
) -> None:
    assert terminal.protocol(Tty(), environment) == how
    assert terminal.protocol(io.StringIO(), environment) is None, "a pipe or a file"


def test_half_blocks_are_the_pixels() -> None:
    """Two rows of pixels a line; the last row of an odd number has no background."""
    assert terminal.preview(Image(COLOURS), "blocks") == (
        "\x1b[38;2;1;2;3m\x1b[48;2;7;8;9m▀\x1b[38;2;4;5;6m\x1b[48;2;10;11;12m▀\x1b[0m\n"
        "\x1b[38;2;13;14;15m▀\x1b[38;2;16;17;18m▀\x1b[0m\n"
    )


@pytest.mark.parametrize(("height", "width"), [(2000, 3), (3, 2000), (900, 1600), (1, 1)])
def test_half_blocks_fit_into_the_terminal(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    shown = terminal.preview(Image(np.zeros((height, width, 3), np.uint8)), "blocks")
    lines = [line.count("▀") for line in shown.splitlines()]
    assert 1 <= len(lines) <= 16
    assert 1 <= max(lines) <= 39


@pytest.mark.parametrize("size", [(8, 6), (300, 20), (2000, 1000)])
def test_kitty_and_iterm2_are_given_the_picture(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
    kitty = terminal.preview(Image(pixels), "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty)
    assert all(len(data) <= 4096 for _, data in pieces)
    assert pieces[0][0].startswith("a=T,f=100,q=2,")
    assert [keys[-1] for keys, _ in pieces] == ["1"] * (len(pieces) - 1) + ["0"]
    png = base64.b64decode("".join(data for _, data in pieces))
    shown = PILImage.open(io.BytesIO(png))
    assert max(shown.size) <= 480
    if size == (8, 6):  # enlarged 32 times, pixel by pixel
        assert (np.asarray(shown)[::32, ::32] == pixels).all()
        assert shown.size == (256, 192)

    iterm2 = terminal.preview(Image(pixels), "iterm2")
    assert iterm2 == (
        f"\x1b]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:"
        f"{base64.b64encode(png).decode()}\x07\n"
    )


def test_a_clip_is_shown_by_its_first_frame_and_a_sound_not_at_all() -> None:
    clip = Video(np.stack([COLOURS, COLOURS[::-1]]), fps=8)
    for how in ("kitty", "iterm2", "blocks"):
        assert terminal.preview(clip, how) == terminal.preview(Image(COLOURS), how)
        assert terminal.preview(Audio(np.zeros(160, np.float32), sample_rate=16000), how) == ""


def test_foreign_text_cannot_steer_the_terminal() -> None:
    assert console.strip_controls("a\x1b]0;x\x07b\x9b2Jc\r\n\td é 画") == "a]0;xb2Jc\n\td é 画"


@pytest.mark.parametrize("typed", ["a b.png", "'a b.png'", '"a b.png"', r"a\ b.png", "./a b.png"])
def test_a_file_is_named_as_people_type_or_drag_it(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a b.png").touch()
    assert file_named(typed) == Path("a b.png")
    assert file_named("~/a b.png") == tmp_path / "a b.png"


# --- a session ----------------------------------------------------------------------------------


@pytest.fixture
def session(tiny_model: AnyToAny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(tmp_path)
    return Session(Chat(tiny_model), Answering())


def test_parts_are_printed_in_order_as_they_come(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    printer = _Printer(session)
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
        printer.take(event)
        assert capsys.readouterr().out == printed, event
    printer.close()
    assert capsys.readouterr().out == "\n"
    assert (Image("mmllm-chat/reply-001.png").to_numpy() == COLOURS).all()
    assert session.last is not None
    assert session.last.modality == "audio"


def test_what_is_printed_is_the_reply(
    session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as `Chat.reply`, and not one escape code where the output is no terminal."""
    monkeypatch.setenv("COLORTERM", "truecolor")
    session.answering = Answering({"image": "force", "audio": "force"}, seed=3)
    reply = session.turn("draw")
    same = session.chat.reply("draw", modalities=session.answering.modalities, seed=3)
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


def test_no_file_is_overwritten_and_a_failed_one_leaves_nothing(session: Session) -> None:
    picture = Image(COLOURS)
    assert [session.save(picture).name for _ in range(3)] == [
        f"reply-00{number}.png" for number in (1, 2, 3)
    ]
    with pytest.raises(MediaError):
        session.save(Image("nothing.png"))
    assert len(list(Path("mmllm-chat").iterdir())) == 3


def test_a_reply_that_cannot_be_saved_is_kept(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    session.out = Path("file")
    session.answering = Answering({"image": "force"}, seed=1)
    with pytest.raises(MediaError, match="file: is a file; name a folder"):
        session.turn("draw")
    assert [message.role for message in session.talked] == ["user", "assistant"]
    session._obey("save", "kept.png")
    assert (Image("kept.png").to_numpy() == session.talked.messages[1].media[0].to_numpy()).all()
    assert "kept.png" in capsys.readouterr().err


def test_open_opens_the_last_medium(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.media import display

    opened: list[object] = []
    monkeypatch.setattr(display, "show", opened.append)
    session.answering = Answering({"image": "force"}, seed=1)
    reply = session.turn("draw")
    session._obey("open", "")
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
    """Somebody at a pseudo-terminal, who reads and types."""

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
    import fcntl
    import termios

    started: list[subprocess.Popen[bytes]] = []
    master, slave = os.openpty()

    def control() -> None:
        parts.heed_signals()
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C is a signal

    def start(*arguments: str, **environment: str) -> Person:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"system": system_tree}))
        kept = {k: v for k, v in os.environ.items() if k not in ("TMUX", "NO_COLOR")}
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        command = [sys.executable, "-m", "mmllm", "chat", "tiny.yaml", "--trust", "tests.parts"]
        started.append(
            subprocess.Popen(
                [*command, *arguments],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=tmp_path,
                env={**kept, **variables, **environment},
                preexec_fn=control,
            )
        )
        return Person(master)

    yield start
    for process in started:
        process.kill()
        process.wait()
    os.close(master)
    os.close(slave)


def test_talking_at_a_terminal(at_terminal: Callable[..., Person], tmp_path: Path) -> None:
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
