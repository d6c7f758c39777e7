"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_LENGTH = 60
"""Characters of a name that are compared."""


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to `name`, or None.

    Args:
        name: the name that was given; its first characters are compared.
        known: the valid names.
        cutoff: minimum similarity in [0, 1], see `difflib.get_close_matches`.
    """
    matches = difflib.get_close_matches(str(name)[:_MAX_LENGTH], list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `; did you mean 'image'?` if a known name is similar to a name, else an empty text.

    Args:
        name: the unknown name.
        known: the known names.
        cutoff: the least similarity, 0 to 1, as in `difflib.get_close_matches`.

    Example:
        >>> did_you_mean("imgae", ["image", "audio"])
        "; did you mean 'image'?"
    """
    match = nearest(name, known, cutoff=cutoff)
    return f"; did you mean {match!r}?" if match is not None else ""
