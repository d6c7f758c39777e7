"""The mark of generated media: one JSON object, kept where each format keeps its remarks.

Pictures and WebP clips carry an XMP packet whose IPTC `DigitalSourceType` says "made by a trained
model" to any reader of photo metadata, with our JSON beside it; GIF, WAV, FLAC, OGG and MP4 carry
the JSON as their comment.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

KEY = "mmllm"
"""The JSON is {KEY: provenance}: a comment that lacks it was written by somebody else."""

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
"""Characters of a remark that is looked at."""


def to_comment(provenance: Mapping[str, Any]) -> str:
    """ASCII JSON on one line; values that JSON does not know are written as their `str`."""
    return json.dumps({KEY: dict(provenance)}, default=str, sort_keys=True)


def from_comment(comment: object) -> dict[str, Any] | None:
    """The provenance that a comment holds, or None. What libraries find in files is of any type."""
    text = _text(comment)
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    marked = found.get(KEY) if isinstance(found, dict) else None
    return marked if isinstance(marked, dict) else None


def to_xmp(provenance: Mapping[str, Any]) -> bytes:
    """An XMP packet."""
    return _XMP.format(kind=_KIND, comment=html.escape(to_comment(provenance), False)).encode()


def from_xmp(packet: object) -> dict[str, Any] | None:
    """The provenance that an XMP packet holds, or None."""
    _, found, rest = _text(packet).partition(_BEGIN)
    marked, ended, _ = rest.partition(_END)
    return from_comment(html.unescape(marked)) if found and ended else None


def _text(found: object) -> str:
    """What a library found as text; the empty text where it is something else or far too long."""
    if isinstance(found, bytes):
        found = found.decode("utf-8", "replace")
    return found if isinstance(found, str) and len(found) <= _LONGEST else ""
