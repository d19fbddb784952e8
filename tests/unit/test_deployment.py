"""What docs/deploy.md shows and no test starts: vLLM and the plugin know each flag, name and metric of it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pad_vllm import channel
from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.frontend import engines
from pad_vllm.frontend.collector import Collector
from pad_vllm.stats import NAMES
from tests.support.engine import PLUGIN

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())
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


def typed() -> list[list[str]]:
    """Arguments of each ``vllm serve`` in the blocks that are not run."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "deploy.md").read_text(), re.M | re.S)
    lines = "".join(body for language, body in blocks if not language).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("vllm serve")]


def charted() -> list[list[str]]:
    """As production-stack's templates make them of the values."""
    names = {"maxModelLen": "--max-model-len", "tensorParallelSize": "--tensor-parallel-size"}
    names |= {"pipelineParallelSize": "--pipeline-parallel-size"}
    found = []
    for model in yaml.safe_load((ROOT / "examples" / "kubernetes.yaml").read_text())["servingEngineSpec"]["modelSpec"]:
        config = dict(model["vllmConfig"])
        assert config.pop("enablePrefixCaching") is True
        extra = config.pop("extraArgs")
        found.append([model["modelURL"], *(word for key in config for word in (names[key], str(config[key]))), *extra])
        mounts = {mount["name"]: mount["mountPath"] for mount in model["extraVolumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in model["extraVolumes"]}
        for path in (model["modelURL"], json.loads(extra[-1])["pad"]):
            assert any(path.startswith(f"{mount}/") for mount in mounts.values())
    return found


@pytest.mark.slow
@pytest.mark.every_release
def test_vllm_reads_every_command():
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    commands = [*typed(), *charted()]
    assert len(commands) == 7
    parser = make_arg_parser(FlexibleArgumentParser())
    for command in commands:
        read = parser.parse_args(command)
        validate_parsed_serve_args(read)
        assert set(read.additional_config) == {"pad"}
        assert read.logits_processors == PLUGIN
        assert read.pipeline_parallel_size == 1


@pytest.mark.every_release
def test_ray_serves_arguments_are_the_engines():
    from vllm import AsyncEngineArgs

    from examples import ray_serve

    known = {field.name for field in fields(AsyncEngineArgs)}
    assert set(ray_serve.ENGINE_KWARGS) <= known
    assert set(ray_serve.ENVIRONMENT) == {ANNOUNCE_DIR}
