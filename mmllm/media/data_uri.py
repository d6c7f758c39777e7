"""Files encoded as text: `data:image/png;base64,…` URIs (RFC 2397) and plain base64.

Requests and dataset rows both use this module. Texts are untrusted and may be long: each is scanned
once, without regular expressions.
"""

from __future__ import annotations

import base64
import binascii
import string
from urllib.parse import unquote_to_bytes

from mmllm.errors import MediaError, OversizedMediaError, quoted
from mmllm.media.limits import current_limits

_HEADER = 1024
"""Number of first characters that must contain the comma of a URI."""
_BLANKS = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")
"""The alphabet of URLs (RFC 4648, section 5) -> the standard one."""
_ALPHABET = frozenset(string.ascii_letters + string.digits + "+/-_=")
_LOOKED_AT = 4096


def is_data_uri(text: str) -> bool:
    """Return whether a text begins with the scheme `data:`, in any case."""
    return text.lstrip()[:5].lower() == "data:"


def parse(text: str, where: str) -> bytes:
    """Decode a `data:TYPE;base64,…` URI.

    Scheme, type and `base64` may be in any case; the data may contain white space and percent
    encoding.

    Args:
        text: the URI.
        where: the place of the text, for messages.

    Returns:
        The bytes of the file.

    Raises:
        MediaError: the text is no such URI, or empty.
        OversizedMediaError: the file exceeds the limits.
    """
    text = text.lstrip()
    comma = text.find(",", 0, _HEADER)
    head = text[: max(comma, 0)].rstrip().lower()
    if not head.startswith("data:") or head.rpartition(";")[2].strip() != "base64":
        raise MediaError(f"{where}: expected data:TYPE;base64,…, got {quoted(text)}")
    payload = text[comma + 1 :]
    if "%" in payload:
        payload = unquote_to_bytes(payload).decode("latin-1")
    return decode(payload, where)


def decode(text: str, where: str) -> bytes:
    """Decode base64 in the standard or the URL alphabet, with or without line breaks and padding.

    Args:
        text: the base64.
        where: the place of the text, for messages.

    Raises:
        MediaError: the text is no base64, or empty.
        OversizedMediaError: the file exceeds the limits.
    """
    try:
        data = text.encode("ascii").translate(_STANDARD, delete=_BLANKS)
    except UnicodeEncodeError as error:
        raise MediaError(f"{where}: not base64: it holds {quoted(text[error.start])}") from error
    size, allowed = len(data) // 4 * 3, current_limits().bytes
    if size > allowed + 2:  # padding counts for up to two bytes
        raise OversizedMediaError(f"{where}: {size} bytes, more than the limit of {allowed}")
    try:
        found = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{where}: not valid base64 ({error}), got {quoted(text)}") from error
    if not found:
        raise MediaError(f"{where}: the base64 is empty (0 bytes)")
    return found


def looks_like_base64(text: str) -> bool:
    """Return whether a text given as a file name is probably the file itself in base64: it is long,
    and its first characters are all of the base64 alphabet."""
    start = text[:_LOOKED_AT]
    return len(text) > 255 and not (set(start) - _ALPHABET).difference(" \t\r\n")
