"""The playground in a headless Chromium, beside a real server: what a person types, sees, stops and copies."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pad_vllm.playground.server import playground
from tests.support.browser import CONTROL, MISSING, Browser, find_chromium
from tests.support.engine import PLUGIN
from tests.support.fixtures import HEADS
from tests.support.models import make_adapter
from tests.support.server import Server

pytestmark = pytest.mark.every_release

PERSONAS = {"terse": {"preference": "concise", "beta": 1.5}, "long": {"preference": "playful"}}
LONG = 900
"""Tokens of an answer that is still being written when something happens to it."""
PROMPT = """Say 'why' to "me" \\ $HOME `é`"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip(MISSING)
    browser = Browser(executable)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(browser, models, tmp_path_factory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("playground")
    adapters = {"warm": str(make_adapter(root / "warm", models.named, 3, rank=4, targets=["q_proj"]) and root / "warm")}
    pad = {"reward_model": str(models.named), "personas": PERSONAS, "adapters": adapters, "top_k": 12, "max_top_k": 20}
    server = Server(
        models.base,
        root / "log",
        *("--max-model-len", "1024", "--logits-processors", *PLUGIN),
        *("--additional-config", json.dumps({"pad": pad})),
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def url(server) -> Iterator[str]:
    with playground(f"http://127.0.0.1:{server.port}/v1") as url:
        yield url


@pytest.fixture
def page(browser, url) -> Browser:
    """A fresh page that knows its server."""
    return opened(browser, url, "guided by another model")


def opened(browser: Browser, url: str, words: str) -> Browser:
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.open("about:blank")
    browser.events.clear()
    browser.open(url)
    browser.wait(f"document.querySelector('#server').textContent.includes({json.dumps(words)})")
    browser.evaluate("document.querySelector('details').open = true")
    return browser


def run(page: Browser) -> None:
    """By keys, from wherever the focus is; until both answers are there."""
    page.evaluate(
        "{ const run = document.querySelector('#run'), isIdle = () => run.getAttribute('aria-disabled') === 'false';"
        "window.hasRun = new Promise((done) => new MutationObserver(() => isIdle() && done(true)).observe(run, "
        "{attributes: true})); }; 0"
    )
    page.press("Enter", CONTROL)
    assert page.evaluate("window.hasRun", timeout=240)


def tokens(page: Browser, side: str) -> list[dict[str, Any]]:
    """Of an answer: a character of several tokens is one span."""
    return page.evaluate(
        f"[...document.querySelectorAll('#{side} .token')].flatMap((span, i) => span.told.map(token => ({{"
        "span: i, logprob: token.logprob, shade: Number(span.style.getPropertyValue('--s'))})))"
    )


def text_of(page: Browser, side: str) -> str:
    """Without tokens that have no text in an answer."""
    spans = f"[...document.querySelectorAll('#{side} .token:not(.unseen)')]"
    return page.evaluate(f"{spans}.map(span => span.textContent).join('')")


def is_the_servers(page: Browser, side: str, answer: dict[str, Any]) -> None:
    """An answer on the page is what the server says to the same request."""
    shown = tokens(page, side)
    expected = answer["choices"][0]["logprobs"]["content"]
    assert len(shown) == len(expected) > 5
    for token, whole in zip(shown, expected, strict=True):
        assert token["logprob"] == pytest.approx(whole["logprob"], abs=1e-2)
        most = max(-other["logprob"] for other in shown if other["span"] == token["span"])
        assert token["shade"] == pytest.approx(min(1, most / 6), abs=1e-2)
    assert text_of(page, side) == answer["choices"][0]["message"]["content"]


def test_what_is_typed_is_answered_side_by_side(page, server, url):
    page.type("#prompt", PROMPT)
    page.type("#system", "You are kind.")
    page.type(".row .text", "concise")
    page.evaluate("document.querySelector('.row .weight').focus()")
    page.press("ArrowLeft", times=25)
    assert page.text(".row output") == "\N{MINUS SIGN}1.5"
    page.click("#add")
    page.type(".row .text", "formal", nth=1)
    for row in (1, 2):
        page.select(f".row:nth-child({row}) .adapter", "warm")
    page.select("#reference", "neutral")
    for field, value in {"beta": "1.2", "top_k": "8", "max_tokens": "24"}.items():
        page.type(f"#{field}", value)
    run(page)
    messages = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": PROMPT}]
    ask = {"messages": messages, "max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    xargs = {
        "pad_preference": ["concise", "formal"],
        "pad_preference_weights": [-1.5, 1],
        "pad_adapter": ["warm", "warm"],
        "pad_beta": 1.2,
        "pad_top_k": 8,
        "pad_reference": "neutral",
    }
    unguided = server.post("/v1/chat/completions", ask)[1]
    guided = server.post("/v1/chat/completions", ask | {"vllm_xargs": xargs})[1]
    is_the_servers(page, "unguided", unguided)
    is_the_servers(page, "guided", guided)
    assert page.text("#unguided .speed").endswith("0% not its first choice · length")
    told = guided["choices"][0]["logprobs"]["content"]
    tops = [max(token["top_logprobs"], key=lambda top: top["logprob"]) for token in told]
    others = [i for i, (token, top) in enumerate(zip(told, tops, strict=True)) if top["logprob"] > token["logprob"]]
    assert len(others) > 2
    share = round(100 * len(others) / 24)
    speed = rf"24 tokens · [\d.]+ tokens/s · {share}% not its first choice · length"
    assert re.fullmatch(speed, page.text("#guided .speed"))
    shown, detail = tokens(page, "guided"), "document.querySelector('#guided .detail').textContent"
    alone = [i for i in others if [token["span"] for token in shown].count(shown[i]["span"]) == 1]
    firsts = {i: "first choice: “{}”, ".format(tops[i]["token"].replace("\n", "↵")) for i in alone if tops[i]["token"]}
    assert len(firsts) > 1
    for i, words in list(firsts.items())[:2]:
        page.hover("#guided .token", shown[i]["span"])
        page.wait(f"{detail}.includes({json.dumps(words)})", 5)
        page.evaluate("document.querySelector('#guided .token').focus()")
        page.press("ArrowRight", times=shown[i]["span"])
        assert words in page.evaluate(detail)
    assert page.complaints() == []
    assert all(asked.startswith(url) for asked in page.requested())
    assert len(page.requested()) >= 7


def test_plain_text_by_a_persona_and_heads_and_requests_to_copy(page, server, tmp_path):
    page.click("[name=kind][value=plain]")
    page.type("#prompt", PROMPT)
    page.type("#max_tokens", "12")
    page.select("#persona", "terse")
    page.click("#use-heads")
    page.evaluate("document.querySelector('#head-1').focus()")
    page.press("ArrowLeft", times=15)
    run(page)
    xargs = {"pad_persona": "terse", "pad_weights": [1, -0.5, 1]}
    assert len(HEADS) == len(xargs["pad_weights"])
    ask = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "vllm_xargs": xargs}
    expected = server.post("/v1/completions", ask)[1]["choices"][0]["text"]
    assert text_of(page, "guided") == expected
    page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    for nth, name in enumerate(("curl", "python")):
        page.click(".copy", nth)
        page.wait(f"document.querySelectorAll('.copy')[{nth}].textContent === 'Copied'")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.text(f"#{name}")
        if name == "curl" and shutil.which("curl"):
            answer = subprocess.check_output(["bash", "-c", copied], stderr=subprocess.DEVNULL, timeout=60)
            assert json.loads(answer)["choices"][0]["text"] == expected
        if name == "python":
            printed = subprocess.check_output([sys.executable, "-c", copied], timeout=60)
            assert printed.decode() == f"{expected}\n"


@pytest.mark.one_release
def test_a_stream_is_shown_as_it_comes_and_stops(page, server):
    page.type("#max_tokens", str(LONG))
    page.type(".row .text", "formal")
    count = "document.querySelectorAll('#guided[aria-busy] .token').length"
    for stop in (lambda: page.click("#stop"), lambda: page.press("Escape")):
        page.press("Enter", CONTROL)
        seen = page.wait(count)
        more = page.wait(f"{count} > {seen} && {count}")
        stop()
        for side in ("unguided", "guided"):
            page.wait(f"document.querySelector('#{side} .speed').textContent.endsWith('· stopped')", 5)
        left = len(tokens(page, "guided"))
        assert 0 < seen < more <= left < LONG
        deadline = time.monotonic() + 20
        while not (idle := re.search(r"^vllm:num_requests_running\{.*\} 0\.0$", server.get("/metrics")[1], re.M)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert idle
        assert len(tokens(page, "guided")) == left


def test_errors_are_the_servers_own_words(page, server):
    page.type("#max_tokens", "8")
    page.type(".row .text", "formal")
    for field, value in (("beta", 101), ("top_k", 21), ("top_k", 2.5)):
        page.type(f"#{field}", str(value))
        run(page)
        xargs = {"pad_preference": "formal", f"pad_{field}": value}
        status, answer = server.post("/v1/completions", {"prompt": "a", "vllm_xargs": xargs})
        assert status == 400
        assert page.text("#guided .error") == answer["error"]["message"]
        assert len(tokens(page, "unguided")) == 8
        page.type(f"#{field}", "")
        page.press("Backspace")
    page.type(".row .text", "")
    page.press("Backspace")
    run(page)
    assert page.text("#guided .error") == "Nothing says how to guide: write a preference, or choose a persona."
    page.type(".row .text", "formal")
    page.click("#add")
    page.select(".row:nth-child(2) .adapter", "warm")
    assert page.text("#problem") == "Preference 2 has not got words: give it to all of them, or to none."


NAMED = {"textbox", "slider", "combobox", "button", "checkbox", "radio", "spinbutton"}
READ = (
    "h1",
    "#server",
    "label",
    "#prompt",
    "#run",
    ".hint",
    ".token:nth-child(4)",
    ".detail",
    ".error:not([hidden])",
    "pre",
)
"""Of each kind of text one, to be read on its ground."""
CONTRAST = """(selector) => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
  const over = (a, b) => a.slice(0, 3).map((x, i) => x * a[3] + b[i] * (1 - a[3]));
  const light = (c) => c.map((x) => x / 255).map((x) => (x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  let element = document.querySelector(selector), back = [];
  const color = parse(getComputedStyle(element).color);
  for (let e = element; e; e = e.parentElement) back.unshift(parse(getComputedStyle(e).backgroundColor));
  const ground = back.reduce((below, above) => over(above, below), [255, 255, 255]);
  const [a, b] = [light(over(color, ground)), light(ground)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}"""


@pytest.mark.one_release
def test_it_can_be_used_on_a_phone_by_keys_and_in_the_dark(page):
    page.resize(360, 740, is_phone=True)
    page.type("#max_tokens", "40")
    page.type(".row .text", "formal")
    run(page)
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in nodes if not n["ignored"] and n["role"]["value"] in NAMED]
    assert len(controls) > 20
    assert [n for n in controls if not n["name"]["value"].strip()] == []
    page.evaluate("document.querySelectorAll('#guided .token')[3].style.setProperty('--s', 1)")
    page.type("#top_k", "1000")
    run(page)
    backs = set()
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.evaluate("document.querySelectorAll('#unguided .token')[3].style.setProperty('--s', 1)")
        for selector in READ:
            assert page.evaluate(f"({CONTRAST})({json.dumps(selector)})") >= 4.5, (scheme, selector)
    assert len(backs) == 2
    page.evaluate("document.activeElement.blur(), document.querySelector('#prompt').focus()")
    reached = []
    for _ in range(40):
        page.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    for name in ("text", "weight", "add", "persona", "beta", "reference", "run", "curl", "python"):
        assert name in reached
    assert len([name for name in reached if name.startswith("token")]) == 1  # of all the tokens of one answer


@pytest.mark.one_release
def test_a_server_that_is_not_there(browser, server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        words = f"the server at {dead} cannot be reached: Connection refused"
        with playground(dead) as url:
            page = opened(browser, url, words)
            run(page)
            assert [page.text(f"#{side} .error") for side in ("unguided", "guided")] == [words] * 2
        run(page)
        assert "own server is gone" in page.text("#guided .error")


@pytest.mark.one_release
def test_a_server_that_ends_while_it_answers(page, server):
    """The last of these tests: it ends the server."""
    page.type("#max_tokens", str(LONG))
    page.type(".row .text", "formal")
    for _ in range(5):  # on a busy machine the browser may be shown all of an answer at once
        page.press("Enter", CONTROL)
        page.wait("document.querySelectorAll('#guided .token').length > 3")
        if page.evaluate("!!document.querySelector('#guided[aria-busy]')"):
            break
    server.close()
    for side in ("unguided", "guided"):
        page.wait(f"!document.querySelector('#{side} .error').hidden", 30)
        assert 3 < len(tokens(page, side)) < LONG
    run(page)
    assert page.text("#guided .error").endswith("cannot be reached: Connection refused")
