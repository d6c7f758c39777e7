"""The pages for a browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.server.conftest import Served


@pytest.mark.parametrize("token", [None, "secret"])
def test_a_browser_is_shown_what_this_is(serve: Callable[..., Served], token: str | None) -> None:
    served = serve(token=token)
    with served.http() as http:
        start, fields = http.get("/"), http.get("/docs")
    for page in (start, fields):
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert not re.search(r"(src|href)=.https?:", page.text)
        assert "secret" not in page.text
    assert f"curl -sS {served.url}/v1/chat/completions" in start.text
    assert ("Bearer" in start.text) == (token is not None)
    for path in ("/v1/chat/completions", "/v1/images/edits", "repetition_penalty"):
        assert path in fields.text
