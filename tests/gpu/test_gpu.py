"""One GPU, end to end: replies and training steps are the CPU's, and no step waits for the device.

Tolerances: float32 without TF32 to 1e-3, media to 1e-3 of their range on average; bfloat16 to 5 %.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import mmllm
from mmllm import Audio, Chat, Image, Medium, Video, checkpoints, config, user
from mmllm import model as models
from mmllm.training import trainer
from mmllm.training.optimizer import update
from tests.decoders import tiny
from tests.device.training import STAGES, assert_alike, trained
from tests.gpu.conftest import OnDevice

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
FEW = {modality: {"steps": 4} for modality in ("image", "audio", "video")}
ASKED = {
    "text": "What is the capital of France?",
    "image": "Draw a red apple.",
    "audio": "Play the sound of a violin.",
    "video": "Animate a rocket.",
}


@pytest.fixture(scope="module")
def chats() -> dict[str, Chat]:
    """mini, once on each device."""
    return {}


def on(chats: dict[str, Chat], device: torch.device) -> Chat:
    if device.type not in chats:
        chats[device.type] = mmllm.load("mini", device=str(device), dtype="float32")
    return chats[device.type]


def assert_media_alike(found: Medium, wanted: Medium) -> float:
    """The same shape and next to the same values; returns their mean distance."""
    one, two = (np.asarray(medium.to_numpy(), dtype=np.float64) for medium in (found, wanted))
    assert one.shape == two.shape
    scale = 1.0 if isinstance(found, Audio) else 255.0
    distance = float(np.abs(one - two).mean() / scale)
    assert distance <= 1e-3
    return distance


@pytest.mark.parametrize("modality", ASKED)
def test_a_reply_equals_the_cpus(chats, device, note, modality: str) -> None:
    forced = {} if modality == "text" else {modality: "force"}
    options = {"seed": 1, "modalities": forced, "decoders": FEW, "max_new_tokens": 32}
    question = [user(ASKED[modality])]
    wanted = on(chats, CPU).reply(question, **options)
    on(chats, device).reply(question, **options)  # loads the decoder and the kernels
    began = time.perf_counter()
    found = on(chats, device).reply(question, **options)
    note(f"{time.perf_counter() - began:.2f} s a reply of {len(found.ids)} tokens")
    assert found.ids == wanted.ids
    assert len(found.media) == len(wanted.media) == (modality != "text")
    for one, two in zip(found.media, wanted.media, strict=True):
        note(f"mean distance from the CPU's {assert_media_alike(one, two):.1e}")


@pytest.mark.parametrize("kind", [Image, Audio, Video], ids=lambda kind: kind.__name__)
def test_what_is_shown_is_read_as_on_the_cpu(chats, device, kind: type) -> None:
    rng = np.random.default_rng(0)
    medium = {
        Image: lambda: Image.from_numpy(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)),
        Audio: lambda: Audio.from_numpy(rng.uniform(-0.5, 0.5, (1, 16000)).astype("f4"), 16000),
        Video: lambda: Video.from_numpy(rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8), 4.0),
    }[kind]()
    question = [user("What is this?", medium)]
    one, two = (on(chats, place).reply(question, max_new_tokens=16) for place in (CPU, device))
    assert one.ids == two.ids


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_of_a_stage(
    make_run, on_device: OnDevice, device, waiting, note, stage: str, pack: bool
) -> None:
    results = {}
    for place in (CPU, device):
        on_device(place)
        run = make_run(output=place.type, steps=2, pack=pack, **STAGES[stage])
        results[place] = trained(run, waiting)
    assert_alike(results[CPU], results[device], 1e-3)
    waits = sum(results[device].waits, Counter())
    note(f"waits in two steps: {dict(waits)}")
    assert waits == Counter()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(make_run, on_device, device, waiting, precision: str) -> None:
    if device.type != "cuda":
        pytest.skip("autocast is the GPU's own")
    on_device(CPU)
    exact = trained(make_run(output="exact", steps=2), waiting)
    on_device(device)
    mixed = trained(make_run(output="mixed", steps=2, precision=precision), waiting)
    # The scaler of fp16 begins too high: it leaves steps out, whose weighted sum is no number.
    pairs = zip(mixed.losses, exact.losses, strict=True)
    finite = [(one, other) for one, other in pairs if not math.isnan(one)]
    assert len(finite) >= len(mixed.losses) - (2 if precision == "fp16" else 0)
    for one, other in finite:
        assert one == pytest.approx(other, rel=0.05)
    assert sum(mixed.waits, Counter()) == Counter()


def test_batches_come_from_pinned_memory(make_run, on_device, device, monkeypatch) -> None:
    if device.type != "cuda":
        pytest.skip("memory is pinned for CUDA")
    on_device(device)
    pinned, take = [], trainer.training_step

    def watched(accelerator, wrapped, optimizer, data, *rest, **options):
        pinned.extend(micro.ids.is_pinned() for micro in data.microbatches)
        return take(accelerator, wrapped, optimizer, data, *rest, **options)

    monkeypatch.setattr(trainer, "training_step", watched)
    for workers in (0, 2):
        trainer.train(make_run(output=f"{workers}", steps=2, num_workers=workers), progress=False)
    assert pinned == [True] * 8


def test_a_gradient_that_is_not_finite_changes_nothing(device) -> None:
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for gradient, finite in ((1.0, True), (torch.nan, False)):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        update(optimizer, torch.full((), finite, device=device))
        assert torch.equal(weight, before) is not finite


@pytest.mark.parametrize("begins", ["cpu", "device"])
def test_a_run_goes_on_on_the_other_device(
    make_run, on_device, device, waiting, begins: str
) -> None:
    constant = {"schedule": "constant", "warmup_ratio": 0.0}
    on_device(CPU)
    whole = trained(make_run(output="whole", steps=4, **constant), waiting)
    places = (CPU, device) if begins == "cpu" else (device, CPU)
    for place, steps in zip(places, (2, 4), strict=True):
        on_device(place)
        run = make_run(output="moved", steps=steps, **constant)
        moved = trained(run, waiting, resume=steps == 4)
    whole.norms = whole.norms[2:]
    assert_alike(whole, moved, 1e-3)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_an_offloaded_decoder_makes_the_same(device, tmp_path: Path, offload: str) -> None:
    if device.type != "cuda":
        pytest.skip("diffusers offloads from CUDA")
    pipelines = tiny.save_pipelines(tmp_path)
    made = {}
    for way in ("none", offload):
        entry = {**config.dump(tiny.configs(pipelines, steps=2)["image"]), "offload": way}
        decoder = config.build(config.parse_component("decoders", entry, "decoder")).to(device)
        condition = decoder.encode_captions(["a red apple"])
        generators = [torch.Generator().manual_seed(0)]
        (made[way],) = decoder.sample(condition, generators=generators)
    assert_media_alike(made[offload], made["none"])


def test_a_language_model_that_is_spread_by_a_map(make_model, system_tree, device) -> None:
    if device.type != "cuda":
        pytest.skip("accelerate spreads models over CUDA devices")
    plain = Chat(make_model())
    spread = Chat(
        models.build(
            config.parse_system(
                {**system_tree, "llm": {**system_tree["llm"], "device_map": "auto"}}
            ),
            device=str(device),
        ).eval()
    )
    question = [user("What is this?")]
    assert spread.reply(question).ids == plain.reply(question).ids


def test_compiled_layers_train_alike(make_run, on_device, device, waiting, note) -> None:
    if device.type != "cuda":
        pytest.skip("torch.compile makes kernels for a GPU")
    on_device(device)
    eager = trained(make_run(output="eager", steps=2), waiting)
    began = time.perf_counter()
    compiled = trained(make_run(output="compiled", steps=2, compile=True), waiting)
    note(f"{time.perf_counter() - began:.0f} s for two steps, compilation included")
    assert_alike(eager, compiled, 1e-3)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers(make_run, on_device, device, waiting, optimizer: str) -> None:
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes on CUDA")
    on_device(device)
    whole = trained(make_run(output="whole", steps=4, optimizer=optimizer), waiting)
    for steps in (2, 4):
        run = make_run(output="parts", steps=steps, optimizer=optimizer)
        parts = trained(run, waiting, resume=steps == 4)
    assert parts.losses[:2] == whole.losses[:2]


def test_four_bits_answer(system_tree, device) -> None:
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes on CUDA")
    llm = {**system_tree["llm"], "quantization": "4bit"}
    system = config.parse_system({**system_tree, "llm": llm})
    chat = Chat(models.build(system, device=str(device)).eval())
    assert chat.reply([user("What is this?")], max_new_tokens=4).ids


def test_ligers_kernel_has_the_loss_of_ours(make_run, on_device, device, waiting) -> None:
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger_kernel on CUDA (pip install 'mmllm[liger]')")
    on_device(device)
    ours = trained(make_run(output="ours", steps=2, liger_loss="off"), waiting)
    theirs = trained(make_run(output="theirs", steps=2, liger_loss="on"), waiting)
    assert_alike(ours, theirs, 1e-3)


def test_a_model_trained_there_answers_here(make_run, on_device, device, waiting) -> None:
    """A checkpoint does not depend on the device."""
    on_device(device)
    folder = trained(make_run(steps=2), waiting).folder
    checkpoint = checkpoints.open_checkpoint(folder)
    replies = [
        Chat(checkpoints.load_model(checkpoint, device=str(place))).reply([user("draw")], seed=0)
        for place in (CPU, device)
    ]
    assert replies[0].ids == replies[1].ids
