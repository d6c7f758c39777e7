"""n samples of one prompt, and the likelihood of given replies, against the slow ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from mmllm.conversation import assistant, user
from mmllm.errors import ConfigError, ContextError
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.batches import batch_of
from tests.inference.prompts import PROMPTS

REPLIES = ["one", "one two three four", "red apple", ""]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("prefixes", [0, 2])
def test_samples_of_one_prompt_are_those_of_single_calls(
    tiny_model: AnyToAny, prompt: list, prefixes: int
) -> None:
    chat = Chat(tiny_model, prefixes=prefixes)
    options = {"temperature": 1.0, "max_new_tokens": 8}
    samples = chat.complete(prompt, n=4, seed=3, **options)
    forbid = dict.fromkeys(("image", "audio", "video"), "forbid")
    for number, sample in enumerate(samples):
        alone = Chat(tiny_model).reply(prompt, seed=3 + number, modalities=forbid, **options)
        assert sample.text == alone.text
        assert sample.completion_tokens == alone.usage.text
        assert sample.prompt_tokens == (0 if number else alone.usage.prompt)
    assert len({sample.text for sample in samples}) > 1


def test_the_prompt_is_computed_once(tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    forward = tiny_model.llm.forward

    def noted(embeds: torch.Tensor, **rest: object) -> torch.Tensor:
        shapes.append((embeds.shape[0], embeds.shape[1]))
        return forward(embeds, **rest)

    monkeypatch.setattr(tiny_model.llm, "forward", noted)
    chat = Chat(tiny_model)
    chat.complete([user("hello " * 20)], n=5, max_new_tokens=3)
    wide = [shape for shape in shapes if shape[1] > 1]
    assert [rows for rows, _ in wide] == [1] * len(wide)
    assert (5, 1) in shapes


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_score_is_the_sum_over_the_logits_of_the_reply(
    tiny_model: AnyToAny, prompt: list
) -> None:
    scores = Chat(tiny_model).score(prompt, REPLIES)
    num_prompt = Chat(tiny_model).count_tokens(prompt)
    for reply, score in zip(REPLIES, scores, strict=True):
        conversation = [*prompt, assistant(reply)]
        rendered = tiny_model.renderer.render(conversation)
        batch = batch_of(tiny_model, [conversation], targets=False)
        logits = tiny_model.llm.head(tiny_model.hidden(batch)[0]).float().log_softmax(-1)
        expected = sum(
            logits[index - 1, label].item()
            for index, label in enumerate(rendered.labels)
            if index >= num_prompt and label >= 0
        )
        assert score == pytest.approx(expected, abs=1e-3)


def test_many_replies_are_scored_in_several_passes(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_model)
    together = chat.score(PROMPTS[0], REPLIES)
    monkeypatch.setattr("mmllm.inference.text_model.MAX_POSITIONS", 1)
    assert chat.score(PROMPTS[0], REPLIES) == pytest.approx(together, abs=1e-4)


def test_a_prompt_longer_than_a_pass_is_computed_once(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [user("one two three four " * 12)]
    chat = Chat(tiny_model)
    expected = [chat.score(prompt, [reply])[0] for reply in REPLIES]
    passes = []
    hidden = tiny_model.hidden
    monkeypatch.setattr(tiny_model, "hidden", lambda batch: passes.append(batch) or hidden(batch))
    monkeypatch.setattr("mmllm.inference.text_model.MAX_POSITIONS", chat.count_tokens(prompt) - 1)
    assert chat.score(prompt, REPLIES) == pytest.approx(expected, abs=1e-3)
    assert len(passes) == 1


def test_what_cannot_be_scored_is_refused(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    with pytest.raises(ConfigError, match="a list of one or more replies"):
        chat.score(PROMPTS[0], [])
    with pytest.raises(ConfigError, match="a list"):
        chat.score(PROMPTS[0], "one")  # pyright: ignore
    with pytest.raises(ContextError, match="context holds 256"):
        chat.score(PROMPTS[0], ["one " * 300])


@pytest.mark.parametrize(
    "find",
    [
        lambda model: model.llm.signal_embeddings,
        lambda model: model.llm.backbone.layers[1].mlp.up_proj.weight,
        lambda model: next(model.input_projections["image"].parameters()),
    ],
    ids=["trained rows", "frozen layer", "projection"],
)
def test_the_fingerprint_is_that_of_the_weights(
    tiny_model: AnyToAny, find: Callable[[AnyToAny], torch.Tensor]
) -> None:
    chat = Chat(tiny_model)
    before = chat.fingerprint
    assert before == chat.fingerprint
    with torch.no_grad():
        find(tiny_model).flatten()[0] += 1
    assert chat.fingerprint != before


def test_the_fingerprint_is_that_of_what_a_config_sets(tiny_model: AnyToAny) -> None:
    """A key that a later version adds, at its default, does not make stored work foreign."""
    config, chat = tiny_model.config, Chat(tiny_model)
    before = chat.fingerprint
    added = dataclasses.make_dataclass(
        type(config.llm).__name__,
        [("added", int, dataclasses.field(default=3))],
        bases=(type(config.llm),),
        frozen=True,
    )
    values = {entry.name: getattr(config.llm, entry.name) for entry in fields(config.llm)}

    def with_llm(llm: object, **options: object) -> str:
        tiny_model.config = replace(config, llm=llm, **options)
        return chat.fingerprint

    assert with_llm(config.llm, name="another", licences={"llm": "MIT"}) == before
    assert with_llm(added(**values)) == before
    assert with_llm(added(**{**values, "weights": "another/path"})) == before
    assert with_llm(added(**values, added=4)) != before
    assert with_llm(replace(config.llm, attention="eager")) != before
