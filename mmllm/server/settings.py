"""What the server allows. Limits are compared before anything is decoded or computed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from mmllm.errors import ConfigError, quoted
from mmllm.media import Limits

MB = 2**20
MediaFormat = Literal["parts", "markdown", "urls"]
"""How a chat's answer shows its media: in `parts` alone, or in `content` too, as Markdown with the
files themselves or with URLs of this server."""
INPUT_LIMITS = Limits(
    bytes=32 * MB,
    pixels=16_000_000,
    seconds=120,
    frames=10_000,
    decoded_bytes=256 * MB,
    decoding_seconds=15.0,
)


@dataclass(frozen=True)
class ServerSettings:
    """`token`: what clients must present; none: nothing. `allow_urls`: hosts ("example.org", or
    "example.org:8443") whose media may be fetched. `hosts`: names by which the server may be
    called (the Host header; None: any), so that a web page cannot reach a local server through a
    name of its own that resolves to 127.0.0.1. `media_format`: how chat responses show media,
    unless a request says `mmllm.media`."""

    token: str | None = None
    allow_urls: frozenset[str] = frozenset()
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})
    media_format: MediaFormat = "parts"
    lenient: bool = False
    """Fields that are unknown or not supported are dropped and named in the answer, not refused."""
    allow_origins: frozenset[str] = frozenset()
    """Origins of web pages ("https://example.org"; "*": any) whose scripts may read answers."""

    # Of one request.
    max_body_bytes: int = 32 * MB
    max_body_seconds: float = 60.0
    """To send it in."""
    idle_timeout: float = 10.0
    """In which a connection must send its headers whole, and more of its body."""
    min_body_rate: int = 16 * 2**10
    """Bytes a second that a body must come at, once `silent_seconds` are over."""
    send_timeout: float = 60.0
    """In which a client must take what it was sent; then it holds its place no longer."""
    linger_timeout: float = 2.0
    """Seconds in which a client that is still sending may read a response that closes the
    connection."""
    linger_bytes: int = 4 * MB
    """Bytes that are read and discarded meanwhile."""
    max_characters: int = 100_000
    """Of all its text."""
    max_input_media: int = 16
    """How many it may show, play or name."""
    input_limits: Limits = INPUT_LIMITS
    """Each of its media; `decoded_bytes`: all that are decoded, together; `decoding_seconds`: to
    decode one, in a process of its own, which is ended then."""
    fetch_timeout: float = 15.0
    """For one URL, from the look-up of its host to the last byte."""

    # Of one reply.
    max_tokens: int = 4096
    max_output_media: int = 8
    """Media."""
    max_steps: int = 200
    max_output_pixels: int = 4_194_304
    """Width x height."""
    max_output_seconds: float = 60.0
    max_output_frames: int = 500
    max_output_volume: int = 134_217_728
    """Width x height x frames."""

    # Of all together.
    max_requests: int = 128
    """That are being read, wait or are answered."""
    max_connections: int = 512
    """Beyond it the oldest connection that has asked nothing yet, or is silent, is closed."""
    max_total_body_bytes: int = 512 * MB
    """Of the requests that are being read, wait or are answered."""
    max_total_decoded_bytes: int = 2**30
    """Of their media."""
    max_queued: int = 64
    """That wait for the engine."""
    max_batch: int = 8
    """That are answered at the same time."""
    max_videos: int = 16
    """Clips that are being made or kept."""
    retention_seconds: float = 3600.0
    """How long a clip, or a file behind a URL, is kept after it was made."""
    max_files: int = 256
    """Files behind URLs."""
    max_file_bytes: int = 256 * MB
    """Of these; a larger one is kept alone."""

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ConfigError("token: expected visible ASCII characters, without spaces")
        if self.media_format not in get_args(MediaFormat):
            raise ConfigError(
                f"media: expected one of {', '.join(get_args(MediaFormat))}, got "
                f"{quoted(self.media_format)}"
            )
        for origin in self.allow_origins:
            if not re.fullmatch(r"\*|https?://[a-z0-9.\[\]:-]+", origin):
                raise ConfigError(
                    "allow_origins: expected an origin such as https://example.org or "
                    f"http://localhost:3000, without a path, or *; got {quoted(origin)}"
                )
        for host in self.allow_urls:
            if not re.fullmatch(r"[a-z0-9.-]+(:\d+)?", host):
                raise ConfigError(
                    f"allow_urls: expected a host such as example.org or example.org:8443, in "
                    f"small letters; got {host!r}"
                )
