"""Training on a bad disk: one clear error, nothing lost, no drafts left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmllm import checkpoints
from mmllm import model as models
from mmllm.errors import CheckpointError, ConfigError, TrainingError
from mmllm.training import journal, trainer
from mmllm.training.trainer import train
from mmllm.utils import files
from tests.faults import DAMAGES, drafts, largest_file, refused_writes
from tests.training.runs import loss_curve

FILES = (
    "rows.safetensors",
    "output_projections.safetensors",
    "adapter/adapter_model.safetensors",
    "training/optimizer.safetensors",
    "training/state.json",
    "config.yaml",
)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_costs_nothing(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on files, as `ulimit -f` sets it, from the checkpoint of step 4 on."""
    train(make_run(output="whole"), progress=False)
    save, saved = checkpoints.save, []

    def limited(folder: Path, *arguments, **options) -> Path:
        saved.append(folder)
        with largest_file(10**9 if len(saved) == 1 else 20_000):
            return save(folder, *arguments, **options)

    monkeypatch.setattr(checkpoints, "save", limited)
    with pytest.raises(CheckpointError) as caught:
        train(make_run(output="parts"), progress=False)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{saved[1]}: cannot be written: ")
    assert "File too large" in message
    assert drafts(tmp_path / "parts") == []
    assert [path.name for path in saved[0].parent.iterdir()] == ["step-00000002"]

    monkeypatch.setattr(checkpoints, "save", save)
    train(make_run(output="parts"), resume=True, progress=False)
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    one, other = (
        contents(tmp_path / name / "checkpoints/step-00000004") for name in ("whole", "parts")
    )
    for name in one:
        if name.endswith(".safetensors"):
            assert one[name] == other[name], name


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
        Exception("No space left on device (os error 28)"),  # as tokenizers does
    ],
)
def test_every_kind_of_failure_keeps_what_was_there(make_run, tmp_path: Path, error) -> None:
    model = models.build(make_run().system)
    folder = tmp_path / "model"
    checkpoints.save(folder, model, step=1)
    before = contents(folder)
    fails = pytest.MonkeyPatch()
    with fails.context() as patch:
        patch.setattr("safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(CheckpointError, match=rf"^{folder}: cannot be written: .*unchanged$"):
            checkpoints.save(folder, model, step=2)
    with refused_writes(tmp_path, errno.EROFS), pytest.raises(CheckpointError, match="Read-only"):
        checkpoints.save(folder, model, step=2)
    assert contents(folder) == before
    assert drafts(tmp_path) == []


def test_a_programming_error_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.write_errors(tmp_path, CheckpointError, ""):
        raise KeyError("x")
    with (
        pytest.raises(ConfigError, match="own words"),
        files.write_errors(tmp_path, CheckpointError, ""),
    ):
        raise ConfigError("own words")


@pytest.fixture
def trained(make_run, tmp_path: Path) -> Path:
    return train(make_run(steps=4), progress=False)


def test_a_damaged_checkpoint_is_found_by_its_hashes_whatever_the_damage(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried = 0
    for name in (*FILES, "manifest.json"):
        for what, damage in DAMAGES.items():
            if (name, what) == ("manifest.json", "a flipped bit"):
                continue  # the last bit is a bracket's: see the next test
            copy = tmp_path / "copy"
            shutil.copytree(trained, copy)
            newest = copy / "checkpoints/step-00000004"
            before = (newest / name).read_bytes()
            damage(newest / name)
            assert not (newest / name).exists() or (newest / name).read_bytes() != before
            caplog.clear()
            found = checkpoints.latest(copy)
            assert found is not None
            assert found.step == 2, (name, what)
            assert "passing over a damaged checkpoint" in caplog.text
            assert "step-00000004" in caplog.text
            shutil.rmtree(copy)
            tried += 1
    assert tried == 41


def test_a_run_resumes_from_the_newest_intact_checkpoint(
    trained: Path, make_run, tmp_path: Path
) -> None:
    wanted = contents(trained / "checkpoints/step-00000004")
    losses = loss_curve(trained)
    DAMAGES["zeroed"](trained / "checkpoints/step-00000004/rows.safetensors")
    train(make_run(steps=4), resume=True, progress=False)
    assert loss_curve(trained) == losses
    found = contents(trained / "checkpoints/step-00000004")
    assert found.keys() == wanted.keys()
    for name, data in wanted.items():
        assert found[name] == data, name


def test_a_run_without_an_intact_checkpoint_is_not_overwritten(trained: Path, make_run) -> None:
    for file in trained.glob("checkpoints/*/rows.safetensors"):
        DAMAGES["zeroed"](file)
    before = contents(trained)
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=r"2 checkpoint.*none of them whole"):
            train(make_run(steps=4), resume=resume, progress=False)
    assert contents(trained) == before


def test_a_model_is_not_loaded_from_damaged_weights(trained: Path) -> None:
    """The same error where the checkpoint itself is named."""
    folder = trained / "checkpoints/step-00000004"
    DAMAGES["zeroed"](folder / "training/optimizer.safetensors")
    checkpoints.load_model(checkpoints.open_checkpoint(folder))  # it needs none of it
    DAMAGES["a flipped bit"](folder / "adapter/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged"):
        checkpoints.load_model(checkpoints.open_checkpoint(folder))


def test_pruning_keeps_what_was_just_written(tmp_path: Path) -> None:
    """A later checkpoint must be damaged, or the run would have resumed from it."""
    for step in (2, 4, 6, 90):
        checkpoints.step_folder(tmp_path, step).mkdir(parents=True)
    checkpoints.prune(tmp_path, keep=1, step=6)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000090"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mmllm.utils import files

count = int(sys.argv[1])
def look(event, arguments):
    global count
    if event.startswith("os.") or event in ("open", "shutil.rmtree"):
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[2])
sys.addaudithook(look)
with files.atomic_folder(folder) as draft:
    for name in ("a", "b"):
        (draft / name).write_text("new")
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    moments = new = aside = 0
    for moment in range(200):
        shutil.rmtree(tmp_path)
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            (folder / name).write_text("old")
        run = subprocess.run([sys.executable, "-c", KILLED, str(moment), str(folder)], check=False)
        found = contents(files.current_folder(folder))
        assert found in ({"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new"}), moment
        new += found["a"] == b"new"
        aside += not folder.exists()
        with files.atomic_folder(folder) as draft:
            (draft / "a").write_text("next")
        assert contents(tmp_path) == {"model/a": b"next"}, moment
        if run.returncode == 0:
            break
        moments += 1
    assert run.returncode == 0
    assert moments >= 8
    assert new >= 1
    assert aside == 1, "the moment between the two renames was not met"


def test_partial_files_of_dead_processes_are_removed_and_others_kept(
    trained: Path, make_run, tmp_path: Path
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = files.draft_path(tmp_path / "model")
    table = files.process_namespace()
    gone = tmp_path / f".model.{table}-{dead.pid}.partial"
    elsewhere = tmp_path / f".model.0000ffff-{dead.pid}.partial"
    old = tmp_path / ".model.4242.partial"  # as earlier versions named them
    for draft in (alive, gone, elsewhere, old):
        draft.mkdir()
        (draft / "rows.safetensors").write_bytes(b"half")
    for path in (old, old / "rows.safetensors"):
        os.utime(path, (1e9, 1e9))
    files.remove_stale_drafts(tmp_path)
    assert sorted(path for path in tmp_path.glob(".model*")) == sorted([alive, elsewhere])

    folder = trained / "checkpoints"
    (folder / ".step-00000002.77.partial").mkdir()
    (trained / ".best.77.partial").mkdir()
    (folder / "step-00000004").rename(folder / ".step-00000004.replaced")
    kept = checkpoints.latest(trained)
    assert kept is not None
    assert kept.step == 4
    train(make_run(steps=5), resume=True, progress=False)
    assert drafts(trained) == []
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    ("code", "message"), [(errno.EROFS, "Read-only"), (errno.ENOSPC, "No space")]
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    monkeypatch.setattr(models, "build", None)
    run = make_run(output="full/run")
    for folder in (tmp_path / "full", tmp_path / "full" / "run"):
        with refused_writes(folder, code), pytest.raises(ConfigError) as caught:
            train(run, progress=False)
        assert str(caught.value).startswith(f"{run.stage.output}: cannot be written: {message}")
        assert "stage.output=" in str(caught.value)
        folder.mkdir()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        train(make_run(output="file/run"), progress=False)
    with largest_file(100_000), pytest.raises(ConfigError, match="File too large"):
        train(run, progress=False)


def test_space_for_a_checkpoint_is_asked_for_before_the_first_step(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "training_step", None)
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match="MiB are free; free some space"):
        train(make_run(), progress=False)
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "curves.png", "report.html", "skipped.json"])
def test_a_report_that_cannot_be_written_is_named_with_its_path(
    drawn_curves, make_run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk fills up during the run; its checkpoints so far are intact."""
    for shown in ("0.png", "1.wav", "2.webp"):
        (data.parent / shown).write_bytes(b"")
    file = tmp_path / "run" / name
    step = trainer.training_step
    stack: list = []

    def filling(*arguments, **options):
        if not stack:
            stack.append(refused_writes(file, errno.ENOSPC))
            stack[0].__enter__()
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", filling)
    monkeypatch.setattr(checkpoints, "save", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "prune", lambda *_: None)
    try:
        with pytest.raises(TrainingError) as caught:
            train(make_run(steps=4), progress=False)
    finally:
        stack[0].__exit__(None, None, None)
    remedy = "free some space and go on with --resume"
    assert str(caught.value) == f"{file}: cannot be written: No space left on device; {remedy}"


def test_damaged_lines_of_metrics_are_dropped(make_run, tmp_path: Path) -> None:
    rows = [{"step": step, "seconds": 1.0, "loss": 2.0} for step in (1, 2, 3)]
    lines = [json.dumps(row).encode() for row in rows]
    odd = [b"\0" * 30, b"\0\0" + lines[0], b'{"step": 2, "lo', b"[1]", b'{"seconds": 1}', b"\xff}"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], *odd, lines[2]]) + b"\n")
    stage = make_run().stage
    journal.Journal(tmp_path, 2, stage, main=True)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == rows[:2]


def test_weights_are_synced_before_they_get_their_name(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order: every file, its folders, the name, the folder of the name."""
    events = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target, **options) -> None:
        events.append(("rename", os.fspath(target)))
        rename(source, target, **options)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    model = models.build(make_run().system)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    folder = checkpoints.save(tmp_path / "model", model, step=1, training={"step": 1})
    place = events.index(("rename", str(folder)))
    draft = str(files.draft_path(folder))
    before = {path.removeprefix(draft) for kind, path in events[:place] if kind == "sync"}
    assert before == {"", "/training"} | {f"/{name}" for name in contents(folder)}
    assert events[place + 1 :] == [("sync", str(tmp_path))]
    assert all(
        torch.isfinite(value).all() for value in load_file(folder / "rows.safetensors").values()
    )
