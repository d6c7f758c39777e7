"""Test items, turns that the model generates itself, and the guards around the decoders."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm.conversation import MEDIA, Conversation, Message, assistant, user
from mmllm.errors import ConfigError
from mmllm.evaluation import tasks
from mmllm.evaluation.prompts import (
    EvalItem,
    captions_blocked,
    evenly_spaced,
    generate_responses,
    read_test_items,
)
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.evaluation.scripted import CONCEPTS, JUDGES, LABELS, ScriptedChat, items_from, medium


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

    def script(turns: Conversation) -> Message:
        if len(turns) == 1:
            return assistant(medium("image", turns[0].text))
        assert [message.role for message in turns] == ["user", "assistant", "user"]
        return assistant(JUDGES["image"].rank(turns[1].media)[0][0])

    chat = ScriptedChat(script)
    items = items_from(tmp_path, entries)["what-did-you-draw"]
    responses = generate_responses(chat, items, batch_size=4)
    assert all(tasks.score_name(response, LABELS).correct for response in responses)
    assert [len(group) for group, _ in chat.calls] == [4, 4, 3, 3]
    lazy = ScriptedChat(lambda turns: assistant(turns[0].text))  # names what it never drew
    assert not any(
        tasks.score_name(response, LABELS).correct for response in generate_responses(lazy, items)
    )
    again = ScriptedChat(script)
    generate_responses(again, items[4:])
    assert again.calls[0][1] == chat.calls[2][1]  # seeds belong to items, not to batches


def test_spread_is_even_and_keeps_order() -> None:
    items = [EvalItem(str(i), "r") for i in range(101)]
    assert [q.id for q in evenly_spaced(items, 5)] == ["0", "25", "50", "75", "100"]
    assert evenly_spaced(items, 200) == items


def test_no_caption_reaches_a_decoder(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    force = dict.fromkeys(MEDIA, "force")
    free = chat.reply([user("Draw.")], seed=3, modalities=force, max_new_tokens=4)
    decoder = tiny_model.decoders["image"]
    with captions_blocked(tiny_model):
        guarded = chat.reply([user("Draw.")], seed=3, modalities=force, max_new_tokens=4)
        with pytest.raises(AssertionError, match="a caption reached a decoder"):
            decoder.encode_captions(["a dog"])
        with pytest.raises(AssertionError, match="a caption reached a decoder"):
            decoder.pipeline.text_encoder(torch.zeros(1, 4, dtype=torch.long))
    for one, other in zip(free.media, guarded.media, strict=True):
        np.testing.assert_array_equal(one.to_numpy(), other.to_numpy())
    assert decoder.encode_captions(["a dog"])  # as before


def test_a_decoder_whose_projection_reads_captions_may_have_them(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model.output_projections["image"], "reads_captions", True)
    with captions_blocked(tiny_model):
        assert tiny_model.decoders["image"].encode_captions(["a dog"])
        with pytest.raises(AssertionError, match="a caption reached a decoder"):
            tiny_model.decoders["video"].encode_captions(["a dog"])


def test_media_that_are_not_rendered_have_a_modality_and_no_data(tiny_model: AnyToAny) -> None:
    """The same text and the same places as with media, and no decoder runs."""
    chat = Chat(tiny_model)
    options = {"modalities": dict.fromkeys(MEDIA, "force"), "max_new_tokens": 4}
    for prompts in (["Draw."], ["Draw.", "Play."]):
        talks = [[user(prompt)] for prompt in prompts]
        seeds = list(range(len(talks)))
        without = chat.reply_many(talks, seeds=seeds, render_media=False, **options)
        made = chat.reply_many(talks, seeds=seeds, **options)
        for one, other in zip(without, made, strict=True):
            assert not any(medium.has_data for medium in one.media)
            assert one.timings.media == {}
            assert [p.modality for p in one.media] == [p.modality for p in other.media]
            assert sorted(p.modality for p in one.media) == sorted(MEDIA)
            assert one.ids == other.ids


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
def test_a_damaged_test_item_is_named(item: str, message: str, tmp_path: Path) -> None:
    good = '{"id": "a", "row": "a", "expect": {"concept": "x\u2028y"}, "messages": []}'
    file = tmp_path / "tests.jsonl"
    file.write_text(f"\ufeff{good}\n{item}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_test_items(file)
    file.write_text(f"\ufeff{good}\n", encoding="utf-8")
    assert read_test_items(file)["a"][0].concept == "x\u2028y"
