"""Media as files: what is read back is what was meant, and bad files say what is wrong."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import wave
import zlib
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from mmllm import media
from mmllm.conversation import Audio, Image, Video
from mmllm.errors import MediaError
from mmllm.media import codecs
from tests.media.samples import MARK, gradient, png, steps, tone

# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "error"), [(".png", 0), (".webp", 12), (".jpg", 12), (".gif", 9)]
)
def test_images_are_saved_with_their_provenance(tmp_path, suffix, error):
    picture = Image.from_numpy(gradient(), provenance=MARK)
    path = picture.save(tmp_path / "new" / f"a{suffix}")
    back = Image(path).decoded()
    difference = np.abs(back.to_numpy().astype(int) - gradient())
    assert difference.mean() <= error / 4
    assert difference.max() <= error * 3
    assert back.provenance == MARK
    assert media.read_provenance(path) == MARK
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_without_provenance_nothing_is_written(tmp_path):
    path = Image.from_numpy(gradient()).save(tmp_path / "a.png")
    assert media.read_provenance(path) is None
    assert b"iTXt" not in path.read_bytes()


def test_exif_orientation_is_honoured(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6  # "turn a quarter clockwise to see it upright"
    PILImage.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    upright = Image(tmp_path / "a.png").to_numpy()
    assert np.array_equal(upright, np.rot90(gradient(), -1))


def test_transparency_is_laid_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 128, 255]
    values = Image(png(PILImage.fromarray(pixels))).to_numpy()[0, :, 0]
    assert values.tolist() == [255, 127, 0]
    palette = PILImage.fromarray(np.zeros((2, 2), np.uint8), "P")
    palette.putpalette([10, 20, 30])
    assert (Image(png(palette, transparency=0)).to_numpy() == 255).all()


def test_deep_grey_is_scaled_not_clipped():
    deep = PILImage.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert Image(png(deep)).to_numpy()[0, :, 1].tolist() == [0, 100, 255]


# --- sounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "error"), [(".wav", 2e-4), (".flac", 2e-4), (".ogg", 0.1)])
def test_audio_is_saved_with_its_provenance(tmp_path, suffix, error):
    samples = np.concatenate([tone(), 0.5 * tone(hertz=880)])
    path = Audio.from_numpy(samples, 16_000, provenance=MARK).save(tmp_path / f"a{suffix}")
    back = Audio(path).decoded()
    assert back.sample_rate == 16_000
    assert back.to_numpy().dtype == np.float32
    assert back.to_numpy().shape == samples.shape
    assert np.abs(back.to_numpy() - samples).max() < error
    assert back.provenance == MARK == media.read_provenance(path)


def test_wav_is_what_the_standard_library_reads(tmp_path):
    path = Audio.from_numpy(tone(), 16_000).save(tmp_path / "a.wav")
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
    assert np.abs(samples - tone()[0]).max() < 1e-4


def test_resampling_keeps_the_tone_and_averages_channels():
    stereo = Audio.from_numpy(np.concatenate([tone(), -0.5 * tone()]), 16_000)
    mono = stereo.resample(44_100)
    assert mono.sample_rate == 44_100
    expected = 0.25 * tone(1.0, 44_100)
    assert mono.to_numpy().shape == expected.shape
    inside = slice(500, -500)
    assert np.abs(mono.to_numpy()[:, inside] - expected[:, inside]).max() < 2e-3
    assert stereo.resample(8_000, mono=False).to_numpy().shape == (2, 8_000)


def test_aac_in_a_container_is_a_sound(tmp_path):
    with av.open(tmp_path / "a.m4a", "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    back = Audio(tmp_path / "a.m4a").decoded()
    assert back.sample_rate == 16_000
    spectrum = np.abs(np.fft.rfft(back.to_numpy()[0, :16_000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1  # bins of 1 Hz


# --- clips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".webp", ".gif"])
def test_videos_are_saved_with_their_provenance(tmp_path, suffix):
    path = Video.from_numpy(steps(), 10.0, provenance=MARK).save(tmp_path / f"a{suffix}")
    back = Video(path).decoded()
    assert back.fps == pytest.approx(10.0)
    assert back.to_numpy().shape == steps().shape
    assert np.abs(back.to_numpy().astype(int) - steps()).max() <= 6
    assert back.audio is None
    assert back.provenance == MARK == media.read_provenance(path)


@pytest.mark.parametrize(("suffix", "times"), [(".mp4", 100), (".webm", 10)])
def test_the_same_clip_is_the_same_file(tmp_path, suffix, times):
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    clip = Video.from_numpy(noise, 4.0)
    files = {clip.save(tmp_path / f"{n}{suffix}").read_bytes() for n in range(times)}
    assert len(files) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_clip_carries_its_sound_in_time(tmp_path, suffix):
    samples = tone(1.2)
    samples[:, :9_600] = 0  # silence, then the tone from 0.6 s on
    clip = Video.from_numpy(steps(), 10.0, audio=Audio.from_numpy(samples, 16_000))
    back = Video(clip.save(tmp_path / f"a{suffix}")).decoded()
    assert back.audio is not None
    rate = back.audio.sample_rate
    assert rate == (16_000 if suffix == ".mp4" else 48_000)  # Opus decodes to 48 kHz
    amplitude = np.abs(back.audio.to_numpy()[0])
    assert abs(len(amplitude) / rate - 1.2) < (1e-9 if suffix == ".mp4" else 0.01)
    assert amplitude[: int(0.56 * rate)].max() < 0.02
    assert abs(int((amplitude > 0.1).argmax()) / rate - 0.6) < 0.01


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_unusual_rates_and_odd_sides_can_be_saved(tmp_path, suffix):
    clip = Video.from_numpy(
        steps(6, 31, 45), 29.97, audio=Audio.from_numpy(tone(0.2, 10_000), 10_000)
    )
    back = Video(clip.save(tmp_path / f"a{suffix}")).decoded()
    assert back.to_numpy().shape == (6, 32, 46, 3)
    # WebM counts in milliseconds.
    assert back.fps == pytest.approx(29.97, abs=0.01 if suffix == ".mp4" else 0.04)
    assert back.audio is not None
    assert back.audio.to_numpy().shape[1] / back.audio.sample_rate == pytest.approx(0.2, abs=0.01)


def test_audio_is_never_dropped_silently(tmp_path, caplog):
    clip = Video.from_numpy(steps(), 10.0, audio=Audio.from_numpy(tone(), 16_000))
    clip.save(tmp_path / "a.webp")
    assert "holds no audio" in caplog.text


def test_a_long_frame_is_repeated(tmp_path):
    frames = [PILImage.fromarray(frame) for frame in steps(3)]
    options = {"save_all": True, "append_images": frames[1:], "lossless": True}
    frames[0].save(tmp_path / "a.webp", duration=[100, 300, 200], **options)
    back = Video(tmp_path / "a.webp").decoded()
    assert back.fps == pytest.approx(10.0)
    assert back.to_numpy()[:, 0, 0, 0].tolist() == [0, 20, 20, 20, 40, 40]


@pytest.mark.parametrize("suffix", [".mp4", ".webp", None])
def test_sampled_frames_are_even_in_time(tmp_path, suffix):
    clip = Video.from_numpy(steps(12), 10.0)
    if suffix:
        clip = Video(clip.save(tmp_path / f"a{suffix}"))
    # Four parts of three frames: the middle one of each. Five parts: at 0.12, 0.36 ... s.
    for num, expected in ((4, [1, 4, 7, 10]), (5, [1, 3, 6, 8, 10])):
        values = clip.sample_frames(num).mean(axis=(1, 2, 3)) / 20
        assert np.round(values).tolist() == expected
    assert len(clip.sample_frames(30)) == 30


def test_rotated_phone_clips_stand_upright(tmp_path):
    path = Video.from_numpy(np.stack([gradient(32, 48)] * 3), 10.0).save(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    # The track header's matrix, set to a quarter turn as cameras write it (ISO 14496-12, 8.3.2).
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[start : start + 36] == identity
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    upright = Video(bytes(data)).to_numpy()[0].astype(int)
    assert upright.shape == (48, 32, 3)
    assert np.abs(upright - np.rot90(gradient(32, 48), -1)).mean() < 8


# --- bad input ----------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    """One good file of each kind."""
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    clip = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8)
    return {
        "png": Image.from_numpy(picture).save(tmp_path / "a.png"),
        "jpg": Image.from_numpy(picture).save(tmp_path / "a.jpg"),
        "webp": Image.from_numpy(picture).save(tmp_path / "a.webp"),
        "wav": Audio.from_numpy(tone(), 16_000).save(tmp_path / "a.wav"),
        "flac": Audio.from_numpy(tone(), 16_000).save(tmp_path / "a.flac"),
        "ogg": Audio.from_numpy(tone(), 16_000).save(tmp_path / "a.ogg"),
        "mp4": Video.from_numpy(clip, 10.0).save(tmp_path / "a.mp4"),
        "gif": Video.from_numpy(clip, 10.0).save(tmp_path / "a.gif"),
    }


KINDS = {"png": Image, "jpg": Image, "webp": Image, "wav": Audio, "flac": Audio, "ogg": Audio}
KINDS |= {"mp4": Video, "gif": Video}


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_files_are_refused(good, suffix, share):
    data = good[suffix].read_bytes()
    assert KINDS[suffix](data).decoded().array is not None
    with pytest.raises(MediaError, match=r"<.* bytes>: .*(damaged|truncated|format)"):
        KINDS[suffix](data[: int(share * len(data))]).decoded()


@pytest.mark.parametrize("suffix", KINDS)
def test_the_wrong_modality_names_the_right_one(good, suffix):
    for kind in {Image, Audio, Video} - {KINDS[suffix]}:
        with pytest.raises(MediaError, match=rf"give it as {KINDS[suffix].__name__}\(\.\.\.\)"):
            kind(good[suffix]).decoded()


@pytest.mark.parametrize("kind", [Image, Audio, Video])
def test_what_is_no_medium(tmp_path, kind):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("I am no picture.\n" * 99)
    (tmp_path / "text.raw").write_text("I am no sound.\n" * 99)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:9,\n/etc/hostname\n")
    for source, why in [
        (tmp_path / "none.png", "no such file"),
        ("https://example.org/a.png", "download it first"),
        (tmp_path, "got a folder"),
        (tmp_path / "empty.png", "empty"),
        (b"", "empty"),
        (tmp_path / "text.png", "neither an image"),
        (tmp_path / "text.raw", "neither an image"),
        (tmp_path / "list.m3u8", "neither an image"),
        (b"\0" * 4096, "neither an image"),
    ]:
        with pytest.raises(MediaError, match=why):
            kind(source).decoded()
    with pytest.raises(MediaError, match="nothing to decode"):
        kind(caption="a cat").decoded()


def test_empty_and_non_finite_audio_is_refused(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    with pytest.raises(MediaError, match="no samples"):
        Audio(tmp_path / "a.wav").decoded()
    samples = np.array([0.0, np.nan], np.float32).tobytes()
    fmt = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)  # 3: IEEE float
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", 8) + samples
    with pytest.raises(MediaError, match="not numbers"):
        Audio(b"RIFF" + struct.pack("<I", len(chunks)) + chunks).decoded()


def test_huge_pictures_are_refused_by_their_header():
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    for side in (9_000, 60_000):  # beyond our limit; beyond what Pillow opens at all
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        data = b"\x89PNG\r\n\x1a\n" + chunks
        with pytest.raises(MediaError, match="pixels"):
            Image(data).decoded()


def test_limits_hold_before_decoding_and_can_be_changed(good, monkeypatch):
    def never(*_, **__):
        raise AssertionError("decoded before the limits were checked")

    cases = [
        (Image, "png", {"pixels": 64 * 64 - 1}, "image"),
        (Image, "png", {"bytes": 100}, "image"),
        (Image, "png", {"decoded_bytes": 64 * 64 * 3 - 1}, "image"),
        (Audio, "wav", {"seconds": 0.9}, "audio"),
        (Video, "mp4", {"seconds": 1.1}, "video"),
        (Video, "mp4", {"frames": 11}, "video"),
        (Video, "gif", {"frames": 11}, "video"),
        (Video, "gif", {"decoded_bytes": 12 * 64 * 64 * 3 - 1}, "video"),
    ]
    for kind, suffix, changes, modality in cases:
        with monkeypatch.context() as patch:
            patch.setitem(codecs.DECODERS, modality, never)
            with media.limits(**changes), pytest.raises(MediaError, match=next(iter(changes))):
                kind(good[suffix]).decoded()
        assert kind(good[suffix]).decoded().array is not None
    with media.limits(seconds=1.0), media.limits(frames=3) as inner:
        assert (inner.seconds, inner.frames) == (1.0, 3)
    assert media.current_limits() == media.Limits()
    with pytest.raises(TypeError), media.limits(second=1):
        pass


def test_a_clip_too_large_to_decode_can_be_sampled(good):
    with media.limits(decoded_bytes=6 * 64 * 64 * 3):
        with pytest.raises(MediaError, match="when decoded"):
            Video(good["mp4"]).decoded()
        assert Video(good["mp4"]).sample_frames(5).shape == (5, 64, 64, 3)
        with pytest.raises(MediaError, match="when decoded"):
            Video(good["mp4"]).sample_frames(7)


def test_open_files_are_read_and_written(tmp_path):
    for medium, form, kind in (
        (Image.from_numpy(gradient(), provenance=MARK), "JPEG", b"\xff\xd8"),
        (Audio.from_numpy(tone(), 16_000, provenance=MARK), "flac", b"fLaC"),
        (Video.from_numpy(steps(), 10.0, provenance=MARK), "webm", b"\x1a\x45\xdf\xa3"),
    ):
        buffer = io.BytesIO()
        assert medium.save(buffer, form) is None
        assert buffer.getvalue().startswith(kind)
        assert buffer.getvalue() == medium.to_bytes(form.lower())
        buffer.seek(0)
        back = type(medium)(buffer).decoded()
        assert back.to_numpy().shape == medium.to_numpy().shape
        assert back.provenance == MARK
    with pytest.raises(MediaError, match="the suffix names the format"):
        Image.from_numpy(gradient()).save(tmp_path / "a.png", "PNG")
    with (tmp_path / "a.png").open("wb") as file:
        Image.from_numpy(gradient()).save(file)
    assert np.array_equal(Image((tmp_path / "a.png").open("rb")).to_numpy(), gradient())


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = Image.from_numpy(gradient()).save(tmp_path / "a.png")
    before = path.read_bytes()

    def full(self, target, *_, **__):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PILImage.Image, "save", full)
    with pytest.raises(MediaError, match=r"No space left on device.*full"):
        Image.from_numpy(255 - gradient()).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_saving_needs_a_known_suffix_and_a_rate(tmp_path):
    with pytest.raises(MediaError, match=r"an image is saved as \.png.*got '\.wav'"):
        Image.from_numpy(gradient()).save(tmp_path / "a.wav")
    with pytest.raises(MediaError, match="no suffix"):
        Audio.from_numpy(tone(), 16_000).save(tmp_path / "a")
    with pytest.raises(MediaError, match="frame rate"):
        replace(Video.from_numpy(steps(), 10.0), fps=None).save(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="sample rate"):
        replace(Audio.from_numpy(tone(), 16_000), sample_rate=None).save(tmp_path / "a.wav")


def test_a_foreign_comment_is_no_provenance(tmp_path):
    picture = PILImage.fromarray(gradient())
    picture.save(tmp_path / "a.gif", comment=json.dumps({"model": "other"}))
    assert media.read_provenance(tmp_path / "a.gif") is None


def test_importing_media_is_light():
    heavy = "{'PIL', 'av', 'soundfile', 'torch', 'torchaudio'}"
    code = f"import sys, mmllm.media; assert not {heavy} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
