"""The concepts of mini's data: the everyday things that the shipped model knows by name."""

from __future__ import annotations

import gzip
import json

from mmllm.mini import locate


def known_concepts() -> dict[str, list[str]]:
    """List the names of the concepts that the shipped model was trained on, sorted.

    Returns:
        Modality -> names: of images, of sounds and of clips.
    """
    data = locate("data")
    visible = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    visible = [concept for concept in visible if concept["split"] == "train"]
    with gzip.open(data / "sounds.json.gz", "rt", encoding="utf-8") as file:
        sounding = json.load(file)["concepts"]
    of_modality = {
        "image": visible,
        "audio": sounding,
        "video": [concept for concept in visible if concept["clip"]],
    }
    return {
        modality: sorted(concept["label"] for concept in concepts)
        for modality, concepts in of_modality.items()
    }
