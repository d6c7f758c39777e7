"""Trains the decoders of mini's world: captions -> images, clips and sounds.

    python -m tools.mini.world.pool image captions --out runs/pool/image
    python -m tools.mini.world.pool image latents --out runs/pool/image
    python -m tools.mini.world.decoders image --run runs/decoders/image --pool runs/pool/image \\
        --minutes 120
    python -m tools.mini.world.decoders image --run runs/decoders/image --pool runs/pool/image \\
        --ship my/decoder

An image decoder may begin with one for images of half the size, whose pool `latents --half` makes:
`image --after runs/decoders/half`. Any decoder may go on from a pipeline: `audio --after
mini:decoders/audio`.

`video --after runs/decoders/image --images runs/pool/image` trains the decoder of clips: layers
over time between those of the image decoder, which stay as they are. With `--joint` both train,
on clips and on images: of that run `image --ship` writes the one. `video --ship` with
`--images-from` writes the layers over time alone.

A transformer denoises the latents; it reads the caption as states of the frozen language model.
Targets are clean samples (Li & He 2025, "Back to basics") on the straight path
x_s = (1 - s) x_0 + s n (Lipman et al. 2023), with the error weighted as a velocity. What is shipped
is a standard pipeline of diffusers.

Dimensions: B samples, L... latents of one, T caption tokens, D = 576 channels of their states.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmllm.kernels.precision import fast_autocast
from mmllm.mini import folder_of
from mmllm.mini.clip_transformer import ClipFrameCodec, is_over_time
from mmllm.mini.world.captions import caption, clip_caption
from mmllm.mini.world.clips import draw_heldout_clip
from mmllm.mini.world.scenes import draw_heldout_scene, draw_training_scene
from mmllm.mini.world.sounds import draw_heldout_soundscape, soundscape_caption
from tools.mini.world import pool
from tools.mini.world.cards import write_card
from tools.mini.world.denoisers import (
    DENOISERS,
    TEXT_PATH,
    Denoiser,
    Text,
    finer,
    pipeline,
    predict_frames,
)
from tools.mini.world.pipelines import scheduler, ship, text_parts
from tools.mini.world.run import Run, load_run, parse_run, train
from tools.mini.world.text import LAYERS, CaptionReader, CaptionStates, standardised

logger = logging.getLogger("decoders")

LEARNING_RATE = 8e-4
DROPPED = 0.1  # captions left out, for guidance
IMAGES_WITH_CLIPS = 24


class Loss:
    """The denoising loss of a step over the pool.

    Args:
        denoiser: What trains.
        network: Its weights.
        folder: The pool.
        seed: Decides what each step sees.
        statistics: The captions by whose mean and deviation states are standardised; None: those of
            the pool.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        network: nn.ModuleDict,
        folder: Path,
        seed: int,
        statistics: CaptionStates | None = None,
    ):
        self.denoiser, self.network, self.seed = denoiser, network, seed
        self.captions, self.latents = pool.captions(folder), pool.latents(folder)
        if statistics:
            own = {"mean": statistics.mean, "std": statistics.std}
            self.captions = replace(self.captions, **own)

    def __call__(self, step: int, share: float) -> Tensor:
        size, (first, last, spread) = self.denoiser.batch, self.denoiser.noise
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        rows = [rng.randrange(len(self.latents)) for _ in range(size)]
        takes = [rng.randrange(self.latents.shape[1]) for _ in rows]
        empty = [rng.random() < DROPPED for _ in rows]
        clean = self.latents[rows, takes].float()
        text = self.captions.batch(rows, empty)
        mean = first + (last - first) * share
        # One draw from each slice of the distribution: less noise in the gradient.
        place = torch.randperm(size, generator=generator) + torch.rand(1, generator=generator)
        level = torch.sigmoid(mean + spread * torch.special.ndtri(place.clamp(min=1e-3) / size))
        noise = torch.randn(clean.shape, generator=generator)
        wide = level.view(-1, *[1] * (clean.ndim - 1))
        # The fused attention kernel is slow backward on CPUs.
        with sdpa_kernel(SDPBackend.MATH), fast_autocast("cpu"):
            noisy = (1 - wide) * clean + wide * noise
            made = self.denoiser.predict(self.network, noisy, level, text)
        error = (made.float() - clean).square().flatten(1).mean(1)
        return (error / level.clamp(min=0.1).square()).mean()


def is_pipeline(folder: str) -> bool:
    """Whether a folder, or one of mini's (`mini:decoders/audio`), holds a pipeline of diffusers."""
    return (folder_of(folder) / "model_index.json").exists()


def load_pipeline(folder: str, network: nn.ModuleDict) -> dict[str, Tensor]:
    """Copy the weights of a pipeline into a network of its shape.

    Returns:
        mean and std of the states of captions, by which that pipeline standardises them.
    """
    made = DiffusionPipeline.from_pretrained(folder_of(folder))
    for name, part in network.items():
        part.load_state_dict(getattr(made, name).float().state_dict())
    return {"mean": made.text_encoder.mean.float(), "std": made.text_encoder.std.float()}


def keep_images(network: nn.ModuleDict) -> None:
    """Let only the layers over time of a denoiser of clips train."""
    for name, weight in network["transformer"].named_parameters():
        weight.requires_grad_(is_over_time(name))


class JointLoss:
    """The losses of clips and of images, for the denoiser of clips whose layers are both's."""

    def __init__(self, clips: Loss, images: Loss):
        self.clips, self.images = clips, images

    def __call__(self, step: int, share: float) -> Tensor:
        return self.clips(step, share) + self.images(step, share)


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    network: nn.ModuleDict,
    shape: torch.Size,
    text: Text,
    seed: int,
    guidance: float = 3.0,
    steps: int = 20,
) -> Tensor:
    """Latents for captions, float[B, L...], by DPM-Solver++ with guidance."""
    states, mask = text
    size = len(states)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(size)]
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    nothing = torch.zeros_like(mask)
    nothing[:, 0] = 1
    both = torch.cat([torch.zeros_like(states), states]), torch.cat([nothing, mask])
    solver: Any = scheduler()
    solver.set_timesteps(steps)
    for time in solver.timesteps:
        level = (time / 1000).expand(2 * size).float()
        with fast_autocast("cpu"):
            made = denoiser.predict(network, torch.cat([latents, latents]), level, both).float()
        without, with_text = made.chunk(2)
        made = without + guidance * (with_text - without)
        latents = solver.step(made, time, latents).prev_sample
    return latents


@torch.inference_mode()
def decode(modality: str, codec: Any, latents: Tensor) -> Tensor:
    """What is sampled, float[B, ...] in -1..1."""
    parts = (latents / pool.KINDS[modality].scale(codec)).split(8)
    decoded = [pool.over_frames(lambda z: codec.decode(z).sample, part) for part in parts]
    return torch.cat(decoded).float().clamp(-1, 1)


SCENES = ("thing", "colour", "count", "pair", "pair, colours", "groups", "three", "four")


def heldout_captions(modality: str) -> list[str]:
    """Captions of 64 items that training never has: always the same."""
    rng = random.Random("sheet")
    texts = []
    if modality == "image":
        for kind in SCENES:  # eight of each, a row of the sheet
            for _ in range(8):
                is_plain = kind == "thing"
                scene = draw_training_scene(rng) if is_plain else draw_heldout_scene(kind, rng)
                texts.append(caption(scene, rng))
        return texts
    for _ in range(64):
        if modality == "video":
            texts.append(clip_caption(draw_heldout_clip(rng), rng))
        else:
            texts.append(soundscape_caption(draw_heldout_soundscape(rng), rng))
    return texts


def picture(modality: str, media: Tensor) -> Tensor:
    """uint8[B, 3, H, W] of what was sampled: clips frame by frame, sounds as log-mel pictures."""
    if modality == "audio":
        mel = pool.MelAutoencoder().encode(media).latent_dist.mode()  # [B, 2 M, K]
        mel = mel.unflatten(1, (2, -1)).permute(0, 2, 3, 1).flatten(2).flip(1)
        media = ((mel + 1.5) / 2 - 1).clamp(-1, 1)[:, None].expand(-1, 3, -1, -1)
    if modality == "video":
        media = media[:, :, ::2].transpose(2, 3).flatten(3)  # [B, 3, H, frames x W]
    return ((media + 1) * 127.5).round().byte()


class Sheet:
    """Writes samples-STEP.png: 64 held-out items, whose captions are in samples.txt."""

    def __init__(self, modality: str, codec: Any, captions: pool.CaptionStates, shape: torch.Size):
        self.modality, self.codec, self.shape = modality, codec, shape
        self.texts = heldout_captions(modality)
        read = CaptionReader().read(self.texts)
        self.text = standardised(read, captions.mean, captions.std, [False] * len(read))

    def __call__(self, run: Run) -> None:
        denoiser = DENOISERS[self.modality]
        network: Any = copy.deepcopy(run.model).eval()
        run.load_averages(network)
        latents = sample(denoiser, network, self.shape, self.text, seed=0)
        pictures = picture(self.modality, decode(self.modality, self.codec, latents))
        columns = 8 if pictures.shape[-1] < 200 else 2
        rows = pictures.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
        page = rows.flatten(0, 1).flatten(1, 2)
        Image.fromarray(page.numpy()).save(run.folder / f"samples-{run.progress.step}.png")
        (run.folder / "samples.txt").write_text("\n".join(self.texts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the decoders of mini's world.")
    parser.add_argument("modality", choices=DENOISERS)
    parser.add_argument("--run", type=Path, required=True, help="an existing one goes on")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--codec", type=Path, help="what tools.mini.codec wrote, if not shipped")
    parser.add_argument(
        "--after",
        metavar="FOLDER",
        help="what a new run begins with: another run, or a pipeline (mini:decoders/audio)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="POOL",
        help="of clips, with --after: what the image decoder was trained on",
    )
    parser.add_argument(
        "--joint",
        action="store_true",
        help="of clips: train the layers of images, too, on both; else they stay as they are",
    )
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="write the pipeline of a run")
    parser.add_argument(
        "--images-from",
        metavar="FOLDER",
        help="with --ship, of clips: the pipeline of images of the same run, whose layers are not "
        "written again",
    )
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="at its highest")
    arguments, progress = parse_run(parser, minutes=120)
    if arguments.joint and not arguments.images:
        parser.error("--joint needs --images POOL, the images that it trains on")
    if arguments.images and not (arguments.after or arguments.joint):
        parser.error("--images needs --after RUN, whose layers stay as they are, or --joint")
    arguments.run.mkdir(parents=True, exist_ok=True)
    denoiser = DENOISERS[arguments.modality]
    captions, shape = pool.captions(arguments.images or arguments.pool), pool.shape(arguments.pool)
    codec: Any = pool.KINDS[arguments.modality].codec(arguments.codec)
    network = denoiser.build(shape, captions.states.shape[-1]).train()
    statistics = arguments.run / "captions.safetensors"  # those that the run began with
    if arguments.after and is_pipeline(arguments.after):
        own = load_pipeline(arguments.after, network)
        if not statistics.exists():
            save_file(own, statistics)
    elif arguments.after:
        load_run(Path(arguments.after), network, finer)
    if arguments.after and arguments.modality == "video" and not arguments.joint:
        keep_images(network)
    if statistics.exists():
        captions = replace(captions, **load_file(statistics))
    run = Run(
        arguments.run,
        network,
        progress,
        arguments.learning_rate,
        paces=lambda name: 2.0 if re.search(TEXT_PATH, name) else 1.0,
        weight_decay=0.01,
    )
    if arguments.ship:
        run.load_averages(network)
        transformer: Any = network["transformer"]
        transformer.images_from = arguments.images_from
        if arguments.images_from:
            codec = ClipFrameCodec.of(arguments.images_from)
        made = pipeline(arguments.modality, network, codec, text_parts(captions))
        ship(made, arguments.ship)
        items = len(pool.latents(arguments.pool))
        write_card(
            arguments.ship,
            arguments.modality,
            type(made).__name__,
            LAYERS,
            items,
            run.progress,
        )
        return
    count = sum(weight.numel() for weight in run.weights.values())
    logger.info("%d captions, %s parameters", len(captions.offsets) - 1, f"{count:,}")
    sheet = Sheet(arguments.modality, codec, captions, shape)
    loss: Any = Loss(denoiser, network, arguments.pool, arguments.seed, captions)
    if arguments.joint:
        still = replace(DENOISERS["image"], predict=predict_frames, batch=IMAGES_WITH_CLIPS)
        loss = JointLoss(loss, Loss(still, network, arguments.images, arguments.seed))
    train(run, loss, sheet, arguments.every)


if __name__ == "__main__":
    main()
