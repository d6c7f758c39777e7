"""The tools that train the parts of mini's world: a few steps of each, and a resumed run."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from mmllm.config import registry
from mmllm.evaluation.everyday_judges import load_judges
from mmllm.mini.caption_encoder import CaptionEncoder, CaptionTokenizer
from mmllm.mini.clip_transformer import ClipFrameCodec, ClipTransformer
from tests import parts
from tools.mini.world import clip_judge, decoders, judge, pool, soundscape_judge
from tools.mini.world.cards import write_card
from tools.mini.world.denoisers import DENOISERS, finer, pipeline, predict_frames
from tools.mini.world.pipelines import ship
from tools.mini.world.run import Progress, Run
from tools.mini.world.text import MAX_TOKENS, CaptionStates, standardised


def line(folder: Path, steps: int, stop: int) -> tuple[nn.Linear, Run]:
    """A tiny training of `steps` steps, stopped after `stop`."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    model = nn.Linear(3, 3)
    run = Run(folder, model, Progress(steps=steps), 1e-2)

    def loss(step: int, share: float) -> torch.Tensor:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(inputs) - inputs).square().mean() * (1 + share)

    for step in itertools.count(run.progress.step):
        if step == stop:
            break
        run.update(loss(step, run.progress.share()))
    run.save()
    return model, run


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole, run = line(tmp_path / "whole", 12, 12)
    line(tmp_path / "parts", 12, 5)
    resumed, again = line(tmp_path / "parts", 12, 12)
    assert again.progress.step == run.progress.step == 12
    assert torch.equal(whole.weight, resumed.weight)
    assert all(torch.equal(run.averages[name], again.averages[name]) for name in run.averages)
    assert [file.name for file in (tmp_path / "parts").glob("state-*")] == ["state-12.safetensors"]


Loss = Callable[[int, float], torch.Tensor]


def scene_loss() -> tuple[nn.Module, Loss]:
    detector = judge.Detector(width=32, blocks=1)
    return detector, judge.Loss(detector, None, seed=0)


def clip_loss() -> tuple[nn.Module, Loss]:
    detector = clip_judge.ClipDetector(width=32, blocks=1)
    return detector, clip_judge.Loss(detector, seed=0)


def soundscape_loss() -> tuple[nn.Module, Loss]:
    classifier = soundscape_judge.SoundscapeClassifier(width=16).eval()  # without dropout
    return classifier, soundscape_judge.Loss(classifier, seed=0)


@pytest.mark.parametrize("make", [scene_loss, clip_loss, soundscape_loss])
def test_a_judge_learns(
    make: Callable[[], tuple[nn.Module, Loss]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (judge, clip_judge, soundscape_judge):
        monkeypatch.setattr(module, "BATCH", 6)
    torch.manual_seed(0)
    model, loss = make()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = loss(0, 0.0)
    for _ in range(12):
        optimizer.zero_grad()
        loss(0, 0.0).backward()
        optimizer.step()
    assert loss(0, 0.0).item() < 0.8 * first.item()
    assert loss(1, 0.0).item() != loss(0, 0.0).item()


@pytest.mark.parametrize(
    ("tool", "name", "modality"),
    [
        (judge, "scene", "image"),
        (clip_judge, "clip", "video"),
        (soundscape_judge, "soundscape", "audio"),
    ],
)
def test_a_judge_is_trained_measured_and_read_again(
    tool: Any, name: str, modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step by the command; its folder is one of judges."""
    monkeypatch.setattr(tool, "BATCH", 3)
    monkeypatch.setattr(tool, "NUM_MEASURED", 4)
    threads = str(torch.get_num_threads())
    for _ in range(2):  # the second time it is complete already
        command = ["judge", "--run", str(tmp_path), "--steps", "1", "--threads", threads]
        monkeypatch.setattr(sys, "argv", command)
        tool.main()
    scores = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(scores) > 3
    assert all(0 <= value <= 1 for value in scores.values())
    card = (tmp_path / f"{name}.md").read_text()
    assert f"python -m {tool.__name__}`: 1 steps" in card
    assert (tmp_path / f"{name}.safetensors").stat().st_size < 4 * 2**20
    assert load_judges(tmp_path).keys() == {modality}


def test_a_run_needs_a_length() -> None:
    with pytest.raises(ValueError, match="so many steps or so many minutes"):
        Progress().share()


def test_pool_and_decoder(tmp_path: Path) -> None:
    """Eight scenes, two steps of the decoder; the caption reaches it."""
    torch.manual_seed(0)
    texts = [pool.text(pool.KINDS["image"], index) for index in range(40)]
    assert 8 < sum(text.startswith(("Here is ", "Here are ")) for text in texts) < 24

    pool.encode(pool.KINDS["image"], tmp_path, None, takes=2, count=8)
    assert pool.latents(tmp_path).shape == (8, 2, 16, 16, 16)
    assert pool.shape(tmp_path) == (16, 16, 16)
    lengths = torch.tensor([0, 5, 3, 4, 5, 6, 7, 2, 3])
    states = torch.randn(int(lengths.sum()), 16).bfloat16()
    CaptionStates(states, lengths.cumsum(0), torch.zeros(16), torch.ones(16)).save(
        tmp_path / "captions-0.safetensors"
    )
    denoiser = replace(DENOISERS["image"], batch=4)
    network = denoiser.build(torch.Size((16, 16, 16)), 16)
    loss = decoders.Loss(denoiser, network, tmp_path, seed=0)
    assert loss(0, 0.0).item() == loss(0, 0.0).item() != loss(1, 0.0).item()
    text = standardised([states[:5], states[5:8]], torch.zeros(16), torch.ones(16), [False] * 2)
    shape = torch.Size((16, 16, 16))
    first, _ = decoders.sample(denoiser, network, shape, text, seed=0, steps=2)
    flipped = (text[0].flip(0), text[1].flip(0))
    swapped = decoders.sample(denoiser, network, shape, flipped, seed=0, steps=2)
    assert first.shape == (16, 16, 16)
    assert not torch.allclose(first, swapped[0], atol=1e-3)


def test_a_decoder_begins_as_one_for_images_of_half_the_size(tmp_path: Path) -> None:
    """Where all latents of a place are alike, it predicts what the smaller one does."""
    pool.encode(pool.KINDS["image"], tmp_path, None, takes=1, count=8, half=True)
    assert pool.shape(tmp_path) == (16, 8, 8)
    torch.manual_seed(0)
    denoiser = DENOISERS["image"]
    small, large = (denoiser.build(torch.Size((16, side, side)), 16) for side in (8, 16))
    for name, weight in small.named_parameters():
        nn.init.normal_(weight, std=0.1)
        grown = dict(large.named_parameters())[name]
        grown.data.copy_(finer(weight.detach(), grown.shape))
    noisy, text = torch.randn(2, 16, 8, 8), (torch.randn(2, 3, 16), torch.ones(2, 3))
    with torch.no_grad():
        made = [
            denoiser.predict(network.eval(), latents, torch.tensor([0.3, 0.8]), text)
            for network, latents in ((small, noisy), (large, _doubled(noisy)))
        ]
    torch.testing.assert_close(made[1], _doubled(made[0]), rtol=1e-4, atol=1e-4)


def _doubled(latents: torch.Tensor) -> torch.Tensor:
    return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


SHAPES = {"image": (16, 16, 16), "video": (16, 9, 16, 16), "audio": (192, 64)}


@pytest.mark.parametrize("modality", SHAPES)
def test_the_pipeline_samples_what_training_samples(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same network, captions and noise, in float32: through diffusers' own pipeline."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    llm = parts.write_llm(tmp_path / "llm")
    tokenizer = CaptionTokenizer.of(str(llm), MAX_TOKENS)
    encoder: Any = CaptionEncoder(weights=str(llm), layers=1, sink=1, width=32)
    captions = ["a red apple", "a violin"]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    denoiser, shape = DENOISERS[modality], torch.Size(SHAPES[modality])
    network = denoiser.build(shape, 32).eval()
    for weight in network.parameters():  # the last layers begin as zeros
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    vae: Any = pool.KINDS[modality].codec(None)
    latents = decoders.sample(
        denoiser, network, shape, (states, tokens.attention_mask.float()), seed=0, steps=2
    )
    wanted = decoders.decode(modality, vae, latents)

    text = {"tokenizer": tokenizer, "text_encoder": encoder}
    pipe = pipeline(modality, network, vae, text)
    pipe.set_progress_bar_config(disable=True)
    call = {**denoiser.call, "num_inference_steps": 2, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    made = pipe(captions, generator=generators, **call)[0]
    if modality != "audio":
        made = 2 * made - 1
    if modality == "video":
        made = made.transpose(1, 2)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)

    ship(pipe, tmp_path / "whole")
    kind = {"image": "pixart", "video": "latte", "audio": "stable_audio"}[modality]
    options = {"type": kind, "weights": str(tmp_path / "whole"), "max_caption_tokens": MAX_TOKENS}
    if modality == "video":
        options["frames"] = shape[1]
    decoder = registry.build(registry.parse_component("decoders", options, "decoders.x"))
    assert not list((tmp_path / "whole").glob("tokenizer/tokenizer.json"))  # the LLM has it
    condition = decoder.encode_captions(captions)
    torch.testing.assert_close(condition["prompt_embeds"], states, rtol=0, atol=1e-5)

    goes_on = denoiser.build(shape, 32)
    assert decoders.is_pipeline(str(tmp_path / "whole"))
    statistics = decoders.load_pipeline(str(tmp_path / "whole"), goes_on)
    assert torch.equal(statistics["mean"], encoder.mean)
    for name, weight in goes_on.named_parameters():
        torch.testing.assert_close(weight, network.get_parameter(name).float())


def test_a_clip_denoiser_without_time_is_the_image_denoiser() -> None:
    """The same weights, captions of several lengths; new layers over time change nothing."""
    torch.manual_seed(0)
    still = DENOISERS["image"].build(torch.Size((16, 8, 8)), 16).eval()
    for weight in still.parameters():  # the last layers begin as zeros
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    clips = DENOISERS["video"].build(torch.Size((16, 9, 8, 8)), 16).eval()
    clips.load_state_dict(still.state_dict(), strict=False)
    noisy, level = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.7])
    text = standardised(
        [torch.randn(7, 16), torch.randn(3, 16)], torch.zeros(16), torch.ones(16), [False, False]
    )
    with torch.no_grad():
        wanted = DENOISERS["image"].predict(still, noisy, level, text)
        made = predict_frames(clips, noisy, level, text)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)


def test_a_clip_denoiser_is_saved_without_the_layers_of_images(tmp_path: Path) -> None:
    clips: Any = DENOISERS["video"].build(torch.Size((16, 9, 8, 8)), 16)["transformer"]
    images: Any = DENOISERS["image"].build(torch.Size((16, 8, 8)), 16)["transformer"]
    shared = {name: value for name, value in clips.state_dict().items() if "temporal" not in name}
    images.load_state_dict(shared)
    images.save_pretrained(tmp_path / "images" / "transformer")
    clips.images_from = str(tmp_path / "images")
    clips.save_pretrained(tmp_path / "clips")
    (weights,) = (tmp_path / "clips").glob("*.safetensors")
    assert weights.stat().st_size < 0.45 * sum(w.numel() * 4 for w in clips.parameters())
    loaded = ClipTransformer.from_pretrained(tmp_path / "clips")
    assert loaded.images_from == clips.images_from
    for name, value in clips.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_layers_of_images_stay_while_clips_train(tmp_path: Path) -> None:
    network = DENOISERS["video"].build(torch.Size((16, 9, 8, 8)), 16)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    decoders.keep_images(network)
    run = Run(tmp_path, network, Progress(steps=2), 1e-2)
    noisy, level = torch.randn(2, 16, 9, 8, 8), torch.tensor([0.3, 0.7])
    text = torch.randn(2, 3, 16), torch.ones(2, 3)
    run.update(DENOISERS["video"].predict(network, noisy, level, text).square().mean())
    changed = {n for n, weight in network.named_parameters() if not torch.equal(weight, before[n])}
    assert changed
    assert all("temporal" in name for name in changed)


def test_neighbours_among_the_layers_over_time_are_one() -> None:
    clips: Any = DENOISERS["video"].build(torch.Size((16, 9, 8, 8)), 16)["transformer"]
    blocks = clips.temporal_transformer_blocks
    assert [blocks[index + 1] is blocks[index] for index in range(5)] == [True, False] * 2 + [True]


def test_the_codec_of_clips_is_that_of_images_and_is_not_saved_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    images.save_pretrained(tmp_path / "images" / "vae")
    ClipFrameCodec.of(str(tmp_path / "images")).save_pretrained(tmp_path / "clips" / "vae")
    assert not list((tmp_path / "clips").rglob("*.safetensors"))
    loaded = ClipFrameCodec.from_pretrained(tmp_path / "clips" / "vae", torch_dtype=torch.float16)
    for name, value in images.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half())


def test_a_card_names_what_is_in_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "part.safetensors")
    write_card(tmp_path, "video", "LattePipeline", 20, 12_000, Progress(step=9, seconds=120.0))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for part in ("`LattePipeline`", "22 in", "12,000 clips", "9 steps in 2 minutes", "Licence"):
        assert part in card


def test_clips_and_images_train_the_same_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, shape in {"clips": (4, 1, 16, 9, 8, 8), "images": (4, 1, 16, 8, 8)}.items():
        (tmp_path / name).mkdir()
        states = torch.randn(12, 16).bfloat16()
        CaptionStates(states, torch.arange(0, 13, 3), torch.zeros(16), torch.ones(16)).save(
            tmp_path / name / "captions-0.safetensors"
        )
        save_file({"latents": torch.randn(shape)}, tmp_path / name / "latents-0.safetensors")
    network = DENOISERS["video"].build(torch.Size((16, 9, 8, 8)), 16)
    clips = replace(DENOISERS["video"], batch=2)
    images = replace(DENOISERS["image"], batch=2, predict=predict_frames)
    loss = decoders.JointLoss(
        decoders.Loss(clips, network, tmp_path / "clips", 0),
        decoders.Loss(images, network, tmp_path / "images", 0),
    )
    loss(0, 0.0).backward()
    transformer: Any = network["transformer"]
    alone = transformer.proj_out.weight.grad.clone()
    network.zero_grad()
    loss.images(0, 0.0).backward()
    assert 0 < transformer.proj_out.weight.grad.norm() != alone.norm()
    assert transformer.temporal_transformer_blocks[0].ff.net[2].weight.grad is None
