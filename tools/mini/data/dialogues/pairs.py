"""Pairs of media and captions, for stages 1 and 2."""

from __future__ import annotations

from tools.mini.data.dialogues.speaker import answer
from tools.mini.data.dialogues.world import Row, World


def pairs(world: World) -> list[Row]:
    """Every train medium with its canonical caption; some again as `validation` (new phrasings)."""
    rows = []
    for item in world.items:
        if item["split"] != "train":
            continue
        concept = world.concept(item["modality"], item["concept"])
        row = {key: item[key] for key in ("file", "modality", "style", "concept")}
        row |= {"caption": concept.caption, "label": concept.label, "thing": concept.thing}
        rows.append({**row, "answer": answer(concept), "split": "train"})
    again = []
    for modality, step in {"image": 13, "video": 4, "audio": 11}.items():
        some = [row for row in rows if row["modality"] == modality][::step]
        again += [{**row, "split": "validation"} for row in some]
    return rows + again
