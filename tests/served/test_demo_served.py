"""``make demo`` and ``make serve-demo``, each with one question and shorter answers than a user gets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pad_vllm.demo.users import USERS
from tests.served.test_playground import run
from tests.support.browser import MISSING, Browser, find_chromium
from tests.support.engine import Worker

QUESTION = "How do I get better at chess?"
SLIDERS = {"Use very simple words.": 1.0, "Give me long, detailed answers.": -0.5}


def run_demo(*arguments: str) -> str:
    """What the command prints, in this process."""
    from pad_vllm.demo import users

    users.DEMO_QUESTIONS = users.DEMO_QUESTIONS[:1]
    from pad_vllm.demo import show

    show.MAX_TOKENS = 48
    from pad_vllm.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert not ended.value.code, out.getvalue()
    return out.getvalue()


def run_served_demo(picture: str | None) -> tuple[str, dict[str, Any]]:
    """What ``demo --serve`` prints to somebody who sits at a terminal, and then uses the playground until Enter."""
    terminal, stdin = pty.openpty()
    seen: dict[str, Any] = {}

    def use_playground() -> None:
        try:
            while not (stays := re.search(r"The playground stays: (\S+)", getattr(sys.stdout, "getvalue", str)())):
                time.sleep(0.1)
            seen["about"] = json.load(urllib.request.urlopen(f"{stays[1]}v1/pad", timeout=60))
            if executable := find_chromium():
                browser = Browser(executable)
                try:
                    seen.update(ask_in_playground(browser, stays[1], picture))
                finally:
                    browser.close()
        finally:
            os.write(terminal, b"\n")

    with os.fdopen(stdin) as sys.stdin:
        threading.Thread(target=use_playground, daemon=True).start()
        return run_demo("--serve"), seen


def ask_in_playground(browser: Browser, url: str, picture: str | None) -> dict[str, Any]:
    """Two sliders for a question: both answers, and a picture of them."""
    browser.resize(1280, 800, scale=1.5 if picture else 1)
    browser.prefer("light")
    browser.open(url)
    browser.wait("document.querySelector('#server').textContent.includes('guided by')")
    browser.type("#prompt", QUESTION)
    for i, (text, weight) in enumerate(SLIDERS.items()):
        if i:
            browser.click("#add")
        browser.type(".row .text", text, nth=i)
        browser.evaluate(f"document.querySelectorAll('.row .weight')[{i}].focus()")
        steps = round(10 * (weight - 1))
        browser.press("ArrowRight" if steps > 0 else "ArrowLeft", times=abs(steps))
    browser.evaluate("document.querySelector('details').open = true")
    for field, value in {"max_tokens": "70" if picture else "40", "temperature": "0.7", "seed": "1"}.items():
        browser.type(f"#{field}", value)
    browser.evaluate("document.querySelector('details').open = false")
    browser.evaluate("scrollTo(0, 0)")
    run(browser)
    told = "document.querySelectorAll('#guided .token')"
    unlikely = browser.evaluate(
        f"[...{told}].slice(0, 40).map(t => +t.dataset.logprob).reduce((a, x, i, all) => x < all[a] ? i : a, 0)"
    )
    browser.hover("#guided .token", unlikely)
    browser.evaluate("scrollTo(0, 0)")
    if picture:
        browser.screenshot(Path(picture))
        Image.open(picture).quantize(64).save(picture, optimize=True)
    return {
        "rows": browser.evaluate("[...document.querySelectorAll('#rows output')].map(o => o.textContent)"),
        "errors": browser.evaluate("[...document.querySelectorAll('.error')].map(e => e.textContent).join('')"),
        **{side: browser.text(f"#{side} .tokens") for side in ("unguided", "guided")},
        "detail": browser.text("#guided .detail"),
        "speed": browser.text("#guided .speed"),
    }


def demo(function: Any, *arguments: Any) -> Any:
    worker = Worker("v1")
    try:
        return worker.run(function, *arguments)
    finally:
        worker.close()


def test_five_users_and_nobody(tmp_path):
    out = demo(run_demo, "--svg", str(tmp_path / "demo.svg"))
    for name, user in USERS.items():
        assert out.count(f"{name}:") == 1, out
        assert user.what.split()[0] in out
    assert out.count("nobody: unguided") == 1
    assert out.count("words ✓") >= 1, out
    picture = (tmp_path / "demo.svg").read_text()
    assert "<svg" in picture
    assert re.findall(r"https?://[^\s\"]+", picture) == ["http://www.w3.org/2000/svg"]  # it loads nothing


def test_users_of_one_server(pytestconfig):
    """Users who want lists and few words, and nobody, streamed side by side; measured as the demo prints it. Then the
    playground, as a person would use it (and where there is no Chromium, what it gets of the server)."""
    picture = pytestconfig.getoption("picture")
    assert find_chromium() or not picture, MISSING
    out, seen = demo(run_served_demo, picture and str(Path(picture).absolute()))
    assert "$ vllm serve" in out
    # How streams fall into batches moves the last digits of logits, and so which of a sampled answer's words come: what
    # is asked of SmolLM2 here is the wish that it heeds best.
    assert re.search(r"omar: lists [\d.]+ > [\d.]+ [✓✗]", out), out
    assert re.search(r"noor: length [\d.]+ > [\d.]+ ✓", out), out
    assert seen["about"]["personas"] == ["omar", "noor"]
    assert seen["about"]["defaults"]["reference"] == "base"
    if find_chromium():
        assert seen["errors"] == ""
        assert seen["rows"] == ["+1.0", "\N{MINUS SIGN}0.5"]
        assert len(seen["unguided"]) > 60
        assert seen["guided"] != seen["unguided"]
        assert len(seen["guided"].split()) > 3
        assert "first choice: " in seen["detail"]
        assert re.match(r"\d+ tokens · [\d.]+ tokens/s · [1-9]\d*% not its first choice · ", seen["speed"])
