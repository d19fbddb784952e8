"""A site of this repository's pages: the hooks of ``mkdocs.yml``.

Pages are written for the repository, and stay as they are. README.md is the start page, and what else a page links to
comes along under its path: a page if it is Markdown, or else a file. A link to a folder becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
START, START_URI = "README.md", "index.md"
IN_NAV = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages of the site, whether another one links to them or not."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^ *```.*?^ *```[ ]*$)", re.M | re.S)
ITEM = re.compile(r"( *)([-*]|\d+\.) +")
TAB = 4
"""Python-Markdown indents by it what belongs to an item. CommonMark goes by where the item's text begins."""
LOADED = re.compile(
    r"<(?:script|link|img|iframe|source|object|embed|video|audio|image|use)\b[^>]*?(?:src|href|data)=[\"']?(?:https?:)?//[^>]*>"
)
STYLED = re.compile(r"(?:@import\s+|url\()[\"']?(?:https?:)?//[^;)]*")


def site_uri(path: str) -> str:
    """Where a file of the repository stands in the site."""
    return START_URI if path == START else path.removeprefix(DOCS)


def repository_path(uri: str) -> str:
    if uri == START_URI:
        return START
    return DOCS + uri if (ROOT / DOCS / uri).exists() else uri


def target(link: str, path: str) -> tuple[str, str] | None:
    """The file of the repository that a link on the page ``path`` leads to, and its anchor; None: another place's."""
    if re.match(r"\w+:", link):
        return None
    there, _, anchor = link.partition("#")
    return (posixpath.normpath(posixpath.join(posixpath.dirname(path), there)) if there else path), anchor


def for_site(markdown: str, path: str) -> str:
    """A page of the repository as the site has it."""

    def link(match: re.Match[str]) -> str:
        image, text, written = match.groups()
        if (found := target(written, path)) is None:
            return match[0]
        there, anchor = found
        if (ROOT / there).is_dir():
            return text
        uri = posixpath.relpath(site_uri(there), posixpath.dirname(site_uri(path)) or ".")
        return f"{image}[{text}]({uri}{'#' * bool(anchor)}{anchor})"

    parts = FENCED.split(markdown)
    return indented("".join(part if fenced % 2 else LINK.sub(link, part) for fenced, part in enumerate(parts)))


def indented(markdown: str) -> str:
    """What belongs to an item, as Python-Markdown wants it: indented by four, and a blank line between the last
    of several paragraphs and the next item."""
    lines: list[str] = []
    inside: list[int] = []
    """Of each item that a line is in, the column where its text begins."""
    in_fence, after_blank, has_blocks = False, True, False
    for line in markdown.splitlines():
        text = line.lstrip(" ")
        column = len(line) - len(text)
        item = None if in_fence else ITEM.match(line)
        if text and not in_fence and (item or after_blank):
            while inside and column < inside[-1]:
                inside.pop()
        if item and has_blocks and not after_blank:
            lines.append("")
        has_blocks = bool(inside) and not item and (has_blocks or after_blank)
        if text and column >= (begins := inside[-1] if inside else 0):
            line = " " * (TAB * len(inside) + column - begins) + text
        lines.append(line)
        if item:
            inside.append(item.end())
        in_fence ^= text.startswith("```")
        after_blank = not text
    return "\n".join(lines) + "\n"


def brought_along() -> Iterator[str]:
    """Files outside of docs/ that the site has: the README, what pages link to, and what these link to."""
    waiting = [START, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / DOCS).glob("*.md"))]
    seen = set(waiting)
    while waiting:
        path = waiting.pop(0)
        if not path.startswith(DOCS):
            yield path
        if not path.endswith(".md"):
            continue
        links = [match[3] for match in LINK.finditer(FENCED.sub("", (ROOT / path).read_text()))]
        there = [place[0] for link in links if (place := target(link, path)) is not None]
        new = dict.fromkeys(name for name in there if name not in seen and (ROOT / name).is_file())
        seen |= new.keys()
        waiting += new


def loads_from_elsewhere(page: str) -> list[str]:
    """What a page or a style sheet would fetch from another place; links that a reader may follow do not count."""
    return [*LOADED.findall(page), *STYLED.findall(page)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path in sorted({*brought_along(), *IN_NAV}):
        if files.get_file_from_path(site_uri(path)) is None:
            files.append(File.generated(config, site_uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return for_site(markdown, repository_path(page.file.src_uri))


def on_post_build(config: MkDocsConfig) -> None:
    site = Path(config.site_dir)
    found = {
        str(path.relative_to(site)): there
        for path in sorted(site.rglob("*"))
        if path.suffix in (".html", ".css", ".svg") and (there := loads_from_elsewhere(path.read_text()))
    }
    if found:
        raise SystemExit(
            "The site loads from elsewhere:\n" + "\n".join(f"  {name}: {there}" for name, there in found.items())
        )
