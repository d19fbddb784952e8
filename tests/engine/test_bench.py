"""``pad-vllm bench``: what it compares generates what the oracle does, and the command writes its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pad_vllm.benchmarks import loops
from pad_vllm.benchmarks.methods import Cell, guidance, prompts
from pad_vllm.benchmarks.record import Record
from tests.support.engine import OFFLINE


def test_the_loops_generate_what_the_oracle_does(models, encode):
    texts = ("The quick brown fox", "the old town. The qu")
    ids = [encode(text)[:5] for text in texts]
    expected = [models.ask(tuple(row), None, None, max_tokens=12, eos_token_id=None) for row in ids]
    cached = loops.cached_loop(models.base_model, models.reward_model, torch.tensor(ids), 12, top_k=10)
    assert cached.tolist() == expected
    published = loops.published_loop(models.base_model, models.reward_model, torch.tensor(ids[:1]), 12, top_k=10)
    assert published.tolist() == expected[:1]


@pytest.mark.parametrize(("share", "guided"), [(0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_a_share_of_the_requests_is_guided(share, guided):
    asked = [guidance(Cell(share=share, personas=4), i) for i in range(16)]
    assert sum(arguments is not None for arguments in asked) == guided
    assert {arguments["pad_persona"] for arguments in asked if arguments} <= {f"p{i}" for i in range(4)}


def test_prompts_are_new_to_every_cache():
    assert len({tuple(prompt) for seed in range(4) for prompt in prompts(Cell(), seed)}) == 64


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

    bench("breakdown")
    assert "breakdown: measured on 2" in bench("batch", "breakdown")
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


def test_a_record_of_another_machine_or_other_settings_is_begun_anew(tmp_path):
    sections = {"batch": "", "rows": ""}
    settings = {"base": None, "dtype": "float32", "enforce_eager": False, "repeats": 1, "batch": [1]}
    row = {"label": "reward tokens", "computed": 3}
    record = Record(tmp_path, settings, sections)
    record.add("rows", [row])
    record.add("batch", [])
    assert list(Record(tmp_path, settings, sections).results) == ["batch", "rows"]
    assert Record(tmp_path, settings | {"repeats": 2}, sections).results == {}
    kept = json.loads((tmp_path / "throughput.json").read_text())
    (tmp_path / "throughput.json").write_text(json.dumps(kept | {"hardware": "another"}))
    assert Record(tmp_path, settings, sections).results == {}


def test_both_models_or_none():
    command = [str(Path(sys.executable).with_name("pad-vllm")), "bench", "--base", "somewhere"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "error: --base and --reward: give both, or none\n")
