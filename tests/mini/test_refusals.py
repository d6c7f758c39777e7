"""What mini says of what is not in its world, and what it recalls of what it drew."""

from __future__ import annotations

import random
import re

from mmllm.conversation import Message, Text
from mmllm.mini.world import unknown
from mmllm.mini.world.conversations import converse
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import things

ANSWER = re.compile(r"I cannot (draw|animate) (.+) yet\. The nearest that I know is (.+)\.")


def words(message: Message) -> str:
    return " ".join(part.text for part in message.parts if isinstance(part, Text))


def talks(kind: str, count: int) -> list[Talk]:
    return [converse(kind, "training", random.Random(seed), targets=False) for seed in range(count)]


def test_an_unknown_thing_is_named_rightly_with_the_nearest_known_one() -> None:
    known = {thing.caption for thing in things().values()}
    names = [name.lower() for name in unknown.things() if not unknown.is_heldout(name)]
    asked, verbs = [], set()
    for talk in talks("unknown", 300):
        request, reply = map(words, talk.messages)
        found = ANSWER.fullmatch(reply)
        assert found, reply
        verbs.add(found[1])
        assert any(found[2].lower().endswith(name) for name in names), reply
        assert found[3] in known
        assert talk.offer
        asked.append(found[2].lower() in request.lower())
    assert verbs == {"draw", "animate"}
    assert 0.6 < sum(asked) / len(asked) < 0.95  # the others are misspelled


def test_what_was_drawn_is_recalled_rightly() -> None:
    kinds = set()
    for talk in talks("recall", 400):
        history = [words(message) for message in talk.messages]
        question, answer = history[-2:]
        earlier = " ".join(history[1:-2:2])
        if found := re.fullmatch(r"The (.+) was (\w+)\.", answer):
            assert re.search(rf"{found[2]} .*\b{found[1].split()[-1]}\b", earlier)
            kinds.add("colour")
        elif found := re.fullmatch(r"I drew ((?:two|three|four) .+)\.", answer):
            assert re.search(rf"Here are .*{found[1].split()[-1]}", earlier)
            kinds.add("number")
        elif found := re.fullmatch(
            r"(Yes, I drew|No, I did not draw) (an?|the|some) (.+)\.", answer
        ):
            assert bool(re.search(rf"Here .*\b{re.escape(found[3])}\b", earlier)) is (
                found[1] == "Yes, I drew"
            )
            kinds.add(found[1])
        else:
            assert answer == history[1], (question, answer)
            kinds.add("again")
    assert len(kinds) == 5
