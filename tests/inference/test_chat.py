"""Generation: complete runs, the caller's wishes, and a batch that gives what singles give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from mmllm.conversation import Audio, Image, Text, Video, assistant, user
from mmllm.errors import ConfigError, ContextError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.chat import Chat
from mmllm.inference.outputs import SignalSpan
from mmllm.inference.prefill import Prefill
from mmllm.inference.sampling import Sampling
from mmllm.inference.sequence import SequenceState
from mmllm.inference.text_stream import TextStream
from mmllm.model import AnyToAny
from tests.batches import batch_of
from tests.inference.prompts import ALL, PROMPTS, eager


def test_states_in_generation_equal_those_in_training(tiny_model: AnyToAny) -> None:
    """The reply, rendered as training renders it, gives the very states that were generated."""
    for prompt in PROMPTS:
        rendered = tiny_model.renderer.render(prompt, add_generation_prompt=True)
        answer = generate(
            tiny_model,
            [rendered],
            FeatureCache(tiny_model),
            sampling=Sampling(max_new_tokens=6, modalities=ALL),
        )[0]
        assert {run.key for run in answer.spans} == {"image", "audio", "video"}
        writer = TextStream(tiny_model, ())
        for piece in answer.ids:
            list(writer.add(piece))
        made = [
            {"image": Image, "audio": Audio, "video": Video}[piece.key](caption="x")
            for piece in answer.pieces
            if isinstance(piece, SignalSpan)
        ]
        reply = assistant(*writer.parts, *made)  # random text ends at the limit, then the runs
        batch = batch_of(tiny_model, [[*prompt, reply]], targets=False)
        ids = batch.ids[0].tolist()
        generated = [i for p in answer.pieces for i in _ids(tiny_model, p)]
        if ids[len(rendered.ids) :][: len(generated)] != generated:
            pytest.fail("the tokenizer does not round-trip the random reply; choose another seed")
        output = tiny_model(batch)
        for run in answer.spans:
            trained = output.hidden.flatten(0, 1)[batch.outputs[run.key].token_indices[-1]]
            assert torch.allclose(trained, run.states, atol=1e-4)


def _ids(model: AnyToAny, piece: int | SignalSpan) -> list[int]:
    return [piece] if isinstance(piece, int) else model.llm.tokens.signal_ids(piece.key)


def test_a_batch_gives_what_single_calls_give(tiny_model: AnyToAny) -> None:
    eager(tiny_model, "audio")
    chat = Chat(tiny_model)
    options = {"max_new_tokens": 7, "temperature": 1.0, "max_media": 2}
    wishes = {"image": "force"}
    together = chat.reply_many(PROMPTS, seeds=[3, 4, 5], modalities=wishes, **options)
    for prompt, seed, batched in zip(PROMPTS, (3, 4, 5), together, strict=True):
        alone = chat.reply(prompt, seed=seed, modalities=wishes, **options)
        assert alone.ids == batched.ids
        assert len(alone.message.parts) == len(batched.message.parts) > 0
        for one, many in zip(alone.message.parts, batched.message.parts, strict=True):
            assert type(one) is type(many)
            if isinstance(one, Text):
                assert one == many
            else:
                difference = one.to_numpy().astype(float) - many.to_numpy().astype(float)
                assert abs(difference).max() <= (1e-4 if isinstance(one, Audio) else 1)


def test_equal_seeds_give_equal_replies_and_other_seeds_other_media(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    first, again, other = (
        chat.reply([user("draw")], seed=seed, modalities={"image": "force"}, max_new_tokens=3)
        for seed in (1, 1, 2)
    )
    assert first.ids == again.ids
    assert (first.media[0].to_numpy() == again.media[0].to_numpy()).all()
    assert (first.media[0].to_numpy() != other.media[0].to_numpy()).any()


@pytest.mark.parametrize("key", ["image", "audio", "video"])
def test_a_signal_span_is_completed_and_read_in_one_step(tiny_model: AnyToAny, key: str) -> None:
    eager(tiny_model, key)
    widths = []
    forward = tiny_model.llm.forward
    tiny_model.llm.forward = lambda embeds, **rest: (
        widths.append(embeds.shape[1]) or forward(embeds, **rest)
    )
    answer = generate(
        tiny_model,
        [tiny_model.renderer.render(PROMPTS[0], add_generation_prompt=True)],
        FeatureCache(tiny_model),
        sampling=Sampling(max_new_tokens=4, max_media=3, num_draft_tokens=0),
    )[0]
    length = len(tiny_model.llm.tokens.signal_ids(key))
    assert len(answer.spans) == 3
    assert [tuple(run.states.shape) for run in answer.spans] == [(length, 32)] * 3
    assert widths[1:].count(length) >= 3
    assert set(widths[1:]) <= {1, length}


def test_force_and_forbid_are_kept(tiny_model: AnyToAny) -> None:
    chat = Chat(eager(tiny_model, "image"))
    forbidden = chat.reply([user("draw")], seed=0, modalities={"image": "forbid"}, max_new_tokens=5)
    assert forbidden.media == []
    assert forbidden.text
    forced = chat.reply(
        [user("hello")],
        seed=0,
        modalities={"image": "forbid", "audio": "force", "video": "force"},
        max_new_tokens=2,
    )
    assert [type(medium) for medium in forced.media] == [Audio, Video]
    with pytest.raises(ConfigError, match="unknown modality 'smell'"):
        chat.reply([user("hello")], modalities={"smell": "force"})
    with pytest.raises(ConfigError, match="auto, force or forbid"):
        chat.reply([user("hello")], modalities={"image": "always"})


def test_a_reply_keeps_the_order_of_text_and_media(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_model)
    tokenizer = tiny_model.llm.tokenizer
    one, two = (chat.model.renderer.encode_text(text) for text in ("one", "two"))
    spans = [SignalSpan("image", torch.zeros(4, 32)), SignalSpan("audio", torch.zeros(3, 32))]

    def generate_these(prefills: Sequence[Prefill], poll: Callable[[], bool]) -> None:
        ((sequence,),) = (prefill.sequences for prefill in prefills)
        for piece in [*one, spans[0], *two, spans[1]]:
            sequence.append(piece)
            assert not poll()
        sequence.done = True
        assert poll()

    monkeypatch.setattr(chat.engine, "generate", generate_these)
    parts = chat.reply([user("draw")], seed=0).message.parts
    assert [type(part) for part in parts] == [Text, Image, Text, Audio]
    assert parts[0] == Text(tokenizer.decode(one))
    assert parts[2] == Text(tokenizer.decode(two))


def test_generated_media_and_replies_continue_the_conversation(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    conversation = [user("draw")]
    reply = chat.reply(conversation, seed=0, modalities={"image": "force"}, max_new_tokens=2)
    provenance = reply.media[0].provenance
    assert provenance
    assert provenance["ai_generated"] is True
    assert provenance["seed"] == 0
    following = chat.reply(
        [*conversation, reply.message, user("make it blue")], seed=1, max_new_tokens=2
    )
    assert following.message.role == "assistant"


def test_captions_never_reach_the_decoder(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation conditions the decoder by projected states only."""
    unconditional = {k: d.unconditional(1) for k, d in tiny_model.decoders.items()}
    for key, decoder in tiny_model.decoders.items():

        def refuse(captions, key=key):
            raise AssertionError(f"{key}: a caption reached the decoder: {captions}")

        monkeypatch.setattr(decoder, "encode_captions", refuse)
        monkeypatch.setattr(
            decoder,
            "unconditional",
            lambda num, key=key: {
                name: value.expand(num, *value.shape[1:])
                for name, value in unconditional[key].items()
            },
        )
    reply = Chat(tiny_model).reply([user("draw")], seed=0, modalities=ALL, max_new_tokens=2)
    assert sorted(medium.modality for medium in reply.media) == ["audio", "image", "video"]


def test_context_overflow_is_noted_or_refused(make_model: Callable[..., AnyToAny]) -> None:
    chat = Chat(make_model())
    history = [user("one " * 20), assistant("two " * 20)] * 10
    reply = chat.reply([*history, user("three")], seed=0, max_new_tokens=2)
    assert "left out" in reply.notes[0]
    with pytest.raises(ContextError):
        chat.reply([user("six " * 400)])
    with pytest.raises(ConfigError, match="unknown sampling option"):
        chat.reply([user("one")], heat=2)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -1e-9},
        {"temperature": 10**400},
        {"temperature": "1"},
        {"top_p": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.0001},
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e300},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_media": -1},
        {"max_media": None},
        {"stop": 5},
        {"stop": [""]},
        {"stop": [5]},
        {"seed": 2**63},
        {"seed": 2**70},
        {"seed": -1},
        {"seed": 1.0},
        {"seed": "1"},
    ],
)
def test_options_out_of_range_are_refused_by_name(tiny_model: AnyToAny, options: dict) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(options))}: expected "):
        Chat(tiny_model).reply([user("hello")], **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize("scale", [1.0, 1e30])
@pytest.mark.parametrize("temperature", [1e-38, 1e-5, 2e-5, 1e-3])
def test_a_tiny_temperature_is_greedy_whatever_the_logits(
    tiny_model: AnyToAny, temperature: float, scale: float
) -> None:
    """One logit is far above the others, as it is behind a division by so little."""
    head = tiny_model.llm.head
    tiny_model.llm.head = lambda hidden: head(hidden) * scale
    options = {"seed": 2**63 - 1, "max_new_tokens": 6, "repetition_penalty": 0.01}
    forbidden = dict.fromkeys(ALL, "forbid")
    chat = Chat(tiny_model)
    hot = chat.reply([user("hello")], temperature=temperature, modalities=forbidden, **options)
    assert hot.ids == chat.reply([user("hello")], modalities=forbidden, **options).ids
    assert len(hot.ids) > 1


def test_a_temperature_divides_what_lies_below_the_largest_logit(tiny_model: AnyToAny) -> None:
    """Two likely tokens are drawn as often as the softmax of their quotients says."""
    row = SequenceState(tiny_model, Sampling(temperature=0.5), torch.Generator().manual_seed(0))
    logits = torch.full([8], -50.0)
    logits[2], logits[5] = 80.0, 80.5
    drawn = [int(row.sample(logits)) for _ in range(2000)]
    assert set(drawn) == {2, 5}
    share = drawn.count(5) / len(drawn)
    assert abs(share - 1 / (1 + torch.tensor(-1.0).exp().item())) < 0.04


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_never_sampled_from(
    tiny_model: AnyToAny, temperature: float
) -> None:
    """As float16 gives them where it overflows; the engine serves the next one."""
    head, broken = tiny_model.llm.head, [True]
    chat = Chat(tiny_model)
    options = {"seed": 0, "max_new_tokens": 3, "modalities": dict.fromkeys(ALL, "forbid")}
    wanted = chat.reply([user("hello")], temperature=temperature, **options)
    tiny_model.llm.head = lambda hidden: head(hidden) * (float("nan") if broken else 1.0)
    with pytest.raises(ConfigError, match=r"not numbers.*dtype bfloat16"):
        chat.reply([user("hello")], temperature=temperature, **options)
    broken.clear()
    assert chat.reply([user("hello")], temperature=temperature, **options).ids == wanted.ids
    assert chat.engine.is_idle
