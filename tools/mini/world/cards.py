"""The card of a decoder that is shipped."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from tools.mini.world.run import Progress

CARD = """# The {modality} decoder of mini

A `{pipeline}` of diffusers. Its captions are read by the first {layers} layers of
SmolLM2-135M-Instruct (Apache-2.0), which is fetched at first use and is no part of this folder.

```python
import mmllm.mini.components  # the classes that are not diffusers' own
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{place}")
pipe(
    "{caption}",
    generator=torch.Generator().manual_seed(0),
    num_inference_steps=20,
    guidance_scale=3.0,{call}
).{output}
```

- **Parameters** in this folder: {parameters:,} in {megabytes:.1f} MB, float16.{shared}
- **Data**: {items:,} {what}, composed by `mmllm.mini.world` of the things, sounds and motions of
  [mini's data](../../data/README.md), whose credits and licences are there. One pair of things,
  colour or number of a thing, motion of a thing and pair of sounds in ten is in none of them.
- **Licence** of these weights: Apache-2.0.
- **Training**: {steps:,} steps in {minutes:.0f} minutes of a share of a CPU core by
  `python -m tools.mini.world.decoders {modality}`; [docs/mini.md](../../../../docs/mini.md) has the
  commands and scores.
"""
_WHAT = {"image": "scenes", "audio": "soundscapes", "video": "clips"}
_CAPTIONS = {
    "image": "two dogs to the left of a blue car",
    "audio": "a cat and then a church bell",
    "video": "a rocket moving up",
}
_IMAGE_CALL = """
    height=128,
    width=128,
    clean_caption=False,"""
_CALLS = {
    "image": f"""{_IMAGE_CALL}
    use_resolution_binning=False,
    max_sequence_length=40,""",
    "audio": "",
    "video": f"""{_IMAGE_CALL}
    video_length=9,""",
}
_OUTPUTS = {"image": "images", "audio": "audios", "video": "frames"}
_SHARED = """
  The rest, the codec and the layers of each frame, is that of the image decoder."""


def write_card(
    folder: Path, modality: str, pipeline: str, layers: int, items: int, progress: Progress
) -> None:
    """Write a decoder's README.md.

    Args:
        folder: where the pipeline is.
        modality: of what it makes.
        pipeline: the name of its class.
        layers: of the language model that read captions.
        items: how many it was trained on.
        progress: of its training.
    """
    parameters = size = 0
    for file in folder.rglob("*.safetensors"):
        size += file.stat().st_size
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                parameters += math.prod(tensors.get_slice(name).get_shape())
    card = CARD.format(
        modality=modality,
        pipeline=pipeline,
        layers=layers,
        place=f"mmllm/mini/decoders/{modality}",
        caption=_CAPTIONS[modality],
        call=_CALLS[modality],
        output=_OUTPUTS[modality],
        parameters=parameters,
        megabytes=size / 1e6,
        shared=_SHARED if modality == "video" else "",
        items=items,
        what=_WHAT[modality],
        steps=progress.step,
        minutes=progress.seconds / 60,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
