"""What ``pad-vllm bench`` compares generates what the oracle does; its cells and its record."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pad_vllm.benchmarks import loops, throughput
from pad_vllm.benchmarks.methods import Workload, guidance, random_prompts
from pad_vllm.benchmarks.record import Record


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
    asked = [guidance(Workload(share=share, personas=4), i) for i in range(16)]
    assert sum(arguments is not None for arguments in asked) == guided
    assert {arguments["pad_persona"] for arguments in asked if arguments} <= {f"p{i}" for i in range(4)}


def test_prompts_are_new_to_every_cache():
    assert len({tuple(prompt) for seed in range(4) for prompt in random_prompts(Workload(), seed)}) == 64


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


def test_an_unfinished_section_goes_on_where_it_stopped(tmp_path, monkeypatch):
    begun = []

    def section(bench, args) -> list[dict]:
        """In parts."""
        rows = list(bench.kept)
        begun.append(len(rows))
        for i in range(len(rows), 3):
            rows.append({"label": f"part {i}", "value": i})
            bench.keep(rows)
            if i == 1:
                raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(throughput, "SECTIONS", {"parts": section})
    args = argparse.Namespace(sections=["parts"], resume=True, output=tmp_path, repeats=1)
    settings = {"base": None, "reward": None, "dtype": "float32", "enforce_eager": False, "batch": [1]}
    with pytest.raises(KeyboardInterrupt):
        throughput.measure_throughput(None, args, settings)
    for _ in range(2):
        throughput.measure_throughput(None, args, settings)
    assert begun == [0, 2]
    rows = json.loads((tmp_path / "throughput.json").read_text())["results"]["parts"]["rows"]
    assert [row["value"] for row in rows] == [0, 1, 2]


def test_both_models_or_none():
    command = [str(Path(sys.executable).with_name("pad-vllm")), "bench", "--base", "somewhere"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "error: --base and --reward: give both, or none\n")
