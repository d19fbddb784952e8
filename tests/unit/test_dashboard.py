"""docs/grafana.json shows what there is, and all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pad_vllm import channel
from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.frontend import engines
from pad_vllm.frontend.collector import Collector
from pad_vllm.stats import NAMES

DASHBOARD = json.loads(Path("docs/grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


class Engine:
    """What an announcement lives as long as."""


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Name of each sample that a server with an engine shows, and its type."""
    monkeypatch.setenv(ANNOUNCE_DIR, str(tmp_path))
    monkeypatch.setattr(engines, "_servers", set())
    engine = Engine()
    channel.make_stats(channel.announce(Announcement(True), engine), 8 * len(NAMES))
    return {sample.name: metric.type for metric in Collector().collect() for sample in metric.samples}


def test_every_metric_is_on_the_dashboard_and_nothing_else(exported):
    assert {name for expression in EXPRESSIONS for name in re.findall(r"\bpad_\w+", expression)} == set(exported)


def test_counters_are_shown_as_rates_and_gauges_as_they_are(exported):
    for expression in EXPRESSIONS:
        for before, name in re.findall(r"(\w*)\((pad_\w+)", expression):
            assert (before in ("rate", "increase")) == (exported[name] == "counter"), expression


def test_variables_exist():
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    asked = {name for name in re.findall(r"\$\{?(\w+)", text) if not name.startswith("__")}
    assert asked == names
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert "label_values(pad_steps_total" in variable["definition"]
