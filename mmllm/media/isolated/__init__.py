"""Decoding in worker processes that can be ended: for files of strangers, of which some take
minutes or gigabytes, and some crash the library that reads them.

    decode(source, "image", seconds=10)     as `mmllm.media.decode`
    sample_frames(source, 8, seconds=10)    as `mmllm.media.sample_frames`
    probe(source, seconds=10)               as `mmllm.media.probe`

Each returns what its namesake returns, and raises MediaError also when the time or the memory is
exhausted, when the worker crashed, or when `cancel` was set. The limits are those in force at the
call (`mmllm.media.limits`). A few workers are started on first use and kept; one is ended together
with the file that it could not cope with. They import neither torch nor the caller's main module,
and end with the process that started them. Responses are JSON and raw arrays, never pickles: a
file that takes over a worker does not take over its parent.

client.py starts and ends workers, worker.py is their program, wire.py the messages between both.
"""

from mmllm.media.isolated.client import (
    PROCESSES,
    SECONDS,
    STARTED,
    DecodingCancelledError,
    decode,
    probe,
    sample_frames,
    start,
)

__all__ = [
    "PROCESSES",
    "SECONDS",
    "STARTED",
    "DecodingCancelledError",
    "decode",
    "probe",
    "sample_frames",
    "start",
]
