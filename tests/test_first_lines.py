"""Some ninety first lines of Python, as newcomers type them, run with the shipped `mini`.

Written from what people guess (the ways of Pillow, OpenAI, transformers, diffusers), not from the
documentation. LINES do what is meant; NAMED are errors that name the way.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import inspect
import io
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import mmllm
from mmllm import Audio, Chat, Image, Reply, Video, checkpoints
from mmllm.errors import MmllmError

LINES: list[tuple[str, str]] = [
    # --- load -----------------------------------------------------------------------------------
    ("chat = mmllm.load()", "isinstance(chat, mmllm.Chat)"),
    ("chat = mmllm.load('mini')", "isinstance(chat, mmllm.Chat)"),
    ("chat = mmllm.load('mini', device='auto')", "loaded['device'] in ('cpu', 'cuda', 'mps')"),
    ("chat = mmllm.load('mini', device=torch.device('cpu'))", "loaded['device'] == 'cpu'"),
    ("chat = mmllm.load('mini', dtype=torch.float32)", "loaded['dtype'] == torch.float32"),
    ("chat = mmllm.load('mini', dtype='bfloat16')", "loaded['dtype'] == torch.bfloat16"),
    ("chat = mmllm.load('mini', dtype='bf16')", "loaded['dtype'] == torch.bfloat16"),
    ("chat = Chat.from_pretrained('mini')", "isinstance(chat, mmllm.Chat)"),
    ("chat = mmllm.load('mini', dtype='auto')", "isinstance(chat, mmllm.Chat)"),
    ("print(mmllm.__version__)", "printed[0].isdigit()"),
    ("chat", "'mini' in repr(_) and 'image' in repr(_)"),
    # --- ask ------------------------------------------------------------------------------------
    ("reply = chat.reply('Draw a cat')", "reply.image"),
    ("reply = chat('Draw a cat')", "reply.image"),
    ("reply = chat.reply(user('Draw a cat'))", "reply.image"),
    ("reply = chat.reply([user('Draw a cat')])", "reply.image"),
    ("reply = chat.reply(['Draw a cat'])", "reply.image"),
    ("reply = chat.reply({'role': 'user', 'content': 'Draw a cat'})", "reply.image"),
    ("reply = chat.reply([{'role': 'user', 'content': 'Draw a cat'}])", "reply.image"),
    (
        "reply = chat.reply([{'role': 'system', 'content': 'You are kind.'}, "
        "{'role': 'user', 'content': 'Good morning!'}])",
        "reply.text",
    ),
    ("reply = chat.reply('Good morning!', system='You are kind.')", "reply.text"),
    ("reply = chat.reply('Draw a cat', seed=0)", "reply.image and reply.seed == 0"),
    ("reply = chat.reply('Draw a cat', modalities=['image'])", "kinds(reply) == ['image']"),
    ("reply = chat.reply('A cat', modalities='image')", "kinds(reply) == ['image']"),
    ("reply = chat.reply('Draw a cat', modalities=['text'])", "not reply.media and reply.text"),
    ("reply = chat.reply('A bell', modalities={'audio': 'force'})", "reply.audio"),
    ("reply = chat.reply('Capital of Italy?', max_tokens=5)", "len(reply.ids) == 5"),
    (
        "reply = chat.reply('Capital of Italy?', max_new_tokens=5)",
        "len(reply.ids) == 5",
    ),
    (
        "reply = chat.reply('Good morning!', temperature=0.7, top_p=0.9)",
        "reply.text",
    ),
    ("reply = chat.reply('Good morning!', stop='!')", "'!' not in reply.text"),
    (
        "reply = chat.reply('Draw a cat', decoders={'image': {'steps': 4}}, on_step=print)",
        "printed.split() == 'image 1 4 image 2 4 image 3 4 image 4 4'.split()",
    ),
    (
        "replies = chat.reply_many(['Draw a cat', 'Good morning!'])",
        "replies[0].image and replies[1].text",
    ),
    (
        "replies = chat.reply_many(['Good morning!', 'Capital of France?'], seeds=[0, 1])",
        "replies[1].seed == 1",
    ),
    # --- show it something ----------------------------------------------------------------------
    ("reply = chat.reply('What is this?', Image('apple.png'))", "sees(reply)"),
    ("reply = chat.reply('What is this?', Image.open('apple.png'))", "sees(reply)"),
    ("reply = chat.reply(Image('apple.png'), 'What is this?')", "sees(reply)"),
    ("reply = chat.reply(['What is this?', Image('apple.png')])", "sees(reply)"),
    ("reply = chat.reply(user('What is this?', Image('apple.png')))", "sees(reply)"),
    ("reply = chat.reply('What is this?', Path('apple.png'))", "sees(reply)"),
    ("reply = chat.reply('What is this?', PILImage.open('apple.png'))", "sees(reply)"),
    ("reply = chat.reply('What is this?', np.array(PILImage.open('apple.png')))", "sees(reply)"),
    ("reply = chat.reply('What is this?', open('apple.png', 'rb').read())", "sees(reply)"),
    ("reply = chat.reply('What is this?', open('apple.png', 'rb'))", "sees(reply)"),
    ("reply = chat.reply('What is this?', io.BytesIO(png))", "sees(reply)"),
    ("reply = chat.reply('What is this?', image='apple.png')", "sees(reply)"),
    ("reply = chat.reply('What is this?', images=['apple.png'])", "sees(reply)"),
    ("reply = chat.reply('What do you hear?', audio='bell.wav')", "reply.usage.prompt > 20"),
    ("reply = chat.reply('What do you hear?', Audio('bell.wav'))", "reply.usage.prompt > 20"),
    ("reply = chat.reply('What is this?', Video('rocket.mp4'))", "reply.usage.prompt > 20"),
    (
        "reply = chat.reply([{'role': 'user', 'content': ["
        "{'type': 'text', 'text': 'What is this?'}, "
        "{'type': 'image_url', 'image_url': {'url': data_uri}}]}])",
        "sees(reply)",
    ),
    (
        "reply = chat.reply([{'role': 'user', 'content': ["
        "{'type': 'text', 'text': 'What is this?'}, {'type': 'image', 'image': 'apple.png'}]}])",
        "sees(reply)",
    ),
    ("image = Image(PILImage.open('apple.png'))", "image.size == (128, 128)"),
    ("image = Image(np.zeros((8, 8, 3), np.uint8))", "image.size == (8, 8)"),
    ("image = Image(io.BytesIO(png))", "image.size == (128, 128)"),
    # --- what comes back ------------------------------------------------------------------------
    ("print(reply.text)", "printed.strip() == reply.text"),
    ("print(reply)", "reply.text.strip() in printed and len(printed) < 300"),
    ("reply", "reply.text in repr(_) and len(repr(_)) < 400"),
    ("reply.image.save('cat.png')", "PILImage.open('cat.png').size == (128, 128)"),
    ("reply.image.save('cat.jpg')", "PILImage.open('cat.jpg').format == 'JPEG'"),
    ("reply.image.save('cat.gif')", "PILImage.open('cat.gif').format == 'GIF'"),
    ("reply.images[0].save(Path('cat.png'))", "Path('cat.png').is_file()"),
    ("reply.media[0].save('cat.png')", "Path('cat.png').is_file()"),
    ("reply.save('cat.png')", "Path('cat.png').is_file()"),
    ("reply.save('out')", "list(Path('out').iterdir())"),
    ("reply.image.show()", "shown"),
    ("reply.show()", "shown"),
    ("reply.image.save(buffer, format='PNG')", "PILImage.open(buffer).size == (128, 128)"),
    ("data = reply.image.to_bytes()", "data.startswith(b'\\x89PNG')"),
    ("picture = reply.image.to_pil()", "isinstance(picture, PILImage.Image)"),
    ("array = np.asarray(reply.image)", "array.shape == (128, 128, 3)"),
    ("array = np.array(reply.image) / 255", "0 <= array.min() and array.max() <= 1"),
    ("width, height = reply.image.size", "(width, height) == (128, 128)"),
    ("width = reply.image.width", "width == 128"),
    ("display(reply)", "'<img' in html(reply)"),
    ("display(reply.image)", "'<img' in html(reply.image)"),
    ("reply.seed", "_ == 0"),
    ("sound.save('bell.mp3')", "Audio('bell.mp3').seconds > 0.5"),
    ("rate, samples = sound.sample_rate, sound.to_numpy()", "samples.shape[1] / rate > 0.5"),
    ("clip.save('rocket.mp4')", "Video('rocket.mp4').seconds > 0.2"),
    ("clip.save('rocket.gif')", "Video('rocket.gif').seconds > 0.2"),
    ("clip.save('rocket.webm')", "Video('rocket.webm').seconds > 0.2"),
    ("frames = clip.to_numpy()", "frames.ndim == 4"),
    # --- turns, streams, asyncio ----------------------------------------------------------------
    (
        "talk = chat.conversation(); talk.reply('Draw a cat'); talk.reply('What did you draw?')",
        "len(talk) == 4",
    ),
    ("reply = chat.reply([user('Draw a cat'), reply, user('What did you draw?')])", "reply.text"),
    ("reply = chat.reply([user('Draw a cat'), reply.message, 'And a dog?'])", "reply.text"),
    ("for event in chat.stream('Draw a cat'): print(event)", "'MediumReady' in printed"),
    (
        "for event in chat.stream('Good morning!'): print(event.text, end='', flush=True)",
        "printed == chat.reply('Good morning!').text",
    ),
    ("reply = await chat.areply('Good morning!')", "reply.text"),
    (
        "async for event in chat.astream('Good morning!'): print(event)",
        "'Done' in printed",
    ),
]
"""(what is typed, what must be true then)."""

NAMED: list[tuple[str, str]] = [
    ("mmllm.load('minni')", "did you mean 'mini'"),
    ("mmllm.load('mini', device='cuda')", r"device: .*cpu"),
    ("chat.reply('What is this?', 'apple.png')", r"write Image\('apple.png'\)"),
    ("chat.reply('What is this?', 'https://example.org/cat.jpg')", "nothing is fetched"),
    ("chat.reply('Draw a cat', stream=True)", r"chat\.stream\("),
    ("Audio(np.zeros(16_000, np.float32), 16_000)", r"sample_rate=16000"),
    ("chat.reply('Draw a cat', num_inference_steps=30)", r"decoders=\{'image': \{'steps': …\}\}"),
    ("chat.reply('Draw a cat', steps=30)", r"decoders=\{'image': \{'steps': …\}\}"),
    ("chat.reply_many(['Good morning!', 'Capital of France?'], seed=0)", r"seeds=\[0, 1, …\]"),
]


def kinds(reply: Reply) -> list[str]:
    return [medium.modality for medium in reply.media]


def html(thing: Any) -> str:
    """What a notebook displays."""
    from IPython.core.formatters import DisplayFormatter

    return DisplayFormatter().format(thing)[0]["text/html"]


@pytest.fixture(scope="module")
def mini() -> Chat:
    """The shipped model; in four denoising steps, for what is tested is not how well it draws."""
    chat = mmllm.load("mini", device="cpu", dtype="float32")
    for decoder in chat.model.decoders.values():
        decoder.config = replace(decoder.config, steps=4)
    return chat


@pytest.fixture(scope="module")
def replies(mini: Chat) -> dict[str, Reply]:
    asked = {"image": "Draw a red apple.", "audio": "Play a bell.", "video": "Animate a rocket."}
    return {
        kind: mini.reply(words, seed=0, modalities=[kind], decoders={kind: {"steps": 20}})
        for kind, words in asked.items()
    }


@pytest.fixture
def names(
    mini: Chat, replies: dict[str, Reply], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The names of a newcomer's session, in a folder with an image, a sound and a clip. `load`
    checks its arguments and gives `mini`, which was loaded once."""
    loaded: dict[str, Any] = {}
    shown: list[Any] = []

    def load_model(checkpoint: Any, system: Any, **options: Any) -> Any:
        loaded.update(options)
        return mini.model

    monkeypatch.setattr(checkpoints, "load_model", load_model)
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **_: shown.append(given))
    monkeypatch.chdir(tmp_path)
    for name, reply in zip(("apple.png", "bell.wav", "rocket.mp4"), replies.values(), strict=True):
        reply.save(name)
    apple = Path("apple.png").read_bytes()
    return {
        **{"mmllm": mmllm, "np": np, "torch": torch, "PILImage": PILImage, "io": io, "Path": Path},
        **{"Image": Image, "Audio": Audio, "Video": Video, "user": mmllm.user, "chat": mini},
        "Chat": Chat,
        **{"reply": replies["image"], "sound": replies["audio"].audio},
        **{"clip": replies["video"].video, "png": apple, "buffer": io.BytesIO()},
        "data_uri": "data:image/png;base64," + base64.b64encode(apple).decode(),
        "display": lambda thing: None,
        **{"loaded": loaded, "shown": shown, "kinds": kinds, "html": html},
        "sees": lambda reply: "apple" in reply.text,
    }


def type_in(line: str, names: dict[str, Any]) -> None:
    """Run a line as a notebook does: `await` is allowed, `_` is the last expression's value."""
    tree = ast.parse(line)
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.parse(f"_ = {ast.unparse(tree.body[-1])}").body[0]
    code = compile(tree, "<line>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.iscoroutine(result):
        asyncio.run(result)


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_a_first_line_does_what_is_meant(
    line: str, expected: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(line, names)
    names["printed"] = capsys.readouterr().out
    assert eval(expected, names), line


@pytest.mark.parametrize(("line", "message"), NAMED, ids=[line for line, _ in NAMED])
def test_unsupported_first_lines_name_the_remedy(
    line: str, message: str, names: dict[str, Any]
) -> None:
    if "cuda" in line and torch.cuda.is_available():
        line = line.replace("cuda", "cuda:99")
    with pytest.raises(MmllmError, match=message):
        type_in(line, names)


def test_there_are_at_least_ninety_two_lines() -> None:
    lines = [line for line, _ in [*LINES, *NAMED]]
    assert len(set(lines)) == len(lines) >= 92
    assert len(LINES) / len(lines) >= 0.9
    assert len(LINES) >= 85
