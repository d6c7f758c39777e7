"""Teaching a tiny model whose projection chooses words, or names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import checkpoints, config
from mmllm.checkpoints import load_model, open_checkpoint
from mmllm.conversation import Image
from mmllm.data.formats.labelled import read_labelled
from mmllm.errors import ConfigError
from mmllm.projections.ctc import CTCConfig, CTCProjection
from mmllm.training.learners import NameLearner
from mmllm.training.teaching import Lesson, TeachingOptions, teach

WORDS = {"type": "words", "words": 6, "num_tokens": 2}
CTC = {
    **{"type": "ctc", "num_tokens": 8, "steps": 12, "vocabulary": 9},
    **{"width": 32, "heads": 2, "layers": 1},
}
SMALL: dict[str, Any] = {
    **{"num_tokens": 4, "steps": 6, "vocabulary": 5},
    **{"width": 8, "heads": 2, "layers": 1},
}
COLOURS = {
    **{"red apple": (250, 20, 20), "rocket": (20, 20, 240), "violin": (20, 240, 20)},
    **{"hour": (240, 230, 20), "world": (20, 230, 240)},
}
"""What the three numbers are that ColourEncoder sees of an image."""


@pytest.fixture(autouse=True)
def own_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.trusted.TRUSTED, "names", {"tests"})


def write(folder: Path, *labels: str) -> Path:
    """Three images of each label."""
    rng = np.random.default_rng(1)
    for label in labels:
        for number in range(3):
            pixels = np.repeat(np.tile(COLOURS[label], 4), 16).reshape(8, 8, 3)
            pixels = pixels + rng.integers(-9, 9, pixels.shape)
            Image.from_numpy(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def written_model(make_model: Any, system_tree: dict, folder: Path, kind: dict) -> Path:
    """A tiny model that reads media at random."""
    changed = {**system_tree["input_projections"], "image": kind}
    model = make_model(input_projections=changed)
    projection = model.input_projections["image"]
    if kind["type"] in ("words", "ctc"):
        with torch.no_grad():  # as sure of what it says as a trained one
            projection.classifier.weight.mul_(10)
    if isinstance(projection, CTCProjection):
        tokens = dict.fromkeys(model.llm.tokenizer.encode(" a rocket a violin"))
        ids = list(tokens)[: projection.vocabulary]
        projection.set_vocabulary(ids, model.llm.embedding.weight[torch.tensor(ids)])
    return checkpoints.save(folder / "model", model, step=0)


def taught(folder: Path, model: Path, **changes: Any) -> Lesson:
    options = {"steps": 500, "batch_size": 16, "learning_rate": 3e-2, "keep": 5.0} | changes
    (lesson,), media = teach(
        write(folder / "own", "red apple", "hour"),
        folder / "taught",
        model=str(model),
        rehearse=write(folder / "known", "rocket", "violin", "world"),
        options=TeachingOptions(**options),
        progress=False,
    )
    assert len(media.items) == 6
    return lesson


@pytest.mark.parametrize("kind", [WORDS, CTC], ids=["words", "ctc"])
def test_new_things_are_read_by_name_and_the_others_as_before(
    kind: dict, make_model: Any, system_tree: dict, tmp_path: Path
) -> None:
    source = written_model(make_model, system_tree, tmp_path, kind)
    lesson = taught(tmp_path, source)
    assert (lesson.encoder, lesson.num_media) == ("image", 6)
    assert lesson.new == ["an hour", "a red apple"]
    assert lesson.known == []
    assert lesson.accuracy == 1.0
    assert lesson.kept is not None
    assert lesson.kept >= 0.8
    before, after = (load_model(open_checkpoint(path)) for path in (source, tmp_path / "taught"))
    old, new = (model.state_dict() for model in (before, after))
    changed = {
        name
        for name, value in new.items()
        if name not in old or value.shape != old[name].shape or not torch.equal(value, old[name])
    }
    head = "input_projections.image."
    own = {
        "words": ("table", "classifier.weight", "classifier.bias"),
        "ctc": ("name_ids", "namer.weight", "namer.bias"),
    }
    assert changed == {head + name for name in own[kind["type"]]}
    rows = len(old[head + "table"])
    assert torch.equal(new[head + "table"][:rows], old[head + "table"])
    if kind is CTC:
        assert after.config.input_projections["image"].names == 2
        features = features_of(after, tmp_path / "own" / "hour" / "0.png")
        projection: Any = after.input_projections["image"]
        (read,) = projection.spell(features)
        assert after.llm.tokenizer.decode(read) == " an hour"
        tokens = projection(features)[0, : len(read)]
        assert torch.equal(tokens, after.llm.embed(torch.tensor(read)))


def features_of(model: Any, file: Path) -> torch.Tensor:
    """float[1, L, C] of an image."""
    encoder = model.encoders["image"]
    return encoder(encoder.preprocess(Image(file).decoded())[None]).tokens


def test_a_caption_that_is_a_name_is_known_and_new_ones_are_not_rehearsed(
    make_model: Any, system_tree: dict, tmp_path: Path
) -> None:
    source = written_model(make_model, system_tree, tmp_path, CTC)
    taught(tmp_path, source)
    lessons, _ = teach(
        write(tmp_path / "again", "hour", "rocket"),
        tmp_path / "again-taught",
        model=str(tmp_path / "taught"),
        rehearse=write(tmp_path / "both", "hour", "rocket"),
        options=TeachingOptions(steps=300, batch_size=16, learning_rate=3e-2),
        progress=False,
    )
    assert (lessons[0].known, lessons[0].new) == (["an hour"], ["a rocket"])
    assert (lessons[0].accuracy, lessons[0].kept) == (1.0, 1.0)
    (found,) = checkpoints.saved_names(open_checkpoint(tmp_path / "again-taught")).values()
    assert found == 3


def test_what_is_rehearsed_without_a_name_stays_spelled(
    make_model: Any, system_tree: dict, tmp_path: Path
) -> None:
    source = written_model(make_model, system_tree, tmp_path, CTC)
    taught(tmp_path, source)
    before, after = (load_model(open_checkpoint(path)) for path in (source, tmp_path / "taught"))
    for label in ("rocket", "violin", "world"):
        features = features_of(after, tmp_path / "known" / label / "0.png")
        was, now = (model.input_projections["image"](features) for model in (before, after))
        assert torch.equal(was, now)


def test_media_in_memory_are_taught_as_those_of_a_folder(
    make_model: Any, system_tree: dict, tmp_path: Path
) -> None:
    source = written_model(make_model, system_tree, tmp_path, CTC)
    taught(tmp_path, source)
    lessons, media = teach(
        read_labelled(tmp_path / "own"),
        tmp_path / "memory",
        model=str(source),
        rehearse=read_labelled(tmp_path / "known"),
        options=TeachingOptions(steps=500, batch_size=16, learning_rate=3e-2, keep=5.0),
        progress=False,
    )
    assert len(media.items) == lessons[0].num_media == 6
    one, other = (load_model(open_checkpoint(tmp_path / name)) for name in ("taught", "memory"))
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def naming(make_model: Any, system_tree: dict, **changes: Any) -> NameLearner:
    projections = {**system_tree["input_projections"], "image": {**CTC, **changes}}
    return NameLearner(make_model(input_projections=projections), "image")


def test_names_are_tokenized_as_within_a_text_and_none_has_two(
    make_model: Any, system_tree: dict
) -> None:
    learner = naming(make_model, system_tree)
    encode = learner.model.llm.tokenizer.encode
    assert learner.add(["a rocket", "an hour"], {}) == (
        {"a rocket": 1, "an hour": 2},
        ["a rocket", "an hour"],
    )
    readings, new = learner.add(["a red apple", "a rocket"], {"a violin": [0]})
    assert (readings, new) == ({"a red apple": 3, "a rocket": 1}, ["a red apple"])
    captions = (" a rocket", " an hour", " a red apple")
    assert learner.projection.names() == [tuple(encode(caption)) for caption in captions]


def test_a_caption_that_is_too_long_is_refused(make_model: Any, system_tree: dict) -> None:
    learner = naming(make_model, system_tree, num_tokens=1)
    with pytest.raises(ConfigError, match=r"has 3 tokens, but .* spells 1 to 1; choose a shorter"):
        learner.add(["a red apple"], {})


def test_a_projection_of_another_type_is_refused(
    make_model: Any, system_tree: dict, tmp_path: Path
) -> None:
    source = written_model(make_model, system_tree, tmp_path, {"type": "linear"})
    with pytest.raises(ConfigError, match="of type ctc or words, and this is another type"):
        taught(tmp_path, source)


def test_the_vocabulary_of_trained_weights_is_found_again() -> None:
    torch.manual_seed(0)
    projection = CTCProjection(CTCConfig(**SMALL), (3, 8), 64, 0.5)
    table = torch.randn(50, 64)
    projection.set_vocabulary([7, 30, 31], table[[7, 30, 31]])
    projection.ids = torch.full((5,), -1)
    projection.find_ids(table)
    assert projection.ids.tolist() == [7, 30, 31, -1, -1]
