"""Encoders and decoders of every family on the second device: what they give on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import config
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.encoders import aisfx, efficientnet, frames
from mmllm.encoders.aisfx import AisfxConfig
from mmllm.encoders.efficientnet import EfficientNetConfig
from mmllm.encoders.frames import FramesConfig
from tests.decoders import tiny
from tests.encoders import twins
from tests.second_device import host_waits

Folder = Callable[[str], Path]
OWN = {
    "efficientnet": (
        lambda: efficientnet.build(EfficientNetConfig(size=64, grid=2)),
        twins.pictures,
    ),
    "aisfx": (lambda: aisfx.build(AisfxConfig()), twins.sounds),
    "frames": (
        lambda: frames.build(FramesConfig(encoder={"type": "efficientnet", "size": 64, "grid": 1})),
        twins.clips,
    ),
}


def written(root: Path, write: Callable[[str, Path], object]) -> Folder:
    """Name -> its folder, written when it is first asked for."""

    def folder(name: str) -> Path:
        place = root / name
        if not place.exists():
            place.mkdir()
            write(name, place)
        return place

    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("encoders")
    return written(root, lambda name, place: twins.TWINS[name].write(place))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return written(tmp_path_factory.mktemp("pipelines"), tiny.save)


def encoders_alike(build: Any, media: list, device: torch.device) -> None:
    here, there = build(), build().to(device)
    wanted, found = here.encode(media), there.encode(media)
    assert found.tokens.device == device
    torch.testing.assert_close(found.tokens.cpu(), wanted.tokens, atol=1e-4, rtol=1e-4)
    assert (found.mask is None) == (wanted.mask is None)
    if found.mask is not None:
        assert found.mask.cpu().equal(wanted.mask)


@pytest.mark.parametrize("name", twins.TWINS)
def test_an_encoder_gives_the_tokens_of_the_cpu(
    name: str, encoder_folder: Folder, second: torch.device
) -> None:
    twin = twins.TWINS[name]
    encoders_alike(lambda: twin.build(encoder_folder(name)), twin.media(), second)


@pytest.mark.parametrize("name", OWN)
def test_an_encoder_of_mini_gives_the_tokens_of_the_cpu(name: str, second: torch.device) -> None:
    build, media = OWN[name]
    encoders_alike(build, media(), second)


STEP_WAITS = {
    "audio": 8,
    "cogvideox": 3,
    "qwen_image": 2,
    "hunyuan_video15": 50,
    "wan_vace": 12,
    "nucleus_image": 12,
    "qwen_image21": 29,
    **{"kandinsky5": 13, "kandinsky5_video": 13, "kandinsky6": 11, "ace_step": 13},
} | dict.fromkeys(("stable_diffusion", "audioldm", "audioldm2", "text_to_video"), 6)
"""What diffusers itself asks the device, or copies to it, in one step: DDIM's scheduler reads its
tables by numbers from the device; Stable Audio and Qwen-Image move tables of angles; HunyuanVideo
1.5 sorts the positions of each caption by its mask; UniPC, which the twin of Wan VACE has, copies
its coefficients there; Nucleus-Image counts the tokens of its experts and builds its positions;
so does Qwen-Image 2.1, from its mask; like Kandinsky, ACE-Step and Wan VACE it makes one medium
after the other, and prepares each between two steps. Elsewhere nothing does."""


def decoders(family: str, folder: Path, device: torch.device, **changes: Any) -> list[Any]:
    made = [config.build(tiny.entry(family, folder, steps=3, **changes)) for _ in range(2)]
    return [made[0], made[1].to(device)]


def sampled(decoder: ModalityDecoder, condition: dict, **options: Any) -> list[np.ndarray]:
    """Two media, as numbers from 0 to 1."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    media = decoder.sample(condition, generators=generators, **options)
    arrays = [medium.to_numpy() for medium in media]
    return [array / 255 if array.dtype == np.uint8 else array for array in arrays]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_decoder_samples_and_learns_as_on_the_cpu(
    family: str, pipeline_folder: Folder, second: torch.device
) -> None:
    here, there = decoders(family, pipeline_folder(family), second)
    captions = ["a red apple", "a blue dog runs ."]
    wanted = here.encode_captions(captions)
    found = there.encode_captions(captions)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].cpu(), value, atol=1e-4, rtol=1e-4)
    pictures = sampled(here, wanted)
    totals: list[int] = []
    with host_waits() as waits:
        again = sampled(there, found, on_step=lambda *_: totals.append(waits.total()))
    for before, after in pairwise(totals):
        assert after - before <= STEP_WAITS.get(family, 0)
    for one, other in zip(pictures, again, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 + 1 / 255, rtol=0)
        assert np.abs(other - one).mean() < 1e-4
    media = [tiny.medium(here.modality, seed) for seed in range(2)]
    samples = torch.stack([here.preprocess(medium) for medium in media])
    latents = here.encode_media(samples)
    latents_there = there.encode_media(samples)
    torch.testing.assert_close(latents_there.cpu(), latents, atol=1e-4, rtol=1e-4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.3, 0.8])
    losses, gradients = [], []
    for decoder, clean in ((here, latents), (there, latents_there)):
        condition = {
            name: value.to(decoder.device).clone().requires_grad_()
            for name, value in wanted.items()
        }
        loss = decoder.denoising_loss(condition, clean, noise=noise, times=times)
        loss.sum().backward()
        losses.append(loss.detach().cpu())
        gradients.append({name: value.grad.cpu() for name, value in condition.items()})  # pyright: ignore
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    for name, gradient in gradients[0].items():
        close = 1e-3 * float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, atol=close, rtol=0)
