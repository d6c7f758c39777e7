"""Writes the averaged weights as the decoder that is shipped, with its card."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from diffusers import (
    DiffusionPipeline,
)

from tools.mini.decoders.items import Items
from tools.mini.decoders.samples import score
from tools.mini.decoders.training import Run, modules, parameters


def ship(run: Run, items: Items, folder: Path) -> None:
    """The averaged weights in float16, scored as reloaded, and their card."""
    pipe = run.averaged()
    for part in modules(pipe).values():
        part.half()
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)  # diffusers notes the folder that it loaded from
        if "dtype" in content:
            content["dtype"] = "float32"  # transformers would keep float16, diffusers does not
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scores = score(pipe, run.recipe, items, rounds=3 if len(items.labels) < 100 else 1)
    logger.info("scores %s", scores)
    counts = parameters(pipe)
    call = ", ".join(f"{name}={value!r}" for name, value in run.recipe.call.items())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    lines = "".join(f"| {name.replace('_', ' ')} | {value} |\n" for name, value in scores.items())
    card = CARD.format(
        decoder=run.progress.decoder,
        pipeline=type(pipe).__name__,
        call=call,
        output=run.recipe.output,
        counts=", ".join(f"{name} {count:,}" for name, count in counts.items() if count),
        size=size,
        items=len(items.concepts),
        concepts=len(items.labels),
        steps=run.progress.step,
        earlier=f" after {run.progress.earlier} of an earlier run" if run.progress.earlier else "",
        batch=run.recipe.batch,
        classes="" if run.progress.decoder == "image" else CLASSES,
        codec="" if run.progress.decoder == "audio" else " --codec runs/decoders/codec",
        minutes=run.progress.seconds / 60,
        scores=lines,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


logger = logging.getLogger(__name__)

CLASSES = "import mmllm.mini.codecs  # the class in the VAE slot\n"
CARD = """# The {decoder} decoder of mini

A `{pipeline}` of diffusers whose every weight was trained by `tools/mini/decoders`.

```python
{classes}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("mmllm/mini/decoders/{decoder}")
pipe("a caption", {call}).{output}
```

- **Parameters**: {counts}; float16, {size:.1f} MB.
- **Data**: {items} items of {concepts} concepts, split `train` only, with the training phrasings
  and synonyms; credits and licences are in `mmllm/mini/data/README.md`.
- **Word vectors**: start from all-MiniLM-L6-v2 (Apache-2.0), reduced.
- **Licence** of these weights: Apache-2.0.
- **Training**: {steps} steps of {batch}{earlier}, {minutes:.0f} minutes on one busy CPU core:
  `python -m tools.mini.decoders {decoder} --words FOLDER{codec} --run runs/decoders/{decoder}
  --minutes {minutes:.0f} --threads 1`; then the same with `--ship mmllm/mini/decoders/{decoder}`.

| held-out phrasings | |
|---|---|
{scores}
A sample counts if its own concept is the nearest (among the nearest five) of all concepts, by
squared distance of coarse pixels or log-mel patches to the training items. What it was not trained
on it cannot make: an unknown caption gives some mixture of known things.
"""
