"""The kernels compile for the GPUs that they are meant for, without spills; the committed table is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import triton

from benchmarks.kernel_resources import measure

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel-resources.json"


@pytest.mark.slow
def test_ahead_of_time_compilation():
    record = measure()
    assert [row for row in record["results"] if row["spilled"]] == []
    committed = json.loads(TABLE.read_text())
    assert committed["triton"] == triton.__version__, "run python -m benchmarks.kernel_resources --output " + str(TABLE)
    assert record == committed
