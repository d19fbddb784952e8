"""``pad-vllm explain``: what it says of each token is what the oracle computes of it, and pages hold only what they
should."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from pad_vllm.cli import main
from pad_vllm.explain.document import document
from pad_vllm.explain.explaining import ExplainedAnswer, ExplainedToken, Explanation, explain
from pad_vllm.explain.terminal import print_answers, print_tokens
from pad_vllm.explain.words import summary
from pad_vllm.worker.kept_rows import RowEffect, row_keeper
from tests.engine.test_traces import expected_effects
from tests.support.browser import MISSING, Browser, find_chromium
from tests.support.engine import Worker

PROMPT = "say why <script>alert(1)</script>"
NUM = 14
PERSONAS = {"terse": {"preference": "concise, formal", "beta": 1.5}}
SETTINGS: list[dict[str, Any]] = [
    {"preference": "formal"},
    {"preference": ["formal", "kind"], "preference_weights": [1, -0.5], "reference": "neutral", "top_k": 20},
    {"pad_beta": 0.5},
    {"preference": ["kind", "brief"], "preference_weights": [0.0, 1.0]},
]


@pytest.fixture(scope="module")
def explanation(models) -> Explanation:
    pad = {
        "reward_model": str(models.reward),
        "reference": "base",
        "personas": PERSONAS,
        "default_persona": "terse",
        "trace": "/dev/null/not a folder",
    }
    engine = {"dtype": "float32", "max_model_len": 256}
    worker = Worker("v1")
    try:
        return worker.run(explain_in, str(models.base), pad, PROMPT, SETTINGS, engine)
    finally:
        worker.close()


def explain_in(model, pad, prompt, settings, engine) -> Explanation:
    found = explain(model, pad, prompt, settings, max_tokens=NUM, engine=engine)
    assert row_keeper() is None  # of engines that are started behind it
    return found


def test_each_token_has_the_oracles_numbers(models, compose, explanation):
    """The settings stand over the default persona, as requests do; the unguided answer has none."""
    prompt = models.tokenizer.encode(PROMPT)
    asked = [PERSONAS["terse"] | {key.removeprefix("pad_"): value for key, value in one.items()} for one in SETTINGS]
    expected = [expected_effects(models, compose, prompt, NUM, one) for one in asked]
    unguided, *guided = explanation.answers
    alone = expected_effects(models, compose, prompt, NUM, {}, reward=None)[0]
    assert [token.token_id for token in unguided.tokens] == alone
    assert all(token.token_id == token.first_id and token.effect is None for token in unguided.tokens)
    for answer, (tokens, effects), one in zip(guided, expected, asked, strict=True):
        assert [token.token_id for token in answer.tokens] == tokens
        for token, effect in zip(answer.tokens, effects, strict=True):
            assert token.effect.changed == effect.changed == (token.token_id != token.first_id)
            assert token.effect.divergence == pytest.approx(effect.divergence, rel=2e-3, abs=1e-4)
            weights = one.get("preference_weights") or [1] * len(effect.rewards)
            read = [value if weight else None for value, weight in zip(effect.rewards, weights, strict=True)]
            assert len(token.effect.rewards) == len(read)
            for value, by_oracle in zip(token.effect.rewards, read, strict=True):
                assert value == (by_oracle if by_oracle is None else pytest.approx(by_oracle, rel=2e-3, abs=1e-3))
    for answer in explanation.answers:
        assert_base_part(models, prompt, answer)
    assert guided[1].contexts == ("+1 formal", "-0.5 kind")
    assert guided[0].divergence == pytest.approx(sum(effect.divergence for effect in expected[0][1]) / NUM, rel=2e-3)
    assert len({answer.text for answer in explanation.answers}) > 2


@torch.no_grad()
def assert_base_part(models, prompt: list[int], answer: ExplainedAnswer) -> None:
    ids = [token.token_id for token in answer.tokens]
    logits = models.base_model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    of_base = logits.softmax(-1)
    for i, token in enumerate(answer.tokens):
        assert token.first_id == int(of_base[i].argmax())
        assert token.probability == pytest.approx(float(of_base[i, token.token_id]), rel=1e-3)
        assert token.first_probability == pytest.approx(float(of_base[i].max()), rel=1e-3)
    assert answer.text == models.tokenizer.decode(ids)


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.texts.append(text)


def test_the_page_is_self_contained_and_shows_texts_as_texts(explanation):
    hostile = ExplainedToken(7, '"><img src=x onerror=alert(1)>\x1b[2J', 0.25, 8, "</script>\n", 0.5, None)
    bad = ExplainedAnswer('preference: </h2><script src="//x">', ("<b>",), (hostile,))
    page = document(Explanation("<base>", "a & b", explanation.prompt, (*explanation.answers, bad)))
    read = Page(page)
    tags = [tag for tag, _ in read.tags]
    assert (tags.count("script"), tags.count("style"), tags.count("img")) == (1, 1, 0)
    for tag, attributes in read.tags:
        assert "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"@import|url\(", page)
    assert "\x1b" not in page
    assert PROMPT in read.texts
    assert '"><img src=x onerror=alert(1)>␛[2J' in read.texts
    tokens = [attributes for tag, attributes in read.tags if (attributes.get("class") or "").startswith("token ")]
    assert tokens[-1]["data-told"] == (
        '"\\"><img src=x onerror=alert(1)>␛[2J": 25.0% by the base model. Its first choice: "</script>\\n", 50.0%.'
    )
    told = [attributes["data-told"] for _, attributes in read.tags if "data-told" in attributes]
    assert len(told) == sum(len(answer.tokens) for answer in explanation.answers) + 1
    first = explanation.answers[2].tokens[0].effect
    assert f"Divergence {first.divergence:.3f} nats. Reward: +1 formal {first.rewards[0]:+.3f}; " in told[2 * NUM]


def test_a_browser_shows_numbers_to_the_mouse_and_to_keys(explanation, tmp_path):
    executable = find_chromium()
    if executable is None:
        pytest.skip(MISSING)
    (tmp_path / "page.html").write_text(document(explanation), encoding="utf-8")
    where, tokens = (tmp_path / "page.html").as_uri(), explanation.answers[1].tokens
    browser = Browser(executable)
    try:
        browser.open(where)
        browser.press("Tab", times=3)  # past the unguided answer and its table
        browser.press("ArrowRight", times=6)
        assert f"Divergence {tokens[6].effect.divergence:.3f} nats" in browser.text("#detail-1")
        browser.press("Home")
        assert f"Divergence {tokens[0].effect.divergence:.3f} nats" in browser.text("#detail-1")
        # Last: to bring a token into view moves where Tab goes on from, in newer versions of Chromium.
        browser.hover(".answer:nth-child(2) .token", 4)
        assert f"Divergence {tokens[4].effect.divergence:.3f} nats" in browser.text("#detail-1")
        assert browser.complaints() == []
        assert browser.requested() <= {where, "about:blank", "data:,"}
        browser.resize(360, 700, is_phone=True)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.close()


def test_a_terminal_shows_answers_and_tables(explanation, monkeypatch):
    out = StringIO()
    monkeypatch.setattr(
        "pad_vllm.explain.terminal.screen",
        lambda: Console(file=out, width=160, force_terminal=True, color_system="truecolor"),
    )
    print_answers(explanation)
    assert "\x1b[4;" in out.getvalue()  # underlined, and shaded
    assert "48;2;" in out.getvalue()
    out.truncate(0)
    print_tokens(explanation)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    token = explanation.answers[2].tokens[3]
    (row,) = [line for line in plain.split("reference: neutral")[1].splitlines() if re.match(r" *3 ", line)][:1]
    assert f"{token.effect.divergence:.3f}" in row
    assert f"{token.effect.rewards[1]:+.3f}" in row
    assert "Be\x1b" not in plain


def test_a_part_of_a_character_and_an_unlikely_token_are_shown():
    effect = RowEffect(True, 0.5, (1.0, None))
    token = ExplainedToken(1, "�", 1e-7, 2, "a", math.exp(-0.1), effect)
    answer = ExplainedAnswer("x", ("+1 a", "+0 b"), (token,))
    assert summary(answer) == (
        "1 token, 100% not the base model's first choice; divergence 0.500 nats a token. Reward a token: +1 a +1.000; "
        "+0 b -"
    )
    assert "1e-07" in document(Explanation("m", "r", "p", (answer,)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--with", '{"preference": 3}'], "--with {'preference': 3}: pad_preference=3: must be a string"),
        (["--with", '{"persona": "ada"}'], "no such persona"),
        (["--with", '{"top_k": 65}'], "pad_top_k=65"),
        (["--with", '{"preferense": "a"}'], "did you mean 'pad_preference'"),
        (["--with", "{}"], "--with {}: asks for no guidance"),
        (["--with", "[1]"], "must be an object"),
        (["--with", "{"], "is not JSON"),
        ([], "at least one setting by --with"),
        (["--with", '{"beta": 1}', "--max-tokens", "0"], "--max-tokens=0: must be at least 1"),
        (["--with", '{"beta": 1}', "--temperature", "-1"], "--temperature=-1.0: must be between"),
        (["--with", '{"beta": 1}', "--html", "nowhere/at/all.html"], "there is no such folder"),
        (["--with", '{"beta": 1}', "--engine-args", '{"tensor_parallel_size": 2}'], "tensor_parallel_size=2"),
        (["--with", '{"beta": 1}', "--config", "missing.yaml"], "'missing.yaml': cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_an_engine_starts(models, capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        main(["explain", "a b", "--model", str(models.base), "--reward-model", str(models.reward), *arguments])
    assert end.value.code == 1
    assert said in capsys.readouterr().err


def test_a_reward_model_has_to_be_named(models, capsys):
    with pytest.raises(SystemExit):
        main(["explain", "a b", "--model", str(models.base), "--with", '{"preference": "a"}'])
    assert "no reward model is named" in capsys.readouterr().err
