"""Masks, references and noise of replies: what of the request and the conversation reaches whom."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmllm.conversation import Image, assistant, user
from mmllm.data.references import ReferenceRules, find_references
from mmllm.errors import ConfigError, MediaError
from mmllm.inference.chat import Chat
from mmllm.inference.conditions import MARK, ConditionMemory, blend
from tests.decoders import tiny
from tests.samples import clip, picture

ONE: dict[str, Any] = {"modalities": {"image": "force"}, "max_new_tokens": 4, "max_media": 1}


def left_half(image: Image) -> Image:
    pixels = np.zeros_like(image.to_numpy())
    pixels[:, : image.width // 2] = 255
    return Image.from_numpy(pixels)


@pytest.fixture
def chat(tiny_model) -> Chat:
    return Chat(tiny_model)


def canvas(tiny_model) -> Image:
    """A picture of the decoder's size."""
    height, width = tiny_model.decoders["image"].size
    rng = np.random.default_rng(0)
    return Image.from_numpy(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_the_rule_of_references():
    one, two, three, drawn = (picture(level) for level in (10, 20, 30, 40))
    empty = Image(caption="without data")
    turns = [user("a", one), assistant("b", drawn), user("c", two, clip(1), three, empty)]
    assert find_references(turns, "auto", 4) == ([two, three], 0)
    assert find_references(turns, "auto", 1) == ([three], 1)
    assert find_references(turns[:2], "auto", 4) == ([one], 0)
    assert find_references([*turns[:2], user("c")], "auto", 4) == ([drawn], 0)
    assert find_references(turns, "all", 3) == ([drawn, two, three], 1)
    assert find_references(turns, "none", 4) == ([], 0)
    assert find_references([user("a")], "auto", 4) == ([], 0)


def test_media_that_start_from_a_picture_train_without_references():
    """As they are sampled."""
    configs = [{"references": "auto", "init_media": start} for start in ("none", "last")]
    decoders = {
        config["init_media"]: SimpleNamespace(max_references=1, config=SimpleNamespace(**config))
        for config in configs
    }
    assert ReferenceRules.of(decoders).by_key == {"none": ("auto", 1)}


def test_a_mask_changes_its_part_of_the_newest_picture_and_nothing_else(chat, tiny_model):
    original = canvas(tiny_model)
    mask = left_half(original)
    turns = [user("one", original)]
    reply = chat.reply(turns, seed=1, decoders={"image": {"mask": mask}}, **ONE)
    before, after = original.to_numpy(), reply.image.to_numpy()
    half = original.width // 2
    assert np.array_equal(before[:, half:], after[:, half:])
    assert not np.array_equal(before[:, :half], after[:, :half])
    # What is masked is made anew, unless the request has a strength.
    own = {"mask": mask, "init_media": original}
    for strength, equal in ((1.0, True), (0.5, False)):
        options = {"image": {**own, "strength": strength}}
        again = chat.reply([user("one", original)], seed=1, decoders=options, **ONE)
        assert np.array_equal(again.image.to_numpy(), after) == equal
    made_from = reply.image.provenance["made_from"]
    assert made_from == {"init_media": {"given": True}, "masked": True}


def test_a_batch_with_a_mask_is_its_conversations(chat, tiny_model):
    original = canvas(tiny_model)
    options = {"image": {"mask": left_half(original)}}
    turns = [[user("one", original)], [user("two", canvas(tiny_model))]]
    batch = chat.reply_many(turns, seeds=[1, 2], decoders=options, **ONE)
    for turn, seed, reply in zip(turns, (1, 2), batch, strict=True):
        alone = chat.reply(turn, seed=seed, decoders=options, **ONE).image.to_numpy()
        assert np.abs(alone.astype(int) - reply.image.to_numpy()).max() <= 1


def test_what_cannot_be_is_refused_before_any_work(chat, tiny_model):
    original = canvas(tiny_model)

    def ask(modality: str, *parts: Any, **options: Any) -> None:
        chat.reply([user("one", *parts)], decoders={modality: options}, seed=1, **ONE)

    mask = left_half(original)
    with pytest.raises(ConfigError, match="mask: there is no picture in the conversation"):
        ask("image", mask=mask)
    with pytest.raises(MediaError, match="mask: expected the size of its picture"):
        ask("image", picture(10), mask=mask)
    with pytest.raises(ConfigError, match="Pipeline takes no mask"):
        ask("video", original, mask=mask)
    with pytest.raises(ConfigError, match=r"mask: expected Image\(...\), got"):
        ask("image", original, mask=clip(1))
    with pytest.raises(ConfigError, match="Pipeline takes no references"):
        ask("image", references=[original])
    with pytest.raises(
        ConfigError, match=r"references: expected media such as Image\(...\), got 3"
    ):
        ask("image", references=[3])
    with pytest.raises(ConfigError, match="noise: expected new or last, got 'old'"):
        ask("image", noise="old")


def test_the_same_but_different_begins_with_the_same_noise(chat, tiny_model, tmp_path, monkeypatch):
    """Also from a file of the picture; a picture of another model begins with its own noise."""
    drawn = chat.reply([user("one")], seed=5, **ONE)
    seeds, sample = [], tiny_model.decoders["image"].sample

    def recording(*args: Any, generators: Any, **options: Any) -> Any:
        seeds.append(generators[0].initial_seed())
        return sample(*args, generators=generators, **options)

    monkeypatch.setattr(tiny_model.decoders["image"], "sample", recording)
    first = drawn.image.provenance["noise_seed"]
    file = drawn.image.save(tmp_path / "drawn.png")
    same = {"image": {"noise": "last"}}
    foreign = Image(drawn.image.to_numpy(), provenance={**drawn.image.provenance, "model": "x"})
    for earlier in (drawn.image, Image(file), foreign):
        turns = [user("one"), assistant("", earlier), user("at night")]
        reply = chat.reply(turns, seed=6, decoders=same, **ONE)
        assert reply.image.provenance["noise_seed"] == seeds[-1]
        assert (seeds[-1] == first) == (earlier is not foreign)
    chat.reply([user("one"), drawn.message, user("at night")], seed=6, **ONE)
    assert seeds[-1] != first
    chat.reply([user("one")], seed=6, decoders=same, **ONE)  # there is nothing to begin from
    assert seeds[-1] != first


@pytest.mark.parametrize("name", ["mask", "init_media", "references"])
@pytest.mark.parametrize("value", [3, [], [None], np.zeros((4, 4, 3)), Image(caption="no data")])
def test_what_holds_no_medium_is_refused_by_the_name_of_the_option(chat, tiny_model, name, value):
    turns = [user("one", canvas(tiny_model))]
    options = {"image": {name: value}}
    if name == "references" and isinstance(value, list) and not value:
        assert chat.reply(turns, decoders=options, **ONE).image  # there are none
        return
    with pytest.raises(ConfigError, match=f"image: {name}: expected"):
        chat.reply(turns, decoders=options, **ONE)


def test_media_of_other_kinds_and_near_names_are_refused(chat, tiny_model):
    turns = [user("one", canvas(tiny_model))]
    for options, wrong in (
        ({"init_media": clip(1)}, "expected 1 initial media of modality image"),
        ({"masks": 1}, "unknown option 'masks'.*, mask; did you mean 'mask'"),
        ({"nois": "last"}, "did you mean 'noise'"),
        (3, "image: expected options by name, got 3"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            chat.reply(turns, decoders={"image": options}, **ONE)


def test_a_file_is_known_by_what_its_file_says(chat, tiny_model, tmp_path):
    """Where a picture comes from is in what is made of it, also when it comes back as a file."""
    drawn = chat.reply([user("one")], seed=5, **ONE).image
    files = [Image(drawn.save(tmp_path / f"drawn.{kind}")) for kind in ("png", "webp", "jpg")]
    options = {"image": {"init_media": "last", "strength": 0.5}}
    for source in (drawn, *files):
        reply = chat.reply([user("one", source)], seed=6, decoders=options, **ONE)
        found = reply.image.provenance["made_from"]["init_media"]
        assert found == {
            name: drawn.provenance[name] for name in ("model", "decoder", "seed", "noise_seed")
        }
    mark = {"model": 3, "seed": True, "noise_seed": -1, "decoder": "x" * 1000}
    strange = Image(drawn.to_numpy(), provenance=mark)
    reply = chat.reply([user("one", strange)], seed=6, decoders=options, **ONE)
    assert reply.image.provenance["made_from"]["init_media"] == {"given": True}


def test_noise_is_looked_for_in_media_of_the_decoders_modality(chat):
    """A clip that follows does not count, whatever it says."""
    drawn = chat.reply([user("one")], seed=5, **ONE)
    mark = {**drawn.image.provenance, "noise_seed": 7}
    turns = [user("one"), drawn.message, user("at night", replace(clip(1), provenance=mark))]
    reply = chat.reply(turns, seed=6, decoders={"image": {"noise": "last"}}, **ONE)
    assert reply.image.provenance["noise_seed"] == drawn.image.provenance["noise_seed"]


@pytest.fixture
def referring(make_model, system_tree, tmp_path, monkeypatch):
    """A model that draws by a FLUX.2, and the references of each of its calls."""
    tree = {"type": "flux2", "weights": str(tiny.save("flux2", tmp_path / "flux2")), "steps": 2}
    tree |= {"max_caption_tokens": tiny.TOKENS, "height": 64, "width": 64, "references": "auto"}
    model = make_model(decoders={**system_tree["decoders"], "image": tree})
    calls: list[Any] = []
    sample = model.decoders["image"].sample

    def recording(*args: Any, **options: Any) -> Any:
        calls.append(options["references"])
        return sample(*args, **options)

    monkeypatch.setattr(model.decoders["image"], "sample", recording)
    return Chat(model), calls


def test_references_of_the_conversation_and_of_the_request_reach_the_decoder(referring):
    chat, calls = referring
    one, two, three = (picture(level) for level in (10, 120, 230))
    turns = [user("a", one), assistant("b"), user("c", two, three)]
    ask = {**ONE, "seed": 1}
    made = [
        chat.reply(turns, decoders={"image": options}, **ask).image
        for options in ({}, {"references": "none"}, {"references": "all"}, {"references": [one]})
    ]
    assert calls == [[(two, three)], None, [(one, two, three)], [(one,)]]
    for index, image in enumerate(made):
        others = [np.array_equal(image.to_numpy(), other.to_numpy()) for other in made[:index]]
        assert not any(others)
    assert made[1].provenance.keys() & {"made_from"} == set()
    assert made[0].provenance["made_from"] == {"references": [{"given": True}] * 2}
    batch = chat.reply_many([turns, turns[:1], [user("d")]], seeds=[1, 1, 1], **ONE)
    assert calls[4:] == [[(two, three), (one,)], None]
    assert np.abs(batch[0].image.to_numpy().astype(int) - made[0].to_numpy()).max() <= 1


def test_more_references_than_the_decoder_takes_are_noted(referring):
    chat, calls = referring
    many = [picture(level) for level in range(12)]
    reply = chat.reply([user("a", *many)], seed=1, **ONE)
    assert calls == [[tuple(many[2:])]]
    assert reply.notes == (
        "the decoder takes 10 references: the oldest 2 picture(s) were left out",
    )
    with pytest.raises(ConfigError, match="takes at most 10 reference"):
        chat.reply([user("a")], decoders={"image": {"references": many}}, **ONE)


def test_a_share_of_the_former_condition_is_kept(chat, tmp_path):
    """All of it, and the former noise, is the former picture; a part is in between."""
    drawn = chat.reply([user("one")], seed=5, **ONE)
    turns = [user("one"), drawn.message, user("two three")]

    def made(**options: Any) -> Image:
        same = {"image": {"noise": "last", **options}}
        return chat.reply(turns, seed=6, decoders=same, **ONE).image

    first = drawn.image.to_numpy().astype(int)
    whole, half, none = (made(keep=share) for share in (1.0, 0.5, 0.0))
    assert np.array_equal(whole.to_numpy(), first)
    away = [np.abs(each.to_numpy() - first).mean() for each in (half, none)]
    assert 0 < away[0] < away[1]
    assert half.provenance["made_from"] == {"kept_condition": 0.5}
    for earlier, is_known in (
        (Image(drawn.image.save(tmp_path / "drawn.png")), True),
        (Image(drawn.image.to_numpy(), provenance={**drawn.image.provenance, MARK: "x"}), False),
        (Image(drawn.image.to_numpy(), provenance={**drawn.image.provenance, MARK: 3}), False),
    ):
        parts = [earlier if part is drawn.image else part for part in drawn.message.parts]
        turns = [user("one"), drawn.message.with_parts(parts), user("two three")]
        expected = whole if is_known else none
        assert np.array_equal(made(keep=1.0).to_numpy(), expected.to_numpy())
    with pytest.raises(ConfigError, match=r"keep: expected from 0 to 1, got 1\.5"):
        made(keep=1.5)


def test_conditions_are_forgotten_beyond_bounds():
    memory = ConditionMemory(max_bytes=8 * 16)

    def medium(decoder: str, value: float, num: int = 4) -> Image:
        mark = memory.keep(decoder, {"embeds": torch.full((num,), value)})
        return Image(canvas_of(1).to_numpy(), provenance={"decoder": decoder, MARK: mark})

    media = [medium("image", float(number)) for number in range(10)]
    assert len(memory) == 8
    assert memory.newest(media[:2], "image") is None  # the oldest of ten, where eight fit
    assert memory.newest(media[:3], "image")["embeds"][0] == 2
    assert memory.newest(media, "video") is None
    assert medium("image", 2.0).provenance == media[2].provenance  # which is now the newest
    assert medium("video", 2.0).provenance[MARK] != media[2].provenance[MARK]
    assert memory.newest(media[:3], "image")["embeds"][0] == 2
    assert memory.newest(media[:4], "image")["embeds"][0] == 2
    assert medium("image", 0.0, num=5).provenance[MARK] is None  # more than an eighth
    assert memory.newest([picture(3)], "image") is None


def test_blending_conditions():
    new = {"embeds": torch.zeros(3, 2, 1), "mask": torch.tensor([[1.0, 0.0]] * 3)}
    old = {"embeds": torch.ones(2, 1), "mask": torch.tensor([0.0, 1.0])}
    mixed = blend(new, [(old, 0.25), (None, 0.5), (old, 1.0)])
    assert mixed["embeds"][:, 0, 0].tolist() == [0.25, 0.0, 1.0]
    assert mixed["mask"].tolist() == [[1, 1], [1, 0], [0, 1]]
    assert new["embeds"].sum() == 0
    assert blend(new, [(old, 0.0), (None, 1.0), (None, 0.0)]) is new


def test_an_initial_picture_goes_before_the_configs_references(referring):
    """FLUX.2 takes one or the other: what the request names counts, and both are refused."""
    chat, calls = referring
    one, two = canvas_of(1), canvas_of(2)
    made = [
        chat.reply([user("a", two)], seed=1, decoders={"image": {"init_media": each}}, **ONE).image
        for each in (one, two)
    ]
    assert calls == [None, None]
    assert not np.array_equal(made[0].to_numpy(), made[1].to_numpy())
    both = {"image": {"init_media": one, "references": [two]}}
    with pytest.raises(ConfigError, match="takes an initial picture or references, not both"):
        chat.reply([user("a")], seed=1, decoders=both, **ONE)


def canvas_of(seed: int) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.from_numpy(pixels)


def test_a_decoder_that_only_edits_leaves_conversations_without_pictures_alone(
    referring, monkeypatch
):
    """It makes nothing there, and says so; with a picture, or if it must, it is as ever."""
    chat, _ = referring
    decoder = chat.model.decoders["image"]
    monkeypatch.setattr(type(decoder), "needs_references", True)
    auto: dict[str, Any] = {"modalities": {"audio": "forbid", "video": "forbid"}}
    turns = [[user("one")], [user("two", picture(10))]]
    batch = chat.reply_many(turns, seeds=[1, 2], max_new_tokens=4, **auto)
    for turn, seed, reply in zip(turns, (1, 2), batch, strict=True):
        alone = chat.reply(turn, seed=seed, max_new_tokens=4, **auto)
        assert alone.text == reply.text
        assert alone.notes == reply.notes
        noted = any("needs a picture" in note for note in reply.notes)
        assert noted == (turn is turns[0])
    assert not batch[0].media
    with pytest.raises(ConfigError, match="needs a picture, and there is none"):
        chat.reply(turns[0], seed=1, **ONE)
    for choice in ({"image": "forbid"}, ["audio"]):
        reply = chat.reply(turns[0], seed=1, modalities=choice, max_new_tokens=4, max_media=1)
        assert reply.notes == ()
    (reply,) = chat.reply_many([turns[0]], seeds=[1], render_media=False, **ONE)
    assert [medium.has_data for medium in reply.media] == [False]
