"""The fuzzer, short, and that it finds what is wrong. ``make fuzz`` runs the long one."""

from __future__ import annotations

import random

import pytest
import torch

from tests import oracle
from tests.fuzz import Record, parts, run_part
from tests.support.lives import PAIRS, AnotherTokenizer, Judge, SameTokenizer, make_personas, make_requests

LIVES = [("v1 another 0", 60, ("evicted", "aborted")), ("v2 same drafts 1", 20, ("evicted", "accepted_drafts"))]


@pytest.mark.parametrize(("name", "number", "seen"), LIVES)
def test_lives(name, number, seen):
    found = run_part(name, number)
    assert (found["wrong"], found["left"]) == ([], [])
    counts = found["counts"]
    assert counts["tokens"] > number
    assert counts["failed"] == 0
    assert all(counts[what] > 0 for what in seen)


@pytest.mark.parametrize("tokenizer", ["same", "another"])
def test_the_judge_says_what_the_oracle_says(tokenizer, tmp_path):
    """Of the oracle's own answers, made token by token, that they are right; and of each with another token, where."""
    rng = random.Random(0)
    world = SameTokenizer(tmp_path, 512) if tokenizer == "same" else AnotherTokenizer(tmp_path, 512, **PAIRS[0])
    personas = make_personas(world, rng)
    judge = Judge(world, personas, "base", 256)
    requests = [r for r in make_requests(world, list(personas), 40, rng, 60, 4) if "temperature" not in r.controls]
    for request in requests[:12]:
        request.controls |= {"ignore_eos": True, "stop_token_ids": []}
        request.max_tokens = 4
        answer = plain_answer(judge, request)
        assert judge.judge(request, answer, True).wrong == []
        place = rng.randrange(4)
        other = answer.copy()
        other[place] = next(token for token in world.candidates[rng.randrange(200) :] if token != answer[place])
        wrong = judge.judge(request, other, True).wrong
        assert wrong[0].startswith(f"token {place} is {other[place]}, and {answer[place]} is")
        assert judge.judge(request, answer[:3], True).wrong == ["3 tokens where 4 were to come"]


def plain_answer(judge: Judge, request) -> list[int]:
    """By the oracle's loop, which reads everything anew for each token."""
    asked, world, prompt, controls = judge.asked(request), judge.world, request.prompt, request.controls
    rule = {}
    if asked:
        rule = {key: asked[key] for key in ("beta", "top_k", "reference", "max_divergence") if key in asked} | {
            "reward": world.reward_model,
            "reward_prompt_ids": judge.contexts(request)[0],
            "weights": asked.get("preference_weights"),
            "head": world.head(tuple(asked["weights"])) if "weights" in asked else None,
            "neutral_prompt_ids": prompt.read,
            "groups": world.groups if prompt.begins_answer or not world.groups else world.groups._replace(first=None),
        }
    allowed = controls.get("allowed_token_ids")
    return oracle.generate(
        world.base_model,
        prompt.ids,
        4,
        mask=(lambda y, output: y.index_fill(0, others(allowed, y), oracle.NEG_INF)) if allowed else None,
        logit_bias=controls.get("logit_bias", {}),
        penalties=tuple(
            controls.get(f"{name}_penalty", default)
            for name, default in (("presence", 0.0), ("frequency", 0.0), ("repetition", 1.0))
        ),
        **rule,
    )


def others(allowed: list[int], y: torch.Tensor) -> torch.Tensor:
    return torch.tensor([i for i in range(len(y)) if i not in allowed])


def test_parts_go_on_where_they_were_stopped(tmp_path):
    names = list(parts(20000))
    by_mode = {name.rpartition(" ")[0] for name in names}
    assert len(names) == len(set(names))
    assert len(by_mode) == 6
    record = Record(tmp_path / "fuzz.json", 20000)
    record.add(names[0], {"counts": {"requests": 3, "wrong": 0}, "wrong": [], "left": []})
    record.add(names[6], {"counts": {"requests": 2, "wrong": 1}, "wrong": [{"request": 1}], "left": []})
    again = Record(tmp_path / "fuzz.json", 20000)
    assert list(again.parts) == [names[0], names[6]]
    assert again.failed == [names[6]]
    assert again.modes()[names[0].rpartition(" ")[0]]["requests"] == 3
    assert Record(tmp_path / "fuzz.json", 10).parts == {}
