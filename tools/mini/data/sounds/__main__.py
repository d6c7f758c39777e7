"""Renders every take, checks it and writes files and table."""

from __future__ import annotations

import argparse
import json
import logging
import zlib
from pathlib import Path

import numpy as np
import soundfile

from mmllm.data.sources import write_text
from tools.mini.data.sounds.concepts import CAPTIONS, check_names, concepts
from tools.mini.data.sounds.rendering import finish, recorded, render
from tools.mini.data.sounds.sources import Concept, Recorded, Rendered, Synthesised
from tools.mini.data.sounds.takes import PEAK, PLACE, RATE, SPLITS, N

log = logging.getLogger("sounds")


def takes(concept: Concept, font: Path, samples: Path) -> list[np.ndarray]:
    match concept.source:
        case Rendered() as source:
            raw = render(source, font)
        case Recorded() as source:
            raw = recorded(source, samples)
        case Synthesised(make):
            seeds = [zlib.crc32(f"{concept.id}/{take}".encode()) for take in range(len(PLACE))]
            raw = [make(PLACE[i], np.random.default_rng(seed)) for i, seed in enumerate(seeds)]
    return [finish(x.astype(np.float64), f"{concept.id}/{i}") for i, x in enumerate(raw)]


def save(samples: np.ndarray, path: Path) -> None:
    """float[N] -> Ogg Opus, about 16 kbit/s, whose *decoded* peak is close to -1 dBFS.

    Opus overshoots on clicks, so a pass measures the peak and the next one is scaled by it.
    A file that already sounds the same is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    for _ in range(8):
        soundfile.write(fresh, samples, RATE, format="OGG", subtype="OPUS", compression_level=0.97)
        decoded, _ = soundfile.read(fresh)
        if abs(np.abs(decoded).max() - PEAK) < 0.08:
            break
        samples = samples * (PEAK / np.abs(decoded).max()) ** 0.8
    if decoded.shape != (N,) or np.abs(decoded).max() > 1:
        raise ValueError(f"{path}: decodes to {decoded.shape}, peak {np.abs(decoded).max():.2f}")
    if path.exists() and np.array_equal(decoded, soundfile.read(path)[0]):
        fresh.unlink()
    else:
        fresh.replace(path)


def table(found: list[Concept]) -> dict:
    return {
        "concepts": [
            {
                "id": c.id,
                "label": c.label,
                "thing": c.thing,
                "caption": f"the sound of {c.thing}",
                "synonyms": list(c.synonyms),
                "heldout_synonyms": list(c.heldout_synonyms),
                "picture": c.picture,
                "kind": c.source.kind,
            }
            for c in found
        ],
        "items": [
            {
                "file": f"sounds/{c.id}/{take}.ogg",
                "modality": "audio",
                "concept": c.id,
                "take": take,
                "split": split,
                "note": c.source.note(take),
            }
            for c in found
            for take, split in enumerate(SPLITS)
        ],
        "captions": CAPTIONS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the sounds of mini.")
    parser.add_argument("--out", type=Path, default=Path("mmllm/mini/data"))
    parser.add_argument(
        "--soundfont", type=Path, default=Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
    )
    parser.add_argument("--samples", type=Path, default=Path("/usr/share/sonic-pi/samples"))
    parser.add_argument("--only", nargs="*", help="remake the files of these concepts only")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for path in (args.soundfont, args.samples):
        if not path.exists():
            raise SystemExit(
                f"{path} is missing; see the packages in tools/mini/data/sounds/__init__.py"
            )
    found = concepts()
    check_names(found)
    for concept in found:
        if args.only is not None and concept.id not in args.only:
            continue
        for take, samples in enumerate(takes(concept, args.soundfont, args.samples)):
            save(samples, args.out / "sounds" / concept.id / f"{take}.ogg")
        log.info("%s (%s)", concept.id, concept.source.kind)
    write_text(args.out / "sounds.json.gz", json.dumps(table(found), indent=1) + "\n")
