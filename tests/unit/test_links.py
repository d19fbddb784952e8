"""The documents: what they link to and the files that they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for pattern in ("*.md", "[!.]*/**/*.md") for path in ROOT.glob(pattern))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:pad_vllm|kernels|tests|benchmarks|docs|examples|requirements)/[\w./-]*)")

NAMED_IN = re.compile(r"`([\w/]+\.py)`: `([\w.]+)`")


def prose(text: str) -> str:
    """Without fenced blocks, whose brackets are code."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> list[str]:
    dead = []
    for link in LINK.findall(prose(document.read_text())):
        if re.match(r"\w+:", link):
            continue  # another place's
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def test_the_readme_is_one_that_one_reads():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    assert dead_links(ROOT / document) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document):
    """Written by a command, they may not be there yet: those stand in a line with ``make`` or ``--output``."""
    lines = [line for line in (ROOT / document).read_text().splitlines() if not re.search(r"make |--output", line)]
    named = NAMED.findall(prose("\n".join(lines)))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_named_in_a_file_is_there(document):
    """A file and, behind a colon, a function or class of it."""
    named = NAMED_IN.findall((ROOT / document).read_text())
    sources = {path: (ROOT / path).read_text() for path, _ in named}
    defined = r"\b(?:def|class) {}\b|^{} ="
    missing = [
        (path, name)
        for path, name in named
        for part in name.split(".")
        if not re.search(defined.format(part, part), sources[path], re.M)
    ]
    assert missing == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# What `it` is: here\n")
    document = tmp_path / "document.md"
    document.write_text(
        "# Here\n[a](other.md) [b](other.md#what-it-is-here) [c](#here) [d](gone.md) [e](other.md#gone) [f](#gone)\n"
        "[g](https://example.com/gone)\n```\n[h](gone)\n```\n"
    )
    assert dead_links(document) == ["gone.md", "other.md#gone", "#gone"]
