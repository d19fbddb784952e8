"""What pytest asks for in every process, and where tests' fixtures are."""

from __future__ import annotations

from pathlib import Path

import pytest

TIERS = ("engine", "kernels", "served", "training", "unit")
"""The folders of the tests, and the markers that these give; those whose files take longest first."""
LONGEST = ("training/test_language.py", "served/test_docs.py")
"""Files that take minutes. Each is one worker's, and the other one must not wait for it in the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--picture", help="a PNG file, for what test_demo_served.py sees of the playground")


def pytest_configure(config: pytest.Config) -> None:
    """Of parallel workers the process that starts them runs no test, and need not import torch first."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.support.fixtures")


def place(item: pytest.Item) -> Path:
    return item.path.relative_to(Path(__file__).parent)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test is marked by its folder. The longest files run first, so that parallel workers end together."""
    for item in items:
        item.add_marker(place(item).parts[0])
    items.sort(key=lambda item: (str(place(item)) not in LONGEST, TIERS.index(place(item).parts[0])))
