"""Media as files and arrays: decode, check, resample and save images, audio and videos.

    probe(source) -> MediaInfo                      what a file is, by its header
    decode(source, "image") -> MediaContent         its arrays, within the limits
    sample_frames(source, 5) -> array               some frames of a video, however long it is
    resample(samples, 44100, 16000) -> array        audio at another sample rate
    save(content, "image", path) -> Path            all or nothing, with its provenance mark
    read_provenance(path)                           what made this file, if mmllm did
    with limits(seconds=30): ...                    other limits

The types that people use are above it (mmllm.conversation: Image, Audio, Video) and call these
functions. Only numpy is imported before a file is opened.
"""

from mmllm.media.audio import resample
from mmllm.media.codecs import decode, probe, read_provenance, sample_frames, save
from mmllm.media.files import Embedded, MediaSource
from mmllm.media.info import MediaContent, MediaInfo
from mmllm.media.limits import Limits, current_limits, limits

__all__ = [
    "Embedded",
    "Limits",
    "MediaContent",
    "MediaInfo",
    "MediaSource",
    "current_limits",
    "decode",
    "limits",
    "probe",
    "read_provenance",
    "resample",
    "sample_frames",
    "save",
]
