"""Audio tracks in containers, read by PyAV.

Legend: C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmllm.errors import MediaError
from mmllm.media import audio
from mmllm.media.container import (
    audio_stream,
    container_provenance,
    decode_packets,
    open_container,
)
from mmllm.media.info import MediaContent, MediaInfo
from mmllm.media.limits import DecodingCost, check_limit, current_limits

if TYPE_CHECKING:
    from av.container import InputContainer


def read_audio(file: BinaryIO, name: str, facts: MediaInfo, cost: DecodingCost) -> MediaContent:
    """Decode the first audio track of a container, with its provenance metadata.

    Args:
        file: the container.
        name: its name in messages.
        facts: what `probe` returned.
        cost: counts the work.

    Returns:
        float32[C, S] in [-1, 1] at the track's own sample rate.

    Raises:
        MediaError: the track is damaged, truncated or empty, or exceeds the limits.
    """
    allowed = current_limits()
    array, length, rate = np.empty((0, 0), np.float32), 0, 0
    with open_container(file, name, cost) as container:
        stream = audio_stream(container)
        assert stream is not None  # the probe found it
        for rate, block in _blocks(container, stream, cost):
            end = length + block.shape[1]
            check_limit(name, "seconds", end / rate, "seconds")
            check_limit(name, "decoded_bytes", 4 * len(block) * end, "bytes when decoded")
            if end > array.shape[1]:
                # Pages that are not written take no memory, so the announced length may be wrong.
                most = int(min(allowed.seconds * rate, allowed.decoded_bytes / 4 / len(block)))
                capacity = max(end, min(most, facts.samples + rate if not length else 2 * end))
                longer = np.empty((len(block), capacity), np.float32)
                if length:
                    longer[:, :length] = array[:, :length]
                array = longer
            array[:, length:end] = block
            length = end
        mark = container_provenance(container)
        kind = container.format.name
        known = "mp4" in kind or kind in (
            "wav",
            "caf",
        )  # durations of other formats may be estimates from the bit rate
        announced = round((stream.duration or 0) * (stream.time_base or 0) * rate) if known else 0
    if not length:
        raise MediaError(f"{name}: the audio holds no samples")
    if length < 0.9 * announced:
        raise MediaError(
            f"{name}: the audio is truncated ({announced} samples announced, {length} found); was "
            "it copied completely?"
        )
    # Codecs with fixed blocks (AAC: 1024 samples) pad the last one.
    length = min(length, announced) if announced > 0 else length
    array = audio.checked(array[:, :length], name)
    return MediaContent(array=array, sample_rate=rate, provenance=mark)


def _blocks(
    container: InputContainer, stream: Any, cost: DecodingCost
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (sample rate, float32[C, S]) of each block of a track. All blocks have the rate and
    channels of the first: later blocks are converted if these change."""
    import av

    target: tuple[Any, int] | None = None
    kind, resampler = None, None
    for frame in decode_packets(container, stream, stream.codec_context, cost):
        target = target or (frame.layout, frame.sample_rate)
        if kind != (frame.format.name, frame.layout.name, frame.sample_rate):
            if resampler is not None:
                yield from ((target[1], block.to_ndarray()) for block in resampler.resample(None))
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            resampler = av.AudioResampler(format="fltp", layout=target[0], rate=target[1])
        assert resampler is not None
        yield from ((target[1], block.to_ndarray()) for block in resampler.resample(frame))
    if resampler is not None and target is not None:
        yield from ((target[1], block.to_ndarray()) for block in resampler.resample(None))
