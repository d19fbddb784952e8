"""``pad-vllm bench``: the command writes its table, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.engine import OFFLINE


def test_the_command_goes_on_where_it_stopped(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

    def bench(*sections: str) -> str:
        command = [Path(sys.executable).with_name("pad-vllm"), "bench", "--resume", "--sections", *sections]
        command += ["--batch", "1", "2", "--repeats", "1", "--output-len", "8", "--enforce-eager", "--output", tmp_path]
        command += ["--base-config", json.dumps(sizes), "--reward-config", json.dumps(sizes)]
        run = subprocess.run(
            [*map(str, command), "--kv-cache-memory-bytes", str(64 << 20)],
            env=os.environ | OFFLINE,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    bench("batch", "breakdown")
    assert "breakdown: measured on 2" in bench("breakdown")
    results = json.loads((tmp_path / "throughput.json").read_text())["results"]
    assert list(results) == ["batch", "breakdown"]
    assert [row["label"] for row in results["batch"]["rows"][:2]] == ["unguided", "guided"]
    assert all(row["tokens_per_s"] > 0 for row in results["batch"]["rows"])
    for row in results["breakdown"]["rows"]:
        assert all(milliseconds >= 0 for milliseconds in row["milliseconds"].values())
        assert row["milliseconds"]["reward forward"] > 0
    table = (tmp_path / "throughput.md").read_text()
    assert "| guided | 2 | 16 | 8 | 10 |" in table
    assert (tmp_path / "throughput.png").exists()
