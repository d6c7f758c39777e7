"""Stand-ins for what mini does not know: labelled pictures, no two alike, nothing held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmllm.data.formats.labelled import read_labelled
from mmllm.mini.world import unknown
from tools.mini import stand_ins


def test_every_name_has_a_picture_of_its_own(tmp_path: Path) -> None:
    stand_ins.write(tmp_path, 40)
    read = read_labelled(tmp_path)
    assert not read.skipped
    assert len({item.label for item in read.items}) == 40
    assert len({np.asarray(item.medium).tobytes() for item in read.items}) == 40
    words = [word for word in unknown.things() if unknown.is_heldout(word)]
    assert not any(item.label.endswith(f" {word}") for item in read.items for word in words)


def test_the_same_again(tmp_path: Path) -> None:
    for name in ("one", "other"):
        stand_ins.write(tmp_path / name, 3)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
