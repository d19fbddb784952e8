"""Records in files of JSON lines."""

from __future__ import annotations

import pytest

from pad_vllm.training.records import DataError, read_records, write_records


def test_what_is_written_is_read(tmp_path):
    """Also where an answer has what Python, unlike JSON lines, takes for the end of a line."""
    records = [{"text": f"one{end}two", "of": ["é", "\U0001f60e"]} for end in "\n\r\v\f\x1c\x1d\x85\u2028\u2029"]
    file = write_records(tmp_path / "folder" / "records.jsonl", records)
    assert read_records(file) == records
    assert [path.name for path in file.parent.iterdir()] == ["records.jsonl"]


def test_a_line_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"records\.jsonl, line 2: not JSON"):
        read_records(file)
