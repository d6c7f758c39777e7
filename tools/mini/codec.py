"""Trains the autoencoder through which mini's decoders of pictures and clips see pixels.

    python -m tools.mini.codec --out runs/decoders/codec --minutes 15

An AutoencoderKL of diffusers, 8 x 8 pixels to one latent of 16 numbers, learns the 3-D pictures and
the frames of the clips from random crops, with the loss of Rombach et al. 2022, sec. 3.1, less its
adversary: the error of pixels and of their differences, and a slight pull towards N(0, 1).
`--out` is then given to `tools.mini.world.pool` and `tools.mini.world.decoders` as `--codec`.

Dimensions: B crops of C x C pixels, N pictures, h x w latents.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from mmllm import mini
from mmllm.data.sources import read_text
from mmllm.kernels.precision import fast_autocast

logger = logging.getLogger("mini_codec")

DATA = mini.FOLDER / "data"
CROP, BATCH, LEARNING_RATE, KL_WEIGHT = 32, 32, 2e-3, 3e-4


def codec() -> AutoencoderKL:
    """The untrained codec."""
    options: dict[str, Any] = {  # diffusers annotates tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 48, 64),
        "norm_num_groups": 8,
        "latent_channels": 16,
        "sample_size": 64,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**options)


def on_white(image: Image.Image) -> Tensor:
    """uint8[3, 64, 64]."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = (
        Image.alpha_composite(white, image)
        .convert("RGB")
        .resize((64, 64), Image.Resampling.LANCZOS)
    )
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def frames_of(path: Path) -> Tensor:
    """uint8[3, F, 64, 64]: the frames of a clip, or the one of a picture."""
    return torch.stack([on_white(frame) for frame in ImageSequence.Iterator(Image.open(path))], 1)


def pictures(data: Path) -> Tensor:
    """uint8[N, 3, 64, 64]: the trained 3-D pictures and every frame of the clips."""
    items = json.loads(read_text(data / "items.json.gz"))
    files = [
        data / item["file"]
        for item in items
        if item["split"] == "train" and item["style"] in ("fluent-3d", "fluent-anim")
    ]
    return torch.cat([frames_of(file).transpose(0, 1) for file in tqdm(files, desc="reading")])


def crops(samples: Tensor, generator: torch.Generator) -> Tensor:
    """float[B, 3, C, C] in -1..1, from uint8[N, 3, 64, 64]; half of them mirrored."""
    num_offsets = samples.shape[-1] - CROP + 1
    rows = torch.randint(len(samples), (BATCH,), generator=generator).tolist()
    offsets = torch.randint(num_offsets, (BATCH, 2), generator=generator).tolist()
    mirrored = (torch.rand(BATCH, generator=generator) < 0.5).tolist()
    cut = [
        samples[row, :, top : top + CROP, left : left + CROP].flip(-1 if flip else ())
        for row, (top, left), flip in zip(rows, offsets, mirrored, strict=True)
    ]
    return torch.stack(cut).float() / 127.5 - 1


def differences(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.diff(dim=-1), samples.diff(dim=-2)


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    edges = sum(
        functional.l1_loss(ours, theirs)
        for ours, theirs in zip(differences(made), differences(real), strict=True)
    )
    return functional.l1_loss(made, real) + edges


def train(model: Any, samples: Tensor, minutes: float, seed: int) -> int:
    """Steps until the minutes are used up, the learning rate falling to nothing with them."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    began, step, share = time.monotonic(), 0, 0.0
    bar = tqdm(unit="step", mininterval=20)
    while share < 1:
        real = crops(samples, generator).to(memory_format=torch.channels_last)
        with fast_autocast("cpu"):
            posterior = model.encode(real).latent_dist
            made = model.decode(posterior.sample(generator)).sample.float()
            loss = reconstruction_loss(made, real)
            loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        step, share = step + 1, (time.monotonic() - began) / 60 / minutes
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", done=f"{share:.0%}")
    bar.close()
    return step


@torch.inference_mode()
def measure(model: Any, samples: Tensor, sheet: Path) -> tuple[float, float]:
    """Standard deviation of the latents, and PSNR in dB over every eighth image.

    `sheet`: where a page of reconstructions is written.
    """
    real = samples[::8].float() / 127.5 - 1
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in real.split(32)])
    made = torch.cat([model.decode(part).sample for part in latents.split(32)]).clamp(-1, 1)
    error = (made - real).square().mean((1, 2, 3))
    rows = torch.stack([real[:32], made[:32]]).unflatten(1, (2, 16)).transpose(0, 1)
    page = rows.permute(0, 1, 4, 2, 5, 3).reshape(4 * 64, 16 * 64, 3)  # real above made, twice
    Image.fromarray(((page + 1) * 127.5).byte().numpy()).save(sheet)
    return latents.std().item(), (10 * (4 / error).log10()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the codec of mini's images and videos.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--after", type=Path, help="folder of an earlier run to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    samples = pictures(arguments.data)
    model: Any = AutoencoderKL.from_pretrained(arguments.after) if arguments.after else codec()
    model = model.train().to(memory_format=torch.channels_last)
    steps = train(model, samples, arguments.minutes, arguments.seed)
    model.eval()
    arguments.out.mkdir(parents=True, exist_ok=True)
    spread, fidelity = measure(model, samples, arguments.out / "reconstructions.png")
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(arguments.out)
    logger.info("%d pictures, %d steps, PSNR %.1f dB", len(samples), steps, fidelity)


if __name__ == "__main__":
    main()
