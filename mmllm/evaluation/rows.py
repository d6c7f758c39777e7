"""The rows of the table as data: which items, what is right, which bar.

A bar is a number, or a share of another figure: understanding is measured against a linear probe,
generation through the LLM against the decoder that is given the caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmllm.conversation import Medium
from mmllm.evaluation.asking import Answer
from mmllm.evaluation.judges import Judge
from mmllm.evaluation.naming import Names

Task = Literal["name", "make", "route"]


@dataclass(frozen=True)
class Row:
    """name: the reply names the concept; make: a judge finds each medium's concept, in order;
    route: exactly the media that were asked for. `bar` times the figure `of`, if that is given.
    `num`: how many items are asked at most."""

    name: str
    task: Task
    bar: float | None = None
    of: str | None = None
    num: int = 200


ROWS: tuple[Row, ...] = (
    Row("image->text", "name", 0.9, "probe/image", num=400),
    Row("audio->text", "name", 0.9, "probe/audio"),
    Row("video->text", "name"),  # seen: each clip is its concept's only take
    Row("image->text/unknown", "name"),
    Row("decoder/image", "make", 0.6),
    Row("decoder/video", "make", 0.5, num=100),
    Row("decoder/audio", "make", 0.5, num=100),
    Row("text->image", "make", 0.9, "decoder/image"),
    Row("text->image/synonym", "make"),
    Row("text->video", "make", 0.9, "decoder/video", num=100),
    Row("text->audio", "make", 0.9, "decoder/audio", num=100),
    Row("image->audio", "make", 0.8, "text->audio", num=100),
    Row("audio->image", "make", 0.8, "text->image", num=100),
    Row("image->video", "make", 0.8, "text->video", num=100),
    Row("what-did-you-draw", "name", 0.9, "what-did-you-draw/as input"),
    Row("text->image+audio", "make", 0.9, num=100),
    *(
        Row(f"routing/{name}", "route", 0.95)
        for name in (
            "text",
            "describe",
            "image",
            "audio",
            "video",
            "two-media",
            "medium-in-text-out",
        )
    ),
)

ROUTING_BAR = 0.98
PROBE_BAR = 0.5
JUDGE_BAR = 0.9
PERPLEXITY_BAR = 1.02
MOTION_BAR = (0.5, 2.0)
MEDIA_TOLERANCE = 1e-4


FULL_BAR, SHORT_BAR = 0.9, 0.6


def short_bar(row: Row) -> Row:
    """What a run of a few minutes is held to: 0.6 where the table says 0.9. Its decoders are the
    shipped ones; everything else is measured without a bar."""
    if row.name.startswith("decoder/"):
        return row
    return replace(row, bar=SHORT_BAR if row.bar == FULL_BAR else None)


@dataclass(frozen=True)
class Marked:
    """One item: was it right, and what was said. `top1` for made media."""

    id: str
    row: str
    right: bool
    top1: bool | None
    prediction: Mapping[str, Any]


def mark_name(answer: Answer, names: Names) -> Marked:
    """Right: the text names the concept and no other. Where the model was to make a medium first,
    it must have made one: the name alone could be read from the request."""
    wanted = answer.question.expect.get("text_concept", answer.question.concept)
    named = names.named(answer.text)
    own = [message for message in answer.messages[:-1] if message.role == "assistant"]
    right = named == {wanted} and all(message.media for message in own)
    return _marked(answer, right, None, concept=wanted, named=sorted(named))


def mark_route(answer: Answer) -> Marked:
    """Right: exactly the modalities asked for, however often text stands between."""
    made = [medium.modality for medium in answer.media]
    wanted = answer.question.modalities
    return _marked(answer, sorted(made) == sorted(wanted), None, wanted=wanted)


def mark_make(answers: Sequence[Answer], judges: Mapping[str, Judge]) -> list[Marked]:
    """Right: the media asked for, in order, each with its concept among the judge's first five."""
    ranks: list[list[list[str]]] = [[[] for _ in answer.media] for answer in answers]
    for modality, judge in judges.items():
        places = [
            (row, place)
            for row, answer in enumerate(answers)
            for place, medium in enumerate(answer.media)
            if medium.modality == modality
        ]
        made: list[Medium] = [answers[row].media[place] for row, place in places]
        for (row, place), ranked in zip(places, judge.rank(made), strict=True):
            ranks[row][place] = ranked
    marked = []
    for answer, ranked in zip(answers, ranks, strict=True):
        question = answer.question
        in_order = [medium.modality for medium in answer.media] == question.modalities
        wanted = question.concepts
        top1, top5 = (
            in_order and all(c in r[:k] for c, r in zip(wanted, ranked, strict=True))
            for k in (1, 5)
        )
        nearest = [row[:5] for row in ranked]
        marked.append(_marked(answer, top5, top1, concepts=wanted, nearest=nearest))
    return marked


def _marked(answer: Answer, right: bool, top1: bool | None, **prediction: Any) -> Marked:
    made = [medium.modality for medium in answer.media]
    said = {"text": answer.text, "modalities": made, **prediction}
    return Marked(answer.question.id, answer.question.row, right, top1, said)
