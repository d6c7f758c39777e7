"""The joined model: each tensor lands where it should, every mix of modalities works."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmllm import losses
from mmllm.conversation import user
from mmllm.data.batch import PACK_MULTIPLE, Batch
from mmllm.errors import CheckpointError
from mmllm.kernels import linear_cross_entropy
from mmllm.kernels.prepacked_linear import FrozenLinear
from mmllm.losses import LossTerm
from mmllm.model import AnyToAny
from mmllm.training.trainable import choose_trainable
from tests.batches import MIXED, batch_of, loss_of, terms_of
from tests.samples import clip, picture, sound

EVERYTHING = {
    "input_projections.*": 1e-3,
    "output_projections.*": 1e-3,
    "llm.signal_embeddings": 1e-3,
    "llm.signal_head": 1e-3,
    "llm.lora.*": 1e-3,
}


def test_every_input_lands_in_its_place(tiny_model: AnyToAny) -> None:
    """Projections that answer with the mean of their samples: red, green and blue."""
    conversation = [user(picture(10), "one", clip(20), "two", picture(30), sound(0.4))]
    batch = batch_of(tiny_model, [MIXED[3], conversation])
    for key, projection in tiny_model.input_projections.items():
        width = tiny_model.num_input_tokens[key]

        def constant(features, mask, width=width):
            return features.mean((1, 2))[:, None, None].expand(-1, width, tiny_model.llm.width)

        projection.forward = constant
    embeds = tiny_model.embed(batch)
    plain = tiny_model.llm.embed(batch.ids)
    rendered = tiny_model.renderer.render(conversation)
    taken = torch.zeros(rendered.num_used_tokens, dtype=torch.bool)
    for place in rendered.inputs:
        expected = tiny_model.encoders[place.key].encode([place.medium]).tokens.mean()
        span = slice(place.start, place.start + place.length)
        assert torch.allclose(embeds[1, span], expected.expand_as(embeds[1, span]))
        taken[span] = True
    rest = embeds[1, : rendered.num_used_tokens][~taken]
    assert torch.equal(rest, plain[1, : rendered.num_used_tokens][~taken])
    assert torch.equal(embeds[0], plain[0])


@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_tokens_that_no_target_reads_are_left_out(tiny_model: AnyToAny, pack: bool) -> None:
    """The end of the last turn is predicted and never read; targets and states stay equal."""
    whole = batch_of(tiny_model, MIXED, pack=pack, targets=False)
    trimmed = batch_of(tiny_model, MIXED, pack=pack)
    lengths = [tiny_model.renderer.render(talk) for talk in MIXED]
    assert all(0 < item.num_used_tokens < len(item) for item in lengths)
    ends = sum(len(item) - item.num_used_tokens for item in lengths)
    if pack:
        real = [batch.ids.shape[1] - batch.padding for batch in (whole, trimmed)]
        assert real[0] - real[1] == ends
    else:
        assert trimmed.ids.shape[1] == max(item.num_used_tokens for item in lengths)
    assert trimmed.labels.equal(whole.labels)
    states = [
        tiny_model(batch).hidden.flatten(0, 1)[batch.target_indices] for batch in (whole, trimmed)
    ]
    assert torch.allclose(*states, atol=1e-4)
    for key, media in whole.outputs.items():
        one = tiny_model(whole).hidden.flatten(0, 1)[media.token_indices]
        other = tiny_model(trimmed).hidden.flatten(0, 1)[trimmed.outputs[key].token_indices]
        assert torch.allclose(one, other, atol=1e-4)


def test_every_output_reads_its_own_states(tiny_model: AnyToAny) -> None:
    batch = batch_of(tiny_model, MIXED)
    output = tiny_model(batch)
    row = tiny_model.renderer.render(MIXED[2])
    for place in row.outputs:
        span = slice(place.start, place.start + place.length)
        states = output.hidden[2, span][None]
        alone = tiny_model.condition({place.key: states})[place.key]
        for name, value in alone.items():
            assert torch.allclose(output.conditions[place.key][name][-1], value[0], atol=1e-6)


def test_generation_leaves_the_attention_of_other_threads_alone(tiny_model: AnyToAny) -> None:
    """Attention kernels are chosen per process, and the LLM runs on while a medium is projected."""
    seen = []
    projection = tiny_model.output_projections["audio"]
    projection.encoder.register_forward_hook(
        lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled())
    )
    signals = torch.randn(1, projection.signal_tokens, tiny_model.llm.width)
    with torch.inference_mode():
        projection(signals)
    assert seen == [True]


def test_a_batch_without_a_modality_still_gives_every_parameter_a_gradient(
    make_model: Callable[..., AnyToAny],
) -> None:
    for conversations in ([MIXED[3]], [MIXED[0]], [MIXED[1]], MIXED):
        model = make_model()
        groups = choose_trainable(model, EVERYTHING)
        batch = batch_of(model, conversations)
        loss_of(model, batch).backward()
        for group in groups:
            for name, parameter in group.parameters.items():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


def test_mixed_and_single_batches_give_the_same_losses(tiny_model: AnyToAny) -> None:
    mixed = terms_of(tiny_model, batch_of(tiny_model, MIXED))
    singles: dict[str, list[LossTerm]] = {}
    for seed, conversation in enumerate(MIXED):
        batch = batch_of(tiny_model, [conversation], seeds=[seed])
        for name, term in terms_of(tiny_model, batch).items():
            singles.setdefault(name, []).append(term)
    assert {"text", "align/image", "denoise/video", "denoise/audio"} <= mixed.keys()
    for name, term in mixed.items():
        assert term.count == sum(single.count for single in singles[name])
        total = sum(single.total for single in singles[name])
        assert torch.allclose(term.total, torch.as_tensor(total), atol=1e-4), name


def test_packed_and_padded_batches_give_the_same_losses(tiny_model: AnyToAny) -> None:
    padded = terms_of(tiny_model, batch_of(tiny_model, MIXED))
    batch = batch_of(tiny_model, MIXED, pack=True)
    assert batch.ids.shape[0] == 1
    assert batch.ids.shape[1] % PACK_MULTIPLE == 0
    assert 0 < batch.padding < PACK_MULTIPLE
    assert batch.mask is None
    for name, term in terms_of(tiny_model, batch).items():
        assert term.count == padded[name].count
        assert torch.allclose(term.total, padded[name].total, atol=1e-4), name


def test_equal_conversations_share_almost_all_of_a_pack(
    tiny_model: AnyToAny,
) -> None:
    """The supervised tokens lie in the shared prefix, and count for each of the conversations."""
    talk = [MIXED[3]] * 3
    padded, packed = (batch_of(tiny_model, talk, pack=pack) for pack in (False, True))
    length = padded.ids.shape[1]
    real = packed.prefix_len + 3 * (length - packed.prefix_len)
    assert packed.ids.shape == (1, real + packed.padding)
    assert packed.target_indices.unique().numel() < len(packed.target_indices)
    found = [terms_of(tiny_model, batch)["text"].total for batch in (padded, packed)]
    assert torch.allclose(*found, atol=1e-4)


def test_a_shared_prefix_is_computed_once_and_changes_nothing(tiny_model: AnyToAny) -> None:
    choose_trainable(tiny_model, EVERYTHING)
    for _, parameter in tiny_model.llm.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(tiny_model, MIXED)
    assert batch.prefix_len >= len(
        tiny_model.llm.tokenizer("<|im_start|>system\nYou see.").input_ids
    )
    found = []
    for shared in (batch.prefix_len, 0):
        batch.prefix_len = shared
        tiny_model.zero_grad()
        terms = terms_of(tiny_model, batch)
        loss_of(tiny_model, batch).backward()
        gradients = [
            p.grad.clone() for _, p in tiny_model.trainable_candidates() if p.grad is not None
        ]
        found.append((terms, gradients))
    (once, gradients_once), (each, gradients_each) = found
    for name, term in once.items():
        assert torch.allclose(term.total, each[name].total, atol=1e-4), name
    for one, other in zip(gradients_once, gradients_each, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_text_loss_equals_the_language_models_own(tiny_model: AnyToAny) -> None:
    """Against transformers' loss on the same ids, where no medium is involved."""
    rendered = tiny_model.renderer.render(MIXED[3])
    logits = tiny_model.llm.model(torch.tensor([rendered.ids])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(rendered.labels[1:]), reduction="sum")
    rows = tiny_model.llm.signal_head.data.clone()
    tiny_model.llm.signal_head.data.zero_()
    zero_rows = terms_of(tiny_model, batch_of(tiny_model, [MIXED[3]]))["text"].total
    tiny_model.llm.signal_head.data.copy_(rows)
    # Three more rows of the head, with logit zero, enlarge each sum of exponentials by 3.
    keep = torch.tensor(rendered.labels[1:]) != -100
    larger = torch.logaddexp(logits[keep].logsumexp(-1), torch.tensor(3.0).log())
    correction = (larger - logits[keep].logsumexp(-1)).sum()
    assert torch.allclose(zero_rows, expected + correction, atol=1e-4)


@pytest.mark.parametrize(
    ("table", "trained"),
    [
        ({"input_projections.*": 1e-3}, ["input_projections"]),
        (
            {"output_projections.*": 1e-3, "llm.signal_embeddings": 1e-3, "llm.signal_head": 1e-3},
            ["output_projections", "llm.signal_embeddings", "llm.signal_head"],
        ),
        (
            EVERYTHING,
            [
                "input_projections",
                "output_projections",
                "llm.signal_embeddings",
                "llm.signal_head",
                "lora_",
            ],
        ),
    ],
)
def test_exactly_the_parameters_of_the_table_train(
    make_model: Callable[..., AnyToAny], table: dict[str, float], trained: list[str]
) -> None:
    model = make_model()
    groups = choose_trainable(model, table)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {
        name for name, _ in model.named_parameters() if any(part in name for part in trained)
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pipelines = {
        (key, part, name): value.clone()
        for key, decoder in model.decoders.items()
        for part, module in decoder.pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, value in module.state_dict().items()
    }
    parameters = [p for group in groups for p in group.parameters.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # LoRA's A gets its first gradient when B is no longer zero
        optimizer.zero_grad()
        batch = batch_of(model, MIXED)
        loss_of(model, batch).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name
        assert (parameter.grad is None) == (name not in names), name
    for (key, part, name), value in pipelines.items():
        assert torch.equal(value, model.decoders[key].pipeline.components[part].state_dict()[name])


def test_a_pattern_without_a_match_is_an_error(tiny_model: AnyToAny) -> None:
    with pytest.raises(ValueError, match="matches no parameter"):
        choose_trainable(tiny_model, {"input_projection.*": 1e-3})
    with pytest.raises(ValueError, match="is matched by"):
        choose_trainable(tiny_model, {"llm.signal_embeddings": 1e-3, "llm.*": 1e-3})


def test_another_encoder_grid_is_refused(tiny_model: AnyToAny) -> None:
    batch = batch_of(tiny_model, [MIXED[0]])
    features = batch.inputs["image"].features
    assert features is not None
    batch.inputs["image"].features = features[:, :2]
    with pytest.raises(ValueError, match="expected features"):
        tiny_model(batch)


@pytest.mark.parametrize("pack", [False, True])
def test_first_tokens_begin_replies_or_follow_media(tiny_model: AnyToAny, pack: bool) -> None:
    batch = batch_of(tiny_model, MIXED, pack=pack)
    spoken = [tiny_model.llm.tokenizer.decode(label) for label in batch.labels[batch.first_tokens]]
    firsts = [token if token == "<|im_end|>" else token[0] for token in spoken]
    assert firsts == ["a", "h", "<|im_end|>", "o", "t", "<|im_end|>", "t", "o"]


def test_noise_belongs_to_the_item(tiny_model: AnyToAny) -> None:
    latents = torch.zeros(3, 2, 4)
    noise, times = losses.draw_noise(latents, [5, 6, 7])
    again, time = losses.draw_noise(latents[:1], [7])
    assert torch.equal(noise[2], again[0])
    assert times[2] == time[0]
    assert not torch.equal(noise[0], noise[1])


def test_total_loss_divides_by_the_count_over_all_processes() -> None:
    one = {"text": LossTerm(torch.tensor(6.0), 3), "align/image": LossTerm(torch.tensor(0.0), 0)}
    weighted = [losses.TextNLL(1.0), losses.Align("image", 2.0, masks={})]
    assert losses.total_loss(weighted, one, {"text": 6, "align/image": 4}) == 1.0
    assert np.isfinite(losses.total_loss(weighted, one, {"text": 3, "align/image": 0}))


def test_lora_of_another_rank_is_refused(make_model: Callable[..., AnyToAny], tmp_path) -> None:
    model = make_model()
    model.llm.attach_lora()
    model.llm.save_lora(tmp_path)
    tree = {**model.config.llm.__dict__, "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
    other = make_model(llm=tree)
    with pytest.raises(CheckpointError, match=r"lora\.rank"):
        other.llm.load_lora(tmp_path)


def gradients_of(model: AnyToAny, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {n: p.grad.clone() for n, p in model.trainable_candidates() if p.grad is not None}


@pytest.mark.usefixtures("auto_kernels")
def test_logits_in_chunks_give_the_same_loss_and_gradients(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_trainable(tiny_model, EVERYTHING)
    batch = batch_of(tiny_model, MIXED)
    whole = terms_of(tiny_model, batch)["text"].total
    wanted = gradients_of(tiny_model, batch)
    sizes = []
    forward, vocab_size = FrozenLinear.forward, len(tiny_model.llm.embedding.weight)

    def spy(layer: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
        if len(layer.weight) == vocab_size:
            sizes.append(len(x))
        return forward(layer, x)

    monkeypatch.setattr(FrozenLinear, "forward", spy)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_SIZE", 3)
    torch.testing.assert_close(terms_of(tiny_model, batch)["text"].total, whole)
    found = gradients_of(tiny_model, batch)
    assert max(sizes) == 3
    assert len(batch.labels) > 9
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.usefixtures("auto_kernels")
def test_recomputed_activations_give_the_same_loss_and_gradients(make_model) -> None:
    found = []
    for recompute in (False, True):
        model = make_model()
        choose_trainable(model, EVERYTHING)
        if recompute:
            model.llm.gradient_checkpointing_enable()
        batch = batch_of(model, MIXED)
        assert batch.prefix_len > 0
        calls = []
        layer = model.llm.backbone.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        found.append((gradients_of(model, batch), len(calls)))
    (wanted, once), (same, again) = found
    assert again == once  # the prefix, then all rows; or all of it, and all of it once more
    for name, value in wanted.items():
        torch.testing.assert_close(same[name], value, msg=name, rtol=1e-4, atol=1e-6)
