"""`mmllm insight heads|steer` on a tiny model: what they print, and the files that they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmllm
from mmllm.cli.entry import main
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny


@pytest.fixture
def chat(tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """What `mmllm.load` gives, whatever is loaded."""
    chat = Chat(tiny_model)
    monkeypatch.setattr(mmllm, "load", lambda *_args, **_options: chat)
    return chat


@pytest.mark.usefixtures("chat")
def test_heads_are_scored_and_ablated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--examples", "1", "--sequences", "2", "--ablate", "1", "--folder", str(folder)]
    assert main(["insight", "heads", "mini", *options]) == 0
    found = json.loads((folder / "heads.json").read_text(encoding="utf-8"))
    assert len(found["heads"]) == 8
    best = max(found["heads"], key=lambda head: head["prefix_matching"])
    name = f"{best['layer']}.{best['head']}"
    assert [*found["losses"]] == [
        "all heads",
        f"without {name}",
        "without 1 others of these layers",
    ]
    printed = capsys.readouterr().out
    assert f"without {name}: {found['losses'][f'without {name}'][0]:.2f}" in printed
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("<td style=") == 16
    assert f'title="{name}: {best["prefix_matching"]:.3f}"' in page


def test_a_steered_reply_is_shown_at_every_strength(chat: Chat, folder: Path) -> None:
    requests = ["Draw a red apple", "--towards", "a violin, please"]
    strengths = ["--strength", "0", "--strength", "1"]
    arguments = ["insight", "steer", *requests, *strengths, "--site", "layers.1"]
    assert main([*arguments, "--folder", str(folder)]) == 0
    found = json.loads((folder / "steer.json").read_text(encoding="utf-8"))
    assert found["site"] == "layers.1"
    assert [reply["strength"] for reply in found["replies"]] == [0, 1]
    plain = chat.reply(
        "Draw a red apple",
        seed=0,
        temperature=0.0,
        max_new_tokens=40,
        modalities={"image": "force"},
    )
    assert found["replies"][0]["text"] == plain.text
    assert (folder / "index.html").is_file()
    assert main([*arguments[:-1], "layer.1", "--folder", str(folder)]) == 2
