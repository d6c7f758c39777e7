"""Trains the autoencoder through which mini's decoders of images and videos see pixels.

    python -m tools.mini.world.codec --out runs/decoders/codec --minutes 60

An AutoencoderDC of diffusers (Chen et al. 2025, "Deep compression autoencoder"), 16 x 16 pixels to
one latent of 48 numbers, learns random crops of scenes that are composed while it runs: the error
of pixels and of their differences.
`--out` is then given to `tools.mini.world.decoder` as `--codec`.

Dimensions: B crops of C x C pixels, N images of P x P pixels, h x w latents.
"""

import argparse
import logging
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mmllm.mini.codecs import ImageAutoencoder
from mmllm.mini.world.rendering import SIDE, render
from mmllm.mini.world.scenes import draw_training_scene
from tools.mini.world.run import Run, parse_run, train

logger = logging.getLogger("mini_codec")

CROP, BATCH, LEARNING_RATE = 64, 16, 1.5e-3
NOISE = 0.08  # of the standard deviation of the latents


def codec() -> AutoencoderDC:
    """The untrained codec.

    Its shortcuts carry averages of pixels past every layer from the first step. An AutoencoderKL
    of the same cost and compression has none, and was at a third of the way after the same time.
    """
    none: tuple[tuple[int, ...], ...] = ((),) * 5
    options: dict[str, Any] = {  # diffusers annotates tuples of one
        "latent_channels": 48,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": (24, 48, 96, 192, 192),
        "decoder_block_out_channels": (24, 48, 96, 192, 192),
        "encoder_layers_per_block": (0, 1, 1, 2, 2),
        "decoder_layers_per_block": (0, 2, 2, 2, 2),
        "encoder_qkv_multiscales": none,
        "decoder_qkv_multiscales": none,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "pixel_unshuffle",
    }
    return AutoencoderDC(**options)


def images(count: int, rng: random.Random) -> Tensor:
    """Images of random training scenes, uint8[N, 3, P, P]."""
    drawn = [torch.from_numpy(render(draw_training_scene(rng), rng)) for _ in range(count)]
    return torch.stack(drawn).permute(0, 3, 1, 2)


def crops(rng: random.Random) -> Tensor:
    """float[B, 3, C, C] in -1..1, half of them mirrored; mostly not empty ground."""
    cut = []
    for image in images(BATCH, rng):
        for _ in range(4):
            top, left = rng.randrange(SIDE - CROP + 1), rng.randrange(SIDE - CROP + 1)
            part = image[:, top : top + CROP, left : left + CROP]
            if part[:, ::4, ::4].float().std() > 20:
                break
        cut.append(part.flip(-1) if rng.random() < 0.5 else part)
    return torch.stack(cut).float() / 127.5 - 1


def differences(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.diff(dim=-1), samples.diff(dim=-2)


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    edges = sum(
        functional.l1_loss(ours, theirs)
        for ours, theirs in zip(differences(made), differences(real), strict=True)
    )
    return functional.l1_loss(made, real) + edges


class Loss:
    """The loss of a step; the decoder sees latents with a little noise, as a denoiser leaves it."""

    def __init__(self, model: Any, seed: int):
        self.model, self.seed = model, seed

    def __call__(self, step: int, share: float) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        real = crops(rng).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.model.encode(real).latent
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + NOISE * latents.detach().std() * noise
            made = self.model.decode(latents).sample.float()
        return reconstruction_loss(made, real)


def ship(run: Run) -> None:
    """Write the averaged weights as a codec, with a page of reconstructions."""
    model = codec().eval()
    run.load_averages(model)
    spread, fidelity = measure(model, run.folder / "reconstructions.png")
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(run.folder)
    wrap(run.folder)
    logger.info("%d steps, PSNR %.1f dB", run.progress.step, fidelity)


@torch.inference_mode()
def wrap(folder: Path, count: int = 1024) -> None:
    """Write the codec of a folder as pipelines use it: FOLDER/wrapped.

    `count`: scenes whose latents decide the components.
    """
    model: Any = AutoencoderDC.from_pretrained(folder)
    real = images(count, random.Random("components")).float() / 127.5 - 1
    latents = torch.cat([model.eval().encode(part).latent for part in real.split(16)])
    ImageAutoencoder.around(model, latents).save_pretrained(folder / "wrapped")


@torch.inference_mode()
def measure(model: Any, sheet: Path) -> tuple[float, float]:
    """Standard deviation of the latents, and PSNR in dB over 128 scenes of another seed.

    `sheet`: where a page of reconstructions is written.
    """
    real = images(128, random.Random("measure")).float() / 127.5 - 1
    latents = torch.cat([model.encode(part).latent for part in real.split(16)])
    made = torch.cat([model.decode(part).sample for part in latents.split(16)]).clamp(-1, 1)
    error = (made - real).square().mean((1, 2, 3))
    rows = torch.stack([real[:16], made[:16]]).unflatten(1, (2, 8)).transpose(0, 1)
    page = rows.permute(0, 1, 4, 2, 5, 3).reshape(4 * SIDE, 8 * SIDE, 3)  # real above made, twice
    Image.fromarray(((page + 1) * 127.5).byte().numpy()).save(sheet)
    return latents.std().item(), (10 * (4 / error).log10()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the codec of mini's images and videos.")
    parser.add_argument("--out", type=Path, required=True, help="an existing run goes on")
    arguments, progress = parse_run(parser, minutes=60)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model: Any = codec()
    model = model.train().to(memory_format=torch.channels_last)
    run = Run(arguments.out, model, progress, LEARNING_RATE, averaging=0.998)
    train(run, Loss(model, arguments.seed), ship, arguments.every)


if __name__ == "__main__":
    main()
