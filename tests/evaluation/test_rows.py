"""Rows with chats that are always right or always wrong, and the guards around the decoders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmllm
from mmllm import evaluation
from mmllm.chat import Chat
from mmllm.conversation import MEDIA, Audio, Conversation, Image, Medium, Message, assistant, user
from mmllm.errors import ConfigError
from mmllm.evaluation import batching, rows
from mmllm.evaluation.asking import Question, ask, muted, no_captions, read_questions, spread
from mmllm.evaluation.judges import Judge
from mmllm.evaluation.naming import Names
from mmllm.evaluation.probe import encoded, fit
from mmllm.model import AnyToAny

CONCEPTS = ("dog", "cat", "owl", "bat", "ant", "bee", "cow")
NAMES = Names({"id": name, "label": name, "synonyms": []} for name in CONCEPTS)


def _medium(modality: str, concept: str) -> Medium:
    """A medium that tells its concept by its level."""
    level = 10 * CONCEPTS.index(concept)
    if modality == "audio":
        return Audio.from_numpy(np.full((1, 8), level / 100, np.float32), 16_000)
    shape = (4, 4, 3) if modality == "image" else (2, 4, 4, 3)
    return MEDIA[modality](array=np.full(shape, level, np.uint8))


def _levels(media: Sequence[Medium]) -> np.ndarray:
    """One-hot features of `_medium`."""
    found = np.zeros((len(media), len(CONCEPTS)))
    for row, medium in enumerate(media):
        value = float(medium.to_numpy().mean()) * (10 if medium.modality == "audio" else 0.1)
        found[row, round(value)] = 1
        found[row] -= 0.01 * np.abs(np.arange(len(CONCEPTS)) - round(value))
    return found


JUDGES = {m: Judge(_levels, {c: _medium(m, c) for c in CONCEPTS}) for m in MEDIA}


@dataclass
class _Reply:
    message: Message
    ids: Sequence[int] = ()

    @property
    def media(self) -> list[Medium]:
        return self.message.media


class _Scripted:
    """Answers every conversation by `script(conversation)`; notes how it was asked."""

    def __init__(self, script):
        self.script = script
        self.calls: list[tuple[list[Conversation], list[int]]] = []

    def reply_many(
        self, conversations: Sequence[Conversation], *, seeds: Sequence[int], **options: Any
    ) -> list[_Reply]:
        assert len(seeds) == len(conversations)
        self.calls.append((list(conversations), list(seeds)))
        return [_Reply(self.script(conversation)) for conversation in conversations]


def _questions(tmp_path: Path, entries: list[dict]) -> dict[str, list[Question]]:
    file = tmp_path / "tests.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    return read_questions(file)


def _make_rows(tmp_path: Path) -> list[Question]:
    entries = [
        {
            "id": f"text->image+audio/{i}",
            "row": "text->image+audio",
            "messages": [{"role": "user", "content": concept}],
            "expect": {
                "concept": concept,
                "concepts": [concept, concept],
                "modalities": ["image", "audio"],
            },
        }
        for i, concept in enumerate(CONCEPTS)
    ]
    return _questions(tmp_path, entries)["text->image+audio"]


def _both(concept: str) -> Message:
    return assistant("Here.", _medium("image", concept), _medium("audio", concept))


@pytest.mark.parametrize(
    ("script", "top1", "top5"),
    [
        (lambda talk: _both(talk[-1].text), 1.0, 1.0),
        (lambda talk: _both("dog" if talk[-1].text == "cat" else talk[-1].text), 6 / 7, 1.0),
        (lambda talk: Message("assistant", _both(talk[-1].text).parts[::-1]), 0.0, 0.0),  # order
        (lambda talk: assistant("no"), 0.0, 0.0),
        (lambda talk: assistant(_medium("image", talk[-1].text)), 0.0, 0.0),
        (lambda talk: _both({"dog": "cow", "cow": "dog"}.get(talk[-1].text, "bat")), 1 / 7, 5 / 7),
    ],
)
def test_made_media(tmp_path: Path, script, top1: float, top5: float) -> None:
    """The last script draws a bat for all between: far from dog and cow, near to the others."""
    marks = rows.mark_make(ask(_Scripted(script), _make_rows(tmp_path), batch=3), JUDGES)
    assert [mark.id for mark in marks] == [f"text->image+audio/{i}" for i in range(7)]
    assert np.mean([mark.right for mark in marks]) == pytest.approx(top5)
    assert np.mean([bool(mark.top1) for mark in marks]) == pytest.approx(top1)


def test_made_media_name_what_was_nearest(tmp_path: Path) -> None:
    (mark, *_) = rows.mark_make(
        ask(_Scripted(lambda talk: _both("cow")), _make_rows(tmp_path)), JUDGES
    )
    assert mark.prediction["modalities"] == ["image", "audio"]
    assert [row[0] for row in mark.prediction["nearest"]] == ["cow", "cow"]
    assert mark.prediction["text"] == "Here."


@pytest.mark.parametrize(("reply", "right"), [("It's a {}.", True), ("a {} or a bee", False)])
def test_names(tmp_path: Path, reply: str, right: bool) -> None:
    entries = [
        {
            "id": f"image->text/{concept}",
            "row": "image->text",
            "messages": [{"role": "user", "content": [{"type": "text", "text": concept}]}],
            "expect": {"concept": concept, "text_concept": concept, "modalities": []},
        }
        for concept in CONCEPTS
        if concept != "bee"
    ]
    questions = _questions(tmp_path, entries)["image->text"]
    chat = _Scripted(lambda talk: assistant(reply.format(talk[-1].text)))
    marks = [rows.mark_name(answer, NAMES) for answer in ask(chat, questions)]
    assert [mark.right for mark in marks] == [right] * 6


@pytest.mark.parametrize(
    ("wanted", "made", "right"),
    [
        ([], [], True),
        ([], ["image"], False),
        (["image"], ["image"], True),
        (["image"], [], False),
        (["image"], ["image", "image"], False),
        (["image", "audio"], ["audio", "image"], True),  # order is another row's business
        (["image", "audio"], ["image"], False),
        (["audio"], ["video"], False),
    ],
)
def test_routing(wanted: list[str], made: list[str], right: bool) -> None:
    question = Question("r/0", "routing/x", ((user("go"),),), expect={"modalities": wanted})
    chat = _Scripted(lambda talk: assistant("Here.", *(_medium(m, "dog") for m in made)))
    assert rows.mark_route(ask(chat, [question])[0]).right is right


def test_generated_turns_are_the_models_own(tmp_path: Path) -> None:
    """Its picture stands in the conversation when it is asked about it."""
    entries = [
        {
            "id": f"what-did-you-draw/{i}",
            "row": "what-did-you-draw",
            "messages": [
                {"role": "user", "content": concept},
                {"role": "assistant", "generate": True},
                {"role": "user", "content": "What is it?"},
            ],
            "expect": {"concept": concept, "text_concept": concept, "modalities": []},
        }
        for i, concept in enumerate(CONCEPTS)
    ]

    def script(talk: Conversation) -> Message:
        if len(talk) == 1:
            return assistant(_medium("image", talk[0].text))
        assert [message.role for message in talk] == ["user", "assistant", "user"]
        return assistant(JUDGES["image"].rank(talk[1].media)[0][0])

    chat = _Scripted(script)
    questions = _questions(tmp_path, entries)["what-did-you-draw"]
    answers = ask(chat, questions, batch=4)
    assert all(rows.mark_name(answer, NAMES).right for answer in answers)
    assert [len(talks) for talks, _ in chat.calls] == [4, 4, 3, 3]
    lazy = _Scripted(lambda talk: assistant(talk[0].text))  # names what it never drew
    assert not any(rows.mark_name(answer, NAMES).right for answer in ask(lazy, questions))
    again = _Scripted(script)
    ask(again, questions[4:])
    assert again.calls[0][1] == chat.calls[2][1]  # seeds belong to items, not to batches


def test_spread_lies_even_and_keeps_order() -> None:
    questions = [Question(str(i), "r") for i in range(101)]
    assert [q.id for q in spread(questions, 5)] == ["0", "25", "50", "75", "100"]
    assert spread(questions, 200) == questions


def test_bars_that_are_shares_of_other_rows_name_rows_that_exist() -> None:
    measured = {row.name for row in rows.ROWS}
    measured |= {"probe/image", "probe/audio", "what-did-you-draw/as input"}
    assert all(row.of is None or row.of in measured for row in rows.ROWS)


def test_every_row_of_the_shipped_tests_has_a_place_in_the_table() -> None:
    shipped = read_questions(Path(mmllm.__file__).parent / "mini" / "data" / "tests.jsonl.gz")
    assert shipped.keys() == {row.name for row in rows.ROWS}
    for row in rows.ROWS:
        least = 50 if row.task == "route" else 80
        assert len(spread(shipped[row.name], row.num)) >= least


@pytest.mark.parametrize(
    ("value", "bar", "met"), [(0.6, 0.6, True), (0.59, 0.6, False), (0.0, 0.0, False)]
)
def test_a_bar_that_is_a_share_of_nothing_is_not_met(value: float, bar: float, met: bool) -> None:
    assert evaluation._barred(evaluation.Figure("r", 10, value), bar).met is met


def test_unknown_rows_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown row 'text->smell'; known are image->text"):
        evaluation.evaluate("mini", rows=["text->smell"])


# --- with a real model ----------------------------------------------------------------------------


def test_no_caption_can_cross(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    force = dict.fromkeys(MEDIA, "force")
    free = chat.reply([user("Draw.")], seed=3, modalities=force, max_new_tokens=4)
    decoder = tiny_model.decoders["image"]
    with no_captions(tiny_model):
        guarded = chat.reply([user("Draw.")], seed=3, modalities=force, max_new_tokens=4)
        with pytest.raises(AssertionError, match="a caption reached a decoder"):
            decoder.encode_captions(["a dog"])
        with pytest.raises(AssertionError, match="a caption reached a decoder"):
            decoder.pipeline.text_encoder(torch.zeros(1, 4, dtype=torch.long))
    for one, other in zip(free.media, guarded.media, strict=True):
        np.testing.assert_array_equal(one.to_numpy(), other.to_numpy())
    assert decoder.encode_captions(["a dog"])  # as before


def test_muted_decoders_make_blank_media_of_the_right_kind(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    force = dict.fromkeys(MEDIA, "force")
    with muted(tiny_model):
        reply = chat.reply([user("Draw.")], seed=3, modalities=force, max_new_tokens=4)
    assert sorted(medium.modality for medium in reply.media) == sorted(MEDIA)
    assert all(np.ptp(medium.to_numpy()) == 0 for medium in reply.media)
    loud = chat.reply([user("Draw.")], seed=3, modalities=force, max_new_tokens=4)
    assert any(np.ptp(medium.to_numpy()) > 0 for medium in loud.media)


def test_a_batch_agrees_with_single_calls(tiny_model: AnyToAny) -> None:
    questions = [
        Question(f"b/{i}", "b", ((user(text, *media),),))
        for i, (text, media) in enumerate(
            [("Draw a red apple.", ()), ("What?", (_medium("image", "cow"),)), ("Play.", ())]
        )
    ]
    chat = Chat(tiny_model)

    class Forced:
        def reply_many(self, talks, **options):
            modalities = dict.fromkeys(MEDIA, "force")
            return chat.reply_many(talks, modalities=modalities, **options)

    found = batching.compare(Forced(), questions)
    assert found.same == (True, True, True)
    assert {modality: len(apart) for modality, apart in found.differences.items()} == {
        "image": 3,
        "audio": 3,
        "video": 3,
    }
    assert max(map(max, found.differences.values())) <= rows.MEDIA_TOLERANCE


def test_difference_of_media() -> None:
    def grey(level: int) -> Image:
        return Image.from_numpy(np.full((4, 4, 3), level, np.uint8))

    assert batching.difference(grey(9), grey(9)) == 0
    assert batching.difference(grey(9), grey(10)) == pytest.approx(1 / 255)  # all of them
    edge = grey(9).to_numpy().copy()
    edge[0, 0, 0] = 10  # one value, one level: rounding
    assert batching.difference(grey(9), Image.from_numpy(edge)) == pytest.approx(1 / 48 / 255)
    sounds = [Audio.from_numpy(np.full(8, v, np.float32), 16_000) for v in (0.5, 0.25)]
    assert batching.difference(*sounds) == 0.25
    assert batching.difference(sounds[0], Audio.from_numpy(np.ones(9, np.float32), 16_000)) > 1


# --- the probe ------------------------------------------------------------------------------------


def test_probe_reads_what_the_projections_read(tiny_model: AnyToAny) -> None:
    media = [_medium("image", concept) for concept in CONCEPTS]
    encoder = tiny_model.encoders["image"]
    expected = encoder.encode(media).tokens.numpy()
    np.testing.assert_allclose(encoded(tiny_model, "image", media), expected, rtol=1e-6)


def test_probe_separates_what_is_linearly_separable() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8))
    concepts = [c for c in ("a", "b", "c") for _ in range(20)]
    features = np.repeat(centres, 20, axis=0) + 0.1 * rng.normal(size=(60, 8))
    assert list(fit(features, concepts).predict(centres)) == ["a", "b", "c"]


def test_a_short_run_is_held_to_two_thirds_of_what_the_table_asks():
    bars = {row.name: rows.short_bar(row).bar for row in rows.ROWS}
    assert bars["image->text"] == bars["text->audio"] == bars["text->image+audio"] == 0.6
    assert bars["decoder/image"] == 0.6
    assert bars["decoder/audio"] == 0.5
    assert bars["image->audio"] is bars["routing/text"] is bars["video->text"] is None


def test_what_is_known_of_the_same_frozen_part_is_not_measured_again() -> None:
    figures = tuple(
        evaluation.Figure(row, 200, 0.9)
        for row in ("decoder/image", "decoder/image, top 1", "decoder/video", "text->image")
    )
    known = evaluation.Report("mini", figures, facts={"fingerprints": {"decoders.image": "a"}})
    bench = evaluation._Bench([], None, known=known)
    assert bench.settled("decoder/image", "decoders.image", "a") == list(figures[:2])
    assert bench.settled("decoder/image", "decoders.image", "b") == []
    assert bench.settled("decoder/video", "decoders.video", "a") == []
    sample = evaluation._Bench([], 20, known=known)  # fewer items: another figure
    assert sample.settled("decoder/image", "decoders.image", "a") == []


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{", "test item 1: line 2: not valid JSON"),
        ('{"id": 5, "row": "a", "expect": {}}', "test item 1: expected 'id', a str, got 5"),
        ('{"id": "b", "expect": {}}', "test item 1: expected 'row', a str, got None"),
        ('{"id": "b", "row": "a"}', "test item 1: expected 'expect', a Mapping, got None"),
        ('{"id": "b", "row": "a", "expect": {}, "messages": ["hi"]}', "expected a turn"),
        (
            '{"id": "b", "row": "a", "expect": {}, "messages": [{"role": "user", "content": 5}]}',
            "expected a text or a list of parts, got 5",
        ),
    ],
)
def test_a_damaged_test_item_is_told(item: str, message: str, tmp_path: Path) -> None:
    good = '{"id": "a", "row": "a", "expect": {"concept": "x\u2028y"}, "messages": []}'
    file = tmp_path / "tests.jsonl"
    file.write_text(f"\ufeff{good}\n{item}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_questions(file)
    file.write_text(f"\ufeff{good}\n", encoding="utf-8")
    assert read_questions(file)["a"][0].concept == "x\u2028y"
