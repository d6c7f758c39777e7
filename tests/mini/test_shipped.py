"""What ships with mini: small, complete, and usable without anything of ours but the codecs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mmllm
from mmllm import Audio, Image, Video, mini, user
from mmllm.inference.chat import Chat
from tests import processes

DATA = mini.FOLDER / "data"

ALONE = """
import mmllm.mini.components
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({folder!r})
pipe.set_progress_bar_config(disable=True)
made = pipe({caption!r}, generator=torch.Generator().manual_seed(0), {call}).{output}
first = made[0]
if isinstance(first, list):  # the frames of a clip
    print((len(made), len(first), *first[0].size))
else:
    print((len(made), *(getattr(first, "shape", None) or first.size)))
"""
CALLS = {
    "image": (
        "a cat",
        "height=128, width=128, num_inference_steps=2, guidance_scale=2.0, "
        "use_resolution_binning=False, clean_caption=False, max_sequence_length=40",
        "images",
        "(1, 128, 128)",
    ),
    "video": (
        "a frog moving up",
        "height=128, width=128, video_length=9, num_inference_steps=2, guidance_scale=2.0, "
        "clean_caption=False",
        "frames",
        "(1, 9, 128, 128)",
    ),
    "audio": (
        "the sound of a piano",
        "num_inference_steps=2, guidance_scale=3.0",
        "audios",
        "(1, 1, 32768)",
    ),
}


@pytest.mark.parametrize("modality", CALLS)
def test_a_decoder_runs_in_a_fresh_process_with_diffusers_alone(modality: str) -> None:
    caption, call, output, shape = CALLS[modality]
    program = ALONE.format(
        folder=str(mini.FOLDER / "decoders" / modality),
        caption=caption,
        call=call,
        output=output,
    )
    done = processes.run(["-c", program])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == shape


def test_data_and_weights_are_small() -> None:
    files = [path for path in mini.FOLDER.rglob("*") if path.is_file() and path.suffix != ".py"]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert max(path.stat().st_size for path in files) < 15e6


def test_every_part_has_a_card_that_says_how_it_was_made() -> None:
    for folder in ("decoders/image", "decoders/video", "decoders/audio", "checkpoint"):
        card = (mini.FOLDER / folder / "README.md").read_text(encoding="utf-8")
        for word in ("Licence", "Data", "Training", "python" if "dec" in folder else "make mini"):
            assert word in card, f"{folder}: {word}"


JUDGES = {"clip": "things", "scene": "thing", "soundscape": "plain"}
"""Judge -> its score for the simplest of what it judges."""


def test_every_judge_has_a_card_and_its_scores() -> None:
    weights = sorted((mini.FOLDER / "judges").glob("*.safetensors"))
    assert [file.stem for file in weights] == list(JUDGES)
    for file in weights:
        assert "licence" in file.with_suffix(".md").read_text(encoding="utf-8")
        scores = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        assert scores[JUDGES[file.stem]] >= 0.9


def test_nothing_that_ships_names_a_folder_of_the_machine_that_made_it() -> None:
    for part in ("decoders", "checkpoint", "judges", "evaluation.json"):
        folder = mini.FOLDER / part
        for path in folder.rglob("*.*") if folder.is_dir() else [folder]:
            if path.suffix in (".json", ".yaml", ".md"):
                assert not re.search(r'["\s](/[a-z]+){2}', path.read_text("utf-8")), path


@pytest.fixture(scope="module")
def chat() -> Chat:
    return mmllm.load("mini", device="cpu", dtype="float32")


def test_mini_answers_straight_after_installation(chat: Chat) -> None:
    assert not chat.reply([user("What is the capital of France?")]).media
    shown = Image(DATA / "pictures" / "twemoji" / "cat.webp")
    assert "cat" in chat.reply([user("What is this?", shown)]).text.lower()


def test_mini_draws_plays_and_animates(chat: Chat) -> None:
    asked = ["Draw a dog.", "Play the sound of a trumpet.", "Animate a frog."]
    replies = chat.reply_many([[user(text)] for text in asked], seeds=[0, 0, 0])
    picture, sound, clip = (reply.media[0] for reply in replies)
    assert isinstance(picture, Image)
    assert picture.to_numpy().shape == (128, 128, 3)
    assert isinstance(sound, Audio)
    assert np.sqrt(np.mean(sound.to_numpy() ** 2)) > 0.01
    assert isinstance(clip, Video)
    assert np.abs(np.diff(clip.to_numpy().astype(int), axis=0)).mean() > 0.5
    again = chat.reply([user(asked[0])], seed=0)
    assert again.ids == replies[0].ids
    np.testing.assert_allclose(again.media[0].to_numpy(), picture.to_numpy(), atol=1)


def test_a_generated_image_can_be_asked_about(chat: Chat, tmp_path: Path) -> None:
    conversation = [user("Draw a dog.")]
    reply = chat.reply(conversation, seed=0)
    reply.media[0].save(tmp_path / "dog.png")
    answer = chat.reply([*conversation, reply.message, user("What did you draw?")])
    assert "dog" in answer.text.lower()


def test_a_mask_changes_one_half_of_a_drawing() -> None:
    chat = mmllm.load("mini")
    first = chat.reply("Draw a red apple.", seed=0)
    apple = first.image
    assert apple is not None
    before = apple.to_numpy().astype(int)
    mask = np.zeros_like(apple.to_numpy())
    mask[:, :64] = 255
    turns = [user("Draw a red apple."), first.message, user("Draw a blue apple.")]
    image = chat.reply(turns, seed=0, decoders={"image": {"mask": Image(mask)}}).image
    assert image is not None
    away = np.abs(image.to_numpy() - before)
    assert away[:, 64:].max() == 0
    assert away[:, :64].mean() > 30  # 39 of 255 levels
