"""Markdown of a reply as safe HTML: without the HTML of a model, images and scripts."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token


@functools.lru_cache(maxsize=1024)
def to_html(text: str) -> str:
    """Return a reply's Markdown as HTML.

    HTML in it is shown as text. An image becomes a link, so that no other host is asked for it.
    Links open only when they are followed, and in another tab. Line breaks and indentation stay, in
    code blocks and elsewhere (with `white-space: pre-wrap`).
    """
    return _parser().render(text)


@functools.cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.disable(["image", "newline", "lheading"])  # newlines stay as they are, with indentation
    parser.add_render_rule("link_open", _link)
    for block in ("fence", "code_block"):
        parser.add_render_rule(block, _code)
    return parser


def _link(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    tokens[index].attrs |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
    return renderer.renderToken(tokens, index, options, env)


def _code(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A code block that the keyboard can scroll, with a button that copies it."""
    return (
        '<div class="code"><button type="button" class="copy">Copy code</button>'
        f'<pre tabindex="0"><code>{html.escape(tokens[index].content)}</code></pre></div>\n'
    )
