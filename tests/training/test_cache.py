"""The feature cache: equal losses, nothing stale, nothing computed twice, damage found."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmllm import config
from mmllm import model as models
from mmllm.cli import main
from mmllm.conversation import Image
from mmllm.data import store
from mmllm.data.frozen import FrozenWork
from mmllm.data.store import FeatureStore
from mmllm.decoders.base import ModalityDecoder
from mmllm.errors import CacheError, ConfigError
from mmllm.training import cluster
from mmllm.training.caching import fill_cache
from mmllm.training.feed import every_item, open_sources
from mmllm.training.loop import train
from tests import parts

LOSSES = {"text": 1.0, "align": 1.0}


def losses(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture
def filled(make_run, tmp_path: Path) -> Path:
    fill_cache(make_run(cache=str(tmp_path / "cache")), progress=False)
    return tmp_path / "cache"


def test_training_from_the_cache_gives_the_same_losses_and_runs_no_frozen_part(
    make_run, filled, monkeypatch
):
    fresh = losses(train(make_run(output="fresh", cache="none", losses=LOSSES), progress=False))
    remembered = losses(train(make_run(output="remembered", losses=LOSSES), progress=False))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a frozen part was run")

    for name in ("forward", "preprocess"):
        monkeypatch.setattr(parts.ColourEncoder, name, refuse)
    for name in ("encode_captions", "encode_media", "pipeline"):
        monkeypatch.setattr(ModalityDecoder, name, refuse)
    run = make_run(output="cached", cache=str(filled), cache_complete=True, losses=LOSSES)
    cached = losses(train(run, progress=False))
    assert cached == remembered == fresh


def test_the_denoising_loss_takes_latents_from_the_cache(make_run, filled, monkeypatch):
    fresh = losses(train(make_run(output="fresh"), progress=False))
    assert any("denoise" in name for row in fresh for name in row)
    monkeypatch.delattr(ModalityDecoder, "encode_media")
    run = make_run(output="cached", cache=str(filled), cache_complete=True)
    assert losses(train(run, progress=False)) == fresh


def test_another_encoder_is_refused_with_both_fingerprints(make_run, filled, monkeypatch):
    run = make_run(output="other", cache=str(filled), cache_complete=True)
    monkeypatch.setattr(parts.ColourEncoder, "fingerprint", "something-else")
    with pytest.raises(CacheError, match=r"something-else; the cache was made with .*colour-"):
        train(run, progress=False)


def test_filling_again_or_in_two_processes_computes_nothing_twice(make_run, tmp_path: Path):
    run = make_run(cache=str(tmp_path / "cache"))
    shown = tmp_path / "media"
    shutil.copy(shown / "0.png", shown / "again.png")
    rows = json.loads((shown / "pairs.json").read_text())
    again = {"file": "again.png", "modality": "image", "caption": "a red apple 0"}
    (shown / "pairs.json").write_text(json.dumps([*rows, again]))
    model = models.build(run.system)
    for rank in (0, 1):
        work = FrozenWork(model, denoise=True, store=FeatureStore(run.stage.cache))
        items = every_item(model, open_sources(run.stage.data, "data"))
        assert work.warm(items, progress=False, part=(rank, 2)) == []
    fill_cache(run, progress=False)  # finds what is missing: the list was halved when it was short
    before = sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))
    fill_cache(run, progress=False)
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors")) == before
    sizes = {(room.kind, room.part): room for room in store.survey(tmp_path / "cache")}
    assert sizes["features", "encoders.image"].items == 4  # again.png is 0.png
    assert sizes["conditions", "decoders.audio"].items == 4
    assert sizes["latents", "decoders.video"].items == 4
    assert all(room.duplicates == 0 for room in sizes.values())


def test_a_damaged_shard_is_passed_over_found_and_pruned(make_run, filled, capsys):
    shard = next(filled.glob("features-*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    (shard.parent / "killed.partial").write_bytes(b"half")
    assert main(["cache", "verify", str(filled)]) == 1
    assert shard.name in capsys.readouterr().out
    train(make_run(output="on", cache=str(filled)), progress=False)  # computes what is gone
    assert "damaged shard" in capsys.readouterr().err
    assert main(["cache", "prune", str(filled)]) == 0
    assert not shard.exists()
    assert not list(filled.rglob("*.partial"))
    assert main(["cache", "verify", str(filled)]) == 0


def test_prune_keeps_the_rooms_that_are_named(filled):
    rooms = store.survey(filled)
    keep = {room.fingerprint for room in rooms if room.kind != "features"}
    assert store.prune(filled, keep) > 0
    assert {room.kind for room in store.survey(filled)} == {"conditions", "latents"}


def test_what_was_stored_comes_back_bit_for_bit(tmp_path: Path):
    entry = {"tokens": torch.randn(3, 5), "mask": torch.tensor([True, False, True])}
    rooms = [FeatureStore(tmp_path).room("features", "encoders.image", "f") for _ in range(2)]
    rooms[0]["a"] = entry
    assert "a" not in rooms[1]
    rooms[0].flush()
    rooms[1].refresh()
    for room in rooms:
        assert room["a"].keys() == entry.keys()
        assert all(torch.equal(room["a"][name], value) for name, value in entry.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache_complete": True}, "needs a folder"),
        ({"cache_complete": True, "cache": "x", "samples": {"prompts": ["a"]}}, "stage.samples"),
    ],
)
def test_a_cache_that_cannot_be_meant_is_refused(make_run, changes, said):
    with pytest.raises(ConfigError, match=said):
        make_run(**changes)


def test_filling_needs_a_folder(make_run):
    with pytest.raises(ConfigError, match="mmllm cache CONFIG stage"):
        fill_cache(make_run(), progress=False)


def test_pipelines_are_let_go_when_their_captions_are_read(make_run):
    run = make_run(losses=LOSSES)
    model = models.build(run.system)
    work = FrozenWork(model)
    assert not work.warm(every_item(model, open_sources(run.stage.data, "data")), progress=False)
    assert [decoder._pipeline for decoder in model.decoders.values()] == [None] * 3


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a cache by room and name, in whichever shard it lies."""
    rooms = [path.parent for path in folder.glob("*/room.json")]
    return {
        f"{room.name}/{name}": value for room in rooms for name, value in contents_of(room).items()
    }


def contents_of(room: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in room.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def test_parts_of_a_cluster_fill_what_one_process_fills(make_run, filled, tmp_path: Path):
    """As Ray Data calls them: rows listed by one process, batches of them given to others."""
    shown = tmp_path / "media"
    rows = json.loads((shown / "pairs.json").read_text())
    broken = {"file": "broken.png", "modality": "image", "caption": "a red apple 0"}
    (shown / "pairs.json").write_text(json.dumps([*rows, broken]))
    (shown / "broken.png").write_bytes(b"no picture")
    tree = config.dump(make_run(cache=str(tmp_path / "cluster")))
    rows = list(cluster.Part(tree).missing())
    bad = []
    for half in (rows[::2], rows[1::2]):
        batch = {name: [row[name] for row in half] for name in ("source", "index", "things")}
        bad += cluster.Part(tree)(batch)["medium"]
    assert list(cluster.Part(tree).missing())
    one, other = contents(filled), contents(tmp_path / "cluster")
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name)
    assert all(room.duplicates == 0 for room in store.survey(tmp_path / "cluster"))
    assert bad
    assert all("broken" in name for name in bad)


def test_a_cluster_without_ray_says_what_to_install(make_run, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmllm\[ray\]'"):
        cluster.fill_cache_by_ray(make_run(cache=str(tmp_path / "cache")), "local")


def test_a_ray_cluster_fills_what_one_process_fills(make_run, filled, tmp_path: Path):
    pytest.importorskip("ray")
    run = make_run(cache=str(tmp_path / "cluster"))
    cluster.fill_cache_by_ray(run, "local")
    one, other = contents(filled), contents(tmp_path / "cluster")
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name)


def test_another_process_finds_all_through_the_index_on_disk(filled, monkeypatch):
    """Keys, tensors and hashes of files, with nothing read into memory at the start."""
    rooms = [
        FeatureStore(filled).room("features", f"encoders.{key}", f"colour-{size}x6")
        for key, size in (("image", 4), ("audio", 2), ("video", 6))
    ]
    assert [path.suffix for path in (filled / "files").iterdir()].count(".index") == 1
    monkeypatch.setattr(store, "_places_in", None)  # the shards' headers are not looked at again
    again = FeatureStore(filled)
    for room in rooms:
        reread = again.room("features", "encoders", room.folder.name.partition("-")[2])
        wanted = contents_of(room.folder)
        assert wanted
        for name, value in wanted.items():
            key, _, tensor = name.partition("/")
            assert key in reread
            assert torch.equal(reread[key][tensor], value)
        assert "nothing" not in reread
        with pytest.raises(KeyError):
            reread["nothing"]
    monkeypatch.setattr("hashlib.file_digest", None)
    shown = filled.parent / "media" / "0.png"
    assert again.key(Image(source=shown)) == hashlib.sha256(shown.read_bytes()).hexdigest()
