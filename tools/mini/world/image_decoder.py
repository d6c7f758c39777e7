"""Trains the image decoder of mini: captions of scenes -> images.

    python -m tools.mini.world.codec --out runs/decoders/codec
    python -m tools.mini.world.pool captions --out runs/pool
    python -m tools.mini.world.pool latents --out runs/pool --codec runs/decoders/codec
    python -m tools.mini.world.image_decoder --run runs/decoders/image --pool runs/pool \\
        --codec runs/decoders/codec --minutes 120

A PixArt transformer denoises the latents of a scene; it reads the caption as states of the frozen
language model. Targets are clean samples (Li & He 2025, "Back to basics") on the straight path
x_s = (1 - s) x_0 + s n (Lipman et al. 2023), with the error weighted as a velocity.

Dimensions: B samples, C x h x w latents, T caption tokens, D = 576 channels of their states.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmllm.mini.world.captions import caption
from mmllm.mini.world.rendering import SIDE
from mmllm.mini.world.scenes import draw_heldout_scene
from tools.mini.world import pool
from tools.mini.world.run import Run, parse_run, train
from tools.mini.world.text import CaptionReader, CaptionStates, standardised

logger = logging.getLogger("image_decoder")

WIDTH, LAYERS, HEADS, BATCH, LEARNING_RATE = 256, 6, 4, 64, 8e-4
DROPPED = 0.1  # captions left out, for guidance
# Mean of logit(s) at the start and at the end, and its spread: the content is decided at high
# noise, by the caption alone, so that is learned first.
NOISE = (1.0, 0.3, 1.2)
TEXT_PATH = r"caption_projection|attn2\.(to_v|to_out)"


def denoiser(channels: int, side: int, text_width: int) -> PixArtTransformer2DModel:
    """The untrained transformer; its text path has unit gain at the start."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=channels,
        out_channels=channels,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        sample_size=side,
        patch_size=2,
        caption_channels=text_width,
    )
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and re.search(TEXT_PATH, name):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return transformer


def predict(transformer: Any, noisy: Tensor, level: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The clean latents as the transformer predicts them, float[B, C, h, w]."""
    states, mask = text
    return transformer(
        noisy,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=1000 * level,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


class Loss:
    """The denoising loss of a step over the pool."""

    def __init__(self, transformer: Any, folder: Path, seed: int):
        self.transformer, self.seed = transformer, seed
        self.captions, self.latents = pool.captions(folder), pool.latents(folder)

    def __call__(self, step: int, share: float) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        rows = [rng.randrange(len(self.latents)) for _ in range(BATCH)]
        takes = [rng.randrange(self.latents.shape[1]) for _ in rows]
        empty = [rng.random() < DROPPED for _ in rows]
        clean = self.latents[rows, takes].float()
        text = self.captions.batch(rows, empty)
        mean = NOISE[0] + (NOISE[1] - NOISE[0]) * share
        # One draw from each slice of the distribution: less noise in the gradient.
        place = torch.randperm(BATCH, generator=generator) + torch.rand(1, generator=generator)
        level = torch.sigmoid(mean + NOISE[2] * torch.special.ndtri(place.clamp(min=1e-3) / BATCH))
        noise = torch.randn(clean.shape, generator=generator)
        wide = level[:, None, None, None]
        # The fused attention kernel is slow backward on CPUs.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            made = predict(self.transformer, (1 - wide) * clean + wide * noise, level, text)
        error = (made.float() - clean).square().flatten(1).mean(1)
        return (error / level.clamp(min=0.1).square()).mean()


@torch.inference_mode()
def sample(
    transformer: Any, text: tuple[Tensor, Tensor], seed: int, guidance: float = 3.0, steps: int = 20
) -> Tensor:
    """Latents for captions, float[B, C, h, w], by DPM-Solver++ with guidance."""
    states, mask = text
    config = transformer.config
    size, side = len(states), config.sample_size
    generators = [torch.Generator().manual_seed(seed + row) for row in range(size)]
    noise = [torch.randn(config.in_channels, side, side, generator=g) for g in generators]
    nothing = torch.zeros_like(mask)
    nothing[:, 0] = 1
    both = torch.cat([torch.zeros_like(states), states]), torch.cat([nothing, mask])
    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    latents = torch.stack(noise)
    for time in scheduler.timesteps:
        level = (time / 1000).expand(2 * size).float()
        with torch.autocast("cpu", torch.bfloat16):
            made = predict(transformer, latents.repeat(2, 1, 1, 1), level, both).float()
        without, with_text = made.chunk(2)
        made = without + guidance * (with_text - without)
        latents = scheduler.step(made, time, latents).prev_sample
    return latents


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """uint8[B, 3, P, P] images."""
    parts = [vae.decode(p / vae.config.scaling_factor).sample for p in latents.split(16)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte()


KINDS = ("thing", "colour", "count", "pair", "pair, colours", "groups", "three", "four")


class Sheet:
    """Writes samples-STEP.png: eight kinds of held-out scenes, eight of each."""

    def __init__(self, codec: Path, statistics: CaptionStates):
        self.vae: Any = AutoencoderDC.from_pretrained(codec).eval()
        rng = random.Random("sheet")
        self.texts = []
        for kind in KINDS:
            for _ in range(8):
                scene = (
                    pool.draw_training_scene(rng)
                    if kind == "thing"
                    else draw_heldout_scene(kind, rng)
                )
                self.texts.append(caption(scene, rng))
        self.text = standardised(
            CaptionReader().read(self.texts), statistics.mean, statistics.std, [False] * 64
        )

    def __call__(self, run: Run) -> None:
        transformer: Any = denoiser(**_shape(self.vae, self.text[0].shape[-1])).eval()
        run.load_averages(transformer)
        images = decode(self.vae, sample(transformer, self.text, seed=0))
        page = images.unflatten(0, (8, 8)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        Image.fromarray(page.numpy()).save(run.folder / f"samples-{run.progress.step}.png")
        (run.folder / "samples.txt").write_text("\n".join(self.texts), encoding="utf-8")


def _shape(vae: Any, text_width: int) -> dict[str, int]:
    return {
        "channels": vae.config.latent_channels,
        "side": SIDE // vae.spatial_compression_ratio,
        "text_width": text_width,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the image decoder of mini.")
    parser.add_argument("--run", type=Path, required=True, help="an existing one goes on")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    arguments, progress = parse_run(parser, minutes=120)
    arguments.run.mkdir(parents=True, exist_ok=True)
    captions = pool.captions(arguments.pool)
    sheet = Sheet(arguments.codec, captions)
    transformer = denoiser(**_shape(sheet.vae, captions.states.shape[-1])).train()
    run = Run(
        arguments.run,
        transformer,
        progress,
        LEARNING_RATE,
        paces=lambda name: 2.0 if re.search(TEXT_PATH, name) else 1.0,
        weight_decay=0.01,
    )
    count = sum(weight.numel() for weight in run.weights.values())
    logger.info("%d captions, %s parameters", len(captions.offsets) - 1, f"{count:,}")
    train(run, Loss(transformer, arguments.pool, arguments.seed), sheet, arguments.every)


if __name__ == "__main__":
    main()
