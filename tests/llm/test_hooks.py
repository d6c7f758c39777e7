"""A hook on the language model is called for every position of every reply, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from mmllm.conversation import assistant, user
from mmllm.inference.chat import Chat
from mmllm.inference.engine import Engine
from mmllm.inference.prefill import Prefill
from mmllm.inference.sequence import SequenceState
from mmllm.model import AnyToAny

TALK = [user("hello world"), assistant("You can see."), user("one two three")]


def said(chat: Chat, **options: Any) -> tuple[list[int], Tensor, int]:
    """The words of a reply, the states of its picture, and how much of its prompt was known."""
    sequences: list[SequenceState] = []
    generate = Engine.generate

    def noted(engine: Engine, prefills: Sequence[Prefill], poll: Any) -> None:
        sequences.extend(sequence for prefill in prefills for sequence in prefill.sequences)
        generate(engine, prefills, poll)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "generate", noted)
        modalities = {"image": "force", "audio": "forbid", "video": "forbid"}
        chat.reply(
            options.pop("talk", TALK),
            seed=0,
            max_new_tokens=6,
            modalities=modalities,  # pyright: ignore
            **options,
        )
    output = sequences[0].output
    return output.ids, output.spans[0].states, output.num_cached


def parts(model: AnyToAny) -> dict[str, nn.Module]:
    """One of each kind of part that computes hidden states or logits."""
    decoder = model.llm.backbone
    layer = decoder.layers[1]
    return {
        "decoder": decoder,
        "layer": layer,
        "norm": layer.input_layernorm,
        "attention": layer.self_attn,
        "projection": layer.self_attn.q_proj,
        "last norm": decoder.norm,
        "head": model.llm.base_model.get_output_embeddings(),
        "embedding": model.llm.embedding,
    }


@pytest.fixture
def chat(tiny_model: AnyToAny) -> Chat:
    return Chat(tiny_model, prefixes=2)


@pytest.mark.parametrize("name", ["layer", "norm", "attention", "projection", "last norm"])
def test_a_hook_is_called_for_every_position_and_removed_leaves_nothing(
    chat: Chat, name: str
) -> None:
    before = said(chat)
    assert said(chat)[2] > len(chat.model.renderer.prefix_ids)  # the conversation is kept
    positions: list[int] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        positions.append(first.shape[1])
        changed = first + 1.0 + torch.arange(first.shape[-1])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = parts(chat.model)[name].register_forward_hook(hook)
    ids, states, known = said(chat)
    prompt = len(chat.model.renderer.render(TALK, add_generation_prompt=True))
    assert known == 0
    assert sum(positions) >= prompt + len(ids)
    assert not states.allclose(before[1], atol=1e-2)
    assert said(chat)[1].equal(states)  # nothing read under a hook is kept
    assert said(chat)[2] == 0
    handle.remove()
    positions.clear()
    chat.engine.prefix_cache.clear()
    after = said(chat)
    assert not positions
    assert after[0] == before[0]
    assert after[1].equal(before[1])
    assert after[2] == before[2]


@pytest.mark.parametrize("name", ["decoder", "layer", "projection", "head", "embedding"])
def test_hooks_of_all_kinds_are_called_after_the_first_reply(chat: Chat, name: str) -> None:
    said(chat)
    calls: list[str] = []
    part = parts(chat.model)[name]
    before = part.register_forward_pre_hook(lambda *_: calls.append("before"))
    behind = part.register_forward_hook(lambda *_: calls.append("behind"))
    said(chat)
    assert calls.count("before") == calls.count("behind") > 1
    before.remove()
    behind.remove()
    calls.clear()
    own = part.forward
    part.forward = lambda *a, **k: calls.append("instead") or own(*a, **k)
    said(chat)
    assert "instead" in calls
    del part.forward
    calls.clear()
    everywhere = torch_modules.register_module_forward_hook(
        lambda module, *_: calls.append("all") if module is part else None
    )
    try:
        said(chat)
    finally:
        everywhere.remove()
    assert "all" in calls


def test_a_part_that_was_replaced_is_used(chat: Chat) -> None:
    first = said(chat)
    layer = chat.model.llm.backbone.layers[0]
    calls: list[int] = []

    class Spliced(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape[1])
            return self.inner(x) * 0.5

    own = layer.mlp
    layer.mlp = Spliced(own)
    _, states, known = said(chat)
    prompt = len(chat.model.renderer.render(TALK, add_generation_prompt=True))
    assert sum(calls) >= prompt
    assert known == len(chat.model.renderer.prefix_ids)  # read anew, by the new part
    assert not states.allclose(first[1], atol=1e-3)
    layer.mlp = own
    chat.engine.prefix_cache.clear()
    assert said(chat)[1].equal(first[1])
    assert said(chat)[0] == first[0]


@pytest.mark.usefixtures("auto_kernels")
def test_a_hook_that_comes_in_the_midst_of_a_reply_is_called_from_there_on(chat: Chat) -> None:
    said(chat)
    chat.engine.prefix_cache.clear()
    calls: list[int] = []
    handles: list[Any] = []
    layer = chat.model.llm.backbone.layers[0]

    def events() -> Iterator[Any]:
        for event in chat.stream(TALK, seed=0, max_new_tokens=6, num_draft_tokens=0):
            if not handles:
                handles.append(layer.register_forward_hook(lambda *_: calls.append(1)))
            yield event

    assert list(events())
    handles[0].remove()
    assert chat.model.llm.new_cache().stack is not None
    kept = chat.engine.prefix_cache.entries
    assert len(kept) == (0 if calls else 1)  # what a hook may have changed is not kept


def test_training_hears_of_hooks_on_the_head(tiny_model: AnyToAny) -> None:
    llm, calls = tiny_model.llm, []
    hidden, labels = torch.randn(5, llm.width), torch.arange(5)
    plain = llm.token_nll(hidden, labels)
    head = llm.base_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _i, out: calls.append(1) or out * 2)
    hooked = llm.token_nll(hidden, labels)
    handle.remove()
    assert calls
    assert not hooked.allclose(plain)
    assert llm.token_nll(hidden, labels).equal(plain)


def test_accelerates_hooks_do_not_keep_openings_from_being_shared(chat: Chat) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    first = said(chat)
    chat.engine.prefix_cache.clear()
    layer = chat.model.llm.backbone.layers[0]
    add_hook_to_module(layer, ModelHook())
    placed = said(chat)
    remove_hook_from_module(layer)
    assert placed[2] == first[2] > 0
    torch.testing.assert_close(placed[1], first[1], atol=1e-4, rtol=1e-4)
