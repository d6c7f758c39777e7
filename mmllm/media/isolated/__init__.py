"""Decoding of untrusted files in worker processes that can be killed: some files take minutes or
gigabytes, and some crash the library that reads them.

    decode(source, "image", seconds=10)     as `mmllm.media.decode`
    sample_frames(source, 8, seconds=10)    as `mmllm.media.sample_frames`
    probe(source, seconds=10)               as `mmllm.media.probe`

Each returns the same as its namesake. It also raises MediaError if it exceeds the time or memory
limit, if the worker crashes, or if `cancel` is set. The limits are those at the time of the call
(`mmllm.media.limits`). A few workers are started on first use and reused; a worker that fails on a
file is killed. Workers import neither torch nor the caller's main module, and end with the process
that started them. Responses are JSON and raw arrays, never pickles: a file that compromises a
worker does not compromise its parent.

client.py starts and kills workers, worker.py is their program, wire.py the messages between them.
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
