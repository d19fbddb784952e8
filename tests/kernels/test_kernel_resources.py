"""The kernels compile for the GPUs that they are meant for, without spills; the committed table is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import triton

from benchmarks.kernel_resources import is_held_by_tests, resources_of_all

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel-resources.json"


@pytest.mark.slow
def test_ahead_of_time_compilation():
    committed = json.loads(TABLE.read_text())
    assert committed["triton"] == triton.__version__, "run python -m benchmarks.kernel_resources --output " + str(TABLE)
    assert [row for row in committed["results"] if row["spilled"]] == []
    tested = [row for row in committed["results"] if is_held_by_tests(row["target"], row["kernel"])]
    assert resources_of_all(all_of_all=False) == committed | {"results": tested}
