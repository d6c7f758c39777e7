"""Collected states are the model's, are labelled, and are kept like features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm.data.batch import collate
from mmllm.errors import ConfigError
from mmllm.features import maintenance
from mmllm.features.cache import FeatureCache
from mmllm.insight import collecting
from mmllm.insight.activations import KINDS
from mmllm.insight.collecting import collect, label_positions, states_of
from mmllm.model import AnyToAny
from tests.insight.conversations import VOCABULARY, rendered

SITES = ["layers.0", "layers.1"]


@torch.no_grad()
def by_transformers(model: AnyToAny, conversation) -> torch.Tensor:
    """float[T, D], the states behind layer 0 of one conversation alone."""
    batch = collate([conversation], FeatureCache(model), model.batch_layout, targets=False)
    backbone = model.llm.backbone
    outputs = backbone(inputs_embeds=model.embed(batch), output_hidden_states=True)
    return outputs.hidden_states[1][0]


def test_states_are_those_of_the_modules(tiny_model: AnyToAny) -> None:
    conversations = rendered(tiny_model, 2)
    states = states_of(tiny_model, conversations, FeatureCache(tiny_model), ["layers.0"])
    for conversation, found in zip(conversations, states["layers.0"], strict=True):
        assert torch.allclose(found, by_transformers(tiny_model, conversation), atol=1e-4)


def test_layers_behind_the_last_site_are_not_computed(tiny_model: AnyToAny) -> None:
    calls: list[int] = []
    for number, layer in enumerate(tiny_model.llm.backbone.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    states_of(tiny_model, rendered(tiny_model), FeatureCache(tiny_model), ["layers.0"])
    assert calls == [0]


def test_positions_are_labelled(tiny_model: AnyToAny) -> None:
    image, audio, generated, video = rendered(tiny_model)
    kinds, media, concepts = label_positions(tiny_model, image, VOCABULARY)
    where = image.inputs[0]
    placeholders = slice(where.start, where.start + where.length)
    names = [KINDS[kind] for kind in kinds]
    assert names[placeholders] == ["image"] * 4
    assert names.count("image") == 4
    assert set(media[placeholders]) == {0}
    assert [VOCABULARY.concepts[number] for number in concepts[placeholders]] == ["apple"] * 4
    words = [
        index
        for index in np.flatnonzero(concepts >= 0)
        if index not in range(len(kinds))[placeholders]
    ]
    text = "".join(collecting.piece_of(tiny_model, image.ids[index]) for index in words)
    assert text.strip() == "apple"
    assert [KINDS[kind] for kind in label_positions(tiny_model, audio)[0]].count("audio") == 2
    signals = label_positions(tiny_model, generated, VOCABULARY)
    assert [KINDS[kind] for kind in signals[0]].count("signal") == 4
    assert (signals[2][signals[0] == KINDS.index("signal")] == 1).all()
    assert [KINDS[kind] for kind in label_positions(tiny_model, video)[0]].count("video") == 3


def test_a_second_call_computes_nothing_and_the_tools_of_the_cache_know_it(
    tiny_model: AnyToAny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = rendered(tiny_model, 2)
    options = {"folder": tmp_path, "vocabulary": VOCABULARY, "progress": False}
    first = collect(tiny_model, conversations, SITES, model_fingerprint="m", **options)
    in_memory = collect(
        tiny_model, conversations, SITES, model_fingerprint="m", text_share=1.0, progress=False
    )
    assert len(in_memory["layers.0"]) > len(first["layers.0"])
    assert in_memory["layers.0"].counts()["image"] == first["layers.0"].counts()["image"] == 8

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "states_of", refuse)
        again = collect(tiny_model, conversations, SITES, model_fingerprint="m", **options)
        with pytest.raises(AssertionError, match="computed again"):
            collect(tiny_model, conversations, SITES, model_fingerprint="other", **options)
    for site in SITES:
        assert torch.equal(again[site].states, first[site].states)
        assert torch.equal(again[site].positions, first[site].positions)
    stored = {entry.part: entry for entry in maintenance.list_namespaces(tmp_path)}
    assert [stored[site].kind for site in SITES] == ["states", "states"]
    assert stored["layers.0"].items == 7  # two are equal
    assert maintenance.verify(tmp_path) == ([], [])
    maintenance.prune(tmp_path, {stored["layers.1"].fingerprint})
    assert {entry.part for entry in maintenance.list_namespaces(tmp_path)} == {"layers.1"}


def test_rows_say_where_they_are_from(tiny_model: AnyToAny) -> None:
    conversations = rendered(tiny_model, 2)
    acts = collect(tiny_model, conversations, ["layers.0"], model_fingerprint="m", progress=False)
    acts = acts["layers.0"]
    for row in range(0, len(acts), 7):
        conversation = conversations[int(acts.items[row])]
        assert conversation.ids[int(acts.positions[row])] == acts.tokens[row]
        exact = by_transformers(tiny_model, conversation)[int(acts.positions[row])]
        assert torch.allclose(acts.states[row].float(), exact, atol=0.05)


def test_a_site_that_does_not_exist_is_refused(tiny_model: AnyToAny) -> None:
    with pytest.raises(ConfigError, match=r"layers\.7"):
        collect(tiny_model, rendered(tiny_model), ["layers.7"], model_fingerprint="m")
