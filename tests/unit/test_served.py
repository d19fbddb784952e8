"""What ``benchmarks/served.py`` sends, in which order it measures, and what it makes of it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import served
from benchmarks.served_record import ServedRecord

ARGUMENTS = {"configurations": list(served.CONFIGURATIONS), "repeats": 2, "rates": [0.5, 0.75], "seconds": 15}
ARGUMENTS |= {"requests": 128, "prompt_len": 4, "output_len": 8, "top_k": 10, "base": None, "dtype": "float32"}
ARGUMENTS |= {"enforce_eager": False, "max_num_seqs": 64, "vllm": "0", "most_others": 0.1}
ARGUMENTS |= {"base_config": {"hidden_size": 512}, "reward_config": {}}
SPEEDS = {"no plugin": 8.0, "0% guided": 8.0, "50% guided": 6.0, "100% guided": 4.0}


@pytest.mark.parametrize(("share", "guided"), [(0.0, 0), (0.5, 60), (1.0, 120)])
def test_the_guided_requests_are_spread_evenly_and_take_all_personas(share, guided):
    lines = list(served.requests_of(share, 120, "seed", 4, 8))
    assert {(len(line["prompt"]), line["output_tokens"]) for line in lines} == {(4, 8)}
    bodies = [line.get("request_overrides") for line in lines]
    assert [sum(body is not None for body in bodies[i : i + 10]) for i in range(0, 120, 10)] == [guided // 12] * 12
    names = [body["vllm_xargs"]["pad_persona"] for body in bodies if body]
    assert len(names) == guided
    assert len(set(names)) == min(guided, 100)
    assert set(names) <= set(served.PERSONAS)


def test_no_two_personas_begin_alike():
    assert (
        len({word for text in served.PERSONAS.values() for word in text.split()}) == 16 * len(served.PERSONAS) == 1600
    )


class Bench:
    """Answers as fast as SPEEDS says, and is stopped at one of its runs."""

    def __init__(self, stops_at: int | None = None, others: Sequence[float] = ()) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.stops_at = stops_at
        self.others = [*others, *[0.0] * 100]

    def run(self, configuration: str, requests: int, rate: float | None, seed: str, when: int) -> dict[str, Any]:
        if len(self.runs) == self.stops_at:
            raise KeyboardInterrupt
        self.runs.append((configuration, requests, rate, seed, when))
        speed = min(SPEEDS[configuration], rate or 100.0)
        figures = dict.fromkeys(served.FIGURES.values(), 1000 / speed)
        figures |= {"requests": requests, "requests_per_s": speed, "tokens_per_s": 8 * speed}
        return (
            {"configuration": configuration, "offered_per_s": rate, "guided": None}
            | figures
            | {"others": self.others.pop(0)}
        )


def test_a_stopped_measurement_goes_on_with_the_repeat_in_which_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(ServedRecord, "plot", lambda *_: None)  # test_load.py has one drawn
    args = argparse.Namespace(**ARGUMENTS)

    def record() -> ServedRecord:
        return ServedRecord(tmp_path, ARGUMENTS, dict.fromkeys(("saturation", "rates"), ""))

    whole, stopped, rest = Bench(), Bench(stops_at=14), Bench()
    served.measure_load(whole, ServedRecord(None, ARGUMENTS, dict.fromkeys(("saturation", "rates"), "")), args)
    with pytest.raises(KeyboardInterrupt):
        served.measure_load(stopped, record(), args)
    served.measure_load(rest, record(), args)
    assert [*stopped.runs[:12], *rest.runs] == whole.runs

    forth = list(served.CONFIGURATIONS)
    back = forth[::-1]
    repeats = [whole.runs[i : i + 4] for i in range(0, len(whole.runs), 4)]
    assert [[run[0] for run in repeat] for repeat in repeats] == [forth, back, forth, forth, back, back]
    for repeat in repeats:  # one after the other at the same moments, with other prompts
        assert len({when for *_, when in repeat}) == 1
        assert len({seed for *_, seed, _ in repeat}) == 4
    assert [repeat[0][1:3] for repeat in repeats] == [(128, None)] * 2 + [(60, 4.0), (90, 6.0)] * 2
    table = (tmp_path / "served.md").read_text()
    assert "| 100% guided | 4.00 | 32.0 (0.50: 0.50 to 0.50) | 250.0 (2.00: 2.00 to 2.00) |" in table
    assert "random models, 12 layers of 512 guided by 6 of 384" in table
    assert "## 6.00 requests a second arrive, 90 in all, 2 times" in table


def test_a_repeat_during_which_others_used_the_machine_begins_again():
    bench = Bench(others=[0.0, 0.05, 0.3])
    record = ServedRecord(None, ARGUMENTS, dict.fromkeys(("saturation", "rates"), ""))
    served.measure_load(bench, record, argparse.Namespace(**ARGUMENTS))
    forth = list(served.CONFIGURATIONS)
    assert [configuration for configuration, *_ in bench.runs[:7]] == [*forth[:3], *forth]
    assert len({seed for *_, seed, _ in bench.runs[:7]}) == 7
    assert len({when for *_, when in bench.runs[:7]}) == 1
    assert [row["others"] for row in record.results["saturation"]["rows"][:4]] == [0.0] * 4
    assert len(record.results["rates"]["rows"]) == 16


def test_a_process_that_the_benchmark_started_is_none_of_the_others():
    """Even when it has ended; a process whose parent has gone is one of them."""
    spin = [sys.executable, "-c", "import time\nwhile time.process_time() < 1.2: pass"]  # counted in hundredths
    before = served.CpuUse()
    subprocess.run(spin, check=True)
    busy, own = before.used()
    assert 1 <= own < 2
    assert busy >= 0.9 * own
    before = served.CpuUse()
    with subprocess.Popen(
        [*spin[:2], f"import os, time\nif os.fork(): os._exit(0)\n{spin[2]}\nprint()"], stdout=subprocess.PIPE
    ) as orphan:
        assert orphan.stdout
        orphan.stdout.read()
    busy, own = before.used()
    assert busy - own > 0.8
