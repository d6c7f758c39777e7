"""Media of replies that training never shows: warned of, where chat would read them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mmllm.conversation import Image, Message, assistant, user
from mmllm.training.unread_media import warn_of_unread_media
from tests.samples import picture

CAPTION = [user("draw"), assistant("here", Image(caption="a cat"))]
FULL = [user("draw"), assistant("here", picture(9, caption="a cat"))]


@dataclass
class Rows:
    """A dataset of one conversation."""

    messages: list[Message]
    share: float = 1.0

    def __len__(self) -> int:
        return 1

    def conversation(self, index: int, rng: object) -> list[Message]:
        return self.messages

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize(
    ("messages", "rereads", "warnings"),
    [
        ([*CAPTION, user("again"), assistant("no")], True, 1),
        ([*CAPTION, user("again"), assistant("no")], False, 0),
        ([*FULL, user("again"), assistant("no")], True, 0),
        (CAPTION, True, 0),  # no turn in which it would be read
    ],
)
def test_captions_in_the_history_are_warned_of(
    make_model, caplog: pytest.LogCaptureFixture, messages, rereads: bool, warnings: int
) -> None:
    model = make_model(rereads_media=rereads)
    warn_of_unread_media(model.renderer, {"talks": Rows(messages)})
    assert len(caplog.records) == warnings
    assert all("data.talks: replies have captions" in r.getMessage() for r in caplog.records)
