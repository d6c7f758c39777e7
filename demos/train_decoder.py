"""Fine-tune a diffusion decoder on labelled images of your own.

python demos/train_decoder.py my/images/teach my/decoder --steps 300

starts from mini's image decoder (a PixArt pipeline of 7 million parameters), reads the images and
captions once, trains the denoiser by the pipeline's own loss, and writes a diffusers folder that
`system.decoders.image.weights` names.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from mmllm import console
from mmllm.config import build, parse_component
from mmllm.data.formats.labelled import read_labelled
from mmllm.losses import draw_noise

CAPTION_DROPOUT = 0.1
"""Share of captions that are left out, for classifier-free guidance (Ho and Salimans 2022)."""


def train(source: Path, output: Path, steps: int, batch_size: int, learning_rate: float) -> float:
    """Train and save; returns the mean loss of the last tenth of the steps."""
    entry = {"type": "pixart", "weights": "mini:decoders/image", "max_caption_tokens": 40}
    decoder = build(parse_component("decoders", entry, "decoder"))
    items = read_labelled(source).items
    with torch.no_grad():
        latents = decoder.encode_media(torch.stack([decoder.preprocess(i.medium) for i in items]))
        named = [item.medium.caption or item.label for item in items]
        captions = decoder.encode_captions([f"Here is {name}." for name in named])  # as replies say
        empty = decoder.unconditional(1)

    denoiser = decoder.pipeline.transformer.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in (bar := tqdm(range(steps), unit="step")):
        rows = torch.randint(len(items), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        condition = {
            name: torch.where(dropped.view(-1, *[1] * (value.dim() - 1)), empty[name], value[rows])
            for name, value in captions.items()
        }
        noise, times = draw_noise(latents[rows], range(step * batch_size, (step + 1) * batch_size))
        loss = decoder.denoising_loss(condition, latents[rows], noise=noise, times=times).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    decoder.pipeline.save_pretrained(output)
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="a folder or table of labelled images")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    given = parser.parse_args()
    loss = train(given.source, given.output, given.steps, given.batch_size, given.learning_rate)
    console.echo(f"{given.output}: loss {loss:.3f}")
