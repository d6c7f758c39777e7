"""Samples of a run: fixed prompts, answered by the model as it stands and written as a gallery."""

from __future__ import annotations

from pathlib import Path

from mmllm.config import SamplesConfig
from mmllm.conversation import MEDIA, Medium, Message, user
from mmllm.model import AnyToAny
from mmllm.training.journal import write_errors


def write_samples(model: AnyToAny, samples: SamplesConfig, output: Path, step: int) -> None:
    """Answer the fixed prompts and write samples/step-N/ with a page that shows them.

    Args:
        model: the model in training.
        samples: the prompts.
        output: the run's folder.
        step: optimizer steps taken.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from mmllm.gallery import GalleryEntry, write_gallery
    from mmllm.inference.chat import Chat

    prompts: list[Message] = [user(text) for text in samples.prompts]
    for line in samples.media:  # "image mini:data/pictures/x.webp What is this?"
        modality, file, text = line.split(" ", 2)
        prompts.append(user(_open_medium(modality, file), text))
    chat = Chat(model)
    replies = chat.reply_many([[p] for p in prompts], seeds=[0] * len(prompts), max_new_tokens=48)
    folder = output / "samples" / f"step-{step:08d}"
    entries = [
        GalleryEntry((prompt, reply.message))
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    with write_errors(folder):
        write_gallery(folder, f"{model.config.name}, step {step}", entries)


def _open_medium(modality: str, file: str) -> Medium:
    from mmllm.data.sources import resolve

    return MEDIA[modality](source=resolve(file))
