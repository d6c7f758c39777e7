"""Requests for what is not in mini's world: one honest sentence, and the nearest thing in it."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.mini.world import unknown, wordings
from mmllm.mini.world.captions import with_article
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import COLOURS, Thing, things

_COMPANY = ("{known} and {unknown}", "{unknown} and {known}", "{unknown} next to {known}")


def refuse(talk: Talk) -> bool:
    """The user asks for an unknown thing, number, colour or in an unknown language."""
    kind = talk.rng.choice((refuse_thing, refuse_thing, refuse_number, _colour, _language))
    return kind(talk)


def refuse_thing(talk: Talk) -> bool:
    """The user asks for an unknown thing: drawn, moving, misspelled, or next to a known one."""
    rng = talk.rng
    word = _pick(talk, list(unknown.things()))
    near = things()[unknown.things()[word]]
    verb, asked = "draw", _noun_phrase(word)
    if rng.random() < wordings.BARE:
        text = word
    elif rng.random() < 0.15:
        verb = "animate"
        text = wordings.request(verb, asked, talk.split, rng)
    else:
        if asked != word and rng.random() < 0.15:
            asked = with_article(f"{rng.choice(list(COLOURS))} {word}")
        words = asked
        if rng.random() < 0.1:
            words = rng.choice(_COMPANY).format(known=_known(talk).caption, unknown=asked)
        text = wordings.request(verb, words, talk.split, rng)
    typed = rng.random() < 0.15
    talk.ask(wordings.misspell(text, asked, rng) if typed else text, typed=typed)
    talk.answer(f"I cannot {verb} {asked} yet. The nearest that I know is {near.caption}.")
    talk.offer = Scene((Group(near.id),))
    return True


def refuse_number(talk: Talk) -> bool:
    """The user asks for more than four of a thing, or for so many of what was drawn."""
    known, drawn = _known(talk), None
    if talk.scene and len(talk.scene.groups) == 1 and talk.rng.random() < 0.5:
        known = drawn = things()[talk.scene.groups[0].thing]
    word = _pick(talk, list(unknown.NUMBERS))
    if not known.countable:
        return False
    if drawn:
        text = wordings.wording("edits", "count", talk.split, talk.rng)
        talk.ask(text.format(number=word, many=known.plural))
    else:
        talk.ask(wordings.request("draw", f"{word} {known.plural}", talk.split, talk.rng))
    many = f"{unknown.NUMBERS[word]} {known.plural}"
    talk.answer(f"I cannot draw {many}: I can count to four. Shall I draw four {known.plural}?")
    talk.offer = Scene((Group(known.id, 4),))
    return True


def _colour(talk: Talk) -> bool:
    known, word = _known(talk), _pick(talk, unknown.COLOURS)
    asked = with_article(f"{word} {known.label}")
    talk.ask(wordings.request("draw", asked, talk.split, talk.rng))
    talk.answer(f"I do not know the colour {word}. Shall I draw {known.caption} in another colour?")
    return True


def _language(talk: Talk) -> bool:
    talk.ask(_pick(talk, unknown.LANGUAGES))
    talk.answer("I only understand English. Try: draw a cat.")
    return True


def accept(talk: Talk) -> bool:
    """The user takes what was offered instead."""
    offer = talk.offer
    if offer is None or not talk.allowed(offer):
        return False
    talk.ask(talk.rng.choice(wordings.tables()["accept"][talk.split]))
    talk.show(offer)
    return True


def _known(talk: Talk) -> Thing:
    return things()[talk.rng.choice(list(things()))]


def _pick(talk: Talk, words: Sequence[str]) -> str:
    """A word of the split."""
    return talk.rng.choice([w for w in words if unknown.is_heldout(w) is talk.is_heldout])


def _noun_phrase(word: str) -> str:
    """An unknown thing as it is asked for: "a scooter", "ice skates", "the Great Wall"."""
    if word[0].isupper():
        return f"the {word}"
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word if is_plural else with_article(word)
