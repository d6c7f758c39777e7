"""MkDocs hook: README and its neighbours become pages, and every package gets a reference page.

mkdocs.yml names this file. Links between Markdown files of the repository stay as they are on disk;
here they are rewritten to where the pages are. Links to what is no page (configs/, LICENSE) become
plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Section
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")},
}
"""File of the repository's root -> page of the site."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def packages() -> list[str]:
    """Every package and top-level module of mmllm that has something public, by dotted name."""
    folder = ROOT / "mmllm"
    names = [
        path.stem if path.is_file() else path.name
        for path in sorted(folder.iterdir())
        if (path / "__init__.py").is_file()
        or (path.suffix == ".py" and not path.stem.startswith("__"))
    ]
    return ["mmllm", *(f"mmllm.{name}" for name in names)]


def modules(package: str) -> list[str]:
    """A package and the modules below it, by dotted name."""
    path = ROOT / package.replace(".", "/")
    if not path.is_dir() or package == "mmllm":
        return [package]
    files = sorted(path.rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def reference(package: str) -> str:
    """The Markdown of a package's reference page."""
    entries = [f"::: {name}\n    options:\n      heading_level: 2" for name in modules(package)]
    return f"# {package}\n\n" + "\n\n".join(entries) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [{name: f"reference/{name}.md"} for name in packages()]
    assert config.nav is not None
    config.nav = [*config.nav, {"API reference": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for name in packages():
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that lead outside docs/ on disk."""
    here = page.file.src_uri
    source = next((name for name, uri in PAGES.items() if uri == here), f"docs/{here}")

    def rewritten(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        on_disk = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        uri = PAGES.get(on_disk) or (
            on_disk.removeprefix("docs/") if on_disk.startswith("docs/") else None
        )
        if uri is None or files.get_file_from_path(uri) is None:
            if not (ROOT / on_disk).exists():
                return match[0]  # a dead link, which strict mode reports
            return (
                f"`{on_disk}`" if text.strip("`") == path.rstrip("/") else f"{text} (`{on_disk}`)"
            )
        relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return _LINK.sub(rewritten, markdown)


def on_nav(nav: Any, config: MkDocsConfig, files: Files) -> Any:
    """The reference is long: its section starts closed."""
    for item in nav.items:
        if isinstance(item, Section) and item.title == "API reference":
            item.is_section = False
    return nav
