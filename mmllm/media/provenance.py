"""Provenance metadata of generated media: one JSON object in the metadata of each format.

Images and WebP animations contain an XMP packet whose IPTC `DigitalSourceType` says "made by a
trained model" to any reader of photo metadata, followed by the JSON; GIF, WAV, FLAC, OGG and MP4
contain the JSON as their comment.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

KEY = "mmllm"
"""The JSON is {KEY: provenance}: a comment without this key was not written by mmllm."""

_XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:mmllm="urn:mmllm:provenance"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>{kind}</Iptc4xmpExt:DigitalSourceType>
<mmllm:provenance>{comment}</mmllm:provenance>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
_KIND = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_BEGIN, _END = "<mmllm:provenance>", "</mmllm:provenance>"
_LONGEST = 1 << 20
"""Maximum length of a comment or packet that is parsed."""


def to_comment(provenance: Mapping[str, Any]) -> str:
    """Return a provenance as ASCII JSON on one line; values that JSON cannot represent become their
    `str`."""
    return json.dumps({KEY: dict(provenance)}, default=str, sort_keys=True)


def from_comment(comment: object) -> dict[str, Any] | None:
    """Return the provenance in a comment of any type, or None."""
    text = _text(comment)
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    marked = found.get(KEY) if isinstance(found, dict) else None
    return marked if isinstance(marked, dict) else None


def to_xmp(provenance: Mapping[str, Any]) -> bytes:
    """Return a provenance as an XMP packet."""
    return _XMP.format(kind=_KIND, comment=html.escape(to_comment(provenance), False)).encode()


def from_xmp(packet: object) -> dict[str, Any] | None:
    """Return the provenance in an XMP packet of any type, or None."""
    _, found, rest = _text(packet).partition(_BEGIN)
    marked, ended, _ = rest.partition(_END)
    return from_comment(html.unescape(marked)) if found and ended else None


def _text(found: object) -> str:
    """Return metadata as text; "" if it is no text or bytes, or too long."""
    if isinstance(found, bytes):
        found = found.decode("utf-8", "replace")
    return found if isinstance(found, str) and len(found) <= _LONGEST else ""
