"""The kernels compile for the GPUs that they are meant for, without spills; the committed table is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import triton

from benchmarks.kernel_resources import is_held, resources_of_all

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel-resources.json"


@pytest.mark.slow
@pytest.mark.parametrize("all_of_all", [False, pytest.param(True, marks=pytest.mark.weekly)])
def test_ahead_of_time_compilation(all_of_all):
    committed = json.loads(TABLE.read_text())
    assert committed["triton"] == triton.__version__, "run python -m benchmarks.kernel_resources --output " + str(TABLE)
    assert [row for row in committed["results"] if row["spilled"]] == []
    rows = [row for row in committed["results"] if all_of_all or is_held(row["target"], row["kernel"], row["K"])]
    assert {row["target"] for row in rows} == {row["target"] for row in committed["results"]}
    assert resources_of_all(all_of_all) == committed | {"results": rows}
