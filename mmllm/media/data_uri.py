"""Files inside texts: `data:image/png;base64,…` URIs (RFC 2397) and base64 by itself.

Requests and rows of datasets read them alike, here. Texts come from outside and may be long: each
is looked at once from its beginning to its end, and no pattern is matched against it.
"""

from __future__ import annotations

import base64
import binascii
import string
from urllib.parse import unquote_to_bytes

from mmllm.errors import MediaError, OversizedMediaError, quoted
from mmllm.media.limits import current_limits

_HEADER = 1024
"""Characters in which the comma of a URI must come."""
_BLANKS = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")
"""The alphabet of URLs (RFC 4648, section 5) -> the standard one."""
_ALPHABET = frozenset(string.ascii_letters + string.digits + "+/-_=")
_LOOKED_AT = 4096


def is_data_uri(text: str) -> bool:
    """Whether a text names its scheme as `data:`, in whatever case."""
    return text.lstrip()[:5].lower() == "data:"


def parse(text: str, where: str) -> bytes:
    """The bytes of a `data:TYPE;base64,…` URI; `where` says in messages what held it.

    Scheme, type and `base64` may be in any case, and white space and percent signs may stand in the
    data. Raises MediaError for another text, OversizedMediaError beyond `limits`.
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
    """The bytes that a base64 text stands for: in the standard alphabet or that of URLs, with or
    without line breaks and padding. Raises as `parse`."""
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
    """Whether a text that was given for a file's name is rather the file itself in base64: long,
    and of that alphabet alone as far as one looks."""
    start = text[:_LOOKED_AT]
    return len(text) > 255 and not (set(start) - _ALPHABET).difference(" \t\r\n")
