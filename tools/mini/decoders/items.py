"""Training items, their latents and the batches drawn from them.

Dimensions: B samples, N items, S latent shape.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
)
from torch import Tensor
from tqdm import tqdm

from mmllm.data.sources import read_text
from tools.mini.decoders.captions import Captions, names_of
from tools.mini.decoders.table import DecoderRecipe


@dataclass(frozen=True)
class Items:
    """Training items of one modality, decoded, in memory."""

    samples: Tensor  # [N, ...] as `read` gives them
    concepts: list[int]  # per item: its index among `labels`
    labels: list[str]
    captions: Captions


def read_items(data: Path, modality: str, read: Callable[[Path], Tensor]) -> Items:
    """The training split of one modality; pictures in the 3-D style only."""
    concepts = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    items = json.loads(read_text(data / "items.json.gz"))
    phrasings = json.loads((data / "captions.json").read_text(encoding="utf-8"))
    if modality == "audio":
        sounds = json.loads(read_text(data / "sounds.json.gz"))
        concepts, items = sounds["concepts"], sounds["items"]
        phrasings = {"audio": sounds["captions"]}
    by_id = {concept["id"]: concept for concept in concepts}
    chosen = [
        item
        for item in items
        if item.get("modality", "audio") == modality
        and item["split"] == "train"
        and (modality != "image" or item["style"] == "fluent-3d")
        and by_id[item["concept"]].get("split", "train") == "train"
    ]
    if not chosen:
        raise ValueError(f"{data} lists no training item of modality {modality}")
    order = list(dict.fromkeys(item["concept"] for item in chosen))
    names = [names_of(by_id[name]) for name in order]
    captions = Captions(phrasings[modality]["train"], phrasings[modality]["heldout"], names)
    samples = torch.stack([read(data / item["file"]) for item in tqdm(chosen, desc="reading")])
    index = {name: position for position, name in enumerate(order)}
    labels = [by_id[name]["label"] for name in order]
    return Items(samples, [index[item["concept"]] for item in chosen], labels, captions)


def training_batch(
    recipe: DecoderRecipe, items: Items, step: int, seed: int
) -> tuple[list[int], list[str], torch.Generator]:
    """Positions of B items and their captions for one step: a pure function of (seed, step)."""
    rng = random.Random(f"{seed}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    takes: dict[int, list[int]] = {}
    for position, concept in enumerate(items.concepts):
        takes.setdefault(concept, []).append(position)
    # Every concept equally often, in a new order for each epoch; a take of it at random.
    concepts = []
    for position in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, place = divmod(position, len(takes))
        concepts.append(epoch_order(len(takes), epoch, seed)[place])
    chosen = [rng.choice(takes[concept]) for concept in concepts]
    captions = [
        "" if rng.random() < 0.12 else items.captions.draw(concept, rng) for concept in concepts
    ]
    return chosen, captions, generator


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/epoch {epoch}").sample(range(count), count)


@torch.no_grad()
def latents_of(recipe: DecoderRecipe, pipe: DiffusionPipeline, samples: Tensor) -> Tensor:
    """What the denoiser sees of samples as `read` gives them: float[B, *S]."""
    samples = samples if samples.is_floating_point() else samples / 127.5 - 1
    parts = [pipe.vae.encode(part).latent_dist.mode() for part in samples.split(64)]
    return torch.cat(parts) * recipe.scale(pipe.vae)
