"""Traces on their way to files, what a line counts, and what is made of lines."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pad_vllm.cli import main
from pad_vllm.config import PADConfig
from pad_vllm.evaluation.traces import Spread, grouped, read_traces, trace_table
from pad_vllm.kernels import Rows
from pad_vllm.kernels.tracing import add_
from pad_vllm.params import GuidanceParams
from pad_vllm.reward.device import HostCopy
from pad_vllm.stats import Stats
from pad_vllm.worker.trace_files import TraceFiles, TraceWriter
from pad_vllm.worker.traces import (
    REFERENCE_BASE,
    REFERENCE_NONE,
    Ended,
    Generated,
    Lines,
    TraceRecord,
    Traces,
    _close,
    reference_of,
    tell,
)

NUM_VALUES = 12


def lines_in(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def writer(folder: Path, make=lambda item: item, max_queued: int = 100, **sizes) -> TraceWriter:
    return TraceWriter(TraceFiles(str(folder), 0, **{"max_bytes": 300, "max_files": 3} | sizes), make, max_queued)


def test_files_are_bounded_in_size_and_number(tmp_path):
    """Those of another engine, and other files, are nobody's to remove."""
    others = [tmp_path / "pad-traces-1-000001.jsonl", tmp_path / "notes.txt"]
    for path in others:
        path.write_text("kept")
    one = writer(tmp_path, max_queued=1000)
    for i in range(200):
        one.put({"i": i, "text": "x" * 20})
    one.close()
    own = sorted(tmp_path.glob("pad-traces-0-*.jsonl"))
    assert len(own) == 3
    assert all(path.stat().st_size <= 300 for path in own)
    written = [json.loads(line)["i"] for path in own for line in path.read_text().splitlines()]
    assert written == list(range(200 - len(written), 200))
    assert all(path.read_text() == "kept" for path in others)
    assert own[0].stat().st_mode & 0o777 == 0o600
    again = writer(tmp_path)  # after a restart, in a file of its own
    again.put({"i": 200})
    again.close()
    assert json.loads(sorted(tmp_path.glob("pad-traces-0-*"))[-1].read_text()) == {"i": 200}


def test_starts_without_an_answer_remove_nothing(tmp_path):
    files = TraceFiles(str(tmp_path), 0, 10**6, 2)
    files.write(b"{}\n" * 1000)
    files.close()
    for _ in range(5):
        TraceFiles(str(tmp_path), 0, 10**6, 2).close()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"{}\n" * 1000]


def test_what_the_queue_has_no_room_for_is_lost_and_counted(tmp_path):
    go = threading.Event()

    def slow(item):
        go.wait(10)
        return item

    one = writer(tmp_path, slow, max_queued=5, max_bytes=10**6)
    for i in range(20):
        one.put({"i": i})
    go.set()
    one.close()
    assert one.num_lost + len(lines_in(tmp_path)) == 20
    assert one.num_lost >= 14


def test_a_vanished_folder_comes_back_and_a_full_disk_loses_lines(tmp_path, monkeypatch, log):
    """Never an exception, nor half a line; and a word in the log, once."""
    folder = tmp_path / "deep" / "traces"
    files = TraceFiles(str(folder), 0, 10**6, 3)
    files.write(b'{"i":0}\n')
    shutil.rmtree(folder.parent)
    files.write(b'{"i":1}\n')
    assert lines_in(folder) == [{"i": 1}]
    import os

    write, is_full = os.write, True

    def fills_up(file: int, data: bytes) -> int:
        if not is_full:
            return write(file, data)
        if len(data) < 6:
            raise OSError(28, "No space left on device")
        return write(file, data[:6])

    one = TraceWriter(files, lambda item: item)
    monkeypatch.setattr("pad_vllm.worker.trace_files.os.write", fills_up)
    for i in range(3):
        one.put({"i": i, "j": 1})
    while one.num_lost < 3:
        pass
    is_full = False
    one.put({"i": 9})
    one.close()
    assert lines_in(folder) == [{"i": 1}, {"i": 9}]
    assert one.num_lost == 3
    assert len([record for record in log.records if "cannot write traces" in record.getMessage()]) == 1


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"pad.trace='.*file/traces': cannot be written"):
        TraceFiles(str(tmp_path / "file" / "traces"), 0, 10**6, 3)


PARAMS = GuidanceParams(("a", "b", "a"), (1.0, -0.5, 0.25), None, 1.0, 10, "neutral", None, (), None, "ada", "mine")


def ended(tail, positions=(8, 5, 6, 7), params=PARAMS, stop_ids=(), max_tokens=100, num_prompt=4) -> Ended:
    """Of a request with a value of 1 for each row: 3 rows before these, and one at each of these positions."""
    values = np.zeros((4, 2, NUM_VALUES), np.float32)
    values[:, 0], values[0, 1] = 1.0, 3.0
    record = TraceRecord(params, frozenset(stop_ids), max_tokens, 0.0, prompt_ids=list(range(num_prompt)))
    copies = [HostCopy(torch.tensor(one)) for one in (values, np.array(positions))]
    return Ended(record, datetime.now(UTC), 2.0, 0.5, *copies, tail)


def on_device(total: int, *ids: int) -> HostCopy:
    return HostCopy(torch.tensor([total, *ids], dtype=torch.int32))


@pytest.mark.parametrize(
    ("tail", "settings", "num_kept"),
    [
        (Generated([50, 51, 52, 53, 54, 55], 4), {}, 7),  # the row at 8 gives a token at 9
        (Generated([50, 51, 52, 53, 54], 4), {}, 6),
        (Generated([50, 51, 52, 53], 4), {}, 5),
        (Generated([50, 51, 52, 53, 54, -1], 4), {"stop_ids": (52,)}, 3 + 1),
        (Generated([50, 51, 52, 53, 54, -1], 4), {"max_tokens": 4}, 3 + 2),
        (Generated(on_device(9, 51, 52, 53, 54), None), {}, 6),
        (Generated(on_device(9, 51, 52, 53, 54), None), {"stop_ids": (53,)}, 5),
        (Generated(on_device(9, 3, 50, 51, 52, 53, 54), None), {"stop_ids": (3, 51)}, 3),
        (Generated(on_device(8, 50, 51, 52, 53, 99, 99), 4), {"stop_ids": (99,)}, 5),
        (None, {}, 7),
    ],
)
def test_rows_behind_the_end_do_not_count(tail, settings, num_kept):
    stats = Stats()
    line = Lines(stats, "0", 1000, None, has_text=False).make(ended(tail, **settings))
    assert line["tokens"] == stats.traced_tokens == stats.changed_tokens == num_kept
    assert line["changed"] == line["divergence"] == 1.0
    assert stats.traced_requests == 1


def test_a_line_names_the_contexts_as_the_request_did():
    """Equal preferences are read once; one whose weights cancel is not read; and no text stands there unasked."""
    lines = Lines(Stats(), "3", 1000, None, has_text=False)
    line = lines.make(ended(None))
    assert line["rewards"] == [1.0, 1.0, 1.0]
    assert line["weights"] == [1.0, -0.5, 0.25]
    assert (line["trace"], line["persona"], line["reference"], line["engine"]) == ("mine", "ada", "neutral", "3")
    assert not {"preferences", "prompt", "answer"} & line.keys()
    unread = GuidanceParams(("a", "b", "a"), (1.0, 2.0, -1.0), None, 1.0, 10, "base")
    assert lines.make(ended(None, params=unread))["rewards"] == [None, 1.0, None]
    cancels = GuidanceParams(("a", "b"), (1.0, -1.0), None, 1.0, 10, "neutral")
    assert lines.make(ended(None, params=cancels))["reference"] == "none"
    assert [reference_of(one) for one in (PARAMS, unread, cancels)] == [2, REFERENCE_BASE, REFERENCE_NONE]
    failed = lines.make(ended(None, params=None))
    assert failed["rewards"] is None
    texts = Lines(Stats(), "0", 1000, lambda ids: " ".join(map(str, ids)), has_text=True)
    line = texts.make(ended(Generated([50, 51, 52, 53, 54, -1], 4)))
    assert (line["preferences"], line["prompt"]) == (["a", "b", "a"], "0 1 2 3")
    assert line["answer"] == "50 51 52 53 54"


def traces_of(folder: Path, num_slots: int = 3) -> Traces:
    """Of an engine without drafts."""
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_index=0)
    model = SimpleNamespace(max_model_len=100)
    engine = SimpleNamespace(parallel_config=parallel, model_config=model, use_v2_model_runner=False)
    config = PADConfig("a model", trace=str(folder))
    return Traces(config, engine, num_slots, 1, Stats(), torch.device("cpu"), None, writes=True)


class Runner:
    """Of vLLM's worker."""

    def __init__(self, vllm_config) -> None:
        self.vllm_config = vllm_config


def add_rows(traces: Traces, slot: int, *positions: int) -> None:
    """As steps do, of rows with a value of 1."""
    for position in positions:
        trace = traces.on_device._replace(slots=torch.tensor([slot]), row_positions=torch.tensor([position]))
        rows = Rows(*[torch.ones(1, dtype=torch.int64)] * 5, max_top_k=1)
        add_(trace, rows, torch.ones(1, 4))


def test_values_follow_a_request_out_of_the_batch_and_back(tmp_path):
    """A request that is preempted, whose slot another one takes, goes on in a slot of its own; a third is gone while it
    is out. What belongs to an engine of another process is not theirs to end."""
    traces = traces_of(tmp_path)
    sampling = SimpleNamespace(stop_token_ids=[9], eos_token_id=None, max_tokens=50)
    records = {key: traces.arrive(key, PARAMS, sampling) for key in "abc"}
    traces.begin(0, records["a"], [1, 2, 3])
    add_rows(traces, 0, 2, 3, 4, 5, 6, 7)
    traces.begin(0, records["b"], [1, 2])  # a is out
    add_rows(traces, 0, 1, 2)
    traces.begin(1, records["c"], [1])
    add_rows(traces, 1, 0)
    traces.park(1)
    assert traces.arrive("a", PARAMS, sampling) is records["a"]
    traces.begin(2, records["a"], [1, 2, 3])
    add_rows(traces, 2, 7, 8)  # its last token is computed again
    records["b"].output_ids = [5, 9, 7]  # of which one row is behind the end
    traces.read_tail = lambda record: Generated(record.output_ids, 2) if record.output_ids else None
    tell(Runner(object()), {"a"})
    assert not traces.gone
    tell(Runner(traces.vllm_config), {"a", "b", "c", "unknown"})
    add_rows(traces, 0, 3)
    traces.collect()
    traces.begin(0, traces.arrive("d", PARAMS, sampling), [1])
    assert not traces.on_device.values[0].any()
    _close(weakref.ref(traces))
    assert [line["tokens"] for line in lines_in(tmp_path)] == [7, 2, 1, 0]
    traces.count()
    assert (traces.stats.traced_tokens, traces.stats.lost_traces) == (10, 0)
    assert not traces.records


def test_a_trace_that_fails_harms_no_request(tmp_path, monkeypatch, log):
    traces = traces_of(tmp_path)
    monkeypatch.setattr(traces, "on_device", None)
    sampling = SimpleNamespace(stop_token_ids=None, eos_token_id=None, max_tokens=None)
    record = traces.arrive("a", PARAMS, sampling)
    traces.begin(0, record, [1])
    assert traces.arrive("b", PARAMS, None) is None
    traces.count()
    assert traces.stats.lost_traces == 2
    traces.writer.close()


def trace_line(persona, tokens, changed, divergence, rewards=(0.5,), weights=(1.0,), **more) -> dict:
    return {
        "persona": persona,
        "tokens": tokens,
        "changed": changed,
        "divergence": divergence,
        "rewards": list(rewards),
        "weights": list(weights),
        "guidance_seconds": 0.001 * tokens,
        "failed": False,
    } | more


def test_tables_by_persona_and_a_plot(tmp_path, capsys):
    lines = [
        trace_line("ada", 10, 0.5, 1.0),
        trace_line("ada", 30, 0.1, 2.0, rewards=(1.0, None, -0.5), weights=(1.0, 1.0, 2.0)),
        trace_line("ada", 0, None, None, rewards=(None,), failed=True),
        trace_line(None, 5, 0.0, 0.0, rewards=(0.0,), trace="x|y"),
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"tokens": 5, "rewards": 3}\n{"tokens": 3, "chan'
    (tmp_path / "pad-traces-0-000001.jsonl").write_text(text)
    found = read_traces(tmp_path)
    assert (len(found.lines), found.num_unread) == (4, 2)
    ada, nobody = grouped(found.lines)
    assert (ada.name, ada.num_requests, ada.num_failed, ada.tokens) == ("ada", 3, 1, 40)
    assert ada.changed == Spread(pytest.approx(0.2), pytest.approx(0.2 * 2**0.5))
    assert ada.divergence.mean == pytest.approx(1.75)
    assert ada.reward.mean == pytest.approx((10 * 0.5 + 30 * 0.0) / 40)
    assert [one and one.mean for one in ada.rewards] == [pytest.approx(35 / 40), None, -0.5]
    assert ada.ms_per_token == pytest.approx(1.0)
    assert nobody.name == "(none)"
    assert "x\\|y" in trace_table(grouped(found.lines, "trace"), "trace")
    image = tmp_path / "plot.svg"
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as end:
        main(["traces", str(tmp_path), "--plot", str(image)])
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert "| ada     | 3        | 1      | 40     | 20.0% ± 28.3 | 1.750 ± 0.707" in printed.out
    assert "2 lines are not traces" in printed.err
    assert "ada (3)" in image.read_text() or image.stat().st_size > 5000
    with pytest.raises(SystemExit):
        main(["traces", str(tmp_path), "--json", "--by", "beta"])
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == 45


def test_a_folder_without_traces_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["traces", str(tmp_path)])
    assert end.value.code == 1
    assert "contains no pad-traces" in capsys.readouterr().err
