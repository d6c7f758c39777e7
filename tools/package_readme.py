"""The README as a package index shows it: a build hook of hatchling, named in pyproject.toml.

An index has none of the files of the repository, so pictures and links to them are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURES = re.compile(r"<!-- pictures -->.*?<!-- /pictures -->\n*", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n*")
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)")


class PackageReadme(MetadataHookInterface):
    """Sets the field `readme`, which pyproject.toml lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the long description to the metadata of the package."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_files(text)}


def without_files(text: str) -> str:
    """Return Markdown without pictures and links that lead to files.

    Example:
        >>> without_files("See [the docs](docs/a.md) and [PyTorch](https://pytorch.org).")
        'See the docs and [PyTorch](https://pytorch.org).'
    """
    for pattern, kept in ((_PICTURES, ""), (_PICTURE, ""), (_LINK, r"\1")):
        text = pattern.sub(kept, text)
    return text
