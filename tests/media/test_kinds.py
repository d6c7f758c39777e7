"""Kinds of files that people have: the right value of each, or one clear error."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mmllm import media
from mmllm.conversation import Audio, Image, Video
from mmllm.encoders.base import ModalityEncoder
from mmllm.encoders.efficientnet import to_square
from mmllm.errors import MediaError, OversizedMediaError
from mmllm.media import audio as sounds
from mmllm.media import image, provenance
from tests.media.samples import gradient, png, steps, tone

FILES = Path(__file__).parent / "files"


def saved(picture: PILImage.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def muxed(
    container: str, codec: str, frames: np.ndarray, pixels: str = "yuv420p", **fields
) -> bytes:
    """A clip at 10 frames per second; `fields` of its codec context, such as `gop_size`."""
    buffer = io.BytesIO()
    form = "rgba" if frames.shape[-1] == 4 else "rgb24"
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.options = fields.pop("options", {})
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        for array in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format=form)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def spoken(container: str, codec: str, samples: np.ndarray, rate: int) -> bytes:
    """float32[C, S] in a container."""
    buffer = io.BytesIO()
    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
        frame.sample_rate = rate
        for part in av.AudioResampler(stream.format, layout).resample(frame):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def pitch(audio: Audio) -> float:
    """Hz of the strongest tone of the first channel."""
    samples = audio.to_numpy()[0]
    assert audio.sample_rate
    return int(np.abs(np.fft.rfft(samples)).argmax()) * audio.sample_rate / len(samples)


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1_000_000, 1), (1, 40_000), (3_000, 20)])
def test_thin_pictures_are_refused_by_their_ratio(width, height):
    data = png(PILImage.new("L", (width, height)))
    with pytest.raises(OversizedMediaError, match=r"as long as wide.*limits\(ratio=\.\.\.\)"):
        Image(data).decoded()
    with media.limits(ratio=2_000_000):
        assert Image(data).to_numpy().shape == (height, width, 3)


def test_long_pictures_are_shrunk_before_they_are_padded():
    tall = np.full((12_000, 120, 3), 255, np.uint8)
    tall[:6_000] = 0
    square = to_square(Image.from_numpy(tall), 96)
    assert square[:, 10, 48].mean() < 0.5 < square[:, 80, 48].mean()
    assert square[:, :, 10].min() == square[:, :, 90].min() == 1.0  # white on both sides


def test_heic_is_a_picture():
    data = (FILES / "photo.heic").read_bytes()
    assert media.probe(data) == media.MediaInfo("image", "HEIF", width=128, height=96)
    array = Image(data).to_numpy()
    assert array.shape == (96, 128, 3)
    assert np.abs(array.astype(int) - [200, 30, 30]).max() < 4
    with pytest.raises(MediaError, match=r"got an image \(HEIF\); give it as Image"):
        Video(data).decoded()
    with pytest.raises(MediaError, match="image is damaged"):
        Image(data[:200]).decoded()


def test_all_tiles_of_a_heic_are_seen():
    array = Image(FILES / "grid.heic").to_numpy().astype(int)
    assert array.shape == (128, 128, 3)
    corners = [array[y, x] for y in (32, 96) for x in (32, 96)]
    expected = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    assert np.abs(np.array(corners) - expected).max() < 4


def test_a_still_in_an_unknown_coding_is_no_clip():
    for brand in (b"heic", b"avif", b"mif1"):
        box = struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, b"miaf")
        with pytest.raises(MediaError, match="the image is damaged"):
            media.probe(box + bytes(400))


def test_long_notes_in_a_png_are_no_damage():
    notes = PngInfo()
    notes.add_text("workflow", "word " * 800_000, zip=True)
    data = png(PILImage.fromarray(gradient()), pnginfo=notes)
    assert np.array_equal(Image(data).to_numpy(), gradient())


def grey_png(depth: int, colour: int, values: bytes, clear: bytes, side: int = 1) -> bytes:
    """A PNG of one row, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, 1, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", clear)
    chunks += chunk(b"IDAT", zlib.compress(b"\0" + values)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(PILImage.new("F", (2, 2), 0.5), "TIFF"), 128),
        (saved(PILImage.new("F", (2, 2), 40.0), "TIFF"), 40),
        (saved(PILImage.new("F", (2, 2), 25_700.0), "TIFF"), 100),
        (saved(PILImage.new("I", (2, 2), 40), "TIFF"), 40),
        (saved(PILImage.new("I", (2, 2), 25_700), "TIFF"), 100),
        (saved(PILImage.fromarray(np.full((2, 2), 40, np.uint16)), "TIFF"), 0),
        (saved(PILImage.fromarray(np.full((2, 2), 32_768, np.uint16)), "PNG"), 128),
        (grey_png(16, 0, b"\x03\xe8", b"\x03\xe8"), 255),
        (grey_png(16, 0, b"\x03\xe8", b"\x03\xe9"), 4),
        (grey_png(16, 2, b"\x10\0" * 3, b"\x10\0" * 3), 255),
        (grey_png(8, 0, b"\x07", b"\0\x07"), 255),
    ],
)
def test_bit_depths_and_transparent_colours(data, expected):
    assert np.unique(Image(data).to_numpy()).tolist() == [expected]


def test_non_finite_floats_are_refused():
    with pytest.raises(MediaError, match="not numbers"):
        Image(saved(PILImage.new("F", (2, 2), float("nan")), "TIFF")).decoded()


def test_a_picture_of_pillow_is_what_its_file_is():
    exif = PILImage.Exif()
    exif[0x0112] = 6
    clear = PILImage.fromarray(np.dstack([gradient(), gradient()[..., 0]]))
    palette = PILImage.fromarray(gradient()).quantize(8)
    palette.info["transparency"] = 2
    deep = PILImage.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60)
    for picture, options in [
        (clear, {}),
        (palette, {"transparency": 2}),
        (deep, {}),
        (PILImage.fromarray(gradient()), {"exif": exif}),
    ]:
        data = png(picture, **options)
        opened = PILImage.open(io.BytesIO(data))
        assert np.array_equal(Image.from_pil(opened).to_numpy(), Image(data).to_numpy())
    turned = Image.from_pil(opened).to_numpy()
    assert np.array_equal(turned, np.rot90(gradient(), -1))


def test_large_pictures_are_converted_in_strips(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    whole = Image.from_pil(PILImage.fromarray(pixels)).to_numpy()
    monkeypatch.setattr("mmllm.media.rgb.STRIP_PIXELS", 7 * 40)
    assert np.array_equal(Image.from_pil(PILImage.fromarray(pixels)).to_numpy(), whole)


@pytest.mark.parametrize("tag", [0x0112, 0x02BC])
def test_exif_of_an_odd_type_leaves_the_picture_alone(tag):
    # One entry: a text, where a number (the orientation) or bytes (XMP) are expected.
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, tag, 2, 4, b"odd\0", 0)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = saved(PILImage.fromarray(gradient()), kind, exif=exif)
        assert Image(data).to_numpy().shape == gradient().shape
    fields = ImageFileDirectory_v2()
    fields[0x02BC] = "odd"
    fields.tagtype[0x02BC] = 2
    data = saved(PILImage.fromarray(gradient()), "TIFF", tiffinfo=fields)
    assert np.array_equal(Image(data).to_numpy(), gradient())


def test_foreign_metadata_is_no_provenance():
    for remark in (None, 5, ("a",), b"\xff", "[" * 100_000, "x" * 3_000_000, '{"mmllm": 5}'):
        assert provenance.from_comment(remark) is None
        assert provenance.from_xmp(remark) is None
    many = "<mmllm:provenance>" * 50_000
    start = time.monotonic()
    assert provenance.from_xmp(many) is None
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("clear", [b"", b"\0", b"\0\1", b"\0\1\0\2\0\3", bytes(300)])
def test_clear_colours_that_do_not_fit_end_in_no_other_error(colour, clear):
    data = grey_png(8, colour, b"\x80" * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour], clear)
    try:
        shape = Image(data).to_numpy().shape
    except MediaError:
        shape = None  # of another kind it would fail here
    assert shape in (None, (1, 1, 3))


# --- sounds -------------------------------------------------------------------------------------


def wav(samples: np.ndarray, announced: int, riff: int | None = None, rest: bytes = b"") -> bytes:
    """A WAV of 16 bits at 16 kHz that announces so many bytes."""
    data = (samples[0] * 32767).astype("<i2").tobytes()
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    riff = riff if riff is not None else min(announced + 36, 0xFFFFFFFF)
    return (
        b"RIFF"
        + struct.pack("<I", riff)
        + head
        + b"data"
        + struct.pack("<I", announced)
        + data
        + rest
    )


@pytest.mark.parametrize(
    "announced", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFDB, 0xFFFFFFFF - 36, 0xFFFFFFFF]
)
def test_a_wav_of_open_length_is_read_to_its_end(announced):
    sound = Audio(wav(tone(), announced)).decoded()
    assert sound.sample_rate == 16_000
    assert np.abs(sound.to_numpy() - tone()).max() < 1e-4


def test_a_wav_that_was_cut_is_damaged():
    for announced in (40_000, 1_000_000):
        with pytest.raises(MediaError, match=rf"{announced} bytes of samples announced, 32000"):
            Audio(wav(tone(), announced)).decoded()
    assert Audio(wav(tone(), 1_000_000, riff=0xFFFFFFFF)).to_numpy().shape == (1, 16_000)


def written(kind: str) -> bytearray:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone()[0], 16_000, format=kind, subtype="PCM_16")
    return bytearray(buffer.getvalue())


def test_streams_of_unknown_length_are_read_to_their_end():
    flac, au, caf = written("FLAC"), written("AU"), written("CAF")
    flac[21] &= 0xF0  # STREAMINFO: 36 bits for the number of samples, of which 0 is unknown
    flac[22:26] = bytes(4)
    au[8:12] = b"\xff" * 4
    start = caf.index(b"data") + 4
    caf[start : start + 8] = b"\xff" * 8
    for data in (flac, au, caf):
        sound = Audio(bytes(data)).decoded()
        assert sound.sample_rate == 16_000
        assert np.abs(sound.to_numpy()[:, :16_000] - tone()).max() < 1e-3


@pytest.mark.parametrize("kind", ["AIFF", "AU", "RF64", "W64"])
def test_sounds_that_were_cut_are_damaged(kind):
    data = bytes(written(kind))
    assert Audio(data).to_numpy().shape == (1, 16_000)
    with pytest.raises(MediaError, match=r"truncated \(\d+ (bytes|samples) announced"):
        Audio(data[: int(0.7 * len(data))]).decoded()


def test_a_wav_without_samples_is_empty():
    with pytest.raises(MediaError, match="no samples"):
        Audio(wav(tone()[:, :0], 0)).decoded()


@pytest.mark.parametrize(
    "subtype", sorted(set(soundfile.available_subtypes("WAV")) - {"MPEG_LAYER_III"})
)
def test_all_codings_of_wav_are_read(subtype):
    buffer = io.BytesIO()
    rate = 8_000 if subtype == "G721_32" else 16_000
    soundfile.write(buffer, tone(1, rate)[0], rate, format="WAV", subtype=subtype)
    sound = Audio(buffer.getvalue()).decoded()
    assert sound.sample_rate == rate
    assert abs(sound.to_numpy().shape[1] - rate) < 0.15 * rate
    assert abs(pitch(sound) - 440) < 3


@pytest.mark.parametrize("codec", ["mp3", "adpcm_ima_wav", "adpcm_ms", "g722", "pcm_alaw"])
def test_codings_that_soundfile_does_not_know_are_read_from_wav(codec):
    sound = Audio(spoken("wav", codec, tone(), 16_000)).decoded()
    assert sound.sample_rate == 16_000
    assert abs(pitch(sound) - 440) < 3


@pytest.mark.parametrize("codec", ["adts", "mp3", "mpegts"])
def test_a_sound_that_changes_in_the_middle_keeps_its_beginnings_rate(codec):
    coder = {"adts": "aac", "mp3": "mp3", "mpegts": "aac"}[codec]
    one = spoken(codec, coder, tone(1, 48_000), 48_000)
    other = spoken(codec, coder, np.repeat(tone(1, 24_000), 2, axis=0), 24_000)
    for data, rate, channels in ((one + other, 48_000, 1), (other + one, 24_000, 2)):
        sound = Audio(data).decoded()
        assert (sound.sample_rate, len(sound.to_numpy())) == (rate, channels)
        assert abs(pitch(sound) - 440) < 3


@pytest.mark.parametrize("rate", [44_101, 15_999, 47_777, 999_983])
def test_rates_without_a_common_divisor_are_resampled(rate):
    sound = Audio.from_numpy(tone(0.5, rate), rate).resample(16_000)
    expected = tone(0.5)
    assert abs(sound.to_numpy().shape[1] - expected.shape[1]) <= 1
    inside = slice(500, 7_000)
    assert np.abs(sound.to_numpy()[:, inside] - expected[:, inside]).max() < 0.02


@pytest.mark.parametrize(("own", "rate"), [(48_000, 16_000), (44_100, 16_000), (8_000, 44_100)])
def test_long_sounds_are_resampled_in_blocks_without_seams(own, rate, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, own + 77)).astype(np.float32)
    whole = Audio.from_numpy(noise, own).resample(rate, mono=False).to_numpy()
    monkeypatch.setattr("mmllm.media.audio.RESAMPLE_BLOCK", own // 7)
    blocks = Audio.from_numpy(noise, own).resample(rate, mono=False).to_numpy()
    assert blocks.shape == whole.shape
    assert np.abs(blocks - whole).max() < 1e-5


def test_resampling_is_exact_under_autocast():
    sound = Audio.from_numpy(tone(), 16_000)
    plain = sound.resample(44_100).to_numpy()
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(sound.resample(44_100).to_numpy(), plain)


def test_absurd_rates_are_refused():
    data = bytearray(wav(tone(), 32_000))
    data[24:28] = struct.pack("<I", 2_000_000_000)
    with pytest.raises(MediaError, match="2000000000 samples per second"):
        Audio(bytes(data)).decoded()
    slow = Audio.from_numpy(np.zeros(200_000, np.float32), 1)
    with pytest.raises(OversizedMediaError, match="when resampled"):
        slow.resample(16_000)


# --- clips --------------------------------------------------------------------------------------


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 whose first track is shown through this matrix (ISO 14496-12, 8.3.2)."""
    start = data.index(b"tkhd") + 44
    parts = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)]
    return data[:start] + struct.pack(">9i", *parts, 1 << 30) + data[start + 36 :]


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
    ],
)
def test_turned_and_mirrored_clips_are_upright(tmp_path, matrix, shown):
    picture = gradient(32, 48)
    picture[:8, :8] = 255  # the top left corner
    path = Video.from_numpy(np.stack([picture] * 3), 10.0).save(tmp_path / "a.mp4")
    upright = Video(with_matrix(path.read_bytes(), *matrix)).to_numpy()[0].astype(int)
    assert upright.shape == shown(picture).shape
    assert np.abs(upright - shown(picture)).mean() < 8


@pytest.mark.parametrize(
    ("aspect", "shape"), [((16, 9), (48, 64)), ((1, 2), (96, 36)), ((1, 1), (48, 36))]
)
def test_pixels_that_are_not_square_are_stretched(aspect, shape):
    frames = steps(3, 48, 36)
    data = muxed("mp4", "libx264", frames, sample_aspect_ratio=Fraction(*aspect))
    facts = media.probe(data)
    assert (facts.height, facts.width) == shape
    clip = Video(data).to_numpy()
    assert clip.shape == (3, *shape, 3)
    assert np.abs(clip[:, 20, 20].astype(int) - frames[:, 20, 20]).max() < 4


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [("webm", "libvpx-vp9", "yuva420p"), ("mov", "png", "rgba")],
)
def test_transparent_clips_are_laid_on_white(container, codec, pixels):
    frames = np.zeros((3, 32, 48, 4), np.uint8)
    frames[:, :, 24:, 3] = 255
    clip = Video(muxed(container, codec, frames, pixels)).to_numpy()
    assert clip[:, :, :20].min() > 245
    assert clip[:, :, 28:].max() < 10


def cut(data: bytes, hidden: int, shown: int) -> bytes:
    """An MP4 at 10 frames per second of which an edit list hides the first frames."""
    start = data.index(b"elst") + 12
    scale = struct.unpack(">I", data[data.index(b"mvhd") + 16 :][:4])[0]
    media_scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0]
    first = struct.unpack(">i", data[start + 4 : start + 8])[0]
    entry = struct.pack(">Ii", shown * scale // 10, first + hidden * media_scale // 10)
    return data[:start] + entry + data[start + 8 :]


@pytest.mark.parametrize(("hidden", "shown"), [(0, 12), (3, 9), (6, 6), (10, 2), (0, 7), (4, 5)])
def test_frames_that_an_edit_list_hides_do_not_count(hidden, shown):
    data = cut(muxed("mp4", "libx264", steps()), hidden, shown)
    clip = Video(data).decoded()
    assert clip.fps == pytest.approx(10.0)
    values = np.round(clip.to_numpy().mean(axis=(1, 2, 3)) / 20).tolist()
    assert values == list(range(hidden, hidden + shown))
    assert media.probe(data).frames == shown
    assert len(Video(data).sample_frames(16)) == 16


@pytest.mark.parametrize(("container", "codec"), [("mpegts", "mpeg2video"), ("avi", "mjpeg")])
def test_frames_that_change_their_size_have_that_of_the_first(container, codec):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    small = muxed(container, codec, steps(6, 32, 48), pixels)
    large = muxed(container, codec, 255 - steps(6, 64, 64), pixels)
    clip = Video(small + large).decoded()
    assert clip.to_numpy().shape[1:] == (32, 48, 3)
    if container == "mpegts":
        assert clip.to_numpy()[-1].mean() > 100
    assert Video(small + large).sample_frames(1).shape == (1, 32, 48, 3)


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"x264-params": "keyint=20"}),
        ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=20:min-keyint=20"}),
        ("mp4", "libx264", {"x264-params": "bframes=3:keyint=50:min-keyint=50:scenecut=0"}),
        ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20"}),
        ("mp4", "mpeg4", {"g": "20", "bf": "2"}),
        ("matroska", "libx264", {"x264-params": "keyint=20"}),
        ("webm", "libvpx-vp9", {"g": "20", "cpu-used": "8", "deadline": "realtime"}),
    ],
)
def test_frames_of_a_long_clip_are_found_by_keyframes_exactly(
    container, codec, options, monkeypatch
):
    noise = np.random.default_rng(0).integers(0, 128, (32, 32, 3)).repeat(2, 0).repeat(2, 1)
    frames = np.stack([np.roll(noise, (n, 2 * n), (0, 1)) + n % 100 for n in range(250)])
    data = muxed(container, codec, frames.astype(np.uint8), options=options)
    whole = Video(data).to_numpy()
    for num in (1, 2, 5):
        decoded: list[int] = []
        with monkeypatch.context() as patch:
            limits = sys.modules["mmllm.media.limits"]
            patch.setattr(limits.DecodingCost, "add_frame", lambda *size, to=decoded: to.append(1))
            sampled = Video(data).sample_frames(num)
        middles = [int((i + 0.5) * len(whole) / num) for i in range(num)]
        assert np.array_equal(sampled, whole[middles])
        assert len(decoded) < 50 * num
    cut_off = data[: int(0.6 * len(data))]
    with pytest.raises(MediaError, match=r"truncated|format"):
        Video(cut_off).sample_frames(5)


def test_a_clip_that_was_cut_behind_its_index_is_truncated(tmp_path):
    data = Video.from_numpy(np.stack([gradient(64, 64) // (1 + n % 3) for n in range(100)]), 10.0)
    whole = data.save(tmp_path / "a.mp4").read_bytes()
    for num in (1, 5):
        with pytest.raises(MediaError, match="truncated"):
            Video(whole[: int(0.4 * len(whole))]).sample_frames(num)


def test_a_longer_sound_does_not_slow_the_clip_down(tmp_path):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        pictures = output.add_stream("libx264", rate=10)
        pictures.height, pictures.width, pictures.pix_fmt = 32, 48, "yuv420p"
        sound = output.add_stream("libopus", rate=48_000, layout="mono")
        for array in steps():
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(4, 48_000), "fltp", "mono")
        frame.sample_rate = 48_000
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    clip = Video(buffer.getvalue()).decoded()
    assert clip.fps == pytest.approx(10, rel=0.01)
    assert len(clip.to_numpy()) == 12
    assert clip.audio.to_numpy().shape[1] > 3.9 * 48_000


def test_animations_whose_frames_outgrow_the_canvas_are_cropped():
    frames = [PILImage.new("RGB", (20, 10), colour).quantize(2) for colour in ("red", "blue")]
    data = bytearray(saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50))
    places = [at for at in range(len(data) - 9) if data[at : at + 9] == b",\0\0\0\0\x14\0\x0a\0"]
    data[places[-1] + 7 : places[-1] + 9] = (5).to_bytes(2, "little")
    data[places[-1] + 5 : places[-1] + 7] = (40).to_bytes(2, "little")
    frames = Video(bytes(data)).sample_frames(2)
    assert frames.shape == (2, 10, 20, 3)
    assert frames[:, 2, 10].tolist() == [[255, 0, 0], [0, 0, 255]]


# --- what decoding may cost ---------------------------------------------------------------------


def moving(frames: int = 60, side: int = 300) -> bytes:
    pictures = [PILImage.new("P", (side, side), n % 2) for n in range(frames)]
    for number, picture in enumerate(pictures):
        picture.putpixel((number % side, 0), 3)
    return saved(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=50)


def test_work_is_bounded_while_decoding():
    gif, clip = moving(), muxed("mp4", "libx264", steps(60, 96, 96))
    for data, pixels in ((gif, 300 * 300 * 40), (clip, 96 * 96 * 40)):
        wanted = pytest.raises(OversizedMediaError, match=r"pixels decoded.*decoded_pixels")
        with media.limits(decoded_pixels=pixels), wanted:
            Video(data).decoded()
        assert Video(data).to_numpy().shape[0] == 60


@pytest.mark.parametrize("what", ["gif", "mp4", "wav", "mp3", "png"])
def test_time_is_bounded_while_decoding(monkeypatch, what):
    kinds = {
        "gif": (Video, moving(5)),
        "mp4": (Video, muxed("mp4", "libx264", steps())),
        "wav": (Audio, wav(tone(), 32_000)),
        "mp3": (Audio, spoken("mp4", "aac", tone(), 16_000)),
        "png": (Image, png(PILImage.fromarray(gradient()))),
    }
    kind, data = kinds[what]
    clock = iter(range(10_000_000))
    ticking = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(sys.modules["mmllm.media.limits"], "time", ticking)
    with (
        media.limits(decoding_seconds=2),
        pytest.raises(OversizedMediaError, match=r"seconds of decoding.*decoding_seconds"),
    ):
        kind(data).decoded()


def test_frames_are_converted_only_where_they_are_looked_at(monkeypatch):
    converted = []
    rgb = image.to_rgb
    monkeypatch.setattr("mmllm.media.image.to_rgb", lambda p: converted.append(p) or rgb(p))
    assert Video(moving(40, 50)).sample_frames(2).shape == (2, 50, 50, 3)
    assert len(converted) == 2


def test_limits_can_be_sent_to_another_process():
    limits = media.Limits(ratio=7, decoding_seconds=3, decoded_pixels=10)
    assert pickle.loads(pickle.dumps(limits)) == limits


# --- arrays and encoders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image.from_numpy(np.zeros((8, 9, 4), np.uint8)), r"uint8\[H, W, 3\].*background"),
        (lambda: Image.from_numpy(np.zeros((8, 9, 1), np.uint8)), "three equal channels"),
        (lambda: Image.from_numpy(np.zeros((8, 9), np.uint8)), r"three equal channels"),
        (lambda: Image.from_numpy(np.zeros((3, 8, 9), np.uint8)), r"moveaxis"),
        (lambda: Image.from_numpy(np.zeros((8, 9, 3), np.float32)), r"astype\(np.uint8\)"),
        (lambda: Image.from_numpy(np.zeros((0, 9, 3), np.uint8)), r"non-empty"),
        (lambda: Video.from_numpy(np.zeros((2, 3, 8, 9), np.uint8), 8), r"F, H, W, 3.*moveaxis"),
        (lambda: Video.from_numpy(np.zeros((2, 8, 9, 4), np.uint8), 8), r"background"),
        (lambda: Video.from_numpy(np.zeros((2, 8, 9, 3), np.uint8), 0), r"fps > 0, got 0"),
        (lambda: Video.from_numpy(np.zeros((2, 8, 9, 3), np.uint8), float("nan")), r"got nan"),
        (lambda: Audio.from_numpy(np.zeros((32_000, 2), np.float32), 16_000), r"transpose it"),
        (lambda: Audio.from_numpy(np.zeros((100, 200), np.float32), 16_000), r"transpose it"),
        (lambda: Audio.from_numpy(np.zeros(8, np.int16), 16_000), r"/ 32768"),
        (lambda: Audio.from_numpy(np.zeros(8), 16_000), r"astype\(np.float32\)"),
        (lambda: Audio.from_numpy(np.full(8, 16_383.5, np.float32), 16_000), r"up to 16383.5"),
        (lambda: Audio.from_numpy(np.array([0, np.nan], np.float32), 16_000), r"finite"),
        (lambda: Audio.from_numpy(np.array([0, np.inf], np.float32), 16_000), r"finite"),
        (lambda: Audio.from_numpy(np.zeros(8, np.float32), 0), r"whole Hz > 0, got 0"),
        (lambda: Audio.from_numpy(np.zeros(8, np.float32), "16k"), r"got '16k'"),
        (lambda: Audio.from_numpy(np.zeros(8, np.float32), True), r"got True"),
    ],
)  # fmt: skip
def test_arrays_of_another_layout_are_refused_with_the_conversion(make, message):
    with pytest.raises(MediaError, match=message):
        make()


def test_arrays_as_libraries_make_them_are_taken():
    sound = Audio.from_numpy(np.array([0.5, 1.25, -1.5], np.float32), np.float64(22_050.0))
    assert sound.sample_rate == 22_050
    assert isinstance(sound.sample_rate, int)
    assert sound.to_numpy().tolist() == [[0.5, 1.0, -1.0]]
    assert Video.from_numpy(steps(), Fraction(30000, 1001)).fps == pytest.approx(29.97, abs=0.01)


class Fragile(ModalityEncoder):
    modality = "image"

    def to_tensor(self, medium: Image) -> torch.Tensor:
        medium.to_numpy()
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyError("size"), TypeError("odd"), ZeroDivisionError("x"), RuntimeError("one\ntwo")]
)
def test_whatever_an_encoder_raises_about_a_medium_is_an_error_of_the_medium(error):
    encoder = Fragile()
    encoder.error = error
    with pytest.raises(MediaError, match=rf"test_kinds: Image.*{type(error).__name__}") as caught:
        encoder.preprocess(Image.from_numpy(gradient()))
    assert caught.value.__cause__ is error
    assert "two" not in str(caught.value)
    with pytest.raises(MediaError, match="expected Image, got Audio"):
        encoder.preprocess(Audio.from_numpy(tone(), 16_000))
    with pytest.raises(OversizedMediaError, match="as long as wide"):
        encoder.preprocess(Image.from_numpy(np.zeros((1, 5_000, 3), np.uint8)))


@pytest.mark.parametrize("source", ["~nobody-has-this-name/x.png", "a\0b.png", "x" * 5_000])
def test_names_that_cannot_be_files(source):
    for kind in (Image, Audio, Video):
        with pytest.raises(MediaError, match=r"cannot be read|no such file") as caught:
            kind(source).decoded()
        assert len(str(caught.value)) < 600


def covered(container: str, cover: bytes) -> bytes:
    """A second of a tone with a picture of it in the file, as players store covers."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        sound = output.add_stream("aac", rate=16_000, layout="mono")
        picture = output.add_stream("png", rate=1)
        picture.width, picture.height, picture.pix_fmt = 8, 8, "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(tone(1, 16_000), "fltp", "mono")
        frame.sample_rate = 16_000
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        output.mux(packet)
    return buffer.getvalue()


def test_a_song_with_a_cover_is_a_sound():
    data = covered("mp4", png(PILImage.fromarray(gradient(8, 8))))
    assert media.probe(data).modality == "audio"
    assert pitch(Audio(data).decoded()) == pytest.approx(440, abs=2)


def test_an_avi_counts_the_frames_that_are_there_and_not_those_that_repeat_them():
    buffer = io.BytesIO()
    frames = steps()
    with av.open(buffer, "w", format="avi") as output:
        stream = output.add_stream("mpeg4", rate=20)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = 2 * number, Fraction(1, 20)  # each second one is left out
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    clip = Video(buffer.getvalue()).decoded()
    assert len(clip.to_numpy()) == len(frames)
    assert clip.fps == pytest.approx(10, abs=0.5)
    with pytest.raises(MediaError, match="truncated"):
        Video(buffer.getvalue()[:6800]).decoded()


def test_the_last_frame_of_a_short_flv_stays_as_long_as_the_others():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flv", options={"flvflags": "no_duration_filesize"}) as output:
        stream = output.add_stream("flv", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for array in steps():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(stream.encode(None))
    assert Video(buffer.getvalue()).decoded().fps == pytest.approx(10, rel=0.01)


def test_a_voc_is_read_without_the_heads_of_its_blocks():
    buffer, samples = io.BytesIO(), tone(1, 16_000)
    with av.open(buffer, "w", format="voc") as output:
        stream = output.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for block in np.array_split(np.round(samples * 32767).astype(np.int16), 10, axis=1):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "s16", "mono")
            frame.sample_rate = 16_000
            output.mux(stream.encode(frame))
    read = Audio(buffer.getvalue()).to_numpy()
    assert read.shape == samples.shape
    assert np.abs(read - samples).max() < 0.001


def test_a_seek_before_the_beginning_stays_where_it_is():
    file = sounds.SoundfileInput(io.BytesIO(b"RIFF"))
    assert file.seek(2) == 2
    assert file.seek(-5) == 2  # what is raised here, soundfile prints as a traceback and loses
    assert file.read(2) == b"FF"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image.from_numpy([[1], [2, 3]]), "expected an array, got list"),
        (lambda: Image.from_numpy(torch.zeros(4, 5, 3, requires_grad=True)), r"\.detach\(\)"),
        (lambda: Video.from_numpy(torch.zeros(2, 4, 5, 3, dtype=torch.bfloat16), 8), "float"),
        (lambda: Audio.from_numpy(torch.zeros(1, 9, dtype=torch.bfloat16), 16_000), "float"),
        (lambda: Image.from_pil(PILImage.new("RGB", (0, 5))), "is empty"),
        (lambda: Audio.from_numpy(tone(), 10**12), "at most 1000000"),
        (lambda: Image.from_pil("a.png"), "picture of Pillow's, got str"),
    ],
)
def test_what_is_neither_an_array_nor_a_picture_is_refused(make, message):
    with pytest.raises(MediaError, match=message):
        make()
