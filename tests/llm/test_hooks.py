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


def replied(chat: Chat, **options: Any) -> tuple[list[int], Tensor, int]:
    """(ids of a reply, hidden states of its image's signals, number of cached prompt tokens)."""
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
    before = replied(chat)
    assert replied(chat)[2] > len(chat.model.renderer.prefix_ids)  # the conversation is kept
    positions: list[int] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        positions.append(first.shape[1])
        changed = first + 1.0 + torch.arange(first.shape[-1])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = parts(chat.model)[name].register_forward_hook(hook)
    ids, states, cached = replied(chat)
    prompt = len(chat.model.renderer.render(TALK, add_generation_prompt=True))
    assert cached == 0
    assert sum(positions) >= prompt + len(ids)
    assert not states.allclose(before[1], atol=1e-2)
    assert replied(chat)[1].equal(states)  # nothing read under a hook is kept
    assert replied(chat)[2] == 0
    handle.remove()
    positions.clear()
    chat.engine.prefix_cache.clear()
    after = replied(chat)
    assert not positions
    assert after[0] == before[0]
    assert after[1].equal(before[1])
    assert after[2] == before[2]


@pytest.mark.parametrize("name", ["decoder", "layer", "projection", "head", "embedding"])
def test_hooks_of_all_kinds_are_called_after_the_first_reply(chat: Chat, name: str) -> None:
    replied(chat)
    calls: list[str] = []
    part = parts(chat.model)[name]
    before = part.register_forward_pre_hook(lambda *_: calls.append("before"))
    behind = part.register_forward_hook(lambda *_: calls.append("behind"))
    replied(chat)
    assert calls.count("before") == calls.count("behind") > 1
    before.remove()
    behind.remove()
    calls.clear()
    own = part.forward
    part.forward = lambda *a, **k: calls.append("instead") or own(*a, **k)
    replied(chat)
    assert "instead" in calls
    del part.forward
    calls.clear()
    everywhere = torch_modules.register_module_forward_hook(
        lambda module, *_: calls.append("all") if module is part else None
    )
    try:
        replied(chat)
    finally:
        everywhere.remove()
    assert "all" in calls


def test_a_part_that_was_replaced_is_used(chat: Chat) -> None:
    first = replied(chat)
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
    _, states, cached = replied(chat)
    prompt = len(chat.model.renderer.render(TALK, add_generation_prompt=True))
    assert sum(calls) >= prompt
    assert cached == len(chat.model.renderer.prefix_ids)  # read anew, by the new part
    assert not states.allclose(first[1], atol=1e-3)
    layer.mlp = own
    chat.engine.prefix_cache.clear()
    assert replied(chat)[1].equal(first[1])
    assert replied(chat)[0] == first[0]


@pytest.mark.usefixtures("auto_kernels")
def test_a_hook_that_is_added_during_a_reply_is_called_from_there_on(chat: Chat) -> None:
    replied(chat)
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


def test_hooks_on_the_head_are_called_in_training(tiny_model: AnyToAny) -> None:
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


def test_hooks_of_accelerate_do_not_prevent_shared_prefixes(chat: Chat) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    first = replied(chat)
    chat.engine.prefix_cache.clear()
    layer = chat.model.llm.backbone.layers[0]
    add_hook_to_module(layer, ModelHook())
    placed = replied(chat)
    remove_hook_from_module(layer)
    assert placed[2] == first[2] > 0
    torch.testing.assert_close(placed[1], first[1], atol=1e-4, rtol=1e-4)
