"""Input projections that know names of whole things, and spell the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm import checkpoints
from mmllm.checkpoints import load_model, open_checkpoint
from mmllm.errors import CheckpointError, ConfigError
from mmllm.projections.ctc import CTCConfig, CTCProjection, build
from mmllm.utils.hashing import sha256_file

SMALL: dict[str, Any] = {
    **{"num_tokens": 4, "steps": 6, "vocabulary": 5},
    **{"width": 8, "heads": 2, "layers": 1},
}
TABLE = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
NAMES = [(7, 30), (41,), (30, 8, 7)]
SPELLED, FIRST, SECOND, THIRD = range(4)


def embed(ids: Tensor) -> Tensor:
    """What a language model would embed tokens as."""
    return TABLE[ids]


def projection(taught: Sequence[Sequence[int]] = (), **changes: Any) -> CTCProjection:
    torch.manual_seed(0)
    made = build(CTCConfig(**SMALL, **changes), feature_shape=(3, 8), width=6, scale=0.5).eval()
    with torch.no_grad():
        made.rest.fill_(0.25)
        made.classifier.bias[0] = -10.0  # something is spelled
    if taught:
        made.add_names(taught, embed)
    return made


def read_as(
    made: CTCProjection, features: Tensor, classes: Sequence[int], mask: Any = None
) -> None:
    """Have the namer read each medium as a class."""
    means = made.mean_feature(features, mask)
    wanted = torch.nn.functional.one_hot(torch.tensor(classes), 1 + len(made.name_ids)).float()
    with torch.no_grad():
        assert made.namer is not None
        made.namer.weight.copy_((torch.linalg.pinv(means) @ wanted).T * 20)
        made.namer.bias.zero_()


def test_what_is_named_has_the_embeddings_of_its_name_and_the_rest_is_spelled() -> None:
    plain, made = projection(), projection(NAMES)
    features = torch.randn(4, 3, 8)
    made.set_vocabulary([11, 12, 13, 14, 15], torch.randn(5, 6))
    plain.load_state_dict(made.state_dict(), strict=False)
    plain.ids = made.ids
    read_as(made, features, [SECOND, SPELLED, THIRD, FIRST])
    tokens, rest = made(features), torch.full((6,), 0.25 * 0.5)
    for row, name in ((0, NAMES[1]), (2, NAMES[2]), (3, NAMES[0])):
        assert torch.equal(tokens[row, : len(name)], TABLE[list(name)])
        assert torch.equal(tokens[row, len(name) :], rest.expand(4 - len(name), -1))
    assert torch.equal(tokens[1], plain(features)[1])
    assert made.spell(features) == [NAMES[1], plain.spell(features)[1], NAMES[2], NAMES[0]]


def test_one_by_one_is_as_in_a_batch_and_hidden_tokens_do_not_count() -> None:
    made, features = projection(NAMES), torch.randn(4, 3, 8)
    mask = torch.tensor([[True, True, False]]).expand(4, -1)
    read_as(made, features, [SECOND, SPELLED, THIRD, FIRST], mask)
    alone = torch.cat([made(features[i : i + 1], mask[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(made(features, mask), alone, rtol=0, atol=1e-4)
    other = torch.where(mask[..., None], features, torch.randn(4, 3, 8))
    torch.testing.assert_close(made.name_scores(other, mask), made.name_scores(features, mask))
    torch.testing.assert_close(made(other, mask), made(features, mask), rtol=0, atol=1e-4)


def test_names_are_kept_while_it_trains_and_their_reader_is_left_as_it_is() -> None:
    made, features = projection(NAMES).train(), torch.randn(2, 3, 8)
    read_as(made, features, [FIRST, SPELLED])
    assert made.namer is not None
    made(features).square().sum().backward()
    assert made.namer.weight.grad is not None
    assert not made.namer.weight.grad.any()
    assert made.classifier.weight.grad is not None
    assert made.classifier.weight.grad.any()


def test_appended_names_change_nothing_that_is_read() -> None:
    made, features = projection(NAMES[:2]), torch.randn(20, 3, 8)
    read_as(made, features, [SPELLED, FIRST, SECOND, FIRST] * 5)
    before, scores = made(features), made.name_scores(features)
    made.add_names(NAMES[2:], embed)
    assert made.names() == NAMES
    now = made.name_scores(features)
    assert torch.equal(now[:, :3], scores)
    assert bool((now[:, 3] < scores.max(-1).values).all())
    assert torch.equal(made(features), before)


def test_without_names_it_is_as_it_was() -> None:
    made = projection()
    assert not [name for name in made.state_dict() if "name" in name]
    assert made.names() == []
    taught = projection(NAMES).state_dict()
    assert {name for name in taught if name not in made.state_dict()} == {
        *("name_ids", "namer.weight", "namer.bias")
    }
    assert all(torch.equal(taught[name], value) for name, value in made.state_dict().items())


def test_names_that_nobody_taught_are_not_read() -> None:
    fresh = projection(names=3)
    features = torch.randn(5, 3, 8)
    assert torch.equal(fresh(features), projection()(features))
    assert fresh.spell(features) == projection().spell(features)


def test_names_follow_the_embeddings_of_the_language_model() -> None:
    made, features = projection(NAMES), torch.randn(2, 3, 8)
    read_as(made, features, [FIRST, THIRD])
    made.embed_names(lambda ids: 2 * TABLE[ids])
    tokens = made(features)
    assert torch.equal(tokens[0, :2], 2 * TABLE[[7, 30]])
    assert torch.equal(tokens[1, :3], 2 * TABLE[[30, 8, 7]])


@pytest.fixture
def named_model(make_model, system_tree: dict):
    """A tiny model whose images are all named, and its tree."""
    kind = {"type": "ctc", **SMALL, "num_tokens": 8, "steps": 12, "names": 2}
    model = make_model(input_projections={**system_tree["input_projections"], "image": kind})
    made = model.input_projections["image"]
    made.name_ids[:, :2] = torch.tensor([[300, 301], [302, -1]])
    made.embed_names(model.llm.embed)
    with torch.no_grad():
        made.namer.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    return model


def projected(model: Any) -> Tensor:
    return model.input_projections["image"](torch.ones(1, 4, 6)).detach()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_checkpoint_holds_names_and_no_embeddings(
    named_model: Any, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    tokens = projected(named_model)
    assert torch.equal(tokens[0, 0], named_model.llm.embedding.weight[302])
    folder = checkpoints.save(tmp_path / "saved", named_model, step=0)
    assert checkpoints.saved_names(open_checkpoint(folder)) == {"image": 2}
    exported = checkpoints.export(open_checkpoint(folder), tmp_path / "exported", dtype=dtype)
    held = load_file(exported / "input_projections.safetensors")
    assert held["image.name_ids"].dtype == torch.int32
    assert {name for name in held if "name" in name} == {
        *("image.name_ids", "image.namer.weight", "image.namer.bias")
    }
    loaded = load_model(open_checkpoint(exported))
    projection = loaded.input_projections["image"]
    assert torch.equal(projection.name_ids, named_model.input_projections["image"].name_ids)  # pyright: ignore
    torch.testing.assert_close(projected(loaded)[:, :1], tokens[:, :1])


def rewritten(folder: Path, **changes: Tensor) -> Any:
    """A checkpoint with other tensors, and a manifest that fits them."""
    file = folder / "input_projections.safetensors"
    save_file({**load_file(file), **changes}, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_checkpoint(folder)


def test_names_of_a_damaged_checkpoint_are_refused(named_model: Any, tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path / "saved", named_model, step=0)
    ids = torch.zeros(2, 8)
    with pytest.raises(CheckpointError, match=r"name_ids.*expected whole numbers, got torch.float"):
        load_model(rewritten(folder, **{"image.name_ids": ids}))
    with pytest.raises(ConfigError, match=r"the config describes .* numbers, but the checkpoint"):
        load_model(rewritten(folder, **{"image.name_ids": ids[:1].int()}))
