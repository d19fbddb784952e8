"""JSON and YAML that others wrote."""

from __future__ import annotations

import json
import re

import pytest

from pad_vllm.config import PADConfig, read_file
from pad_vllm.reading import MAX_DEPTH, read_json, read_yaml


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_a_mark_of_the_byte_order_is_no_part_of_a_file(name, tmp_path):
    """Some editors write it."""
    (tmp_path / name).write_text('{"a": 1}', "utf-8-sig")
    assert read_file("a", str(tmp_path / name)) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("deep.json", "{\n" + '"a": ' + nested(100_000) + "}", "in one another: line 2 column 105"),
        ("deep.yaml", "a: 1\nb: " + nested(3000), "line 2, column 103"),
        ("deeper.yaml", "\n".join("  " * i + "- " for i in range(3000)), "line 101, column 201"),
        ("number.json", '{"a": ' + "9" * 5000 + "}", "a number of 5000 digits, 99999999999999999999..."),
        ("number.yaml", "a: 1\nb: " + "9" * 5000, "is no int"),
        ("month.yaml", "a: 1\nb: 2026-13-45", "'2026-13-45' is no timestamp (month must be in 1..12) in"),
        ("tag.yaml", "a: 1\nb: !!timestamp x", "'x' is no timestamp"),
        ("empty.yaml", "a: !!int ''", "'' is no int"),
        ("truth.yaml", "a: !!bool x", "'x' is no bool"),
        ("twice.json", '{"a": 1, "a": 2}', "'a' is given twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_file("pad", str(tmp_path / name))
    assert str(error.value).startswith(f"pad='{tmp_path / name}': ")
    assert "\n" not in str(error.value)


def test_what_is_not_too_deep_is_read():
    text = nested(MAX_DEPTH)
    assert read_json(text) == read_yaml(text) == json.loads(text)
    brackets = json.dumps(["[{" * MAX_DEPTH, '"[' * MAX_DEPTH])  # in texts they say nothing
    assert read_json(brackets) == json.loads(brackets)


def test_a_deep_pad_json_is_named(tmp_path):
    (tmp_path / "pad.json").write_text(nested(100_000))
    with pytest.raises(ValueError, match=r"pad.json: cannot be read \(more than 100 lists and objects in one another"):
        PADConfig.from_additional_config({"pad": {"reward_model": str(tmp_path)}})
