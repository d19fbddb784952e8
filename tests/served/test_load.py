"""``python -m benchmarks.served``: a real server, and vLLM's own client."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.command import run_python

pytestmark = pytest.mark.every_release

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SHARES = {"0% guided": 0, "50% guided": 0.5, "100% guided": 1}


def test_a_load_is_answered_and_as_much_of_it_is_guided_as_was_asked_for(tmp_path):
    """The numbers of guided requests are the server's own, of its ``/metrics``."""
    command = ["-m", "benchmarks.served", "--resume", "--output", tmp_path, "--configurations", *SHARES]
    command += ["--base-config", json.dumps(SIZES), "--reward-config", json.dumps(SIZES), "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", 64 << 20, "--max-num-seqs", 8, "--prompt-len", 8, "--output-len", 4]
    command += ["--requests", 12, "--rates", 0.5, "--seconds", 0.1, "--repeats", 1]
    printed = run_python(command)
    results = json.loads((tmp_path / "served.json").read_text())["results"]
    assert list(results) == ["saturation", "rates"]
    for section, number in (("saturation", 12), ("rates", 20)):
        assert "unfinished" not in results[section]
        rows = {row["configuration"]: row for row in results[section]["rows"]}
        assert {name: row["guided"] for name, row in rows.items()} == {n: s * number for n, s in SHARES.items()}
        for row in rows.values():
            assert row["requests"] == number
            assert row["tokens_per_s"] == pytest.approx(4 * row["requests_per_s"], rel=1e-3)
            assert 0 < row["ttft_median_ms"] <= row["ttft_p90_ms"]
            # Tokens of so small a model may come together.
            assert 0 <= row["itl_median_ms"] <= row["itl_p90_ms"]
            assert row["itl_p90_ms"] > 0
    offered = results["rates"]["rows"][0]["offered_per_s"]
    assert offered == pytest.approx(results["saturation"]["rows"][0]["requests_per_s"] / 2, abs=1e-3)
    table = (tmp_path / "served.md").read_text()
    assert len(re.findall(r"^\| (?:0|50|100)% guided \|", table, re.M)) == 6
    assert (tmp_path / "served.png").exists()
    assert run_python(command).endswith(table)  # there is nothing left to measure
    assert printed.endswith(table)
