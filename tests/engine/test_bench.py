"""``pad-vllm bench``: the command writes its table, and goes on where it stopped."""

from __future__ import annotations

import argparse
import json

from pad_vllm.benchmarks.breakdown import HOST
from pad_vllm.benchmarks.methods import Setup, Workload, host_on_v2
from pad_vllm.benchmarks.models import make_models
from tests.support.command import run_command
from tests.support.engine import Worker

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_the_command_goes_on_where_it_stopped(tmp_path):
    def bench(*sections: str) -> str:
        command = ["bench", "--resume", "--sections", *sections]
        command += ["--batch", "1", "2", "--repeats", "1", "--output-len", "8", "--enforce-eager", "--output", tmp_path]
        command += ["--base-config", json.dumps(SIZES), "--reward-config", json.dumps(SIZES)]
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


def test_the_host_on_model_runner_v2(tmp_path):
    args = argparse.Namespace(vocab_size=30_000, base_config=SIZES, reward_config=SIZES, load_format="auto")
    setup = Setup(*make_models(tmp_path, args), kv_cache_memory_bytes=64 << 20, max_num_seqs=4)
    worker = Worker("v2")
    parts = worker.run(host_on_v2, setup, Workload(batch=2, output_len=8, personas=0))
    worker.close()
    assert list(parts) == [part for part, _, _ in HOST]
    assert all(0 < milliseconds < 1000 for milliseconds in parts.values())
