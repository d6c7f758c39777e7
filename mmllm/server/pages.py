"""What a browser is shown: a start page, and the API's paths and fields; nothing is loaded from
elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
_STYLE += "pre{background:#8882;padding:1em;overflow:auto}td{padding:0 1em 0 0}"


def start(base: str, needs_token: bool) -> str:
    """The page at `/`: what this is, and a line that asks it something."""
    token = ' -H "authorization: Bearer $MMLLM_TOKEN"' if needs_token else ""
    asked = '{"messages": [{"role": "user", "content": "Draw a red apple."}]}'
    curl = f"curl -sS {base}/v1/chat/completions -H 'content-type: application/json'{token} \\\n"
    curl += f"  -d '{asked}'"
    return _page(
        "mmllm",
        "<p>This server answers by OpenAI's API: text, pictures, sounds and clips in; text, "
        f"pictures, sounds and clips out. Its base URL is <code>{escape(base)}/v1</code>.</p>"
        f"<pre>{escape(curl)}</pre><p><a href='/docs'>Paths and fields</a></p>",
    )


def reference(document: Mapping[str, Any]) -> str:
    """The page at `/docs`, made of the OpenAPI document."""
    return _page("mmllm: paths and fields", "".join(_paths(document)))


def _paths(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(about.get('description', ''))}</p>"
    for name, schema in document["components"]["schemas"].items():
        if "properties" not in schema:
            continue
        yield f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p><table>"
        for field, about in schema["properties"].items():
            description = escape(about.get("description", ""))
            yield f"<tr><td><code>{escape(field)}</code></td><td>{description}</td></tr>"
        yield "</table>"


def _page(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{body}</html>"
    )
