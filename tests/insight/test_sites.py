"""States at named sites, against transformers' own and the slow way; edits, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmllm import insight
from mmllm.conversation import Message, assistant, user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from mmllm.insight import Positions
from mmllm.kernels.backend import use_kernels
from mmllm.model import AnyToAny
from tests.batches import MIXED, batch_of
from tests.samples import clip, picture, sound

LLM_SITES = ("embeddings", "layers.0", "layers.1.attention", "layers.1.heads", "hidden")
FORCED = {"image": "force", "audio": "forbid", "video": "forbid"}


@pytest.fixture
def chat(tiny_model: AnyToAny) -> Chat:
    return Chat(tiny_model)


def kinds_of(model: AnyToAny, conversation: list[Message], **options: Any) -> list[str]:
    """The kind of each position, from the spans of the rendered conversation."""
    rendered = model.renderer.render(conversation, **options)
    kinds = ["text"] * len(rendered)
    for span in rendered.inputs:
        kinds[span.start : span.start + span.length] = [span.medium.modality] * span.length
    for span in rendered.outputs:
        kinds[span.start : span.start + span.length] = ["signal"] * span.length
    return kinds


@torch.no_grad()
def states_of(model: AnyToAny, conversation: list[Message]) -> dict[str, Tensor]:
    """The states of one conversation by transformers alone: one row, no padding, no hooks."""
    batch = batch_of(model, [conversation], targets=False)
    output = model.llm.backbone(
        inputs_embeds=model.embed(batch), use_cache=False, output_hidden_states=True
    )
    return {
        "embeddings": output.hidden_states[0][0],
        "layers.0": output.hidden_states[1][0],
        "hidden": output.last_hidden_state[0],
    }


def difference(one: Reply, other: Reply) -> int:
    """The largest difference of the pictures of two replies, in levels of 8 bits."""
    assert one.image is not None
    assert other.image is not None
    return int(np.abs(one.image.to_numpy().astype(int) - other.image.to_numpy()).max())


# --- names --------------------------------------------------------------------------------------


def test_all_points_have_names(chat: Chat) -> None:
    names = insight.sites(chat)
    assert {*LLM_SITES, "layers.1", "layers.0.mlp", "encoders.image"} <= set(names)
    assert "input_projections.audio.layers.0" in names or any(
        name.startswith("input_projections.audio.") for name in names
    )
    assert insight.sites(chat.model) == names
    for name in names:
        with insight.look(chat, name):
            pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer.1", "did you mean 'layers.1'"),
        ("layers.1.atention", "did you mean 'layers.1.attention'"),
        ("layers.2", "layers.0 to layers.1"),
        ("layers.1.heads.4", "4 heads, 0 to 3"),
        ("encoders.imge", "did you mean 'encoders.image'"),
        ("", "insight.sites"),
    ],
)
def test_a_name_that_does_not_exist_names_the_near_one(chat: Chat, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), insight.look(chat, name):
        pass
    with pytest.raises(ConfigError, match=message), insight.edit(chat, name, lambda x, _: x):
        pass


def test_other_objects_than_models_are_refused(chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"what mmllm\.load gives"):
        insight.sites("mini")
    with insight.look(chat, "layers.0") as seen, pytest.raises(ConfigError, match="no positions"):
        _ = seen.positions
    with pytest.raises(ConfigError, match=r"layers.1' was not looked at, only layers.0"):
        _ = seen["layers.1"]
    with pytest.raises(ConfigError, match="was not computed"):
        _ = seen["layers.0"]


# --- looking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("pack", [False, True])
def test_states_of_a_batch_are_those_of_each_conversation_alone(
    tiny_model: AnyToAny, kernels: Any, pack: bool
) -> None:
    use_kernels(tiny_model, kernels)
    batch = batch_of(tiny_model, MIXED, targets=False, pack=pack)
    assert batch.prefix_len
    with insight.look(tiny_model, *LLM_SITES) as seen:
        tiny_model(batch)
    at = seen.positions
    for number, conversation in enumerate(MIXED):
        own = at.conversation == number
        # The shared prefix is computed once, for the first conversation.
        start = 0 if at.index[own].min() == 0 else batch.prefix_len
        kinds = kinds_of(tiny_model, conversation)[start:]
        assert at.index[own].tolist() == list(range(start, start + len(kinds)))
        assert at.kind[own].tolist() == kinds
        alone = states_of(tiny_model, conversation)
        for name, states in alone.items():
            torch.testing.assert_close(seen[name][own], states[start:], atol=1e-4, rtol=1e-4)
    heads = seen["layers.1.heads"]
    assert heads.shape == (len(at), 4, 8)
    o_proj = tiny_model.llm.backbone.layers[1].self_attn.o_proj
    mixed = o_proj(heads.flatten(1)).detach()
    torch.testing.assert_close(mixed, seen["layers.1.attention"], atol=1e-4, rtol=1e-4)


def test_media_are_numbered_and_signals_know_what_they_make(tiny_model: AnyToAny) -> None:
    conversation = [
        user(picture(1), picture(2), "and", sound(0.1)),
        assistant("here", clip(1, caption="a rocket"), picture(3, caption="a red apple")),
    ]
    batch = batch_of(tiny_model, [conversation], targets=False)
    with insight.look(tiny_model, "embeddings") as seen:
        tiny_model(batch)
    at = seen.positions
    found = [(at.kind[p], at.modality[p], at.medium[p]) for p in np.flatnonzero(at.medium >= 0)]
    assert found == [
        *[("image", "image", 0)] * 4,
        *[("image", "image", 1)] * 4,
        *[("audio", "audio", 2)] * 2,
        *[("signal", "video", 3)] * 5,
        *[("signal", "image", 4)] * 4,
    ]
    assert (at.token[at.select("media")] == -1).all()
    rendered = tiny_model.renderer.render(conversation)
    assert at.token[at.select("text")].tolist() == [
        token for token in rendered.ids if token < tiny_model.llm.tokens.vocab_size
    ]
    assert at.select("all").sum() == len(at) == len(rendered)
    assert at.select("image").sum() == 12
    assert at.select("signal").sum() == 9
    assert at[at.select("audio")].index.tolist() == [
        span.start + offset for span in rendered.inputs[2:] for offset in range(2)
    ]


def test_a_reply_is_seen_from_the_first_position_to_the_last(chat: Chat) -> None:
    talk = [user(picture(40), "one two one two one two")]
    with insight.look(chat, *LLM_SITES) as seen:
        reply = chat.reply(talk, seed=0, max_new_tokens=8, modalities=FORCED)
    at = seen.positions
    prompt = kinds_of(chat.model, talk, add_generation_prompt=True)
    assert at.index.tolist() == list(range(len(at)))  # each once, no rejected draft
    assert at.kind[: len(prompt)].tolist() == prompt
    assert at.select("signal").sum() == 4
    assert at.token[len(prompt) :][at.kind[len(prompt) :] == "text"].tolist() == reply.ids
    assert len(seen["layers.1.heads"]) == len(at)
    assert not seen["hidden"].is_inference()
    # The same as the whole conversation in one pass.
    batch = batch_of(chat.model, [[*talk, assistant(*reply.message.parts)]], targets=False)
    embeds = chat.model.embed(batch)
    expected = chat.model.llm.backbone(inputs_embeds=embeds).last_hidden_state[0].detach()
    torch.testing.assert_close(
        seen["hidden"][: len(prompt)], expected[: len(prompt)], atol=1e-4, rtol=1e-4
    )


def test_positions_of_a_batch_name_their_conversation(chat: Chat) -> None:
    talks = [[user("hello")], [user(picture(40), "what is this? one two")], [user(sound(0.2))]]
    with insight.look(chat, "layers.1") as seen:
        chat.reply_many(talks, seeds=[0, 1, 2], max_new_tokens=5, modalities=FORCED)
    for number, talk in enumerate(talks):
        with insight.look(chat, "layers.1") as alone:
            chat.reply(talk, seed=number, max_new_tokens=5, modalities=FORCED)
        own = seen.positions.conversation == number
        assert seen.positions[own].index.tolist() == alone.positions.index.tolist()
        assert seen.positions[own].token.tolist() == alone.positions.token.tolist()
        torch.testing.assert_close(seen["layers.1"][own], alone["layers.1"], atol=1e-4, rtol=1e-4)


def test_scores_and_training_with_recomputed_layers_are_seen_once(tiny_model: AnyToAny) -> None:
    batch = batch_of(tiny_model, MIXED, pack=True)
    llm = tiny_model.llm
    llm.attach_lora()
    for parameter in dict(llm.lora_parameters()).values():
        parameter.requires_grad_(True)
    llm.train().gradient_checkpointing_enable()
    with insight.look(tiny_model, "layers.0", "layers.1.mlp") as seen:
        tiny_model(batch).token_nll.sum().backward()
    real = batch.ids.numel() - batch.padding
    assert len(seen.positions) == len(seen["layers.0"]) == len(seen["layers.1.mlp"]) == real
    with (
        insight.edit(tiny_model, "layers.0.attention", lambda states, _: states * 0.5),
        pytest.raises(ConfigError, match="gradient_checkpointing: false"),
    ):
        tiny_model(batch).token_nll.sum().backward()


def test_encoders_and_projections_are_seen(chat: Chat) -> None:
    names = ("encoders.image", "input_projections.image")
    with insight.look(chat, *names) as seen:
        chat.score([user(picture(3), picture(5))], ["one"])
        chat.score([user(picture(7))], ["one"])
    media = [picture(value) for value in (3, 5, 7)]
    expected = chat.model.encoders["image"].encode(media)  # pyright: ignore
    torch.testing.assert_close(seen["encoders.image"], expected.tokens)
    projected = chat.model.input_projections["image"](expected.tokens, None).detach()
    torch.testing.assert_close(seen["input_projections.image"], projected)


# --- editing ------------------------------------------------------------------------------------


def add_noise(states: Tensor, _positions: Any) -> Tensor:
    return states + 0.5 * torch.arange(states[0].numel()).view(states[0].shape).sin()


@pytest.mark.parametrize("name", [*LLM_SITES, "layers.0.mlp"])
@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_an_edit_is_what_a_plain_hook_does(tiny_model: AnyToAny, name: str, pack: bool) -> None:
    batch = batch_of(tiny_model, MIXED, pack=pack)
    plain = tiny_model(batch).token_nll
    with insight.edit(tiny_model, name, lambda states, _: states):
        torch.testing.assert_close(tiny_model(batch).token_nll, plain, atol=1e-4, rtol=1e-4)
    with insight.edit(tiny_model, name, add_noise):
        edited = tiny_model(batch).token_nll
    layers = tiny_model.llm.backbone.layers

    def added(states: Tensor) -> Tensor:
        return states + 0.5 * torch.arange(states.shape[-1]).sin()

    def output(_module: Any, _args: Any, value: Any) -> Any:
        return (added(value[0]), *value[1:]) if isinstance(value, tuple) else added(value)

    modules = {
        "layers.0": layers[0],
        "layers.1.attention": layers[1].self_attn,
        "layers.0.mlp": layers[0].mlp,
        "hidden": tiny_model.llm.backbone.norm,
    }
    inputs = {"embeddings": layers[0], "layers.1.heads": layers[1].self_attn.o_proj}
    if name in modules:
        handle = modules[name].register_forward_hook(output)
    else:
        handle = inputs[name].register_forward_pre_hook(lambda _, args: (added(args[0]), *args[1:]))
    expected = tiny_model(batch).token_nll
    handle.remove()
    assert not edited.allclose(plain, atol=1e-2)
    torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tiny_model(batch).token_nll, plain)  # nothing is left


@torch.no_grad()
def test_one_head_is_one_slice(tiny_model: AnyToAny) -> None:
    batch = batch_of(tiny_model, MIXED)
    with insight.edit(tiny_model, "layers.1.heads.2", lambda states, _: 0 * states):
        edited = tiny_model(batch).token_nll

    def zero(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0].clone()
        states[..., 16:24] = 0
        return (states, *args[1:])

    o_proj = tiny_model.llm.backbone.layers[1].self_attn.o_proj
    handle = o_proj.register_forward_pre_hook(zero)
    torch.testing.assert_close(edited, tiny_model(batch).token_nll, atol=1e-5, rtol=1e-5)
    handle.remove()


def only(which: str, amount: float = 3.0) -> Callable[[Tensor, Positions], Tensor]:
    """An edit of the positions of one group alone."""

    def function(states: Tensor, positions: Positions) -> Tensor:
        where = torch.from_numpy(positions.select(which)).to(states)
        return states + amount * where[:, None] * torch.arange(states.shape[-1]).cos()

    return function


def test_an_edit_of_signal_positions_changes_what_is_made_and_not_what_is_written(
    chat: Chat,
) -> None:
    talk = [user("draw a red apple")]
    options: dict[str, Any] = {"seed": 0, "max_new_tokens": 6, "modalities": FORCED}
    before = chat.reply(talk, **options)
    with insight.edit(chat, "layers.1", only("signal")):
        edited = chat.reply(talk, **options)
    with insight.edit(chat, "layers.1", only("media")):  # there are none
        same = chat.reply(talk, **options)
    assert edited.ids == before.ids == same.ids
    assert difference(edited, before) > 1
    assert difference(same, before) <= 1


def test_gradients_go_through_an_edit(tiny_model: AnyToAny) -> None:
    batch = batch_of(tiny_model, MIXED, pack=True)
    direction = torch.zeros(tiny_model.llm.width, requires_grad=True)
    with insight.edit(tiny_model, "layers.0", lambda states, _: states + direction):
        loss = tiny_model(batch).token_nll.sum()
        loss.backward()
        assert direction.grad is not None
        gradient = direction.grad
        step = 1e-3 * gradient / gradient.norm()
        with torch.no_grad():
            direction += step
            higher = tiny_model(batch).token_nll.sum()
            direction -= 2 * step
            lower = tiny_model(batch).token_nll.sum()
    slope = (higher - lower) / (2 * step.norm())
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize(
    ("function", "got"),
    [(lambda x, _: x[1:], r"\[\d+, 32\]"), (lambda x, _: None, "NoneType")],
)
def test_an_edit_that_returns_something_else_is_refused(
    chat: Chat, function: Any, got: str
) -> None:
    with (
        insight.edit(chat, "layers.0", function),
        pytest.raises(ConfigError, match=f"as many, got {got}"),
    ):
        chat.score([user("hello")], ["one"])
    assert chat.score([user("hello")], ["one"])  # the hooks are gone


@pytest.mark.parametrize("name", ["encoders.image", "input_projections.image"])
def test_an_edited_encoder_is_asked_again_and_leaves_nothing_in_the_prefix_cache(
    tiny_model: AnyToAny, name: str
) -> None:
    chat = Chat(tiny_model, prefixes=2)
    talk = [user(picture(40), "what is this?")]
    prefix_len = len(tiny_model.renderer.prefix_ids)

    def made() -> tuple[int, Tensor]:
        """How much of the prompt was cached, and the condition of the picture."""
        with insight.look(chat, "output_projections.image") as seen:
            reply = chat.reply(talk, seed=0, max_new_tokens=4, modalities=FORCED)
        return reply.usage.cached, seen["output_projections.image"]

    _, before = made()
    assert made()[0] > prefix_len  # the conversation is kept
    with insight.look(chat, name) as seen:
        assert made()[0] <= prefix_len
    with insight.edit(chat, name, lambda states, _: 9 * states.flip(-1)):
        with insight.look(chat, name) as seen_edited:
            cached, edited = made()
        assert cached <= prefix_len
    torch.testing.assert_close(seen_edited[name], 9 * seen[name].flip(-1))
    assert not edited.allclose(before, atol=1e-4)
    torch.testing.assert_close(made()[1], before, atol=1e-5, rtol=1e-5)
