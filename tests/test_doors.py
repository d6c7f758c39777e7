"""Three doors, one engine: Python, the demo and the server give the same for the same seed, and
read a conversation as training reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmllm.conversation import Image, assistant, user
from mmllm.demo.replying import stream_reply
from mmllm.demo.sessions import BrowserSession, Turn
from mmllm.inference.chat import Chat
from mmllm.inference.engine import Engine
from mmllm.inference.prefill import Prefill
from mmllm.inference.sequence import SequenceState
from mmllm.model import AnyToAny
from mmllm.server.app import build_app
from tests.server.conftest import running
from tests.server.exchange import ALL, files_in, files_of
from tests.server.files import IMAGE, PNG

CONVERSATION = [
    user(Image(PNG), "what is this?"),
    assistant("one two"),
    user("draw it, three four"),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], SequenceState]]:
    """What every door asks of the engine: (ids of the prompt, its sequence)."""
    requested: list[tuple[list[int], SequenceState]] = []
    generate = Engine.generate

    def noted(engine: Engine, prefills: Sequence[Prefill], poll: Any) -> None:
        for prefill in prefills:
            pairs = zip(prefill.prompts, prefill.sequences, strict=True)
            requested.extend((prompt.ids, sequence) for prompt, sequence in pairs)
        generate(engine, prefills, poll)

    monkeypatch.setattr(Engine, "generate", noted)
    return requested


def non_empty(parts: list[str | bytes]) -> list[str | bytes]:
    return [part for part in parts if part]


def by_python(chat: Chat, options: dict[str, Any]) -> list[str | bytes]:
    return non_empty(files_of(chat.reply(CONVERSATION, **options).message))


def by_the_demo(chat: Chat, options: dict[str, Any], folder: Path) -> list[str | bytes]:
    session = BrowserSession("x", folder)
    session.turns = [
        Turn(user(session.keep(Image(PNG)), "what is this?")),
        *map(Turn, CONVERSATION[1:]),
    ]
    list(stream_reply(chat, session, options))
    return non_empty(files_of(session.turns[-1].message))


def by_the_server(chat: Chat, options: dict[str, Any], *, stream: bool) -> list[str | bytes]:
    body: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "what is this?"}]},
            {"role": "assistant", "content": "one two"},
            {"role": "user", "content": "draw it, three four"},
        ],
        **{name: value for name, value in options.items() if name != "max_new_tokens"},
        "max_tokens": options["max_new_tokens"],
    }
    with running(build_app(chat)) as served, served.openai() as client:
        path = client.chat.completions
        if not stream:
            response = path.create(model="tiny", extra_body=body, messages=[])
            return non_empty(files_in(response.choices[0].message.parts))
        with path.stream(model="tiny", extra_body=body, messages=[]) as events:
            for _ in events:
                pass
            snapshot = events.current_completion_snapshot
            return non_empty(files_in(snapshot.choices[0].message.parts))


def test_all_doors_give_the_same_ids_and_media(
    tiny_model: AnyToAny, asked: list[tuple[list[int], SequenceState]], tmp_path: Path
) -> None:
    chat = Chat(tiny_model)
    options = {"seed": 3, "modalities": ALL, "temperature": 1.0, "max_new_tokens": 9}
    python = by_python(chat, options)
    assert [type(entry) for entry in python] == [str, bytes, bytes, bytes]
    assert by_the_demo(chat, options, tmp_path) == python
    assert by_the_server(chat, options, stream=False) == python
    assert by_the_server(chat, options, stream=True) == python

    (prompt, row), *others = asked
    assert len(others) == 3
    assert len(row.output.ids) > 0
    for ids, other in others:
        assert ids == prompt
        assert other.output.ids == row.output.ids
    # As training renders it.
    learned = tiny_model.renderer.render([*CONVERSATION, assistant("five six")])
    assert learned.ids[: len(prompt)] == prompt
