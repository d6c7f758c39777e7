"""The first lines of Python that people write: they work, or the error names the remedy."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import mmllm
from mmllm import Audio, Chat, Image, Text, Video, assistant, system, user
from mmllm.errors import ConfigError, MediaError
from mmllm.inference.events import Done
from mmllm.inference.replies import Reply
from mmllm.inference.session import ChatSession
from mmllm.model import AnyToAny
from tests.inference.comparing import same

QUICK: Any = {"seed": 3, "max_new_tokens": 6}
RED = (200, 10, 10)


@pytest.fixture
def chat(tiny_model: AnyToAny) -> Chat:
    return Chat(tiny_model)


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PILImage.new("RGB", (32, 32), RED).save(path)
    return path


# --- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "one two",
        Text("one two"),
        ["one two"],
        user("one two"),
        [user("one two")],
        (user("one two"),),
        {"role": "user", "content": "one two"},
        [{"role": "user", "content": "one two"}],
        [{"role": "user", "content": [{"type": "text", "text": "one two"}]}],
        [{"role": "user", "content": ["one two"]}],
    ],
    ids=repr,
)
def test_text_is_accepted_in_every_form(chat: Chat, given: Any) -> None:
    assert same(chat.reply(given, **QUICK), chat.reply([user("one two")], **QUICK))


def test_messages_may_come_from_a_generator(chat: Chat) -> None:
    messages = (user(words) for words in ("one", "two"))
    assert same(chat.reply(messages, **QUICK), chat.reply([user("one"), user("two")], **QUICK))


def test_a_chat_can_be_called(chat: Chat) -> None:
    assert same(chat("one two", **QUICK), chat.reply("one two", **QUICK))


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize(
    "picture",
    [
        lambda path: Image(path),
        lambda path: Image(str(path)),
        lambda path: Image(path.read_bytes()),
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: PILImage.open(path),
        lambda path: np.array(PILImage.open(path)),
        lambda path: Image(PILImage.open(path)),
        lambda path: Image(np.array(PILImage.open(path))),
        lambda path: {"type": "image", "image": str(path)},
        lambda path: {"type": "image", "image": PILImage.open(path)},
        lambda path: {"type": "image", "path": str(path)},
        lambda path: {"type": "image_url", "image_url": {"url": data_uri(path)}},
        lambda path: {"type": "image_url", "image_url": data_uri(path)},
        lambda path: {"type": "image_url", "image_url": {"url": f"file://{path}"}},
        lambda path: {"type": "input_image", "image_url": data_uri(path)},
    ],
    ids=lambda make: inspect.getsource(make).strip()[:60],
)
def test_images_are_accepted_in_every_form(
    chat: Chat, red: Path, picture: Callable[[Path], Any]
) -> None:
    expected = chat.reply([user("what is this?", Image(red))], **QUICK)
    given = picture(red)
    assert same(chat.reply("what is this?", given, **QUICK), expected)
    assert same(chat.reply(["what is this?", given], **QUICK), expected)
    assert same(chat.reply(user("what is this?", given), **QUICK), expected)
    content = ["what is this?", given]
    assert same(chat.reply([{"role": "user", "content": content}], **QUICK), expected)


def test_text_that_a_medium_parts_is_joined_by_a_space(red: Path) -> None:
    assert assistant("A cat.", Image(red), "A dog.").text == "A cat. A dog."
    assert assistant("A cat.", Image(red), Image(red), "\nA dog.").text == "A cat.\nA dog."
    assert assistant("A", "b").text == "Ab"
    assert assistant(Image(red), "A dog.").text == "A dog."


def test_a_file_name_as_text_is_refused_with_a_remedy(chat: Chat, red: Path) -> None:
    for ask in (lambda: user("what?", str(red)), lambda: chat.reply("what?", str(red))):
        with pytest.raises(ConfigError, match=r"is the name of a file: write Image\("):
            ask()
    assert user("what?", Text(str(red))).text.endswith("red.png")
    assert user("what is red.png?").text == "what is red.png?"
    assert user(str(red.with_name("absent.png"))).text.endswith("absent.png")


def test_sounds_and_clips_of_arrays() -> None:
    sound = Audio(np.zeros((2, 800), np.float32), sample_rate=16_000)
    assert (sound.to_numpy().shape, sound.seconds) == ((2, 800), 0.05)
    clip = Video(np.zeros((4, 8, 8, 3), np.uint8), fps=8)
    assert (clip.to_numpy().shape, clip.seconds) == ((4, 8, 8, 3), 0.5)
    with pytest.raises(MediaError, match=r"sample_rate\? Audio\(array, sample_rate=16000\)"):
        Audio(np.zeros(800, np.float32))
    with pytest.raises(MediaError, match=r"Video\(array, fps=8\)"):
        Video(np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(MediaError, match=r"uint8\[H, W, 3\]"):
        Image(np.zeros((3, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the conversation is empty"),
        (None, "expected text, a picture"),
        (7, "expected text, a picture"),
        ([user("a"), 7], "expected text, a picture"),
        ([{"role": "tool", "content": "x"}], "expected system, user or assistant, got 'tool'"),
        ([{"role": "user", "content": [{"type": "pdf"}]}], "got 'pdf'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part 'image' without"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "https://a/b.png"}]},
            "nothing is fetched",
        ),
    ],
)
def test_invalid_input_is_refused_with_a_remedy(chat: Chat, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat.reply(given)


def test_missing_files_are_named(chat: Chat) -> None:
    with pytest.raises(MediaError, match=r"absent\.png"):
        chat.reply("what?", Path("absent.png"))


# --- options ------------------------------------------------------------------------------------


def test_common_names_of_options_are_understood(chat: Chat) -> None:
    expected = chat.reply("one two", seed=3, max_new_tokens=2)
    assert same(chat.reply("one two", seed=3, max_tokens=2), expected)
    options: Any = {"max_completion_tokens": 2}
    assert same(chat.reply("one two", seed=3, **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 2}, "did you mean 'max_new_tokens'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"steps": 4}, r"decoders=\{'image': \{'steps': …\}\}"),
        ({"num_inference_steps": 4}, r"decoders=\{'image': \{'steps': …\}\}"),
        ({"guidance_scale": 4}, r"'guidance'"),
        ({"negative_prompt": "x"}, r"'negative_prompt'"),
        ({"negative": "x"}, r"'negative_prompt'"),
        ({"media": "x"}, "media are parts of a message"),
        ({"system_prompt": "x"}, 'system="Be brief."'),
        ({"stream": True}, r"chat\.stream"),
        ({"n": 2}, "reply_many"),
        ({"seeds": [1]}, "seed=0"),
        ({"max_tokens": 2, "max_new_tokens": 2}, "mean the same"),
        ({"do_sample": True}, "temperature"),
    ],
    ids=repr,
)
def test_unsupported_options_are_refused_with_a_remedy(
    chat: Chat, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chat.reply("one two", **options)


def test_a_system_message_and_media_by_keyword(chat: Chat, red: Path) -> None:
    written_out = [system("Be brief."), user("what?", Image(red), Image(red))]
    expected = chat.reply(written_out, **QUICK)
    shown = {"images": [str(red), PILImage.open(red)], "system": "Be brief."}
    assert same(chat.reply("what?", **shown, **QUICK), expected)
    assert same(chat.reply([user("what?")], **shown, **QUICK), expected)
    talk = chat.conversation(system="Be brief.")
    assert same(talk.reply("what?", image=[red, red], **QUICK), expected)
    assert [entry.role for entry in talk] == ["system", "user", "assistant"]
    with pytest.raises(ConfigError, match="has a system message already"):
        talk.reply("and now?", system="Be long.")
    with pytest.raises(ConfigError, match="expected a user message last"):
        chat.reply([user("what?"), assistant("that")], image=red)
    with pytest.raises(ConfigError, match="nothing is fetched"):
        chat.reply("what?", image="https://example.org/cat.png")
    with pytest.raises(MediaError, match=r"absent\.png"):
        chat.reply("what?", image="absent.png")
    wrong: Any = {"system": "Be brief."}
    with pytest.raises(ConfigError, match="a conversation begins with it"):
        chat.reply_many(["one"], **wrong)


def test_media_urls_as_text_are_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"nothing is fetched: download it and write Image\("):
        user("what?", "https://example.org/cat.jpg?size=2")
    assert user("see https://example.org/cat.jpg").text.startswith("see https")
    assert user("https://example.org/").text == "https://example.org/"


def test_several_conversations_are_given_like_single_ones(chat: Chat) -> None:
    replies = chat.reply_many(["one", [user("two")]], seeds=[1, 2], max_new_tokens=4)
    assert same(replies[0], chat.reply("one", seed=1, max_new_tokens=4))
    assert same(replies[1], chat.reply("two", seed=2, max_new_tokens=4))
    wrong: Any = {"seed": 1}
    with pytest.raises(ConfigError, match=r"seeds=\[0, 1, …\]"):
        chat.reply_many(["one", "two"], **wrong)


@pytest.mark.parametrize(
    ("modalities", "made"),
    [
        (["image"], ["image"]),
        ("image", ["image"]),
        ("picture", ["image"]),
        (("sound", "clip"), ["audio", "video"]),
        ({"picture": "force"}, ["image"]),
        (["text"], []),
    ],
    ids=repr,
)
def test_modalities_by_list_and_by_name(chat: Chat, modalities: Any, made: list[str]) -> None:
    reply = chat.reply("one two", modalities=modalities, **QUICK)
    others = {"image", "audio", "video"} if not isinstance(modalities, dict) else set()
    kinds = [medium.modality for medium in reply.media]
    assert [kind for kind in kinds if kind in made or kind in others] == made


def test_unknown_modalities_are_named(chat: Chat) -> None:
    with pytest.raises(ConfigError, match="unknown modality 'smell'"):
        chat.reply("one two", modalities=["smell"])


# --- replies and media --------------------------------------------------------------------------


def test_a_reply_gives_its_media_by_kind(chat: Chat, tmp_path: Path) -> None:
    reply = chat.reply("one", modalities=["image", "audio"], **QUICK)
    assert reply.image is reply.images[0]
    assert reply.audio is reply.audios[0]
    assert (reply.video, reply.videos) == (None, [])
    assert reply.image is not None
    assert reply.image.size == reply.image.to_pil().size
    assert np.asarray(reply.image).shape == reply.image.to_numpy().shape
    assert str(reply).count("[image]") == 1
    assert len(repr(reply)) < 400
    files = reply.save(tmp_path / "out")
    assert [file.name for file in files] == ["image-1.png", "audio-2.wav"]
    with pytest.raises(MediaError, match="2 media; give a folder"):
        reply.save(tmp_path / "one.png")
    assert chat.reply("one", modalities=["image"], **QUICK).save(tmp_path / "one.png") == [
        tmp_path / "one.png"
    ]
    with pytest.raises(MediaError, match=r"reply\.text is its text"):
        chat.reply("one", modalities=["text"], **QUICK).save(tmp_path / "two.png")


def test_media_become_files_in_memory() -> None:
    picture = Image(PILImage.new("RGB", (8, 6), RED))
    assert PILImage.open(io.BytesIO(picture.to_bytes())).size == (8, 6)
    assert PILImage.open(io.BytesIO(picture.to_bytes("webp"))).format == "WEBP"
    with pytest.raises(MediaError, match="saved as"):
        picture.to_bytes("docx")


def test_notebooks_show_replies_and_media(chat: Chat) -> None:
    reply = chat.reply("<b>one</b>", modalities=["image", "audio", "video"], **QUICK)
    shown = reply._repr_mimebundle_()["text/html"]
    assert shown.index("<img") < shown.index("<audio") < shown.index("<video")
    assert "data:image/png;base64," in shown
    sound = Audio("absent.wav")._repr_mimebundle_()
    assert "absent.wav" in sound["text/html"]
    session = ChatSession(chat, [user("<b>one</b>")])
    assert "&lt;b&gt;one" in session._repr_mimebundle_()["text/html"]


# --- conversations and asyncio ------------------------------------------------------------------


def test_a_conversation_keeps_its_turns(chat: Chat) -> None:
    talk = chat.conversation(system("one"))
    first = talk.reply("two", **QUICK)
    second = talk.reply("three", **QUICK)
    written_out = [system("one"), user("two"), first.message, user("three")]
    assert same(second, chat.reply(written_out, **QUICK))
    assert [message.role for message in talk] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert [message.role for message in talk.undo()] == ["user", "assistant"]
    assert same(talk("three", **QUICK), second)
    talk.clear()
    assert [message.text for message in talk.messages] == ["one"]


def test_a_turn_that_fails_is_not_kept(chat: Chat) -> None:
    talk = chat.conversation()
    with pytest.raises(MediaError):
        talk.reply("what?", Image("absent.png"))
    assert len(talk) == 0


def test_a_streamed_turn_is_kept(chat: Chat) -> None:
    talk = chat.conversation()
    events = list(talk.stream("two", **QUICK))
    assert isinstance(events[-1], Done)
    assert talk.messages == [user("two"), events[-1].reply.message]


def test_replies_for_asyncio(chat: Chat) -> None:
    async def ask() -> tuple[Reply, list[Any], Reply]:
        one, events = await chat.areply("one", **QUICK), []
        async for event in chat.astream("one", **QUICK):
            events.append(event)
        return one, events, await chat.conversation().areply("one", **QUICK)

    one, events, turn = asyncio.run(ask())
    expected = chat.reply("one", **QUICK)
    assert same(one, expected)
    assert same(events[-1].reply, expected)
    assert same(turn, expected)


def test_a_cancelled_task_ends_the_work(chat: Chat) -> None:
    cancel = threading.Event()

    async def ask() -> None:
        task = asyncio.create_task(
            chat.areply("one", modalities=["video"], seed=0, max_new_tokens=200, cancel=cancel)
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    assert cancel.is_set()


def test_an_error_reaches_an_asynchronous_stream(chat: Chat) -> None:
    async def ask() -> None:
        async for _ in chat.astream("what?", Image("absent.png")):
            pass

    with pytest.raises(MediaError):
        asyncio.run(ask())


# --- loading and the package --------------------------------------------------------------------


def test_devices_and_types_as_torch_names_them(system_tree: dict, tmp_path: Path) -> None:
    path = tmp_path / "system.yaml"
    path.write_text(json.dumps(system_tree))
    chat = mmllm.load(str(path), device="auto", dtype=torch.float32)
    assert chat.model.llm.embedding.weight.dtype == torch.float32
    assert mmllm.load(path, device=torch.device("cpu")).reply("one", **QUICK).ids


def test_the_package_exports_the_everyday_names() -> None:
    for name in ("Chat", "Reply", "load", "user", "system", "assistant", "Image", "Text"):
        assert hasattr(mmllm, name)
        assert name in mmllm.__all__
    assert assistant("one", Image("a.png")).media[0].modality == "image"


def test_loading_as_a_library_prints_nothing() -> None:
    program = "import mmllm; mmllm.load('mini', device='cpu', dtype='float32')"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("", "")
