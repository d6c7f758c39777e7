"""Teaching mini the names of images that it has never seen, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mmllm
from demos.unseen import write_images
from mmllm import Image, user
from mmllm.checkpoints import load_model, open_checkpoint
from mmllm.cli import main
from mmllm.data.sources import resolve
from mmllm.encoders.efficientnet import EfficientNetEncoder
from mmllm.errors import ConfigError
from mmllm.projections.input import WordsConfig, WordsProjection
from mmllm.training.teaching import TeachingOptions, teach

DATA = resolve("mini:data/concepts.json").parent


def test_added_words_leave_the_others_as_they_were() -> None:
    torch.manual_seed(0)
    projection = WordsProjection(WordsConfig(words=5, num_tokens=2), (3, 8), 16, 0.5).eval()
    features = torch.randn(4, 3, 8)
    before, logits = projection(features), projection.scores(features)
    words = torch.randn(2, 2, 16)
    assert projection.add_words(words) == 5
    assert projection.words == 7
    assert torch.equal(projection.scores(features)[:, :5], logits)
    assert torch.allclose(projection.table[5:] * projection.gain, words)
    chosen = projection.scores(features).argmax(-1)
    torch.testing.assert_close(projection(features)[chosen < 5], before[chosen < 5])


def test_logits_of_the_mean_feature_are_the_mean_logits() -> None:
    torch.manual_seed(0)
    projection = WordsProjection(WordsConfig(words=5), (3, 8), 16, 0.5).eval()
    features, mask = torch.randn(4, 3, 8), torch.tensor([[True, True, False]] * 4)
    for given in (None, mask):
        means = projection.mean_feature(features, given)
        torch.testing.assert_close(projection.classifier(means), projection.scores(features, given))


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four new things taught to mini, with rehearsal of twelve that it knows."""
    folder = tmp_path_factory.mktemp("own")
    write_images(folder / "all")
    for label in ("llama", "waffle", "canoe", "thermometer"):
        (folder / "own").mkdir(exist_ok=True)
        (folder / "all" / "teach" / label).rename(folder / "own" / label)
    concepts = json.loads((DATA / "concepts.json").read_text(encoding="utf-8"))
    rows = [
        {"file": f"pictures/fluent-3d/{entry['id']}.webp", "label": entry["label"]}
        for entry in concepts[:12]
    ]
    table = folder / "known.json"
    for row in rows:
        place = folder / row["file"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((DATA / row["file"]).read_bytes())
    table.write_text(json.dumps(rows), encoding="utf-8")
    lessons, media = teach(
        folder / "own",
        folder / "taught",
        rehearse=table,
        options=TeachingOptions(steps=100),
        cache=folder / "cache",
        progress=False,
    )
    assert media.skipped == []
    assert [entry.encoder for entry in lessons] == ["image"]
    assert lessons[0].new == ["a canoe", "a llama", "a thermometer", "a waffle"]
    assert lessons[0].known == []
    assert (lessons[0].num_media, lessons[0].accuracy, lessons[0].kept) == (8, 1.0, 1.0)
    return folder


def test_a_taught_model_names_the_things_in_a_style_that_it_was_not_taught(lesson: Path) -> None:
    chat = mmllm.load(lesson / "taught", dtype="float32")
    asked = [(label, "twemoji") for label in ("llama", "waffle", "canoe", "thermometer")]
    conversations = [
        [user("What is this?", Image(lesson / f"all/ask/{label}/{style}.webp"))]
        for label, style in asked
    ]
    replies = [chat.reply(conversation, seed=0).text for conversation in conversations]
    right = [label in text for (label, _), text in zip(asked, replies, strict=True)]
    assert sum(right) >= 3, replies
    known = [user("What is this?", Image(DATA / "pictures/fluent-3d/dog.webp"))]
    assert "dog" in chat.reply(known, seed=0).text


def test_only_the_projection_that_was_taught_differs(lesson: Path) -> None:
    before, after = (
        load_model(open_checkpoint(source)).state_dict() for source in ("mini", lesson / "taught")
    )
    changed = {
        name
        for name, value in after.items()
        if value.shape != before[name].shape or not torch.equal(value, before[name])
    }
    head = "input_projections.image"
    assert changed == {f"{head}.name_ids", f"{head}.namer.weight", f"{head}.namer.bias"}
    names = before[f"{head}.name_ids"].shape[0]
    assert torch.equal(after[f"{head}.name_ids"][:names], before[f"{head}.name_ids"])


def test_a_thing_that_is_known_gets_no_second_name_and_what_was_read_is_not_read_again(
    lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, preprocess = [], EfficientNetEncoder.preprocess
    monkeypatch.setattr(
        EfficientNetEncoder,
        "preprocess",
        lambda encoder, medium: read.append(medium) or preprocess(encoder, medium),
    )
    place = tmp_path / "own" / "dog"
    place.mkdir(parents=True)
    (place / "1.webp").write_bytes((DATA / "pictures/twemoji/dog.webp").read_bytes())
    lessons, _ = teach(
        tmp_path / "own",
        tmp_path / "taught",
        rehearse=lesson / "known.json",
        options=TeachingOptions(steps=5),
        cache=lesson / "cache",
        progress=False,
    )
    assert [Path(medium.source).name for medium in read] == ["1.webp"]
    assert (lessons[0].new, lessons[0].known) == ([], ["a dog"])
    known = open_checkpoint("mini").system().input_projections["image"]
    assert open_checkpoint(tmp_path / "taught").system().input_projections["image"] == known


def test_options_that_cannot_train_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected steps >= 1"):
        TeachingOptions(steps=0)


def test_the_command_refuses_a_folder_of_other_things(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert main(["teach", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
