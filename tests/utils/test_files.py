"""Folders that are written atomically."""

from __future__ import annotations

import stat
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmllm.utils.files import atomic_folder


def test_everybody_reads_the_files_who_reads_the_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as draft:
        draft.chmod(0o750)
        (draft / "part").mkdir()
        save_file({"weight": torch.zeros(2)}, draft / "part" / "model.safetensors")
        (draft / "script.sh").touch(mode=0o700)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").rglob("*")
    }
    assert modes["model.safetensors"] == 0o640
    assert modes["script.sh"] == 0o740
