"""The loop: the stage's table, exact resume, interrupts, skipped items, damaged checkpoints."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm import checkpoints, config
from mmllm import model as models
from mmllm.checkpoints import saving
from mmllm.cli import FAILED, main
from mmllm.config import PrealignConfig
from mmllm.conversation import Video, user
from mmllm.data.batch import Batch
from mmllm.errors import CheckpointError, ConfigError, TrainingError
from mmllm.features.cache import FeatureCache
from mmllm.inference.chat import Chat
from mmllm.losses import LossTerm, TextNLL
from mmllm.model import Output
from mmllm.training import callbacks, processes, setup, trainer
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.optimizer import update
from mmllm.training.prealign import prealign
from mmllm.training.resume import CheckpointSaver
from mmllm.training.trainable import choose_trainable
from mmllm.training.trainer import train
from tests import parts
from tests.training.runs import loss_curve, metrics, weights


def test_resume_equals_a_run_that_never_stopped(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_run(output="whole", steps=6, save_steps=6), progress=False)

    step = trainer.training_step
    taken = []

    def killed(*arguments, **options):
        if len(taken) == 3:  # after the checkpoint of step 2, in the middle of step 4
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(make_run(output="parts", steps=6), progress=False)
    monkeypatch.setattr(trainer, "training_step", step)
    assert checkpoints.open_checkpoint(tmp_path / "parts").step == 2
    train(make_run(output="parts", steps=6), resume=True, progress=False)

    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    whole, parts_ = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts_.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts_[name]), name


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of both signals are those of before the test, whatever it did."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted_by(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Send the process the next of these signals in each step."""
    step, left = trainer.training_step, list(numbers)

    def interrupted(*arguments, **options):
        if left:
            os.kill(os.getpid(), left.pop(0))
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "before", [signal.default_int_handler, signal.SIG_DFL, lambda number, frame: None]
)
def test_ctrl_c_saves_after_the_current_step(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers, number, before
) -> None:
    signal.signal(number, before)
    interrupted_by(monkeypatch, number)
    train(make_run(steps=50, save_steps=50), progress=False)
    assert checkpoints.open_checkpoint(tmp_path / "run").step == 1
    assert signal.getsignal(number) is before


def test_a_job_in_the_background_ignores_ctrl_c_and_saves_when_it_is_ended(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers
) -> None:
    """As a shell starts it: Ctrl-C at the terminal is meant for another program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted_by(monkeypatch, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    train(make_run(steps=50, save_steps=50), progress=False)
    assert checkpoints.open_checkpoint(tmp_path / "run").step == 3
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_training_in_a_thread_leaves_the_signals_alone(make_run, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(train, make_run(steps=2), progress=False).result(120)
    assert checkpoints.open_checkpoint(tmp_path / "run").step == 2
    assert {number: signal.getsignal(number) for number in before} == before


def test_losses_fall_and_the_saved_model_answers_alike(
    drawn_curves, make_run, tmp_path: Path
) -> None:
    table = {"*_projections.*": 1e-2, "llm.*": 1e-2}
    run = make_run(steps=30, save_steps=30, gradient_accumulation_steps=1, learning_rates=table)
    train(run, progress=False)
    curve = loss_curve(tmp_path / "run")
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000

    checkpoint = checkpoints.open_checkpoint(tmp_path / "run")
    first, second = (checkpoints.load_model(checkpoint) for _ in range(2))
    ids = torch.tensor([[5, 6, first.llm.tokens.signal_ids("audio")[0], 7]])
    logits = [m.llm.head(m.llm(m.llm.embed(ids)).flatten(0, 1)) for m in (first, second)]
    assert torch.equal(*logits)
    untrained = models.build(run.system).llm
    assert not torch.equal(first.llm.signal_embeddings, untrained.signal_embeddings)
    assert (tmp_path / "run/checkpoints/step-00000030/adapter/adapter_config.json").is_file()
    reply = Chat(first).reply([user("draw")], seed=0, modalities={"video": "force"})
    assert isinstance(reply.media[-1], Video)


def test_a_stage_starts_from_the_one_before(make_run, tmp_path: Path) -> None:
    train(make_run(output="one", steps=2), progress=False)
    start = str(tmp_path / "one")
    table = {"output_projections.*": 1e-3}
    train(make_run(output="two", steps=1, init_from=start, learning_rates=table), progress=False)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in two.items():
        if name.startswith(("input_projections", "rows", "adapter_model")):
            assert torch.equal(value, one[name]), name
    with pytest.raises(CheckpointError, match="train the stage before it first"):
        train(make_run(output="three", init_from=str(tmp_path / "absent")), progress=False)


def test_mini_is_accepted_as_a_checkpoint_everywhere(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = train(make_run(output="shipped", steps=1), progress=False)
    newest = checkpoints.open_checkpoint(shipped).folder
    monkeypatch.setattr("mmllm.mini.locate", {"checkpoint": newest}.__getitem__)
    train(
        make_run(output="begun", steps=1, init_from="mini", learning_rates={"llm.*": 0.0}),
        progress=False,
    )
    one, other = weights(shipped), weights(tmp_path / "begun")
    assert torch.equal(one["rows/rows"], other["rows/rows"])
    assert main(["export", "mini", str(tmp_path / "given"), "--dtype", "float32"]) == 0
    assert torch.equal(one["rows/rows"], weights(tmp_path / "given")["rows/rows"])
    (tmp_path / "mini").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name is meant before the name
    with pytest.raises(CheckpointError, match="mini: no checkpoint there"):
        checkpoints.open_checkpoint("mini")


def test_resuming_a_stage_that_has_not_begun_begins_it(make_run, tmp_path: Path) -> None:
    """`make demo` always says --resume: a first start must start from the stage before it."""
    train(make_run(output="one", steps=1), progress=False)
    table = {"output_projections.*": 1e-3}
    start = str(tmp_path / "one")
    run = make_run(
        output="two", steps=2, init_from=start, learning_rates=table, prealign={"steps": 2}
    )
    train(run, resume=True, progress=False)
    assert len(loss_curve(tmp_path / "two")) == 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in two.items():
        if name.startswith("input_projections"):
            assert torch.equal(value, one[name]), name


def test_a_run_is_never_overwritten_or_resumed_as_another(make_run) -> None:
    train(make_run(steps=2), progress=False)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(make_run(steps=2), progress=False)
    with pytest.raises(ConfigError, match=r"cannot resume with another stage\.batch_size"):
        train(make_run(steps=4, batch_size=8), resume=True, progress=False)


def test_bad_items_are_skipped_counted_and_listed(make_run, data: Path, tmp_path: Path) -> None:
    (data.parent / "0.png").write_bytes(b"")
    (data.parent / "1.wav").unlink()
    (data.parent / "2.webp").write_bytes((data.parent / "2.webp").read_bytes()[:60])
    train(make_run(steps=4), progress=False)
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    names = {row["item"].rpartition("/")[2] for row in skipped}
    assert names <= {"0.png", "1.wav", "2.webp"}
    assert names
    assert all(row["error"] for row in skipped)


def test_too_many_bad_items_end_the_run_with_the_list(make_run, data: Path, tmp_path: Path) -> None:
    for number in range(3):
        for suffix in ("png", "wav", "webp"):
            (data.parent / f"{number}.{suffix}").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"could not be read.*skipped\.json"):
        train(make_run(steps=40, batch_size=12), progress=False)
    assert (tmp_path / "run" / "skipped.json").is_file()


def test_a_damaged_checkpoint_is_skipped(make_run, tmp_path: Path, caplog) -> None:
    train(make_run(steps=4), progress=False)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    (newest / "rows.safetensors").write_bytes(b"half")
    assert checkpoints.open_checkpoint(tmp_path / "run").step == 2
    assert "passing over a damaged checkpoint" in caplog.text


def test_a_full_disk_loses_nothing(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_run(steps=2), progress=False)
    folder = checkpoints.open_checkpoint(tmp_path / "run").folder
    model = checkpoints.load_model(checkpoints.open_checkpoint(folder))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(CheckpointError, match="free some space"):
            checkpoints.save(folder, model, step=3)

    def no_space(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_tensors", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(folder, model, step=3)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_another_llm_or_shape_is_refused_by_name(
    make_run, system_tree: dict, tmp_path: Path
) -> None:
    train(make_run(steps=2), progress=False)
    checkpoint = checkpoints.open_checkpoint(tmp_path / "run")

    parts.write_llm(tmp_path / "other", seed=5)
    llm = {**system_tree["llm"], "weights": str(tmp_path / "other")}
    other = models.build(config.parse_system({**system_tree, "llm": llm}))
    with pytest.raises(CheckpointError, match="llm differs"):
        checkpoints.load_weights(other, checkpoint)

    projections = {**system_tree["input_projections"], "audio": {"type": "mlp", "hidden": 8}}
    tree = {**system_tree, "input_projections": projections}
    differs = r"'audio\.layers\.0\.bias': expected \[8\], got \[16"
    with pytest.raises(CheckpointError, match=differs):
        checkpoints.load_weights(models.build(config.parse_system(tree)), checkpoint)


def test_losses_that_are_not_finite_end_the_run(make_run, monkeypatch) -> None:
    monkeypatch.setattr(TextNLL, "compute", _not_a_number)
    with pytest.raises(TrainingError, match="not finite in 3 steps"):
        train(make_run(steps=9, max_nonfinite=2), progress=False)


def _not_a_number(loss: TextNLL, output: Output, batch: Batch) -> LossTerm:
    return LossTerm(output.token_nll.sum() * float("nan"), loss.num_targets(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prealignment_trains_the_projections_alone(make_run, dtype):
    """Clips of noise are all alike to the tiny encoder; images and sounds must be recognised."""
    run = make_run()
    options = PrealignConfig(steps=150, batch_size=4, learning_rate=1e-2)
    cast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype == torch.bfloat16)
    found, weights = [], []
    for _ in range(2):
        model = models.build(run.system, dtype=torch.float32, device="cpu", seed=0)
        choose_trainable(model, {"*_projections.*": 1e-3})
        before = {name: weight.clone() for name, weight in model.llm.state_dict().items()}
        items = list(
            render_all_items(model.renderer, open_sources(run.stage.data, "data"), variants=2)
        )
        found.append(
            prealign(
                model, items, FeatureCache(model), run.stage, options, autocast=cast, progress=False
            )
        )
        weights.append(dict(model.trainable_candidates()))
        for name, weight in model.llm.state_dict().items():
            assert torch.equal(weight, before[name]), name
    kinds = [f"{side}_projections.{key}" for side in ("input", "output") for key in parts.KEYS]
    assert sorted(found[0]) == sorted(kinds)
    assert found[0] == found[1]
    assert found[0]["input_projections.image"] == found[0]["input_projections.audio"] == 1.0
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    untrained = models.build(run.system, dtype=torch.float32, device="cpu", seed=0)
    choose_trainable(untrained, {"*_projections.*": 1e-3})
    none = PrealignConfig(steps=1, batch_size=4, learning_rate=0.0)
    start = prealign(untrained, items, FeatureCache(untrained), run.stage, none, progress=False)
    for key in parts.KEYS:
        name = f"output_projections.{key}"
        assert found[0][name] < 0.5 * start[name]


def test_prealignment_comes_before_the_first_step_only(make_run, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "prealign", lambda *_, **__: asked.append(1) or {})
    run = make_run(steps=2, prealign={"steps": 1})
    train(run, progress=False)
    assert asked == [1]
    train(make_run(steps=3, prealign={"steps": 1}), resume=True, progress=False)
    assert asked == [1]


def test_realignment_comes_after_the_last_step_and_improves_the_outputs(make_run, tmp_path):
    table = {"llm.lora.*": 1e-2}  # what the projections read moves, and they do not follow
    options = {"steps": 100, "batch_size": 8, "learning_rate": 3e-3}
    changes = {"steps": 3, "losses": {"text": 1.0, "align": 1.0}}
    train(make_run(output="first", steps=1), progress=False)
    start = str(tmp_path / "first")
    aligned = {}
    for output, realign in (("without", None), ("with", options)):
        both = {**table, "output_projections.*": 1e-9}
        run = make_run(
            output=output, init_from=start, learning_rates=both, realign=realign, **changes
        )
        train(run, progress=False)
        model = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / output))
        choose_trainable(model, {"output_projections.*": 1e-9})
        still = PrealignConfig(steps=1, batch_size=64, learning_rate=0.0)
        items = list(render_all_items(model.renderer, open_sources(run.stage.data, "data")))
        aligned[output] = prealign(
            model, items, FeatureCache(model), run.stage, still, progress=False
        )
    for key in parts.KEYS:
        name = f"output_projections.{key}"
        assert aligned["with"][name] < 0.7 * aligned["without"][name], name


def test_prealignment_runs_the_model_on_the_configured_number_of_conversations(
    make_run, monkeypatch
):
    run = make_run()
    model = models.build(run.system, dtype=torch.float32, device="cpu", seed=0)
    choose_trainable(model, {"output_projections.*": 1e-3})
    items = list(render_all_items(model.renderer, open_sources(run.stage.data, "data")))
    spoken = []
    run_over = model.llm.forward
    monkeypatch.setattr(
        model.llm, "forward", lambda *args, **kwargs: spoken.append(1) or run_over(*args, **kwargs)
    )
    monkeypatch.setattr("mmllm.training.projection_fit.BATCH_SIZE", 1)
    few = PrealignConfig(steps=1, conversations=3)
    prealign(model, items, FeatureCache(model), run.stage, few, inputs=False, progress=False)
    assert len(spoken) == 3 < sum(bool(item.outputs) for item in items)


def test_prealignment_without_a_memory_of_features_is_refused(make_run):
    with pytest.raises(ConfigError, match="needs a cache"):
        make_run(prealign={"steps": 1}, cache="none")


def test_an_exported_model_has_the_weights_and_no_training_state(make_run, tmp_path: Path, capsys):
    output = train(make_run(steps=1), progress=False)
    assert main(["export", str(output), str(tmp_path / "given"), "--dtype", "float32"]) == 0
    assert "step 1" in capsys.readouterr().out
    own, given = (
        checkpoints.load_model(checkpoints.open_checkpoint(folder))
        for folder in (output, tmp_path / "given")
    )
    for name, weight in own.trainable_candidates():
        assert torch.equal(weight, dict(given.trainable_candidates())[name]), name
    assert not (tmp_path / "given" / "training").exists()
    modes = {file.stat().st_mode for file in (tmp_path / "given").rglob("*") if file.is_file()}
    assert len(modes) == 1, "the weights have the file mode of the config"
    small = sum(file.stat().st_size for file in (tmp_path / "given").rglob("*.safetensors"))
    assert main(["export", str(output), str(tmp_path / "given")]) == 0  # float16, over the first
    half = sum(file.stat().st_size for file in (tmp_path / "given").rglob("*.safetensors"))
    assert half < 0.7 * small
    assert main(["export", str(output), str(tmp_path)]) == FAILED


def test_the_best_model_is_kept_and_a_report_is_written(
    drawn_curves, make_run, tmp_path: Path
) -> None:
    held = make_run().stage.data["understand-image"]
    validation = {"every": 1, "batches": 1, "data": {"pictures": config.dump(held)}}
    samples = {"every": 2, "prompts": ["draw"]}
    run = make_run(
        steps=4, validation=validation, best="validation/text", samples=samples, save_total_limit=1
    )
    output = train(run, progress=False)
    curve = {
        row["step"]: row["validation/text"] for row in metrics(output) if "validation/text" in row
    }
    best = checkpoints.open_checkpoint(output / "best")
    assert len(curve) == 4
    assert curve[best.step] == min(curve.values())
    assert len(list((output / "checkpoints").iterdir())) == 1
    page = (output / "report.html").read_text()
    for word in (
        "text: cross-entropy",
        "step 2",
        "step 4",
        "data:image/svg+xml",
        "Config",
        "torch",
    ):
        assert word in page, word
    assert not re.search(r'src="(?!data:)', page)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": "validation/text"}, "stage.validation: give one"),
        ({"trackers": ["no_such_tracker"]}, "no_such_tracker"),
    ],
)
def test_what_cannot_be_tracked_is_refused(make_run, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        train(make_run(**changes), progress=False)


def test_a_dry_run_takes_one_step_of_everything_and_keeps_nothing(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make_run().stage.data["understand-image"]
    validation = {"every": 50, "batches": 9, "data": {"pictures": config.dump(held)}}
    done = []
    for owner, name in (
        (trainer, "training_step"),
        (callbacks, "validate"),
        (CheckpointSaver, "save"),
    ):
        own = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, own=own, name=name, **k: done.append(name) or own(*a, **k)
        )
    before = sorted(tmp_path.iterdir())
    run = make_run(steps=1000, validation=validation, samples={"every": 500, "prompts": ["draw"]})
    trainer.dry_run(run, progress=False)
    assert done == ["training_step", "validate", "save"]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_an_optimiser_of_bitsandbytes_resumes_exactly(make_run, tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    train(make_run(output="whole", optimizer=name, save_total_limit=9), progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000004")  # as if it had stopped after two
    train(make_run(output="parts", optimizer=name, save_total_limit=9), resume=True, progress=False)
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    whole, parts_ = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert any("state1" in entry for entry in whole)
    for entry, value in whole.items():
        assert torch.equal(value, parts_[entry]), entry


def test_an_optimiser_that_is_not_installed_is_refused(make_run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"stage\.optimizer: adamw_8bit: bitsandbytes is not"):
        train(make_run(optimizer="adamw_8bit"), progress=False)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """Decided on the device: weights, the step count and Adam's moments stay unchanged."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(3)
    update(optimizer, torch.tensor(True))
    moved = weight.detach().clone()
    state = {name: value.clone() for name, value in optimizer.state[weight].items()}
    assert not torch.equal(moved, torch.ones(3))
    weight.grad = torch.full((3,), torch.nan)
    update(optimizer, torch.tensor(False))
    assert torch.equal(weight, moved)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, state[name]), name
    weight.grad = torch.ones(3)
    update(optimizer, torch.tensor(True))
    assert not torch.equal(weight, moved)


def test_liger_is_used_where_it_is_supported(monkeypatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for installed in (False, True):
        found = object() if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
        assert not processes.uses_liger("auto", cpu)
        assert processes.uses_liger("auto", cuda) == installed
        assert not processes.uses_liger("off", cuda)
        with pytest.raises(ConfigError, match=r"stage\.liger_loss: on, but .*it needs cuda"):
            processes.uses_liger("on", cpu)
    assert processes.uses_liger("on", cuda)


def test_compiling_compiles_every_layer_and_renames_nothing(make_run, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    output = train(make_run(compile=True, steps=2), progress=False)
    assert [type(layer).__name__ for layer in compiled] == ["LlamaDecoderLayer"] * 2
    plain = train(make_run(output="plain", steps=2), progress=False)
    assert weights(output).keys() == weights(plain).keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("pack", [False, True])
def test_compiled_training_has_the_same_losses_and_is_resumed(
    make_run, tmp_path: Path, pack: bool
) -> None:
    plain = loss_curve(train(make_run(output="plain", pack=pack), progress=False))
    train(make_run(output="compiled", pack=pack, compile=True), progress=False)
    assert loss_curve(tmp_path / "compiled") == pytest.approx(plain, rel=1e-4)
    shutil.rmtree(tmp_path / "compiled/checkpoints/step-00000004")
    train(make_run(output="compiled", pack=pack), resume=True, progress=False)
    assert loss_curve(tmp_path / "compiled") == pytest.approx(plain, rel=1e-4)
