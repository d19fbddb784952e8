"""The order of logits processors, with entry points of packages that are really installed (in a folder on the path)."""

from __future__ import annotations

import pytest

from pad_vllm import PADLogitsProcessor
from pad_vllm.worker import order
from tests.support.engine import PLUGIN

BEHIND = "tests.support.processors:Behind"


@pytest.fixture
def another_plugin(tmp_path, monkeypatch):
    """A package that registers a processor, found after PAD's own."""
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{order.ENTRY_POINTS}]\nother = {BEHIND}\n")
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])


def found(listed):
    return order.processors(listed, PADLogitsProcessor)


def test_an_entry_point_gives_way_to_the_listed_class():
    assert order.num_giving_way(found(None)) == 0
    for listed in (PLUGIN, [PADLogitsProcessor], [BEHIND, *PLUGIN]):
        assert order.num_giving_way(found(listed)) == 1
    assert order.num_giving_way(found([BEHIND])) == 0


@pytest.mark.usefixtures("another_plugin")
def test_an_unlisted_processor_behind_pad_is_warned_of(log):
    order.log_order(found(None))
    (info, warning) = log.records
    assert f"PAD, {BEHIND} (entry point)." in info.getMessage()
    assert f"{BEHIND}, registered as an entry point, runs after PAD" in warning.getMessage()


@pytest.mark.usefixtures("another_plugin")
def test_the_start_names_the_order(log):
    order.log_order(found([*PLUGIN, BEHIND]))
    (info,) = log.records
    assert f"in this order: {BEHIND} (entry point), PAD, {BEHIND}." in info.getMessage()


def test_pad_alone_says_nothing(log):
    order.log_order(found(PLUGIN))
    assert not log.records
