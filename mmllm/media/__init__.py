"""Media files and arrays: decode, validate, resample and save images, audio and videos.

    probe(source) -> MediaInfo                      format and size of a file, from its header
    decode(source, "image") -> MediaContent         the decoded arrays, within the limits
    sample_frames(source, 5) -> array               evenly spaced frames of a video of any length
    resample(samples, 44100, 16000) -> array        audio at another sample rate
    save(content, "image", path) -> Path            an atomic write, with provenance metadata
    read_provenance(path)                           the provenance of a file that mmllm generated
    with limits(seconds=30): ...                    other limits inside the block

The types of the public API (mmllm.conversation: Image, Audio, Video) call these functions. Only
numpy is imported before a file is opened.
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
