"""Twenty things that no part of mini was trained on, as images to teach and images to ask about.

python demos/unseen.py my/images

writes my/images/teach/LABEL/STYLE.webp in two styles and my/images/ask/LABEL/STYLE.webp in two
others: 40 images each.
"""

import argparse
import json
import shutil
from pathlib import Path

from mmllm.data.sources import resolve

TEACH, ASK = ("fluent-3d", "fluent-flat"), ("noto", "twemoji")


def write_images(folder: Path) -> list[str]:
    """Copy the images; returns the labels."""
    data = resolve("mini:data/concepts.json").parent
    concepts = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    unseen = [entry for entry in concepts if entry["split"] == "heldout_concept"]
    for purpose, styles in (("teach", TEACH), ("ask", ASK)):
        for entry in unseen:
            place = folder / purpose / entry["label"].replace(" ", "_")
            place.mkdir(parents=True, exist_ok=True)
            for style in styles:
                shutil.copy(data / f"pictures/{style}/{entry['id']}.webp", place / f"{style}.webp")
    return [entry["label"] for entry in unseen]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    write_images(parser.parse_args().folder)
