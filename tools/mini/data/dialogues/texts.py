"""Plain texts to measure perplexity on."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tools.mini.data.dialogues.world import DATA
from tools.mini.data.pictures import read_member

log = logging.getLogger(__name__)

TEXT_LENGTH = 120_000  # characters of each text
PYTHON_PAGES = ("faq/design", "faq/general", "howto/sockets", "howto/unicode", "howto/functional")


PYTHON_PAGES += ("howto/logging", "howto/regex", "tutorial/classes", "tutorial/modules")


def write_texts(packages: Path) -> None:
    """A novel and a technical text, as paragraphs of one line each, and the latter's licence."""
    with tarfile.open(next(packages.glob("[Bb]rotli-*.tar.gz"))) as archive:
        member = next(m for m in archive.getnames() if m.endswith("testdata/alice29.txt"))
        novel = read_member(archive, member).decode("ascii")
    folder = packages / "usr/share/doc/python3.11/html/_sources"
    pages = [(folder / f"{page}.rst.txt").read_text("utf-8") for page in PYTHON_PAGES]
    (DATA / "text").mkdir(exist_ok=True)
    for name, paragraphs in (
        ("alice", [" ".join(block.split()) for block in re.split(r"\n\s*\n", novel)]),
        ("python", [text for page in pages for text in prose(page)]),
    ):
        text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        text = text[: text.rindex("\n\n", 0, TEXT_LENGTH)] if len(text) > TEXT_LENGTH else text
        (DATA / "text" / f"{name}.txt").write_text(text + "\n", "utf-8")
        log.info("text/%s.txt: %d characters", name, len(text))
    licence = (packages / "usr/share/doc/python3.11-doc/copyright").read_text("utf-8")
    start, end = licence.index("PYTHON SOFTWARE FOUNDATION"), licence.index("BEOPEN.COM LICENSE")
    (DATA / "text" / "LICENSE.python").write_text(licence[start:end].rstrip() + "\n", "utf-8")


def prose(page: str) -> Iterator[str]:
    """The paragraphs of a reStructuredText page, without code, headings and mark-up."""
    for block in re.split(r"\n\s*\n", page):
        if block.startswith((" ", "..", "\t", "|", "+", "*", "-", "=", "#", ":")):
            continue
        text = re.sub(r":[\w:+-]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", " ".join(block.split()))
        text = re.sub(r"`([^`<]+?)\s*(?:<[^`>]*>)?`__?", r"\1", text)
        text = re.sub(r"``(.+?)``|\*\*(.+?)\*\*|\*(\w[^*]*?)\*", r"\1\2\3", text)
        text = re.sub(r"::$", ":", text).replace("\\ ", "")
        if len(text) > 60 and text[-1] in ".:!?)" and "://" not in text and "`" not in text:
            yield text
