"""The feature cache: equal losses, nothing stale, nothing computed twice, damage found."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm import config
from mmllm import model as models
from mmllm.cli import main
from mmllm.conversation import Image
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.errors import CacheError, ConfigError
from mmllm.features import maintenance
from mmllm.features.cache import FeatureCache
from mmllm.features.shard import open_shard
from mmllm.features.store import FeatureStore
from mmllm.training import cluster
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.precompute import fill_cache
from mmllm.training.trainer import train
from tests import parts
from tests.faults import DAMAGES, drafts, largest_file, refused_writes
from tests.training.conftest import data, make_run
from tests.training.runs import metrics

__all__ = ["data", "make_run"]

LOSSES = {"text": 1.0, "align": 1.0}


def losses(output: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in metrics(output)]


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


def test_features_in_bfloat16_take_half_the_space_and_are_their_own(make_run, tmp_path: Path):
    folder, losses_of = tmp_path / "cache", {"text": 1.0, "align": 1.0}
    exact = losses(train(make_run(output="exact", losses=losses_of), progress=False))
    half = {"cache": str(folder), "cache_dtype": "bfloat16", "losses": losses_of}
    fill_cache(make_run(**half), progress=False)
    kinds = {
        shard.parent.name.partition("-")[0]: {tensor.dtype for tensor in load_file(shard).values()}
        for shard in folder.rglob("*.safetensors")
    }
    assert kinds == {"features": {torch.bfloat16}, "conditions": {torch.bfloat16}}
    run = make_run(output="half", cache_complete=True, **half)
    for row, rounded in zip(exact, losses(train(run, progress=False)), strict=True):
        assert rounded == pytest.approx(row, rel=0.02)
    other = make_run(output="other", cache=str(folder), cache_complete=True, losses=losses_of)
    with pytest.raises(CacheError, match=r"fingerprint .*-bfloat16"):
        train(other, progress=False)


def test_the_denoising_loss_takes_latents_from_the_cache(make_run, filled, monkeypatch):
    fresh = losses(train(make_run(output="fresh"), progress=False))
    assert any("denoise" in name for row in fresh for name in row)
    monkeypatch.delattr(ModalityDecoder, "encode_media")
    run = make_run(output="cached", cache=str(filled), cache_complete=True)
    assert losses(train(run, progress=False)) == fresh


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_captions_that_no_loss_reads_are_not_encoded(make_run, monkeypatch, cache: str):
    unweighted = {"text": 1.0, "align": 0.0}
    measured = losses(train(make_run(output="measured", losses=unweighted), progress=False))
    for name in ("encode_captions", "pipeline"):
        monkeypatch.delattr(ModalityDecoder, name)
    run = make_run(output="alone", cache=cache, losses={"text": 1.0})
    alone = losses(train(run, progress=False))
    expected = [row["text"] for row in measured]
    assert [row["text"] for row in alone] == pytest.approx(expected, abs=1e-5)


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
        work = FeatureCache(model, denoise=True, store=FeatureStore(run.stage.cache))
        items = render_all_items(model.renderer, open_sources(run.stage.data, "data"))
        assert work.precompute(items, progress=False, part=(rank, 2)) == []
    fill_cache(run, progress=False)  # finds what is missing: the list was halved when it was short
    before = sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))
    fill_cache(run, progress=False)
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors")) == before
    sizes = {
        (space.kind, space.part): space for space in maintenance.list_namespaces(tmp_path / "cache")
    }
    assert sizes["features", "encoders.image"].items == 4  # again.png is 0.png
    assert sizes["conditions", "decoders.audio"].items == 4
    assert sizes["latents", "decoders.video"].items == 4
    assert all(namespace.duplicates == 0 for namespace in sizes.values())


def test_a_damaged_shard_is_skipped_reported_and_pruned(make_run, filled, capsys):
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


@pytest.fixture
def reread(monkeypatch):
    """Shards are opened again, as by another process."""
    open_shard.cache_clear()
    yield open_shard.cache_clear
    open_shard.cache_clear()


def shard_of(cache: Path, kind: str) -> Path:
    return next(cache.glob(f"{kind}-*/*.safetensors"))


def damage_data(shard: Path, damage) -> None:
    """Damage the data of a shard and keep its header; a bit flips in every item, since which ones
    a short run reads depends on chance."""
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    shard.write_bytes(whole[start:])
    if damage is DAMAGES["a flipped bit"]:
        size = len(whole) - start
        for number in range(1, 5):
            damage(shard, number * size // 4 - 1)
    else:
        damage(shard)
    shard.write_bytes(whole[:start] + shard.read_bytes())


@pytest.mark.parametrize(
    ("kind", "what"),
    [("features", "zeroed"), ("conditions", "half zeroed"), ("latents", "a flipped bit")],
)
def test_damaged_tensors_are_computed_again_or_reported_where_that_is_not_allowed(
    make_run, filled, capsys, reread, kind: str, what: str
):
    """A power loss leaves shards of the right size that hold zeros; a bad disk flips bits."""
    fresh = losses(train(make_run(output="fresh", steps=4), progress=False))
    shard = shard_of(filled, kind)
    damage_data(shard, DAMAGES[what])
    assert main(["cache", "verify", str(filled)]) == 1
    assert f"{shard}: " in capsys.readouterr().out

    complete = make_run(output="complete", steps=4, cache=str(filled), cache_complete=True)
    with pytest.raises(CacheError, match=rf"{shard}: damaged: .*`mmllm cache prune {filled}`"):
        train(complete, progress=False)
    reread()
    run = make_run(output="on", steps=4, cache=str(filled))
    assert losses(train(run, progress=False)) == fresh
    assert f"damaged shard of the cache: {shard}" in capsys.readouterr().err
    reread()
    assert main(["cache", "prune", str(filled)]) == 0
    assert not shard.exists()
    fill_cache(run, progress=False)
    complete = make_run(output="again", steps=4, cache=str(filled), cache_complete=True)
    assert losses(train(complete, progress=False)) == fresh


@pytest.mark.parametrize("what", ["zeroed", "half zeroed", "cut", "empty"])
def test_a_shard_with_a_damaged_header_is_skipped(make_run, filled, what: str):
    shard = shard_of(filled, "features")
    DAMAGES[what](shard)
    fresh = losses(train(make_run(output="fresh"), progress=False))
    assert losses(train(make_run(output="on", cache=str(filled)), progress=False)) == fresh
    assert {path for path, _ in maintenance.verify(filled)[0]} == {shard}


ONE_NUMBER = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a/tokens": []},
        {"a/tokens": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a/tokens": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
        {"a/tokens": {"dtype": "F32", "shape": [1], "data_offsets": []}},
        {"__metadata__": 7, "a/tokens": ONE_NUMBER},
        {"__metadata__": {"crc32": "[1]"}, "a/tokens": ONE_NUMBER},
        {"__metadata__": {"crc36": "{}"}, "a/tokens": ONE_NUMBER},
        {"__metadata__": {"crc32": "{}"}, "a/tokens": ONE_NUMBER},
    ],
)
def test_a_header_that_means_nothing_is_a_damaged_shard(filled, caplog, header):
    text = json.dumps(header).encode()
    shard = filled / "features-odd" / "x.safetensors"
    shard.parent.mkdir()
    about = {"kind": "features", "part": "p", "fingerprint": "odd"}
    (shard.parent / "room.json").write_text(json.dumps(about))
    shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    namespace = FeatureStore(filled).namespace("features", "p", "odd")
    assert "a" not in namespace
    assert "passing over a damaged shard" in caplog.text
    assert [path for path, _ in maintenance.verify(filled)[0]] == [shard]


def test_checksums_cover_name_dtype_and_shape(tmp_path: Path):
    """The checksum is of the name, the type and the shape, too."""
    namespace = FeatureStore(tmp_path).namespace("features", "encoders.image", "f")
    namespace["a"] = {"tokens": torch.ones(2, 3), "mask": torch.ones(3, dtype=torch.bool)}
    namespace["b"] = {"tokens": torch.zeros(2, 3), "mask": torch.zeros(3, dtype=torch.bool)}
    namespace.flush()
    shard = shard_of(tmp_path, "features")
    whole = shard.read_bytes()
    for old, new in ((b'"a/tokens"', b'"c/tokens"'), (b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]")):
        shard.write_bytes(whole.replace(old, new, 1))
        [(path, why)] = maintenance.verify(tmp_path)[0]
        assert path == shard, old
        assert "checksum" in why or "header" in why, (old, why)
    shard.write_bytes(whole)
    assert maintenance.verify(tmp_path) == ([], [])


def without_checksums(cache: Path) -> int:
    """The cache as earlier versions wrote it."""
    for path in cache.glob("*/*.index"):
        path.unlink()
    shards = list(cache.glob("*/*.safetensors"))
    for path in shards:
        save_file(load_file(path), path)
    return len(shards)


def test_an_earlier_cache_without_checksums_is_read_and_reported(make_run, filled, capsys):
    fresh = losses(train(make_run(output="fresh"), progress=False))
    count = without_checksums(filled)
    run = make_run(output="cached", cache=str(filled), cache_complete=True)
    assert losses(train(run, progress=False)) == fresh
    capsys.readouterr()
    assert main(["cache", "verify", str(filled)]) == 0
    assert f"{count} shard(s) of an earlier version have no checksums" in capsys.readouterr().err


def test_a_cache_of_an_earlier_version_with_values_that_are_not_finite_is_damaged(filled):
    without_checksums(filled)
    shard = shard_of(filled, "features")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("tokens"))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, shard)
    [(path, why)] = maintenance.verify(filled)[0]
    assert path == shard
    assert "not finite" in why


@pytest.mark.parametrize("folder", ["features-colour-4x6", "files"])
def test_a_damaged_index_is_made_again(filled, monkeypatch, folder: str):
    monkeypatch.setattr("mmllm.features.store.sha256_file", None)  # no file is read again
    shown = filled.parent / "media" / "0.png"
    [table] = (filled / folder).glob("*.index")
    whole, wanted = table.read_bytes(), contents_of(filled / "features-colour-4x6")
    assert len(wanted) == 4
    for what, damage in DAMAGES.items():
        for read_only in (True, False):
            table.write_bytes(whole)
            damage(table)
            with refused_writes(filled) if read_only else nullcontext():
                again = FeatureStore(filled)
                features = again.namespace("features", "encoders.image", "colour-4x6")
                for name, value in wanted.items():
                    key, _, tensor = name.partition("/")
                    assert torch.equal(features[key][tensor], value), (what, name)
                sha256 = hashlib.sha256(shown.read_bytes()).hexdigest()
                assert again.key(Image(source=shown)) == sha256
        if what != "a flipped bit":  # of another bucket than was asked for, perhaps
            assert table.read_bytes() == whole, what


def test_a_complete_cache_is_read_where_nothing_can_be_written(make_run, filled, capsys):
    """Clusters share them read-only; filling one leaves the index that readers need."""
    fresh = losses(train(make_run(output="fresh", steps=2), progress=False))
    before = sorted(filled.rglob("*"))
    assert sum(path.suffix == ".index" for path in before) == 10
    for number, complete in enumerate((True, False)):
        run = make_run(output=f"on-{number}", steps=2, cache=str(filled), cache_complete=complete)
        with refused_writes(filled):
            assert losses(train(run, progress=False)) == fresh
    for path in filled.glob("*/*.index"):
        path.unlink()
    run = make_run(output="without", steps=2, cache=str(filled), cache_complete=True)
    with refused_writes(filled):
        assert losses(train(run, progress=False)) == fresh


def test_a_cache_that_cannot_be_written_is_refused(make_run, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    run = make_run(cache=str(cache))
    for code, reason in ((errno.EROFS, "Read-only"), (errno.ENOSPC, "No space left")):
        message = rf"^{cache}/\S+: cannot be written: {reason}.*stage\.cache"
        with refused_writes(cache, code), pytest.raises(CacheError, match=message):
            fill_cache(run, progress=False)
    with largest_file(1000), pytest.raises(CacheError, match=r"written: .*File too large"):
        fill_cache(run, progress=False)
    assert drafts(tmp_path) == []
    fill_cache(make_run(cache=str(cache)), progress=False)
    assert maintenance.verify(cache) == ([], [])


def test_prune_keeps_the_namespaces_that_are_named(filled):
    namespaces = maintenance.list_namespaces(filled)
    keep = {each.fingerprint for each in namespaces if each.kind != "features"}
    assert maintenance.prune(filled, keep) > 0
    assert {each.kind for each in maintenance.list_namespaces(filled)} == {"conditions", "latents"}


def test_what_was_stored_comes_back_bit_for_bit(tmp_path: Path):
    entry = {"tokens": torch.randn(3, 5), "mask": torch.tensor([True, False, True])}
    one, other = (
        FeatureStore(tmp_path).namespace("features", "encoders.image", "f") for _ in range(2)
    )
    one["a"] = entry
    assert "a" not in other
    one.flush()
    other.refresh()
    for namespace in (one, other):
        assert namespace["a"].keys() == entry.keys()
        assert all(torch.equal(namespace["a"][name], value) for name, value in entry.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_complete": True}, "needs a folder"),
        ({"cache_complete": True, "cache": "x", "samples": {"prompts": ["a"]}}, "stage.samples"),
    ],
)
def test_settings_of_a_cache_that_contradict_are_refused(make_run, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_run(**changes)


def test_filling_needs_a_folder(make_run):
    with pytest.raises(ConfigError, match="mmllm cache CONFIG stage"):
        fill_cache(make_run(), progress=False)


def test_pipelines_are_unloaded_after_their_captions_are_encoded(make_run):
    run = make_run(losses=LOSSES)
    model = models.build(run.system)
    work = FeatureCache(model)
    assert not work.precompute(
        render_all_items(model.renderer, open_sources(run.stage.data, "data")), progress=False
    )
    assert [decoder.is_loaded for decoder in model.decoders.values()] == [False] * 3


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a cache by namespace and name, in whichever shard it lies."""
    namespaces = [path.parent for path in folder.glob("*/room.json")]
    return {
        f"{path.name}/{name}": value
        for path in namespaces
        for name, value in contents_of(path).items()
    }


def contents_of(namespace: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in namespace.glob("*.safetensors")
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
    rows = list(cluster.FrozenParts(tree).missing())
    bad = []
    for half in (rows[::2], rows[1::2]):
        batch = {name: [row[name] for row in half] for name in ("source", "index", "things")}
        bad += cluster.FrozenParts(tree)(batch)["medium"]
    assert list(cluster.FrozenParts(tree).missing())
    one, other = contents(filled), contents(tmp_path / "cluster")
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name)
    sizes = maintenance.list_namespaces(tmp_path / "cluster")
    assert all(namespace.duplicates == 0 for namespace in sizes)
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
    namespaces = [
        FeatureStore(filled).namespace("features", f"encoders.{key}", f"colour-{size}x6")
        for key, size in (("image", 4), ("audio", 2), ("video", 6))
    ]
    assert [path.suffix for path in (filled / "files").iterdir()].count(".index") == 1
    for module in ("shard", "namespace"):  # the headers of the shards are not read again
        monkeypatch.setattr(f"mmllm.features.{module}.tensors_in", None)
    again = FeatureStore(filled)
    for namespace in namespaces:
        fingerprint = namespace.folder.name.partition("-")[2]
        reread = again.namespace("features", "encoders", fingerprint)
        wanted = contents_of(namespace.folder)
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
