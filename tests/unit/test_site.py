"""The site: pages of the repository as mkdocs reads them. `make site` builds it, and a dead link stops that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from release import site_pages

ROOT = Path(__file__).parents[2]
CONFIGURATION = (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize(
    ("path", "written", "read"),
    [
        ("README.md", "[a](docs/drafts.md#limits)", "[a](drafts.md#limits)"),
        ("README.md", "![b](benchmarks/results/language.png)", "![b](benchmarks/results/language.png)"),
        ("README.md", "scripts in [examples/](examples)", "scripts in examples/"),
        (
            "docs/cfg.md",
            "[c](../README.md#how-it-works), [d](adapters.md)",
            "[c](index.md#how-it-works), [d](adapters.md)",
        ),
        ("docs/cfg.md", "[e](../examples/pad.yaml)", "[e](examples/pad.yaml)"),
        ("benchmarks/README.md", "[f](results/soak.json)", "[f](results/soak.json)"),
        ("benchmarks/README.md", "[g](../docs/families.md)", "[g](../families.md)"),
        ("docs/cfg.md", "[h](#here), [i](https://example.com)", "[h](cfg.md#here), [i](https://example.com)"),
        ("docs/cfg.md", "```\n[j](../README.md)\n```", "```\n[j](../README.md)\n```"),
    ],
)
def test_links_lead_to_the_site(path, written, read):
    assert site_pages.for_site(written, path) == read + "\n"


def test_what_belongs_to_an_item_is_indented_by_four():
    written = """
1. one
   more

   ```bash
   - no item
     command
   ```

2. two
   - three
     of it

     | a |
     |---|
   - four

behind
"""
    read = """
1. one
    more

    ```bash
    - no item
      command
    ```

2. two
    - three
        of it

        | a |
        |---|

    - four

behind
"""
    assert site_pages.indented(written) == read


def test_files_that_pages_link_to_come_along():
    found = set(site_pages.brought_along())
    assert {"README.md", "CONTRIBUTING.md", "benchmarks/results/throughput.md", "examples/personas.yaml"} <= found
    assert not any(path.startswith("docs/") or (ROOT / path).is_dir() for path in found)


def test_every_page_has_its_place():
    """In the order to read in, or said to have none."""
    head, _, nav = CONFIGURATION.partition("\nnav:\n")
    named = re.findall(r": (\S+\.md)$", nav, re.M)
    assert [page for page in named if not (ROOT / site_pages.repository_path(page)).exists()] == []
    without = re.findall(r"^  /(\S+\.md)$", head, re.M)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {*named, *without}


def test_what_a_page_would_load_from_elsewhere_is_found():
    ours = '<img src="demo.svg"><a href="https://example.com">a</a><link rel="stylesheet" href="assets/a.css">'
    assert site_pages.loads_from_elsewhere(ours) == []
    theirs = ['<script async src="https://example.com/a.js">', '<link href="//example.com/a.css" rel="stylesheet">']
    assert site_pages.loads_from_elsewhere(ours + "".join(theirs)) == theirs
    assert site_pages.loads_from_elsewhere('@font-face { src: url("https://example.com/a.woff2") }') != []
