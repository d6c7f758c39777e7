"""Scenes with their captions, read and encoded once, before a decoder is trained on them.

    python -m tools.mini.world.pool captions --out runs/pool --count 40000
    python -m tools.mini.world.pool latents --out runs/pool --codec runs/decoders/codec

The first command draws training scenes and reads a caption of each by the language model; the
second renders every scene a few times and encodes the images. Both go on where they stopped.

Dimensions: N scenes, K renderings of each, C x h x w latents.
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mmllm.mini.world.captions import caption
from mmllm.mini.world.rendering import render
from mmllm.mini.world.scenes import Scene, draw_training_scene
from tools.mini.world.text import CaptionReader, CaptionStates

SHARD = 4000
"""Scenes in a file."""


@functools.cache
def scene(index: int) -> Scene:
    """The scene of an index; a pure function of it."""
    return draw_training_scene(random.Random(f"scene {index}"))


def text(index: int) -> str:
    """The caption of a scene by its index."""
    return caption(scene(index), random.Random(f"caption {index}"))


def renderings(index: int, count: int) -> Tensor:
    """A scene in `count` arrangements, float[K, 3, P, P] in -1..1."""
    drawn = [
        torch.from_numpy(render(scene(index), random.Random(f"image {index}/{take}")))
        for take in range(count)
    ]
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_captions(out: Path, count: int) -> None:
    reader = CaptionReader()
    for start in range(0, count, SHARD):
        file = out / f"captions-{start}.safetensors"
        if not file.exists():
            indices = range(start, min(start + SHARD, count))
            CaptionStates.of([text(index) for index in indices], reader).save(file)


def captions(folder: Path) -> CaptionStates:
    """All shards of captions, with the statistics of the first."""
    files = sorted(folder.glob("captions-*.safetensors"), key=lambda f: int(f.stem.split("-")[1]))
    shards = [CaptionStates.load(file) for file in files]
    lengths = torch.cat([shard.offsets.diff() for shard in shards])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    states = torch.cat([shard.states for shard in shards])
    return CaptionStates(states, offsets, shards[0].mean, shards[0].std)


@torch.inference_mode()
def encode(out: Path, codec: Path, takes: int, count: int) -> None:
    vae: Any = AutoencoderDC.from_pretrained(codec)
    vae = vae.eval().to(memory_format=torch.channels_last)
    for start in range(0, count, SHARD):
        file = out / f"latents-{start}.safetensors"
        if file.exists():
            continue
        parts = []
        for index in tqdm(range(start, min(start + SHARD, count), 8), mininterval=20):
            images = torch.cat([renderings(i, takes) for i in range(index, index + 8)])
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(images.to(memory_format=torch.channels_last)).latent
            parts.append((latents.float() * vae.config.scaling_factor).unflatten(0, (8, takes)))
        save_file({"latents": torch.cat(parts).bfloat16().contiguous()}, file)


def latents(folder: Path) -> Tensor:
    """bfloat16[N, K, C, h, w] of all shards."""
    files = sorted(folder.glob("latents-*.safetensors"), key=lambda f: int(f.stem.split("-")[1]))
    return torch.cat([load_file(file)["latents"] for file in files])


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads captions and encodes scenes beforehand.")
    parser.add_argument("what", choices=("captions", "latents"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40_000, help="scenes, a multiple of 8")
    parser.add_argument("--codec", type=Path)
    parser.add_argument("--takes", type=int, default=2, help="renderings of a scene")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "captions":
        read_captions(arguments.out, arguments.count)
    elif arguments.codec:
        encode(arguments.out, arguments.codec, arguments.takes, arguments.count)
    else:
        parser.error("latents need --codec: what tools.mini.world.codec --out wrote")


if __name__ == "__main__":
    main()
