"""What the decoders learn from, with its captions, read and encoded once before they are trained.

    python -m tools.mini.world.pool image captions --out runs/pool/image --count 40000
    python -m tools.mini.world.pool image latents --out runs/pool/image

The first command draws training scenes and reads a caption of each by the language model; the
second renders every scene a few times and encodes the images. `video` does so with clips, `audio`
with soundscapes. All go on where they stopped.

Dimensions: N items, K renderings of each, L... latents of one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mmllm.kernels.precision import fast_autocast
from mmllm.mini import locate
from mmllm.mini.codecs import MelAutoencoder
from mmllm.mini.world.captions import announce, announce_clip, caption, clip_caption
from mmllm.mini.world.clips import draw_training_clip, render_clip
from mmllm.mini.world.rendering import render
from mmllm.mini.world.scenes import draw_training_scene
from mmllm.mini.world.sounds import (
    announce_soundscape,
    draw_training_soundscape,
    render_soundscape,
    soundscape_caption,
)
from tools.mini.world.text import CaptionReader, CaptionStates

SHARD = 4000
"""Items in a file."""
REPLIES = 0.4
"""Share of the captions that are replies."""


@dataclass(frozen=True)
class Kind:
    """One modality of the world.

    Attributes:
        name: of an item, from which its chance is drawn.
        draw: chance -> the description of an item of training.
        caption: (description, chance) -> its caption.
        announce: description -> the words of a reply that shows it.
        render: (description, chance) -> what the codec encodes, without a batch.
        codec: the folder of `tools.mini.codec`, or None -> the codec.
        scale: the codec -> the factor of its latents.
    """

    name: str
    draw: Callable[[random.Random], Any]
    caption: Callable[[Any, random.Random], str]
    announce: Callable[[Any], str]
    render: Callable[[Any, random.Random], Tensor]
    codec: Callable[[Path | None], nn.Module]
    scale: Callable[[Any], float]


def _pixels(array: Any) -> Tensor:
    """uint8[..., P, P, 3] -> float[3, ..., P, P] in -1..1."""
    return torch.from_numpy(array).movedim(-1, 0).float() / 127.5 - 1


def image_codec(folder: Path | None = None) -> AutoencoderKL:
    """What encodes images and frames of clips, 8 x 8 pixels to a latent of 16 channels.

    `folder`: where `tools.mini.codec` wrote it; None: the shipped one.
    """
    codec: Any = AutoencoderKL.from_pretrained(folder or locate("decoders") / "image" / "vae")
    return codec.eval().to(memory_format=torch.channels_last)


KINDS = {
    "image": Kind(
        "scene",
        draw_training_scene,
        caption,
        announce,
        lambda scene, rng: _pixels(render(scene, rng)),
        image_codec,
        lambda codec: codec.config.scaling_factor,
    ),
    "video": Kind(
        "clip",
        draw_training_clip,
        clip_caption,
        announce_clip,
        lambda clip, rng: _pixels(render_clip(clip, rng)),
        image_codec,
        lambda codec: codec.config.scaling_factor,
    ),
    "audio": Kind(
        "soundscape",
        draw_training_soundscape,
        soundscape_caption,
        announce_soundscape,
        lambda scape, rng: torch.from_numpy(render_soundscape(scape, rng))[None],
        lambda folder: MelAutoencoder(),
        lambda codec: 1.0,
    ),
}
"""Modality -> its items."""


def item(kind: Kind, index: int) -> Any:
    """The description of an item; a pure function of its index."""
    return kind.draw(random.Random(f"{kind.name} {index}"))


def text(kind: Kind, index: int) -> str:
    """The caption of an item by its index, or the reply that shows it: a decoder reads both."""
    rng = random.Random(f"caption {index}")
    if rng.random() < REPLIES:
        return kind.announce(item(kind, index))
    return kind.caption(item(kind, index), rng)


def renderings(kind: Kind, index: int, count: int) -> Tensor:
    """An item in `count` arrangements."""
    described = item(kind, index)
    return torch.stack(
        [kind.render(described, random.Random(f"image {index}/{take}")) for take in range(count)]
    )


def read_captions(kind: Kind, out: Path, count: int) -> None:
    """Write the states of captions, a file for every SHARD of them."""
    reader = CaptionReader()
    for start in range(0, count, SHARD):
        file = out / f"captions-{start}.safetensors"
        if not file.exists():
            indices = range(start, min(start + SHARD, count))
            CaptionStates.of([text(kind, index) for index in indices], reader).save(file)


def captions(folder: Path) -> CaptionStates:
    """All shards of captions, with the statistics of the first."""
    shards = [CaptionStates.load(file) for file in _shards(folder, "captions")]
    lengths = torch.cat([shard.offsets.diff() for shard in shards])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    states = torch.cat([shard.states for shard in shards])
    return CaptionStates(states, offsets, shards[0].mean, shards[0].std)


@torch.inference_mode()
def encode(
    kind: Kind, out: Path, codec: Path | None, takes: int, count: int, half: bool = False
) -> None:
    """Write the latents of renderings, a file for every SHARD of items; `half`: of images of half
    the width and height."""
    vae: Any = kind.codec(codec)
    for start in range(0, count, SHARD):
        file = out / f"latents-{start}.safetensors"
        if file.exists():
            continue
        parts = []
        for index in tqdm(range(start, min(start + SHARD, count), 8), mininterval=20):
            rendered = torch.cat([renderings(kind, i, takes) for i in range(index, index + 8)])
            if half:
                rendered = functional.avg_pool2d(rendered, 2)
            with fast_autocast("cpu"):
                latents = over_frames(lambda x: vae.encode(x).latent_dist.mode(), rendered)
            parts.append((latents.float() * kind.scale(vae)).unflatten(0, (8, takes)))
        save_file({"latents": torch.cat(parts).bfloat16().contiguous()}, file)


def over_frames(function: Callable[[Tensor], Tensor], media: Tensor) -> Tensor:
    """Apply what is made for images to media, to clips frame by frame: [B, C, F, H, W] to
    [B, C', F, H', W']."""
    if media.ndim < 5:
        return function(media)
    frames = function(media.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(media), -1)).transpose(1, 2)


def latents(folder: Path) -> Tensor:
    """bfloat16[N, K, L...] of all shards."""
    return torch.cat([load_file(file)["latents"] for file in _shards(folder, "latents")])


def shape(folder: Path) -> torch.Size:
    """That of the latents of one rendering."""
    with safe_open(_shards(folder, "latents")[0], framework="pt") as file:
        return torch.Size(file.get_slice("latents").get_shape()[2:])


def _shards(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.safetensors"), key=lambda f: int(f.stem.split("-")[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads captions and encodes media beforehand.")
    parser.add_argument("modality", choices=KINDS)
    parser.add_argument("what", choices=("captions", "latents"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40_000, help="items, a multiple of 8")
    parser.add_argument("--codec", type=Path, help="what tools.mini.codec wrote, if not shipped")
    parser.add_argument("--takes", type=int, default=1, help="renderings of an item")
    parser.add_argument("--half", action="store_true", help="images of half the size, latents")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.half and (arguments.modality, arguments.what) != ("image", "latents"):
        parser.error("--half is for image latents")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kind = KINDS[arguments.modality]
    if arguments.what == "captions":
        read_captions(kind, arguments.out, arguments.count)
    else:
        encode(
            *(kind, arguments.out, arguments.codec, arguments.takes, arguments.count),
            half=arguments.half,
        )


if __name__ == "__main__":
    main()
