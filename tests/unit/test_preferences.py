"""Preference sets: what is read, and what is said of what cannot be."""

import json

import pytest

from pad_vllm.training.data import Comparison, DataError, encode, read_comparisons

GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
CHAT = [{"role": "user", "content": "Why?"}]


SYSTEM = {"role": "system", "content": "Be a pirate."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
SURROGATE = "So\ud800."


def answer(text):
    return [*CHAT, {"role": "assistant", "content": text}]


def write(folder, *lines):
    path = folder / "set.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (GOOD, Comparison("Why?", "So.", "No.")),
        (
            GOOD | {"preference": " brief ", "labels": {"a": 1, "b": -2.5, "c": 0, "d": None}, "score": 3},
            Comparison("Why?", "So.", "No.", "brief", {"a": 1.0, "b": -2.5}),
        ),
        (GOOD | {"preference": None, "labels": None}, Comparison("Why?", "So.", "No.")),
        (GOOD | {"preference": ""}, Comparison("Why?", "So.", "No.")),
        ({"question": "Why?", "chosen": "So.", "rejected": "No."}, Comparison("Why?", "So.", "No.")),
        (GOOD | {"prompt": CHAT}, Comparison(tuple(CHAT), "So.", "No.")),
        ({"chosen": answer("So."), "rejected": answer("No.")}, Comparison(tuple(CHAT), "So.", "No.")),
        # The prompt is said twice, as in sets of conversations with their last turn beside them.
        (
            {"prompt": "Why?", "chosen": answer("So."), "rejected": answer("No.")},
            Comparison(tuple(CHAT), "So.", "No."),
        ),
        (
            {"prompt": CHAT, "chosen": answer("So.")[1:], "rejected": answer("No.")[1:]},
            Comparison(tuple(CHAT), "So.", "No."),
        ),
        # All that the answers were written for, whichever field it stands in.
        (GOOD | {"system": "Be a pirate."}, Comparison((SYSTEM, *CHAT), "So.", "No.")),
        (GOOD | {"system_prompt": "Be a pirate.", "prompt": CHAT}, Comparison((SYSTEM, *CHAT), "So.", "No.")),
        (GOOD | {"system": "Be a pirate.", "prompt": [SYSTEM, *CHAT]}, Comparison((SYSTEM, *CHAT), "So.", "No.")),
        (GOOD | {"system": "", "history": [], "input": ""}, Comparison("Why?", "So.", "No.")),
        (
            {"prompt": CHAT, "chosen": [SYSTEM, *answer("So.")], "rejected": [SYSTEM, *answer("No.")]},
            Comparison((SYSTEM, *CHAT), "So.", "No."),
        ),
        (
            {"prompt": [*EARLIER, *CHAT], "chosen": answer("So."), "rejected": answer("No.")},
            Comparison((*EARLIER, *CHAT), "So.", "No."),
        ),
        (
            {"prompt": "Why?", "chosen": "So.", "rejected": [*EARLIER, *answer("No.")]},
            Comparison((*EARLIER, *CHAT), "So.", "No."),
        ),
        (
            {"instruction": "Translate.", "input": "Hallo", "chosen": "So.", "rejected": "No."},
            Comparison("Translate.\nHallo", "So.", "No."),
        ),
        (GOOD | {"question": "Why?", "messages": answer("So.")}, Comparison("Why?", "So.", "No.")),
        # An answer may be a dialogue.
        (
            GOOD | {"chosen": "User: a\nAssistant: b", "rejected": "User: c\nAssistant: d"},
            Comparison("Why?", "User: a\nAssistant: b", "User: c\nAssistant: d"),
        ),
    ],
)
def test_layouts(record, expected, tmp_path):
    path = write(tmp_path, "", record, "  ")
    (found,) = read_comparisons(path)
    assert found == Comparison(**{**expected.__dict__, "where": f"{path}, line 2"})


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", "expected an object with fields, found [1]"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt': missing"),
        ({"prompt": "p", "rejected": "b"}, "field 'chosen': missing"),
        (GOOD | {"rejected": None}, "field 'rejected': missing"),
        (GOOD | {"prompt": " "}, "field 'prompt': empty"),
        (GOOD | {"prompt": 3}, "field 'prompt': expected text or a list of messages, found 3"),
        (GOOD | {"prompt": []}, "field 'prompt': expected text or a list of messages, found []"),
        (GOOD | {"prompt": [{"role": "user"}]}, "field 'prompt', message 1: expected texts under 'role' and 'content'"),
        (GOOD | {"chosen": ""}, "field 'chosen': empty"),
        (GOOD | {"chosen": 1.5}, "field 'chosen': expected text or a list of messages, found 1.5"),
        (GOOD | {"chosen": CHAT}, "field 'chosen': the last message is of role 'user', not 'assistant'"),
        (GOOD | {"rejected": "So."}, "chosen and rejected are the same text"),
        (GOOD | {"preference": ["x"]}, "field 'preference': expected text, found ['x']"),
        (GOOD | {"labels": [1]}, "field 'labels': expected an object of numbers, found [1]"),
        (GOOD | {"labels": {"a": "1"}}, "field 'labels', 'a': expected a finite number, found '1'"),
        (GOOD | {"labels": {"a": True}}, "field 'labels', 'a': expected a finite number, found True"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "labels": {"a": NaN}}', "'a': expected a finite number"),
        (
            {"chosen": answer("a"), "rejected": [CHAT[0] | {"content": "?"}, *answer("b")[1:]]},
            "field 'rejected': the messages before its answer differ from those of 'chosen'",
        ),
        # What would be dropped.
        (
            {"prompt": "Why?", "chosen": [*EARLIER, *answer("a")], "rejected": [EARLIER[0], SYSTEM, *answer("b")]},
            "field 'rejected': the messages before its answer differ from those of 'chosen'",
        ),
        (
            GOOD | {"prompt": "How?", "chosen": answer("a")},
            "field 'prompt': is not among the messages before the",
        ),
        (
            GOOD | {"prompt": EARLIER, "chosen": answer("a")},
            "field 'prompt': ends differently from the messages before",
        ),
        (
            GOOD | {"system": "Be a pirate.", "prompt": [SYSTEM | {"content": "x"}, *CHAT]},
            "field 'system': differs from",
        ),
        (GOOD | {"system": 3}, "field 'system': expected text, found 3"),
        (GOOD | {"input": "Hallo"}, "field 'input': is read only beside 'instruction'"),
        (GOOD | {"question": "How?"}, "fields 'prompt' and 'question': both mean 'prompt', but they differ"),
        (GOOD | {"history": [["a", "b"]]}, "field 'history': is not read, although the answers may depend on it"),
        (GOOD | {"tools": [{"name": "f"}]}, "field 'tools': is not read"),
        (GOOD | {"prompt": [CHAT[0] | {"tool_calls": [{}]}]}, "field 'prompt', message 1: 'tool_calls' is not read"),
        (
            GOOD | {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
            "the answers are transcripts, which begin with a user's turn; give messages",
        ),
        (
            GOOD | {"chosen": "<|im_start|>user\nQ<|im_end|>", "rejected": "<|im_start|>user\nR<|im_end|>"},
            "the answers are transcripts",
        ),
        # What is no text, or no number, to those who read it next.
        (
            GOOD | {"chosen": SURROGATE},
            "field 'chosen': contains a lone surrogate, which is not text (\\ud800 at cha",
        ),
        (GOOD | {"prompt": SURROGATE}, "field 'prompt': contains a lone surrogate"),
        (GOOD | {"prompt": [CHAT[0] | {"content": SURROGATE}]}, "field 'prompt', message 1: contains a lone surrogate"),
        (GOOD | {"preference": SURROGATE}, "field 'preference': contains a lone surrogate"),
        (GOOD | {"system": SURROGATE}, "field 'system': contains a lone surrogate"),
        (GOOD | {"labels": {SURROGATE: 1}}, "field 'labels', 'So\\ud800.': contains a lone surrogate"),
        (GOOD | {"labels": {"a": 10**400}}, "field 'labels', 'a': expected a finite number, found 1000"),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "labels": {"a": ' + "9" * 5000 + "}}",
            "a number of 5000 d",
        ),
        ('{"prompt": ' + "[" * 3000, "not JSON (more than 100 lists and objects in one another at column 111)"),
        # Heads that a file of heads would not keep apart.
        *(
            (GOOD | {"labels": {name: 1}}, f"field 'labels', {name!r}: no dimension can have this name")
            for name in ("backbone", "heads.x", "v_head.summary", "x.weight", "")
        ),
    ],
)
def test_what_is_malformed_is_named_with_its_line_and_field(bad, says, tmp_path):
    path = write(tmp_path, GOOD, bad, GOOD)
    with pytest.raises(DataError) as error:
        read_comparisons(path)
    assert f"{path}, line 2" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert says in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_comparisons(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="empty"):
        read_comparisons(write(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8 .* at byte 15"):
        read_comparisons(tmp_path / "latin.jsonl")


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path, {"q": "Why?", "better": "So.", "rejected": "No."})
    (found,) = read_comparisons(path, {"prompt": "q", "chosen": "better"})
    assert (found.prompt, found.chosen) == ("Why?", "So.")
    with pytest.raises(DataError, match="columns: answer: the fields are prompt, preference"):
        read_comparisons(path, {"answer": "x"})


def test_folders_of_datasets(tmp_path):
    import datasets

    rows = [GOOD | {"labels": {"a": 1.0}}, GOOD | {"prompt": "How?", "labels": {"b": -1.0}}]
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    )
    saved.save_to_disk(tmp_path / "splits")
    saved["train"].save_to_disk(tmp_path / "one")
    for folder in ("splits", "one"):
        found = read_comparisons(tmp_path / folder)
        assert [(c.prompt, c.labels) for c in found] == [("Why?", {"a": 1.0}), ("How?", {"b": -1.0})]
        assert found[1].where == f"{tmp_path / folder}, row 2"
    assert len(read_comparisons(tmp_path / "splits", split="test")) == 1
    with pytest.raises(DataError, match="no split 'dev'; there are train, test"):
        read_comparisons(tmp_path / "splits", split="dev")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files", GOOD, GOOD)
    assert len(read_comparisons(tmp_path / "files")) == 2
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="not a folder that datasets reads"):
        read_comparisons(tmp_path / "nothing")
    bad = datasets.Dataset.from_list([GOOD, GOOD | {"chosen": ""}])
    bad.save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match="row 2, field 'chosen': empty"):
        read_comparisons(tmp_path / "bad")


def test_long_comparisons_are_left_out(models):
    from pad_vllm.reward.template import PromptTemplate

    template = PromptTemplate(models.tokenizer)
    pairs = [Comparison("a", "b", "c"), Comparison("a b " * 50, "b", "c")]
    assert len(encode(pairs, models.tokenizer, template, 20)) == 1
    with pytest.raises(DataError, match="all 1 comparisons are longer than 20 tokens"):
        encode(pairs[1:], models.tokenizer, template, 20)
