"""The tools that train the parts of mini's world: a few steps of each, and a resumed run."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmllm.config import registry
from mmllm.evaluation.everyday_judges import load_judges
from mmllm.mini.caption_encoder import CaptionEncoder, CaptionTokenizer
from mmllm.mini.codecs import ClipAutoencoder, ImageAutoencoder
from tests import parts
from tools.mini.world import clip_judge, codec, decoders, judge, pool, soundscape_judge
from tools.mini.world.denoisers import DENOISERS, pipeline
from tools.mini.world.pipelines import ship
from tools.mini.world.run import Progress, Run, train
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


def test_codec_pool_and_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the codec, eight scenes, two steps of the decoder; the caption reaches it."""
    monkeypatch.setattr(codec, "BATCH", 2)
    torch.manual_seed(0)
    model = codec.codec().train()
    run = Run(tmp_path, model, Progress(steps=2), codec.LEARNING_RATE)
    before = model.decoder.conv_in.weight.detach().clone()
    train(run, codec.Loss(model, 0), lambda run: None, every=60)
    assert not torch.equal(before, model.decoder.conv_in.weight)
    model.register_to_config(scaling_factor=0.1)
    model.save_pretrained(tmp_path / "codec")
    codec.wrap(tmp_path / "codec", count=16)

    pool.encode(pool.KINDS["image"], tmp_path, tmp_path / "codec", takes=2, count=8)
    assert pool.latents(tmp_path).shape == (8, 2, 16, 8, 8)
    assert pool.shape(tmp_path) == (16, 8, 8)
    lengths = torch.tensor([0, 5, 3, 4, 5, 6, 7, 2, 3])
    states = torch.randn(int(lengths.sum()), 16).bfloat16()
    CaptionStates(states, lengths.cumsum(0), torch.zeros(16), torch.ones(16)).save(
        tmp_path / "captions-0.safetensors"
    )
    denoiser = replace(DENOISERS["image"], batch=4)
    network = denoiser.build(torch.Size((16, 8, 8)), 16)
    loss = decoders.Loss(denoiser, network, tmp_path, seed=0)
    assert loss(0, 0.0).item() == loss(0, 0.0).item() != loss(1, 0.0).item()
    text = standardised([states[:5], states[5:8]], torch.zeros(16), torch.ones(16), [False] * 2)
    shape = torch.Size((16, 8, 8))
    first, _ = decoders.sample(denoiser, network, shape, text, seed=0, steps=2)
    flipped = (text[0].flip(0), text[1].flip(0))
    swapped = decoders.sample(denoiser, network, shape, flipped, seed=0, steps=2)
    assert first.shape == (16, 8, 8)
    assert not torch.allclose(first, swapped[0], atol=1e-3)


SHAPES = {"image": (16, 8, 8), "video": (64, 3, 8, 8), "audio": (192, 64)}


def world_codec(modality: str) -> Any:
    torch.manual_seed(0)
    image: Any = codec.codec().eval()
    wrapped = ImageAutoencoder.around(image, torch.randn(4, 48, 8, 8))
    return {"image": wrapped, "video": ClipAutoencoder.around(wrapped)}.get(
        modality, pool.KINDS["audio"].codec(Path())
    )


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
    vae = world_codec(modality)
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
    kind = {"image": "pixart", "video": "wan", "audio": "stable_audio"}[modality]
    options = {"type": kind, "weights": str(tmp_path / "whole"), "max_caption_tokens": MAX_TOKENS}
    decoder = registry.build(registry.parse_component("decoders", options, "decoders.x"))
    assert not list((tmp_path / "whole").glob("tokenizer/tokenizer.json"))  # the LLM has it
    condition = decoder.encode_captions(captions)
    torch.testing.assert_close(condition["prompt_embeds"], states, rtol=0, atol=1e-5)


def test_a_codec_of_clips_may_be_that_of_another_pipeline(tmp_path: Path) -> None:
    clips: Any = world_codec("video")
    frames = clips.frames
    frames.save_pretrained(tmp_path / "images" / "vae")
    ClipAutoencoder.around(frames, str(tmp_path / "images")).save_pretrained(tmp_path / "clips")
    assert sum(file.stat().st_size for file in (tmp_path / "clips").iterdir()) < 10_000
    other: Any = ClipAutoencoder.from_pretrained(tmp_path / "clips")
    with torch.no_grad():
        clip = torch.rand(1, 3, 5, 32, 32)
        latents = clips.encode(clip).latent_dist.mode()
        assert torch.equal(other.encode(clip).latent_dist.mode(), latents)
        assert torch.equal(other.decode(latents).sample, clips.decode(latents).sample)


def test_latents_of_images_are_components_of_variance_1() -> None:
    torch.manual_seed(0)
    inner: Any = codec.codec().eval()
    mixed = torch.linalg.qr(torch.randn(48, 48)).Q * torch.logspace(-0.5, 0.5, 48)
    latents = torch.einsum("bchw,cd->bdhw", torch.randn(64, 48, 8, 8), mixed) + 3
    wrapped: Any = ImageAutoencoder.around(inner, latents, channels=48)
    with torch.no_grad():
        image = torch.rand(2, 3, 64, 64) * 2 - 1
        coded = wrapped.encode(image).latent_dist.mode()
        own = inner.encode(image).latent
        torch.testing.assert_close(
            wrapped.decode(coded).sample, inner.decode(own).sample, rtol=0, atol=1e-4
        )
        wrapped.codec.encode = lambda _: SimpleNamespace(latent=latents)
        whitened = wrapped.encode(image).latent_dist.mode().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cov(whitened.T), torch.eye(48), rtol=0, atol=1e-3)
    few = ImageAutoencoder.around(inner, latents, channels=16)
    assert torch.equal(few.variances, wrapped.variances[:16])  # those of the largest variance
    assert few.variances.min() > wrapped.variances[16:].max()
