"""Media of any size and length: tiles, windows, a clip with its track, and budgets of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmllm import config, planning
from mmllm import model as models
from mmllm.conversation import Audio, Image, Video
from mmllm.data.batch import collate
from mmllm.encoders.pieces import time_channels
from mmllm.errors import ConfigError, ContextError, MediaError
from mmllm.features.cache import FeatureCache, entry_name
from mmllm.features.store import FeatureStore
from mmllm.inference.chat import Chat
from mmllm.inference.inputs import as_messages, assistant, user
from mmllm.insight.positions import PassReader
from mmllm.planning import planner
from tests import parts
from tests.encoders import twins
from tests.encoders.twins import TWINS


@pytest.fixture(scope="module")
def tree(folders):
    """The config of a twin's encoder."""

    def make(name: str, **options) -> dict:
        twin = TWINS[name]
        return {"type": twin.type, "weights": str(folders(name)), **twin.options, **options}

    return make


def built(tree: dict):
    return config.build(config.parse_component("encoders", tree, "encoders.any"))


def image(height: int, width: int) -> Image:
    random = np.random.default_rng(height * width)
    return Image.from_numpy(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise(seconds: float, rate: int = 16_000) -> Audio:
    random = np.random.default_rng(round(seconds * rate))
    return Audio.from_numpy(0.1 * random.standard_normal((1, round(seconds * rate)), "f4"), rate)


def counts_and_mask_agree(encoder, media) -> list[int]:
    """N of each medium, after it was checked against the mask and against each alone."""
    features = encoder.encode(media)
    assert features.tokens.shape == (len(media), *encoder.feature_shape)
    counts = [encoder.layout[2](medium)[0] for medium in media]
    for row, medium in enumerate(media):
        alone = encoder.encode([medium])
        assert torch.allclose(alone.tokens[0], features.tokens[row], atol=1e-5)
        assert torch.equal(alone.mask[0], features.mask[row])
        assert not features.mask[row, counts[row] :].any()
    return counts


# --- tiles --------------------------------------------------------------------------------------


@torch.no_grad()
def test_tiles_are_the_encoders_own_answers_row_by_row_and_the_whole_image_last(tree):
    encoder = built({"type": "tiles", "encoder": tree("clip"), "max_tokens": 16 * 7})
    inner = built(tree("clip"))
    assert inner.feature_shape == (16, 16)
    assert encoder.feature_shape == (7 * 16, 16)
    wide = image(64, 96)  # of a side of 32: 2 x 3 tiles
    parts = [
        Image.from_numpy(wide.to_numpy()[32 * row : 32 * row + 32, 32 * column : 32 * column + 32])
        for row in range(2)
        for column in range(3)
    ]
    expected = inner.encode([*parts, wide]).tokens.flatten(0, 1)
    assert torch.allclose(encoder.encode([wide]).tokens[0], expected, atol=1e-5)


@torch.no_grad()
def test_an_image_takes_as_many_tiles_as_its_size_and_the_budget_allow(tree):
    encoder = built({"type": "tiles", "encoder": tree("clip"), "max_tokens": 16 * 5 + 3})
    media = [image(10, 10), image(64, 64), image(20, 300), image(300, 40), image(40, 64)]
    counts = counts_and_mask_agree(encoder, media)
    #  too small to cut; 2 x 2; one row of 4, as far as 5 pieces go; a column; 1 x 2
    assert [count // 16 for count in counts] == [1, 5, 5, 5, 3]
    one = built({"type": "tiles", "encoder": tree("clip"), "max_tokens": 20})
    assert counts_and_mask_agree(one, media) == [16] * 5
    assert one.fingerprint != encoder.fingerprint
    same = built({"type": "tiles", "encoder": tree("clip"), "max_tokens": 16 * 5})
    assert same.fingerprint == encoder.fingerprint, "the same number of tiles"


def test_budgets_and_encoders_that_do_not_fit_are_refused(tree):
    with pytest.raises(ConfigError, match=r"tiles\.max_tokens: a piece takes 16 tokens, got 15"):
        built({"type": "tiles", "encoder": tree("clip"), "max_tokens": 15})
    with pytest.raises(
        ConfigError, match=r"tiles\.encoder: expected an encoder of image, got .*audio"
    ):
        built({"type": "tiles", "encoder": tree("whisper")})
    with pytest.raises(ConfigError, match=r"images of one size, got one of any aspect"):
        built({"type": "tiles", "encoder": tree("siglip2")})
    with pytest.raises(ConfigError, match=r"tiles\.encoder: .*own tower reads media of any size"):
        built({"type": "tiles", "encoder": {"type": "backbone"}})


@torch.no_grad()
def test_native_patches_keep_to_a_budget(tree, folders):
    encoder = built(tree("siglip2", max_tokens=40))
    wide = image(20, 90)
    small = replace(wide, max_tokens=12)
    counts = counts_and_mask_agree(encoder, [wide, image(64, 64), small])
    assert 30 < counts[0] <= 40
    assert counts[1] == 36
    assert 6 < counts[2] <= 12
    assert encoder.fingerprint != built(tree("siglip2")).fingerprint
    twins.rewrite(folders("siglip2"), "preprocessor_config.json", max_num_patches=40)
    expected = TWINS["siglip2"].tokens(folders("siglip2"), wide)
    twins.rewrite(folders("siglip2"), "preprocessor_config.json", max_num_patches=20)
    found = encoder.encode([wide]).tokens[0, : counts[0]]
    assert torch.allclose(found, expected[: counts[0]], atol=1e-4)
    with pytest.raises(
        ConfigError, match=r"max_tokens: .*'clip.*' sees images of one size; .*tiles"
    ):
        built(tree("clip", max_tokens=40))
    with pytest.raises(ConfigError, match=r"max_tokens: expected at least 1, and no grid"):
        built(tree("siglip2", max_tokens=40, grid=2))


# --- windows ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["parakeet", "whisper", "clap"])
def test_windows_are_the_encoders_own_answers_with_their_time(tree, name):
    inner = built(tree(name))
    most, channels = inner.feature_shape
    encoder = built(
        {"type": "windows", "encoder": tree(name), "seconds": 1.0, "max_tokens": 3 * most}
    )
    long = noise(2.5)
    wave = long.to_numpy()
    windows = [Audio.from_numpy(wave[:, 16_000 * i : 16_000 * (i + 1)], 16_000) for i in range(3)]
    tokens, mask = [], []
    for at, window in enumerate(windows):
        found = inner.encode([window])
        here = found.mask[0] if found.mask is not None else torch.ones(most, dtype=torch.bool)
        keep = here if inner.layout else torch.ones_like(here)
        times = time_channels(torch.tensor([float(at)])).expand(int(keep.sum()), -1)
        tokens.append(torch.cat([found.tokens[0, keep], times], dim=1))
        mask.append(here[keep])
    expected = torch.cat(tokens)
    features = encoder.encode([long])
    assert features.tokens.shape[2] == channels + 16
    assert encoder.layout[2](long) == (len(expected), None)
    assert torch.allclose(features.tokens[0, : len(expected)], expected, atol=1e-5)
    assert torch.equal(features.mask[0, : len(expected)], torch.cat(mask))
    counts_and_mask_agree(encoder, [noise(0.4), long, noise(1.0)])


def test_of_audio_beyond_the_budget_windows_are_evenly_spaced(tree):
    tree = {"type": "windows", "encoder": tree("parakeet"), "seconds": 1.0, "max_tokens": 3 * 25}
    encoder = built(tree)
    assert encoder.num_pieces == 3
    starts = [at for _, at in encoder.cut(noise(9.0), encoder.num_pieces)]
    assert starts == [0.0, 4.0, 8.0]
    assert [at for _, at in encoder.cut(noise(2.1), 3)] == [0.0, 1.0, 2.0]
    assert [at for _, at in encoder.cut(noise(0.1), 3)] == [0.0]


@torch.no_grad()
def test_windows_of_a_clip(tree):
    frames = {"type": "frames", "frames": 2, "encoder": tree("clip", grid=2)}
    tree = {"type": "windows", "modality": "video", "encoder": frames, "seconds": 0.5}
    encoder = built({**tree, "max_tokens": 3 * 8})
    clips = twins.clips()  # of 9/8, 4/8 and 3/8 seconds
    assert counts_and_mask_agree(encoder, clips) == [24, 8, 8]
    second = Video.from_numpy(clips[0].to_numpy()[4:8], 8.0)
    expected = built(frames).encode([second]).tokens[0]
    found = encoder.encode([clips[0]]).tokens[0, 8:16]
    assert torch.allclose(found[:, :-16], expected, atol=1e-5)
    assert torch.allclose(found[:, -16:], time_channels(torch.tensor([0.5])).expand(8, -1))


# --- a clip and its track -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["clap", "parakeet"])
def test_a_track_is_read_with_its_frames(tree, name):
    frames = {"type": "frames", "frames": 2, "encoder": tree("clip", grid=2)}
    encoder = built({"type": "audio_video", "video": frames, "audio": tree(name)})
    video, audio = built(frames), built(tree(name))
    films = twins.films()
    counts = counts_and_mask_agree(encoder, films)
    assert counts[2] == 8, "no track"
    for film, count in zip(films[:2], counts, strict=False):
        seen = video.encode([film]).tokens[0]
        found = audio.encode([film.audio])
        sounding = found.tokens[0] if found.mask is None else found.tokens[0][found.mask[0]]
        assert count == len(seen) + len(sounding)
        tokens = encoder.encode([film]).tokens[0]
        assert torch.allclose(tokens[:8, :16], seen, atol=1e-5)
        assert torch.allclose(tokens[8:count, 16:], sounding, atol=1e-5)
        assert (tokens[:8, 16:] == 0).all()
        assert (tokens[8:count, :16] == 0).all()


@torch.no_grad()
def test_windows_of_a_clip_with_its_track_put_both_in_the_order_of_time(tree):
    frames = {"type": "frames", "frames": 2, "encoder": tree("clip", grid=2)}
    both = {"type": "audio_video", "video": frames, "audio": tree("parakeet")}
    encoder = built(
        {"type": "windows", "modality": "video", "encoder": both, "seconds": 0.5, "max_tokens": 200}
    )
    film = twins.films()[0]
    counts = counts_and_mask_agree(encoder, twins.films())
    track = film.audio.to_numpy()[:, 8_000:16_000]
    window = Video.from_numpy(film.to_numpy()[4:8], 8.0, audio=Audio.from_numpy(track, 16_000))
    inner = built(both)
    size = inner.layout[2](window)[0]
    assert counts[0] > 2 * size
    expected = inner.encode([window]).tokens[0, :size]
    found = encoder.encode([film]).tokens[0, size : 2 * size, :-16]
    assert torch.allclose(found, expected, atol=1e-5)


# --- budgets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tree, tmp_path_factory):
    """A tiny system that reads images by tiles and audio by windows."""
    folder = tmp_path_factory.mktemp("system")
    described = parts.system_tree(
        folder,
        encoders={
            "image": {"type": "tiles", "encoder": tree("clip"), "max_tokens": 16 * 5},
            "audio": {
                "type": "windows",
                "encoder": tree("parakeet"),
                "seconds": 1.0,
                "max_tokens": 3 * 25,
            },
        },
        input_projections={"image": {"type": "linear"}, "audio": {"type": "linear"}},
    )
    return models.build(config.parse_system(described))


def spans(model, *media) -> list[int]:
    """The positions of each medium in a prompt."""
    rendered = model.renderer.render([user("Look: ", *media)])
    assert rendered.ids.count(model.llm.tokens.placeholder_id) == sum(
        span.length for span in rendered.inputs
    )
    return [span.length for span in rendered.inputs]


def test_a_prompt_has_as_many_positions_as_the_media_need(model):
    assert spans(model, image(20, 20), image(64, 64), noise(0.5), noise(2.0)) == [16, 80, 7, 26]


def test_a_budget_of_a_medium_is_exact_in_prompt_and_cache(model, tmp_path):
    large = image(40, 64)  # 1 x 2 tiles and the whole
    less = replace(large, max_tokens=47)
    assert spans(model, large, less, replace(large, max_tokens=48)) == [48, 16, 48]
    with pytest.raises(MediaError, match=r"a piece takes 16 tokens, but its max_tokens is 15"):
        spans(model, replace(large, max_tokens=15))
    with pytest.raises(MediaError, match=r"max_tokens: expected a whole number from 1, got 0"):
        replace(large, max_tokens=0)
    for store in (None, FeatureStore(tmp_path)):
        names = {entry_name(medium, store) for medium in (large, less, replace(less))}
        assert len(names) == 2
        cache = FeatureCache(model, store=store)
        masks = cache.input_media("image", [large, less])["feature_mask"]
        assert masks.sum(dim=1).tolist() == [48, 16]


def test_a_budget_that_an_encoder_cannot_keep_is_refused(model, tree, tmp_path):
    described = parts.system_tree(tmp_path)
    fixed = models.build(config.parse_system(described))
    with pytest.raises(
        ContextError, match=r"takes 4 tokens, but its max_tokens is 3: raise it, or"
    ):
        spans(fixed, replace(image(8, 8), max_tokens=3))
    assert spans(fixed, replace(image(8, 8), max_tokens=4)) == [4]


def test_a_budget_of_a_request_holds_for_media_without_one(model):
    given = [Image.from_numpy(image(40, 64).to_numpy(), max_tokens=16), image(40, 64)]
    (message,) = as_messages("Look: ", images=given, media_tokens=48)
    assert [part.max_tokens for part in message.parts[1:]] == [16, 48]
    assert spans(model, *message.parts[1:]) == [16, 48]


@torch.no_grad()
def test_cached_features_and_samples_give_the_same_states(model):
    media = [image(64, 64), image(20, 20), noise(2.3), replace(image(64, 64), max_tokens=20)]
    prompts = [model.renderer.render([user("What? ", *media[:2], media[2])])]
    prompts.append(model.renderer.render([user("And this? ", media[3])]))

    def states(enabled: bool, items: list) -> torch.Tensor:
        cache = FeatureCache(model, enabled=enabled)
        for item in items:
            cache.check(item)
        batch = collate(items, cache, model.batch_layout, targets=False)
        return model.hidden(batch)

    sampled = states(False, prompts)
    assert torch.allclose(states(True, prompts), sampled, atol=1e-5)
    for row, prompt in enumerate(prompts):
        alone = states(True, [prompt])[0]
        assert torch.allclose(sampled[row, : len(alone)], alone, atol=1e-4)


def test_media_are_measured_after_the_weights_are_released(tree, tmp_path):
    described = parts.system_tree(
        tmp_path,
        encoders={"image": {"type": "tiles", "encoder": tree("clip"), "max_tokens": 80}},
        input_projections={"image": {"type": "linear"}},
    )
    own = models.build(config.parse_system(described))
    cache = FeatureCache(own)
    prompt = own.renderer.render([user(image(40, 64))])
    cache.check(prompt)
    encoder = own.encoders["image"]
    own.unload_encoders()
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert spans(own, image(40, 64)) == [48]
    batch = collate([prompt], cache, own.batch_layout, targets=False)
    assert own.hidden(batch).isfinite().all()


def test_a_track_is_a_part_of_what_is_cached(tmp_path):
    first, second, _ = twins.films()
    other = replace(first, audio=second.audio)
    for store in (None, FeatureStore(tmp_path)):
        assert entry_name(first, store) != entry_name(other, store)
        assert entry_name(first, store) == entry_name(replace(first), store)


def test_a_plan_names_the_tokens_of_a_medium(model):
    plan = planner.Plan(model.config, [], [], media={"image": (80, True), "audio": (25, False)})
    lines = list(planning.render(plan))
    assert any(line.split()[:2] == ["encoders.image", "80"] for line in lines)
    assert sum("at most, as many as it needs" in line for line in lines) == 1
    described = models.build(model.config, meta=True)
    assert planner.media_tokens(described) == {"image": (80, True), "audio": (75, True)}


def test_insight_counts_media_of_any_number_of_tokens(model):
    media = [image(64, 64), noise(0.5), image(20, 20)]
    prompt = model.renderer.render([user("One ", media[0], " two ", media[1], " three ", media[2])])
    batch = collate([prompt], FeatureCache(model), model.batch_layout, targets=False)
    shape = (batch.ids.shape[0], batch.ids.shape[1])
    found, _ = PassReader(model).read(shape, batch.sources, None, batch.positions, 0, ())
    for number, span in enumerate(prompt.inputs):
        where = slice(span.start, span.start + span.length)
        assert set(found.medium[where]) == {number}
        assert set(found.kind[where]) == {span.medium.modality}
    assert (found.medium >= 0).sum() == 80 + 7 + 16


def test_a_reply_keeps_to_the_budget_and_is_the_same_in_a_batch(model):
    chat = Chat(model)
    options = {"max_new_tokens": 4, "modalities": ["text"]}
    whole, less, own = (
        chat.reply("What? ", image=given, **options, **more)
        for given, more in (
            (image(40, 64), {}),
            (image(40, 64), {"media_tokens": 16}),
            (replace(image(40, 64), max_tokens=16), {}),
        )
    )
    assert whole.usage.prompt - less.usage.prompt == 32
    assert (less.ids, less.usage.prompt) == (own.ids, own.usage.prompt)
    conversations = [[user("What? ", image(40, 64))], [user("And? ", noise(2.3), image(9, 9))]]
    together = chat.reply_many(conversations, **options)
    alone = [chat.reply(conversation, **options) for conversation in conversations]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]


@torch.no_grad()
def test_packs_have_the_states_of_padded_rows(model):
    prompts = [
        model.renderer.render([user("What? ", image(40, 64)), assistant("A drum.")]),
        model.renderer.render([user("What? ", noise(1.5), image(9, 9)), assistant("Two of them.")]),
    ]
    padded, packed = (
        collate(prompts, FeatureCache(model), model.batch_layout, targets=False, pack=pack)
        for pack in (False, True)
    )
    states = [model.hidden(batch).flatten(0, 1)[batch.target_indices] for batch in (padded, packed)]
    assert torch.allclose(*states, atol=1e-4)
