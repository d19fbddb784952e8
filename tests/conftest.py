"""What pytest asks for in every process, and where tests' fixtures are."""

from __future__ import annotations

from pathlib import Path

import pytest

TIERS = ("engine", "kernels", "served", "training", "unit")
"""The folders of the tests, and the markers that these give; those whose files take longest first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--picture", help="a PNG file, for what test_demo_served.py sees of the playground")


def pytest_configure(config: pytest.Config) -> None:
    """Of parallel workers the process that starts them runs no test, and need not import torch first."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.support.fixtures")


def tier(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test is marked by its folder. The longest files run first, so that parallel workers end together."""
    for item in items:
        item.add_marker(tier(item))
    items.sort(key=lambda item: TIERS.index(tier(item)))
