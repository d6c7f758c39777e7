"""Samples of a decoder: pages to look at, and retrieval scores.

Dimensions: B samples, F frames, N items.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import soundfile
import torch
from diffusers import (
    DiffusionPipeline,
)
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from tools.mini.decoders.items import Items
from tools.mini.decoders.table import DecoderRecipe

if TYPE_CHECKING:
    from tools.mini.decoders.training import Run


@torch.inference_mode()
def sample(pipe: Any, recipe: DecoderRecipe, captions: list[str], seed: int = 0) -> Tensor:
    """Samples for captions, in the space of the recipe's `read`: [B, ...] in -1..1."""
    made = []
    for start in range(0, len(captions), 16):
        part = captions[start : start + 16]
        generators = [
            torch.Generator().manual_seed(seed + start + index) for index in range(len(part))
        ]
        made.append(
            pipe(part, generator=generators, output_type="pt", **recipe.call)[recipe.output]
        )
    made = torch.cat(made).float()
    if recipe.output == "frames":
        made = made.transpose(1, 2)  # [B, F, 3, H, W] -> [B, 3, F, H, W]
    return made if recipe.output == "audios" else 2 * made - 1


def picture(sample: Tensor, codec: Any) -> Image.Image:
    """An image, the frames of a video side by side, or a spectrogram."""
    if sample.ndim == 2:  # float[1, N]
        mel = codec.encode(sample[None]).latent_dist.mode()[0].T  # [K, frames * M]
        mel = mel.unflatten(1, (codec.config.frames_per_token, -1)).flatten(0, 1).T.flip(0)
        sample = ((mel + 1.5) / 2 - 1)[None].expand(3, -1, -1)
    if sample.ndim == 4:
        sample = torch.cat(list(sample.unbind(1)), dim=-1)
    pixels = ((sample.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def sheet(run: Run, items: Items, count: int = 32) -> None:
    """samples-STEP.png: samples of the averaged weights for held-out phrasings, with labels."""
    pipe = run.averaged()
    stride = max(1, len(items.labels) // count)
    chosen = range(0, len(items.labels), stride)[:count]
    captions = [items.captions.test(concept, place) for place, concept in enumerate(chosen)]
    made = sample(pipe, run.recipe, captions)
    tiles = [picture(sample_, pipe.vae) for sample_ in made]
    scale = 2 if tiles[0].width < 200 else 1
    width, height = tiles[0].width * scale, tiles[0].height * scale
    columns = 1152 // width
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * width, rows * (height + 12)), "white")
    pen = ImageDraw.Draw(page)
    for place, (tile, concept) in enumerate(zip(tiles, chosen, strict=True)):
        x, y = place % columns * width, place // columns * (height + 12)
        page.paste(tile.resize((width, height)), (x, y + 12))
        pen.text((x + 2, y), items.labels[concept], fill="black")
    page.save(run.folder / f"samples-{run.progress.step}.png")
    if run.recipe.output == "audios":
        for wave, concept in zip(made, chosen, strict=True):
            name = items.labels[concept].replace(" ", "-")
            soundfile.write(run.folder / f"{name}.wav", wave[0].numpy(), 16_000)


def features(samples: Tensor, codec: Any) -> Tensor:
    """Features for retrieval, float[B, n]: pixels or log-mel frames, averaged over patches."""
    if samples.ndim == 3:  # float[B, 1, N] sounds
        mel = codec.encode(samples).latent_dist.mode().transpose(1, 2)  # [B, K, frames * M]
        mel = mel.unflatten(2, (codec.config.frames_per_token, -1)).flatten(1, 2)
        return functional.avg_pool2d(mel, (8, 2)).flatten(1)
    return functional.avg_pool2d(samples.flatten(1, -3), 4).flatten(1)


@torch.inference_mode()
def score(
    pipe: DiffusionPipeline, recipe: DecoderRecipe, items: Items, rounds: int
) -> dict[str, float]:
    """Share of samples of unseen phrasings whose nearest concept is their own (top 1, top 5).

    The gallery is every training item; a concept is as near as the nearest of its items.
    """
    real = items.samples if items.samples.is_floating_point() else items.samples / 127.5 - 1
    owners = torch.tensor(items.concepts)
    concepts = list(range(len(items.labels))) * rounds
    captions = [items.captions.test(concept, place) for place, concept in enumerate(concepts)]
    made = sample(pipe, recipe, captions)
    distances = torch.cdist(features(made, pipe.vae), features(real, pipe.vae))  # [B, N]
    nearest = torch.full((len(made), len(items.labels)), float("inf"))
    nearest.scatter_reduce_(1, owners.expand(len(made), -1), distances, "amin")
    own = nearest.gather(1, torch.tensor(concepts)[:, None])
    rank = (nearest < own).sum(1)
    result = {
        "samples": len(made),
        "concepts": len(items.labels),
        "top1": (rank < 1).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
    }
    if recipe.output == "frames":
        moved = [clips.diff(dim=2).abs().mean((1, 2, 3, 4)) for clips in (made, real)]
        ratio = moved[0] / moved[1][concepts]
        result["motion_ratio_median"] = ratio.median().item()
        result["motion_ratio_in_half_to_two"] = ((ratio > 0.5) & (ratio < 2)).float().mean().item()
    return {name: round(value, 4) for name, value in result.items()}
