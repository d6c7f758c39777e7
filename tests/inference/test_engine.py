"""One engine for many: who joins, leaves, fails or goes away does not show in what others get."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmllm.conversation import Message, assistant, user
from mmllm.decoders.contract import Cancelled
from mmllm.features.cache import FeatureCache
from mmllm.inference import batching
from mmllm.inference.batching import ContinuousBatcher, generate
from mmllm.inference.chat import Chat
from mmllm.inference.events import Progress
from mmllm.inference.outputs import GenerationOutput
from mmllm.inference.prefill import prepare_prefill
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.replies import Reply
from mmllm.inference.sampling import Sampling
from mmllm.inference.sequence import SequenceState
from mmllm.model import AnyToAny
from tests.inference.comparing import close
from tests.inference.prompts import ALL, PROMPTS, eager

LENGTHS = (3, 9, 5)
PICTURE = {"image": "force", "audio": "forbid", "video": "forbid"}


def sampled(number: int) -> Sampling:
    return Sampling(max_new_tokens=LENGTHS[number], temperature=1.0, max_media=number)


def same(one: GenerationOutput, other: GenerationOutput) -> bool:
    return (one.ids, one.finish) == (other.ids, other.finish) and all(
        a.key == b.key and torch.allclose(a.states, b.states, atol=1e-4)
        for a, b in zip(one.spans, other.spans, strict=True)
    )


@pytest.mark.parametrize(("keep", "long"), [(0, 1), (0, 10_000), (3, 10_000)])
def test_rows_that_join_and_leave_equal_single_ones(
    tiny_model: AnyToAny, keep: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a prompt is read by itself or along with a step of the others."""
    monkeypatch.setattr(batching, "MAX_MIXED_PREFILL", long)
    passes: list[int] = []
    read = tiny_model.llm.forward_with_cache
    tiny_model.llm.forward_with_cache = lambda new: passes.append(len(new)) or read(new)  # pyright: ignore
    model = eager(tiny_model, "audio")
    work, prefixes = FeatureCache(model), PrefixCache(keep)
    prompts = [model.renderer.render(talk, add_generation_prompt=True) for talk in PROMPTS]
    batcher, entries, rows, sizes = ContinuousBatcher(model, prefixes), [], [], []
    for number, prompt in enumerate(prompts):
        rows.append(SequenceState(model, sampled(number), torch.Generator().manual_seed(number)))
        entries.append(prepare_prefill(model, [prompt], work, rows[-1:], prefixes))
        batcher.join(entries[-1])
        batcher.step()
        sizes.append(len(batcher.sequences))
    assert [entry.sequences for entry in entries] == [
        [row] for row in rows
    ]  # each waits for its own
    while batcher.sequences:
        batcher.step()
        sizes.append(len(batcher.sequences))
    assert sizes[:3] == [1, 2, 3]
    assert max(passes) == 2
    assert passes[:6] == ([1, 1, 1, 2, 1, 2] if long == 1 else [1, 2, 2, 1, 1, 1])
    assert sizes[2:] == sorted(sizes[2:], reverse=True)
    assert {*sizes[2:]} == {3, 2, 1, 0}
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        (alone,) = generate(
            model,
            [prompt],
            work,
            sampling=sampled(number),
            generators=[torch.Generator().manual_seed(number)],
        )
        assert same(row.output, alone)
        assert len(alone.ids) <= LENGTHS[number]

    # What is kept of a row is what it would have been alone: the next turn goes on from it.
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        text = model.llm.tokenizer.decode(row.output.ids)
        talk: list[Message] = [*PROMPTS[number], assistant(text), user("three")]
        following = model.renderer.render(talk, add_generation_prompt=True)
        cached, plain = (
            generate(
                model, [following], work, sampling=Sampling(max_new_tokens=4), prefix_cache=by
            )[0]
            for by in (prefixes, None)
        )
        assert (cached.num_cached >= len(prompt)) == (keep > 0)
        assert same(cached, plain)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls in threads of their own, or what they raised."""
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_concurrent_calls_of_all_kinds_equal_single_ones(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    asked: list[dict[str, Any]] = [
        {"seed": 1, "max_new_tokens": 12, "temperature": 1.0, "modalities": ALL},
        {"seed": 2, "max_new_tokens": 3, "modalities": ALL},
        {"seed": 3, "max_new_tokens": 8, "temperature": 2.0, "top_k": 9, "stop": ["e"]},
        {"seed": 4, "max_new_tokens": 5, "modalities": ALL, "decoders": {"image": {"steps": 3}}},
    ]

    def streamed(number: int) -> Reply:
        (*_, done) = chat.stream(PROMPTS[number % 3], **asked[number])
        return done.reply  # pyright: ignore

    calls = [
        lambda: chat.reply(PROMPTS[0], **asked[0]),
        lambda: streamed(1),
        lambda: chat.reply(PROMPTS[2], **asked[2]),
        lambda: streamed(3),
    ]
    expected = [chat.reply(PROMPTS[number % 3], **asked[number]) for number in range(4)]
    for found, alone in zip(together(*calls), expected, strict=True):
        assert close(found, alone)
    assert chat.engine.is_idle


def test_media_of_several_calls_are_made_in_one_batch_and_one_may_leave(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, decoder = Chat(tiny_model), tiny_model.decoders["image"]
    options: dict[str, Any] = {
        "max_new_tokens": 2,
        "modalities": PICTURE,
        "decoders": {"image": {"steps": 6}},
    }
    expected = [chat.reply([user("draw")], seed=seed, **options) for seed in range(3)]
    may, sizes = threading.Event(), []
    sample = decoder.sample

    def held(*args: Any, generators: Any, **rest: Any) -> Any:
        sizes.append(len(generators))
        assert may.wait(60)
        return sample(*args, generators=generators, **rest)

    monkeypatch.setattr(decoder, "sample", held)
    gone = threading.Event()

    def leaving() -> list[type]:
        kinds = []
        for event in chat.stream([user("draw")], seed=1, cancel=gone, **options):
            kinds.append(type(event))
            if isinstance(event, Progress):
                gone.set()
        return kinds

    def asking(seed: int) -> Callable[[], Reply]:
        return lambda: chat.reply([user("draw")], seed=seed, **options)

    def release() -> None:
        until = time.monotonic() + 60
        while chat.engine.num_waiting_media + sum(sizes) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        may.set()

    first, left, third, _ = together(asking(0), leaving, asking(2), release)
    assert sum(sizes) == 3
    assert len(sizes) <= 2, "what waited was made together"
    assert close(first, expected[0])
    assert close(third, expected[2])
    assert left.count(Progress) < 6
    assert chat.engine.is_idle


def test_an_error_in_a_step_reaches_all_its_callers_and_leaves_the_engine_usable(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_model)
    options = {"seed": 1, "max_new_tokens": 20, "temperature": 1.0}
    expected = chat.reply(PROMPTS[0], **options)
    head, calls = tiny_model.llm.head, []

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return head(hidden)

    monkeypatch.setattr(tiny_model.llm, "head", broken)
    for error in together(*[lambda: chat.reply(PROMPTS[0], **options)] * 2):
        assert isinstance(error, RuntimeError)
    monkeypatch.undo()
    assert chat.engine.is_idle
    assert chat.reply(PROMPTS[0], **options).ids == expected.ids


def test_a_prompt_that_fails_to_prefill_fails_alone(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_model)
    options = {"seed": 1, "max_new_tokens": 20, "temperature": 1.0}
    expected = chat.reply(PROMPTS[0], **options)

    def broken(samples: torch.Tensor) -> Any:
        raise RuntimeError("no such picture")

    monkeypatch.setattr(tiny_model.encoders["image"], "forward", broken)
    good, bad = together(
        lambda: chat.reply(PROMPTS[0], **options), lambda: chat.reply(PROMPTS[1], **options)
    )
    assert good.ids == expected.ids
    assert isinstance(bad, RuntimeError)
    assert chat.engine.is_idle


def test_a_cancelled_row_leaves_while_others_go_on(tiny_model: AnyToAny) -> None:
    chat, cancel = Chat(tiny_model), threading.Event()
    options = {"temperature": 1.0, "modalities": dict.fromkeys(ALL, "forbid")}
    expected = chat.reply(PROMPTS[0], seed=1, max_new_tokens=60, **options)

    def leaving() -> Reply:
        threading.Timer(0.05, cancel.set).start()
        return chat.reply(PROMPTS[1], seed=2, max_new_tokens=200, cancel=cancel, **options)

    good, left = together(
        lambda: chat.reply(PROMPTS[0], seed=1, max_new_tokens=60, **options), leaving
    )
    assert good.ids == expected.ids
    assert isinstance(left, Cancelled)
    assert chat.engine.is_idle
