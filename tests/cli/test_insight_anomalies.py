"""`mmllm insight anomalies`: folders in, a table and JSON out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmllm
from mmllm.cli import FAILED, main
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.insight.conv_encoder import ConvEncoder, pictures, with_a_spot


def test_the_oddest_comes_first(
    tiny_model: AnyToAny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model.encoders["image"] = ConvEncoder("image")
    chat = Chat(tiny_model)
    monkeypatch.setattr(chat, "score", lambda *_: [-2.5])
    monkeypatch.setattr(mmllm, "load", lambda *_, **__: chat)
    usual, asked, report = tmp_path / "usual", tmp_path / "asked", tmp_path / "report.json"
    for folder in (usual, asked):
        folder.mkdir()
    for number, picture in enumerate(pictures(5)):
        picture.save(usual / f"{number}.png")
    first, second = pictures(2, seed=4)
    first.save(asked / "a.png")
    with_a_spot(second).save(asked / "b.png")
    arguments = ["insight", "anomalies", "--normal", str(usual), "--test", str(asked)]
    assert main([*arguments, "--describe", "a dog", "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["b.png", "a.png"]
    assert "p 0.167" in lines[0]
    assert "-log p" in lines[0]
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["b.png"]["score"] > found["a.png"]["score"]
    assert len(found["b.png"]["map"]) == 16
    assert found["a.png"]["surprisal"] == 2.5
    assert main([*arguments, "--folder", str(tmp_path / "page")]) == 0
    page = tmp_path / "page" / "index.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.index("b.png") < text.index("a.png")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main([*arguments, "--folder", str(blocked)]) == FAILED
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "is no folder"), (".", "holds no picture, sound or clip")]
)
def test_a_folder_without_media_is_refused(
    folder: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / folder)
    assert main(["insight", "anomalies", "--normal", place, "--test", place]) == FAILED
    assert message in capsys.readouterr().err
