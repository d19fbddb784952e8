"""``pad-vllm bench``: the command writes its table, and goes on where it stopped."""

from __future__ import annotations

import json

from tests.support.command import run_command


def test_the_command_goes_on_where_it_stopped(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

    def bench(*sections: str) -> str:
        command = ["bench", "--resume", "--sections", *sections]
        command += ["--batch", "1", "2", "--repeats", "1", "--output-len", "8", "--enforce-eager", "--output", tmp_path]
        command += ["--base-config", json.dumps(sizes), "--reward-config", json.dumps(sizes)]
        return run_command([*command, "--kv-cache-memory-bytes", 64 << 20])

    bench("batch", "tokenizers", "breakdown")
    assert "breakdown: measured on 2" in bench("breakdown")
    results = json.loads((tmp_path / "throughput.json").read_text())["results"]
    assert list(results) == ["batch", "tokenizers", "breakdown"]
    assert results["tokenizers"]["rows"][-1]["label"] == "two tokenizers over one, batch 2"
    assert [row["label"] for row in results["batch"]["rows"][:2]] == ["unguided", "guided"]
    assert all(row["tokens_per_s"] > 0 for row in results["batch"]["rows"])
    for row in results["breakdown"]["rows"]:
        assert all(milliseconds >= 0 for milliseconds in row["milliseconds"].values())
        assert row["milliseconds"]["reward forward"] > 0
    table = (tmp_path / "throughput.md").read_text()
    assert "| guided | 2 | 16 | 8 | 10 |" in table
    assert (tmp_path / "throughput.png").exists()
