"""Markdown of a reply: what is shown of it, and what a model cannot make a browser do."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from mmllm.demo.markdown import to_html


def elements(text: str) -> set[tuple[str, str]]:
    """(tag, attribute) of all elements of the HTML; an element without attributes has ""."""
    found: set[tuple[str, str]] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.update((tag, name) for name, _ in attrs or [("", None)])

    Reader().feed(to_html(text))
    return found


def visible(text: str) -> str:
    """The text of the HTML, entities decoded."""
    words: list[str] = []
    reader = HTMLParser()
    reader.handle_data = words.append  # pyright: ignore[reportAttributeAccessIssue]
    reader.feed(to_html(text))
    return "".join(words)


@pytest.mark.parametrize(
    "text",
    [
        "<b>x</b>",
        "<script>alert(1)</script>",
        "<img src=http://a.example/b.png onerror=alert(1)>",
        "a\n\n<iframe src=//a.example></iframe>\n",
        "<!-- x --><style>*{}</style>",
        "[x](javascript:alert(1))",
        "[x](data:text/html,<script>alert(1)</script>)",
        '&lt;b onclick="x"&gt;',
    ],
)
def test_html_and_scripts_of_a_model_are_text(text: str) -> None:
    assert elements(text) <= {("p", ""), ("pre", "tabindex"), ("code", "")}


@pytest.mark.parametrize(
    "text",
    [
        "![a cat](http://a.example/b.png)",
        "![a cat][r]\n\n[r]: http://a.example/b.png",
        "<http://a>",
    ],
)
def test_an_image_is_a_link_which_opens_in_another_tab_when_it_is_followed(text: str) -> None:
    assert {tag for tag, _ in elements(text)} == {"p", "a"}
    assert 'target="_blank" rel="noopener noreferrer nofollow"' in to_html(text)


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo",
        "def f(x):\n    return 1",
        "a  b\n  c\n\td",
        "2 * 3 * 4 and snake_case_name",
        "1 < 2",
    ],
)
def test_line_breaks_and_spaces_of_plain_text_stay(text: str) -> None:
    assert visible(text).strip("\n") == text


@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_code_stays_as_it_was_also_while_it_is_being_written(fence: str, is_closed: bool) -> None:
    code = 'if x < 3:\n    return "![x](y) <b>"\n'
    shown = visible(f"{fence}python\n{code}{fence * is_closed}")
    assert shown == f"Copy code{code}\n"
