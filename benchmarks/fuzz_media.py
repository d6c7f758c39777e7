"""Does any damaged or odd file get past the errors of media?

    python benchmarks/fuzz_media.py                            # 2,000 files, some minutes
    python benchmarks/fuzz_media.py --seed 1 --count 200 --keep broken

Small files of all formats are made, changed (bytes, numbers, cut, joined, of two sizes or rates),
and read as far as encoders read them, each in a process of its own. Exits with 1 if one raises
anything but MediaError, takes over 5 s of processor time, or over 1 GB of memory.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import multiprocessing
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torchaudio.functional  # noqa: F401 - here once, and not in every process
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from mmllm import console, media
from mmllm.conversation import MEDIA, Audio, Image, Video
from mmllm.encoders.efficientnet import to_square
from mmllm.errors import MediaError

SECONDS = 5.0
MEMORY = 2**30
PATIENCE = 60.0
"""Seconds after which a process is ended."""
RATE = 16_000
HEIC = sorted((Path(__file__).parents[1] / "tests" / "media" / "files").glob("*.heic"))
"""They can be read here, not written."""
CLIPS = (
    ("mp4", "libx264", "yuv420p", "aac"),
    ("mp4", "mpeg4", "yuv420p", None),
    ("mov", "png", "rgba", "pcm_s16le"),
    ("webm", "libvpx", "yuv420p", "libopus"),
    ("webm", "libvpx-vp9", "yuva420p", "libopus"),
    ("matroska", "libx264", "yuv420p", "aac"),
    ("matroska", "ffv1", "gray", None),
    ("avi", "mjpeg", "yuvj420p", "mp3"),
    ("mpegts", "mpeg2video", "yuv420p", "mp2"),
    ("mpegts", "libx264", "yuv420p", "aac"),
    ("flv", "flv", "yuv420p", "mp3"),
    ("asf", "wmv2", "yuv420p", "wmav2"),
)
SOUNDS = (
    ("adts", "aac"),
    ("mp4", "aac"),
    ("mp3", "mp3"),
    ("ogg", "libopus"),
    ("wav", "adpcm_ima_wav"),
    ("wav", "mp3"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a file."""

    what: str
    """"read", "named" or "failed"."""
    why: str
    seconds: float
    memory: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    options = parser.parse_args()
    counted: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    started = time.monotonic()
    # Made elsewhere: encoders leave threads and locks behind, which forked processes would lack.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        files = pool.apply(corpus)
    PILImage.init()  # all formats of Pillow, here once as well
    for name, data in mutants(files, options.seed, options.count):
        outcome = tried(lambda data=data: examine(data))
        counted[outcome.what] += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.memory)
        if outcome.what == "failed":
            console.echo(f"{name}: {outcome.why}")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / name.replace("/", "-")).write_bytes(data)
    console.echo(
        f"{options.count} files in {time.monotonic() - started:.0f} s: {counted['read']} read, "
        f"{counted['named']} named errors, {counted['failed']} failed; at most {slowest:.1f} s "
        f"and {largest / 2**20:.0f} MB"
    )
    return 1 if counted["failed"] else 0


# --- one file -----------------------------------------------------------------------------------


def examine(data: bytes) -> str:
    """Read a file in all ways; its error, or "". Others are raised."""
    message = ""
    for read in (_by_probe, _as_image, _as_audio, _as_video):
        try:
            read(data)
        except MediaError as error:
            words = str(error)
            if not words or len(words) > 1000 or "MemoryError" in words:
                raise AssertionError(f"an error of {len(words)} characters: {words}") from error
            if "give it as" not in words:  # of another modality is what most of the ways must find
                message = message or words
    return message


def _by_probe(data: bytes) -> None:
    facts = media.probe(data)
    assert facts.modality in MEDIA


def _as_image(data: bytes) -> None:
    image = Image(data).decoded()
    assert image.array is not None
    assert image.array.dtype == np.uint8
    assert image.array.ndim == 3
    assert bool(to_square(image, 224).isfinite().all())  # pyright: ignore[reportArgumentType]


def _as_audio(data: bytes) -> None:
    sound = Audio(data).decoded()
    assert sound.array is not None
    assert abs(sound.array).max() <= 1
    assert sound.resample(RATE).to_numpy().shape[0] == 1  # pyright: ignore


def _as_video(data: bytes) -> None:
    frames = Video(data).sample_frames(3)
    assert frames.shape[::4] == (3,)
    for frame in frames:
        to_square(Image(array=frame), 224)
    clip = Video(data).decoded()
    assert clip.array is not None
    assert clip.array.shape[1:] == frames.shape[1:]


def tried(work: Callable[[], str]) -> Outcome:
    """The outcome of `work` in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _report(work, writer)
    os.close(writer)
    alive = not select.select([reader], [], [], PATIENCE)[0]  # readable when it has ended, too
    if alive:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as file:
        report = file.read()
    _, status, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime  # how busy the machine is otherwise does not count
    if alive or b"\t" not in report:
        why = f"still at it after {PATIENCE} s" if alive else f"died with status {status}"
        return Outcome("failed", f"{why}\n{report.decode()}".strip(), seconds, 0)
    what, most, why = report.decode().split("\t", 2)
    memory = int(most)
    if seconds > SECONDS or memory > MEMORY:
        return Outcome("failed", f"{seconds:.1f} s, {memory / 2**20:.0f} MB", seconds, memory)
    return Outcome(what, why, seconds, memory)


def _report(work: Callable[[], str], writer: int) -> None:
    """In the child: do the work, write its outcome, end without the parent's exit handlers."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # FFmpeg and libjpeg complain there
    faulthandler.dump_traceback_later(PATIENCE - 5, exit=True, file=writer)
    before = _memory()
    try:
        message = work()
        what = "named" if message else "read"
    except BaseException as error:
        what, message = "failed", f"{type(error).__name__}: {error}"
    faulthandler.cancel_dump_traceback_later()
    line = f"{what}\t{_memory() - before}\t{message[:500]}"
    os.write(writer, line.encode("utf-8", "replace"))
    os._exit(0)


def _memory() -> int:
    """Bytes of this process at their most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# --- files --------------------------------------------------------------------------------------


def corpus() -> dict[str, bytes]:
    """Whole files of all formats, by name."""
    return {**_pictures(), **_animations(), **_sounds(), **_clips()}


def _colours(height: int = 30, width: int = 40, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(height).integers(0, 256, (height, width, channels))
    return (values // 32 * 32).astype(np.uint8)


def _saved(picture: PILImage.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    rgb = PILImage.fromarray(_colours())
    rgba = PILImage.fromarray(_colours(channels=4))
    palette = rgb.quantize(16)
    deep = PILImage.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    grey = PILImage.fromarray(np.arange(1200, dtype=np.float32).reshape(30, 40) / 1200)
    exif = PILImage.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    text = PngInfo()
    text.add_text("workflow", "word " * 500, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    return {
        "rgb.png": _saved(rgb, "PNG", pnginfo=text, exif=exif),
        "rgba.png": _saved(rgba, "PNG"),
        "clear.png": _saved(rgb, "PNG", transparency=(0, 32, 64)),
        "palette.png": _saved(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "deep.png": _saved(deep, "PNG", transparency=100),
        "bit.png": _saved(rgb.convert("1"), "PNG"),
        "grey.png": _saved(rgba.convert("LA"), "PNG"),
        "rgb.jpg": _saved(rgb, "JPEG", exif=exif, xmp=b"<x:xmpmeta/>"),
        "cmyk.jpg": _saved(rgb.convert("CMYK"), "JPEG"),
        "steps.jpg": _saved(rgb.convert("L"), "JPEG", progressive=True),
        "rgb.webp": _saved(rgb, "WEBP", exif=exif),
        "rgba.webp": _saved(rgba, "WEBP", lossless=True),
        "still.gif": _saved(palette, "GIF", transparency=3, comment=b"{}"),
        "raw.tif": _saved(rgb, "TIFF"),
        "lzw.tif": _saved(palette, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": _saved(rgb, "TIFF", compression="jpeg"),
        "deep.tif": _saved(deep, "TIFF", compression="tiff_deflate"),
        "float.tif": _saved(grey, "TIFF"),
        "rgb.bmp": _saved(rgb, "BMP"),
        "palette.bmp": _saved(palette, "BMP"),
        "rgb.avif": _saved(rgb, "AVIF", speed=10),
        **{path.name: path.read_bytes() for path in HEIC},
    }


def _animations() -> dict[str, bytes]:
    frames = [PILImage.fromarray(_colours(24 + n, 32)).resize((32, 24)) for n in range(5)]
    options = {"save_all": True, "append_images": frames[1:], "duration": [40, 80, 40, 120, 40]}
    palettes = [frame.quantize(8) for frame in frames]
    return {
        "moving.gif": _saved(palettes[0], "GIF", **{**options, "append_images": palettes[1:]}),
        "disposed.gif": _saved(frames[0], "GIF", disposal=2, transparency=0, **options),
        "moving.png": _saved(frames[0], "PNG", disposal=1, blend=1, **options),
        "moving.webp": _saved(frames[0], "WEBP", **options),
        "moving.avif": _saved(frames[0], "AVIF", speed=10, **options),
    }


def _tone(rate: int, channels: int, seconds: float = 0.3) -> np.ndarray:
    time_ = np.arange(round(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 220 * (n + 1) * time_) for n in range(channels)])


def _sounds() -> dict[str, bytes]:
    made = {}
    for kind in ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "RF64", "CAF"):
        for subtype in soundfile.available_subtypes(kind):
            buffer = io.BytesIO()
            channels = 1 if subtype in ("GSM610", "G721_32", "NMS_ADPCM_16") else 2
            rate = 48_000 if subtype == "OPUS" else RATE
            try:
                soundfile.write(buffer, _tone(rate, channels).T, rate, format=kind, subtype=subtype)
            except soundfile.LibsndfileError:
                continue  # not every coding takes these channels
            made[f"{subtype.lower()}.{kind.lower()}"] = buffer.getvalue()
    for container, codec in SOUNDS:
        for rate, channels in ((48_000, 2), (24_000, 1)):
            made[f"{codec}-{channels}.{container}"] = _muxed(
                container, sound=(codec, rate, channels)
            )
    return made


def _clips() -> dict[str, bytes]:
    made = {}
    for container, codec, layout, sound in CLIPS:
        if not {codec, sound or codec} <= av.codecs_available:
            continue
        for height, width in ((32, 48), (64, 32)):
            track = (sound, 44_100 if sound == "mp3" else 48_000, 2) if sound else None
            picture = (codec, layout, height, width)
            name = f"{codec}-{height}.{container}"
            made[name] = _muxed(container, picture=picture, sound=track)
    return made


def _muxed(
    container: str,
    picture: tuple[str, str, int, int] | None = None,
    sound: tuple[str, int, int] | None = None,
) -> bytes:
    """A file with a clip of 8 frames, a sound of 0.3 s, or both."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        pictures = sounds = None
        if picture is not None:
            codec, layout, height, width = picture
            pictures = output.add_stream(codec, rate=Fraction(10))
            pictures.height, pictures.width, pictures.pix_fmt = height, width, layout
        if sound is not None:
            codec, rate, channels = sound
            sounds = output.add_stream(
                codec, rate=rate, layout="stereo" if channels == 2 else "mono"
            )
            sounds.bit_rate = 64_000
        if picture is not None and pictures is not None:
            for index in range(8):
                array = _colours(picture[2], picture[3]) // (index + 1)
                output.mux(pictures.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            output.mux(pictures.encode(None))
        if sound is not None and sounds is not None:
            samples = _tone(sound[1], sound[2]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", sounds.layout.name)
            frame.sample_rate, frame.pts = sound[1], 0
            output.mux(sounds.encode(frame))
            output.mux(sounds.encode(None))
    return buffer.getvalue()


# --- changes ------------------------------------------------------------------------------------


def mutants(files: dict[str, bytes], seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of `count` files: every eleventh as it was made, the others changed."""
    names = sorted(files)
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        data = files[name]
        changes = [] if number % 11 == 10 else draw.choices(CHANGES, k=draw.choice((1, 1, 1, 2, 3)))
        for change in changes:
            data = change(data, draw, files, name)
        if name.endswith(".png") and draw.random() < 0.7:
            data = _mended(data)
        done = "+".join(change.__name__.strip("_") for change in changes) or "whole"
        yield f"{seed}-{number:05d}-{done}-{name}", data


def _place(data: bytes, draw: random.Random, size: int = 1) -> int:
    """A place in the file, half of them near its beginning, where the headers are."""
    most = max(0, len(data) - size)
    return draw.randint(0, min(most, 200)) if draw.random() < 0.5 else draw.randint(0, most)


def _bytes(data: bytes, draw: random.Random, *_: object) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        if changed:
            changed[_place(data, draw)] = draw.randrange(256)
    return bytes(changed)


def _number(data: bytes, draw: random.Random, *_: object) -> bytes:
    size = draw.choice((1, 2, 4))
    most = 256**size
    value = draw.choice((0, 1, most - 1, most // 2 - 1, most // 2, draw.randrange(most)))
    start = _place(data, draw, size)
    order = draw.choice(("big", "little"))
    return data[:start] + value.to_bytes(size, order) + data[start + size :]


def _cut(data: bytes, draw: random.Random, *_: object) -> bytes:
    return data[: _place(data, draw)] or data[:1]


def _gap(data: bytes, draw: random.Random, *_: object) -> bytes:
    start = _place(data, draw)
    return data[:start] + data[start + draw.choice((1, 4, 100, 2000)) :] or data[:1]


def _inserted(data: bytes, draw: random.Random, *_: object) -> bytes:
    start = _place(data, draw)
    return data[:start] + draw.randbytes(draw.choice((1, 4, 100))) + data[start:]


def _zeros(data: bytes, draw: random.Random, *_: object) -> bytes:
    start = _place(data, draw)
    return data[:start] + bytes(draw.choice((4, 64, 1000))) + data[start + 64 :]


def _joined(data: bytes, draw: random.Random, files: dict[str, bytes], name: str) -> bytes:
    """With another file of the kind, often of other sizes, rates or channels, in whole or half."""
    alike = [other for other in sorted(files) if Path(other).suffix == Path(name).suffix]
    other = files[draw.choice(alike if draw.random() < 0.8 else sorted(files))]
    return (
        data + other if draw.random() < 0.6 else data[: len(data) // 2] + other[len(other) // 2 :]
    )


CHANGES = (_bytes, _bytes, _number, _number, _cut, _gap, _inserted, _zeros, _joined, _joined)


def _mended(data: bytes) -> bytes:
    """A PNG whose checksums are right again: a reader gets to what was changed."""
    made, start = bytearray(data[:8]), 8
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            break
        made += data[start:end] + struct.pack(">I", zlib.crc32(data[start + 4 : end]))
        start = end + 4
    return bytes(made + data[start:])


if __name__ == "__main__":
    sys.exit(main())
