"""Connectors: what they read, what they start from, and that a reply reads what training read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from mmllm import config, losses
from mmllm.conversation import assistant, user
from mmllm.data.batch import collate
from mmllm.errors import ConfigError, MmllmError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.sampling import Sampling
from mmllm.model import AnyToAny
from mmllm.projections.connector import Connector, ConnectorConfig, build
from mmllm.training.trainable import choose_trainable
from tests.batches import batch_of, loss_of, terms_of
from tests.samples import clip, picture, sound

EVERYTHING = {"*_projections.*": 1e-3, "llm.*": 1e-3}
MIXED = [
    [user(picture(30), "what is this?"), assistant("a red apple")],
    [user("draw"), assistant("here is one two three", picture(90, caption="a red apple"))],
    [user("draw"), assistant("here", picture(91, caption="a red dog"))],
    [
        user(sound(0.5), "and", clip(60), "and", picture(200)),
        assistant(
            *("one", sound(0.1, caption="a violin"), "two", clip(9, caption="a rocket")),
            picture(80, caption="a blue dog"),
        ),
        user("hello"),
        assistant("three four"),
    ],
]
SHAPES = {"embeds": (6, 10), "attention_mask": (6,), "pooled": (5,)}


def small(**options) -> ConnectorConfig:
    return ConnectorConfig(
        **{"signal_tokens": 4, "width": 16, "heads": 2, "layers": 2, "feed_forward": 32, **options}
    )


def connector(width: int = 8, shapes=SHAPES, **options) -> Connector:
    torch.manual_seed(0)
    return build(small(**options), condition_shapes=shapes, width=width).eval()


def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(make_connected) -> None:
    for conversations in ([MIXED[0]], [MIXED[1]], MIXED):
        model = make_connected(condition_dropout=0.5)
        groups = choose_trainable(model, EVERYTHING)
        loss_of(model, batch_of(model.train(), conversations)).backward()
        for group in groups:
            for name, parameter in group.parameters.items():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_packed_padded_and_single_batches_give_the_same_losses(make_connected, kernels) -> None:
    model = make_connected()
    model.llm.use_kernels(kernels)
    padded = terms_of(model, batch_of(model, MIXED))
    packed = terms_of(model, batch_of(model, MIXED, pack=True))
    single = [
        terms_of(model, batch_of(model, [conversation], seeds=[seed]))
        for seed, conversation in enumerate(MIXED)
    ]
    for name, term in padded.items():
        torch.testing.assert_close(packed[name].total, term.total, rtol=0, atol=1e-4)
        total = sum(each[name].total for each in single)
        torch.testing.assert_close(torch.as_tensor(total), term.total, rtol=0, atol=1e-4)


def test_words_are_those_of_the_reply_in_front_of_the_medium(make_connected) -> None:
    model = make_connected()
    batch = batch_of(model, MIXED)
    ids = batch.ids.flatten()
    decode = model.llm.tokenizer.decode
    spelled = [decode(ids[row[row >= 0]].tolist()) for row in batch.outputs["image"].word_indices]
    whole = model.llm.tokenizer("here is one two three").input_ids
    assert spelled == [decode(whole[-3:]), decode(model.llm.tokenizer("here").input_ids), ""]
    assert [decode(ids[row[row >= 0]].tolist()) for row in batch.outputs["audio"].word_indices] == [
        "one"
    ]
    assert batch.outputs["video"].word_indices is None


@torch.no_grad()
def test_tapped_states_are_those_of_transformers(make_connected) -> None:
    """Whatever computes them: the packed stack, transformers' layers, or the cached stack."""
    model = make_connected()
    llm = model.llm
    assert llm.tapped_layers == (1,)
    embeds = llm.embed(torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(0)))
    positions = torch.arange(16)[None]
    wanted = llm.backbone(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    wanted = torch.cat([wanted[2], wanted[1]], dim=-1)
    packed = llm(embeds, positions=positions, seq_lens=[16])
    padded = llm(embeds, positions=positions, mask=torch.ones(1, 16, dtype=torch.bool))
    cached = llm(embeds, positions=positions, cache=llm.new_cache())
    for states in (packed, padded, cached):
        torch.testing.assert_close(states, wanted, rtol=0, atol=1e-4)
    assert llm.select_layers(packed, [2, 1]).equal(packed)
    assert llm.select_layers(packed, [1]).equal(packed[..., llm.width :])


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_reply_reads_the_states_that_training_reads(make_connected, kernels) -> None:
    model = make_connected()
    model.llm.use_kernels(kernels)
    conversation = [user("draw a red apple")]
    prompt = model.renderer.render(conversation, add_generation_prompt=True)
    sampling = Sampling(
        max_new_tokens=5, modalities={"image": "force", "audio": "force", "video": "forbid"}
    )
    (output,) = generate(model, [prompt], FeatureCache(model), sampling=sampling)
    ids: list[int] = list(prompt.ids)
    labels = [-100] * len(ids)
    whole = model.renderer.render([*conversation, assistant("x", picture(1, caption="a dog"))])
    whole.ids, whole.labels, whole.outputs = ids, labels, list[object]()
    for piece in output.pieces:
        if isinstance(piece, int):
            ids.append(piece)
            labels.append(piece)
            continue
        span = model.llm.tokens.signal_ids(piece.key)
        whole.outputs.append(media_span(piece.key, len(ids), len(span)))
        ids += span
        labels += [model.llm.tokens.logit_index(piece.key), *[-100] * (len(span) - 1)]
    assert len(output.ids) == 5
    batch = collate([whole], None, model.batch_layout, targets=False)
    with torch.no_grad():
        flat = model.hidden(batch).flatten(0, 1)
    for span in output.spans:
        wanted = batch.outputs[span.key].select_states(flat)[0]
        torch.testing.assert_close(span.states, wanted, rtol=0, atol=1e-4)
    first = output.spans[0]
    assert (first.states != 0).any(-1).all()


def media_span(key: str, start: int, length: int):
    from mmllm.data.rendering import MediaSpan

    return MediaSpan(key, picture(1, caption="a dog"), start, length)


def test_absent_words_are_not_read() -> None:
    """The same as a connector without words, of the same weights."""
    with_words, without = connector(words=3), connector()
    state = with_words.state_dict()
    state["position"] = state["position"][3:]
    without.load_state_dict(state)
    signals = torch.randn(2, 4, 8)
    padded = torch.cat([torch.zeros(2, 3, 8), signals], dim=1)
    for name, value in with_words(padded).items():
        torch.testing.assert_close(value, without(signals)[name], rtol=0, atol=1e-5)
    padded[1, 2] = 1.0
    changed, before = with_words(padded)["embeds"], without(signals)["embeds"]
    torch.testing.assert_close(changed[0], before[0], rtol=0, atol=1e-5)
    assert (changed[1] - before[1]).abs().max() > 1e-3


def test_each_tensor_has_its_shape_and_masks_begin_full() -> None:
    for signal_tokens in (1, 4, 9):
        own = connector(signal_tokens=signal_tokens)
        condition = own(torch.randn(3, signal_tokens, 8))
        shapes = {name: value.shape[1:] for name, value in condition.items()}
        assert shapes == SHAPES
        assert condition["attention_mask"].equal(torch.ones(3, 6))
        assert (condition["embeds"].std(1) > 0.1).all()


def test_a_language_model_is_read_without_its_mask(language_model: Path) -> None:
    """Compared with its own layers under a mask of zeros, eagerly."""
    own = connector(weights=str(language_model), layers=1)
    x = torch.randn(2, 7, 24)
    llama = AutoModel.from_pretrained(language_model, attn_implementation="eager").eval()
    llama.layers = llama.layers[:1]
    llama.config.num_hidden_layers = 1
    with torch.no_grad():
        wanted = llama(inputs_embeds=x, attention_mask=torch.zeros(2, 1, 7, 7)).last_hidden_state
        got = own.encode(x, None)
        masked = torch.tensor([[False] * 7, [True] * 2 + [False] * 5])
        shorter = own.encode(x[1:, 2:], None)
    torch.testing.assert_close(own.encode(x, masked)[1, 2:], shorter[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    names = dict(own.encoder.named_parameters())
    assert not any("embed_tokens" in name for name in names)
    q = "layers.0.self_attn.q_proj.weight"
    assert names[q].equal(llama.get_parameter(q))


@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpoint_holds_the_connector(
    make_connected, language_model: Path, tmp_path: Path, trained: bool
) -> None:
    from mmllm import checkpoints

    model = make_connected()
    if trained:
        with torch.no_grad():
            for parameter in model.output_projections.parameters():
                parameter.add_(torch.randn_like(parameter))
    checkpoints.save(tmp_path / "saved", model, step=1)
    loaded = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "saved"))
    saved = dict(model.output_projections.named_parameters())
    for name, parameter in loaded.output_projections.named_parameters():
        assert parameter.equal(saved[name]), name
    assert loaded.llm.tapped_layers == (1,)


def test_layers_are_averaged_by_gates_that_are_reported() -> None:
    own = connector(llm_layers=(3, 5, 9), words=2)
    with torch.no_grad():
        own.gates.copy_(torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]))
    assert own.layer_gates() == {
        "signal tokens": pytest.approx([0, 1, 0]),
        "words": pytest.approx([1, 0, 0]),
    }
    signals = torch.randn(1, 6, 3, 8)
    before = own(signals.flatten(2))["embeds"]
    signals[:, :2, 1:] += 1.0  # what words are not read at
    signals[:, 2:, [0, 2]] += 1.0  # what signal tokens are not read at
    assert own(signals.flatten(2))["embeds"].allclose(before, atol=1e-5)
    signals[:, 2:, 1] += torch.randn(8)
    assert not own(signals.flatten(2))["embeds"].allclose(before, atol=1e-2)
    assert connector(llm_layers=(3,)).layer_gates() == {}


def test_standardising_takes_out_scales_and_starts_at_the_mean_caption() -> None:
    own = connector(condition_dropout=0.0)
    loud = torch.tensor([1000.0, *[1.0] * 7])
    signals = torch.randn(64, 4, 8) * loud + 5 * loud
    targets = {
        "embeds": torch.randn(64, 6, 10) * torch.linspace(0.1, 9, 10) + torch.arange(10.0),
        "pooled": torch.randn(64, 5) - 3,
        "attention_mask": torch.ones(64, 6),
    }
    targets["embeds"][:, 4:] = 0  # unused positions
    targets["attention_mask"][:, 4:] = 0
    assert own.is_new
    own.standardize(signals)
    own.start_at_captions(targets)
    assert not own.is_new
    read = (signals - own.shift) * own.scale
    torch.testing.assert_close(read.mean((0, 1)), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(read.std((0, 1)), torch.ones(8), rtol=0, atol=0.01)
    made, wanted = own(signals), targets["embeds"][:, :4]
    error = made["embeds"].mean((0, 1)) - wanted.mean((0, 1))
    assert (error.abs() < 2 * wanted.std((0, 1))).all()
    ratio = made["embeds"].std((0, 1)) / wanted.std((0, 1))
    assert ratio.min() > 0.2
    assert ratio.max() < 3
    assert made["attention_mask"].equal(torch.ones(64, 6))


def dropped_share(model: AnyToAny, seeds: int) -> float:
    return losses.draw_dropped(range(seeds), 0.25).float().mean().item()


def test_a_share_of_media_is_denoised_under_the_null_condition(make_connected) -> None:
    model = make_connected(condition_dropout=0.25)
    assert abs(dropped_share(model, 4000) - 0.25) < 0.03
    with torch.no_grad():
        for parameter in model.output_projections["image"].null.values():
            parameter.normal_()
    seeds = list(range(100, 124))
    batch = batch_of(model, [MIXED[1]] * len(seeds), seeds=seeds)
    media, decoder = batch.outputs["image"], model.decoders["image"]
    loss = next(
        each
        for each in losses.build_losses(model, {"denoise": 1.0})
        if each.name == "denoise/image"
    )
    output = model(batch)
    projection = model.output_projection("image")
    with torch.no_grad():
        projection.train()
        trained = loss.compute(output, batch).total
        projection.eval()
        held_out = loss.compute(output, batch).total
    noise, times = losses.draw_noise(media.latents, media.seeds)
    with torch.no_grad():
        own, null = (
            decoder.denoising_loss(condition, media.latents, noise=noise, times=times)
            for condition in (output.conditions["image"], projection.null_condition(len(seeds)))
        )
    is_dropped = losses.draw_dropped(media.seeds, 0.25)
    assert 0 < is_dropped.sum() < len(seeds)
    torch.testing.assert_close(trained, null.where(is_dropped, own).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(held_out, own.sum(), rtol=1e-5, atol=0)


def test_guidance_moves_away_from_the_null_condition(make_connected, monkeypatch) -> None:
    from mmllm.inference.chat import Chat

    model = make_connected()
    chat = Chat(model)
    options = {"seed": 3, "max_new_tokens": 1, "modalities": {"image": "force"}}

    def drawn(**decoder: object):
        reply = chat.reply([user("draw")], decoders={"image": decoder}, **options)
        return torch.from_numpy(reply.media[-1].to_numpy()).float()

    plain, guided = drawn(guidance=1.0), drawn(guidance=4.0)
    other = drawn(guidance=4.0, negative_prompt="blue dog")
    with torch.no_grad():
        for parameter in model.output_projections["image"].null.values():
            parameter.add_(3 * torch.randn_like(parameter))
    assert drawn(guidance=1.0).equal(plain)
    assert not drawn(guidance=4.0).equal(guided)
    assert drawn(guidance=4.0, negative_prompt="blue dog").equal(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition_dropout": 1.0}, "condition_dropout: expected at least 0 and below 1, got 1"),
        ({"signal_tokens": 0}, "signal_tokens: expected at least 1, got 0"),
        ({"words": -1}, "words: expected 0 or more, got -1"),
        ({"heads": 3}, "width 16 is not a multiple of heads 3"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connector(**options)


def test_what_the_language_models_lack_is_refused(
    make_model: Callable[..., AnyToAny], make_connected, language_model: Path, system_tree: dict
) -> None:
    with pytest.raises(ConfigError, match=r"llm_layers: expected layers from 1 to 2.*got 7"):
        make_connected(llm_layers=[1, 7])
    with pytest.raises(ConfigError, match="it has 2 layers, but `layers` asks for 9"):
        connector(weights=str(language_model), layers=9)
    with pytest.raises(MmllmError, match="weights '/nowhere'"):
        connector(weights="/nowhere")


def test_former_projections_are_as_they_were(make_model: Callable[..., AnyToAny]) -> None:
    """Names, and the bytes of their initialisation, which checkpoints and seeds depend on."""
    model = make_model()
    assert model.llm.tapped_layers == ()
    assert model.llm.state_width == model.llm.width
    assert model.batch_layout.num_words == {}
    names = {name.split(".")[0] for name, _ in model.output_projections["image"].named_parameters()}
    assert names == {"inward", "norm", "position", "encoder", "decoder", "queries", "outward"}


def test_plans_count_a_connector(system_tree: dict, language_model: Path) -> None:
    from mmllm import model as models
    from mmllm.planning.memory import projections
    from tests.projections.conftest import connectors

    tree = {**system_tree, "output_projections": connectors(language_model)}
    system = config.parse_system(tree)
    stage = config.parse_stage(
        {
            "name": "plan",
            "learning_rates": {"output_projections.*": 1e-3},
            "losses": {"denoise": 1.0},
            "data": {},
            "output": "unused",
        }
    )
    model = models.build(system, meta=True)
    counted = sum(value.numel() for value in model.output_projections.parameters())
    real = models.build(system)
    assert counted == sum(value.numel() for value in real.output_projections.parameters())
    saved, flops = projections(model, stage, rows=2)
    assert saved > 0
    assert flops > 0
