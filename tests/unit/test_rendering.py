"""Chat templates of whoever made a folder, rendered in a bounded time."""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
import time
from pathlib import Path

import pytest

from pad_vllm.reward import rendering
from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.first_space import answers_begin_with_space
from pad_vllm.reward.rendering import bounded_render
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import DataError, prompt_ids
from pad_vllm.worker.answers import answer_tokens
from tests.support import chats
from tests.support.models import make_tokenizer

PACKAGE = Path(rendering.__file__).parents[1]
TALK = [
    {"role": "system", "content": "Be brief. <|user|> é\u2028"},
    {"role": "user", "content": " Why? \n"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And then?"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "<d> é", "parameters": {}}}
NEVER = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ (9 ** (9 ** 9)) % 7 }}",  # holds the interpreter's lock, and is computed as the template is compiled
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def in_a_thread(tokenizer, **settings) -> Exception:
    """What rendering raises where no signal can be had."""
    raised = []

    def render() -> None:
        try:
            bounded_render(tokenizer, TALK, **settings)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    return raised[0]


@pytest.mark.parametrize("template", NEVER)
def test_a_template_that_never_ends_is_given_up_and_not_tried_again(template, tokenizer):
    tokenizer.chat_template = template
    started = time.monotonic()
    assert str(in_a_thread(tokenizer, seconds=0.5)) == "the chat template did not end within 0.5 seconds"
    first, started = time.monotonic() - started, time.monotonic()
    with pytest.raises(ValueError, match=r"did not end within 0\.5 seconds"):
        bounded_render(tokenizer, TALK)
    assert time.monotonic() - started < 0.4
    assert first < 30
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert bounded_render(tokenizer, TALK) == TALK[0]["content"]


def test_all_that_a_start_renders_is_bounded(tokenizer, monkeypatch):
    """What an answer may hold, and how it begins, are found by rendering too."""
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.3)
    tokenizer.chat_template = NEVER[0] + "{# of this test #}"
    started = time.monotonic()
    assert answer_tokens(tokenizer, {1}) == {}
    assert answers_begin_with_space(ByteTokens(tokenizer, "reward")) is None
    assert time.monotonic() - started < 20
    sources = [file for room in ("reward", "worker", "frontend") for file in (PACKAGE / room).rglob("*.py")]
    calls = [file.name for file in sources if "apply_chat_template(" in file.read_text()]
    assert calls == ["rendering.py"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(10 ** 12) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
        ("{{ 'a' * 2 * 10 ** 7 }}", "wrote 20,000,000 characters"),
        ("{{ raise_exception('roles\n  must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    ],
)
def test_what_a_template_does_wrong_is_said(template, words, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words) as error:
        bounded_render(tokenizer, TALK)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("family", chats.FAMILIES)
@pytest.mark.parametrize("variables", [{}, {"add_generation_prompt": True, "tools": [TOOL], "enable_thinking": False}])
def test_it_renders_what_transformers_does(family, variables, tokenizer):
    tokenizer.chat_template = chats.FAMILIES[family].template
    for talk in (TALK, TALK[1:], TALK[:2], [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]):
        try:
            expected = tokenizer.apply_chat_template(talk, tokenize=False, **variables)
        except Exception:
            with pytest.raises(ValueError):  # noqa: PT011 (whatever the template says)
                bounded_render(tokenizer, talk, **variables)
            continue
        assert bounded_render(tokenizer, talk, **variables) == expected


def test_everything_that_the_environment_has(tokenizer):
    """What templates use of transformers' environment beyond jinja2's own."""
    tokenizer.chat_template = (
        "  {% generation %}{{ bos_token }}{% endgeneration %}\n"
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m.content | trim }}{% endfor %}\n"
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ strftime_now('%d') }}"
    )
    told = {"strftime_now": lambda form: "1"}
    assert bounded_render(tokenizer, TALK, **told) == tokenizer.apply_chat_template(TALK, tokenize=False, **told)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    assert bounded_render(tokenizer, TALK) == tokenizer.apply_chat_template(TALK, tokenize=False)
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert bounded_render(tokenizer, TALK) == "a"
    assert bounded_render(tokenizer, TALK, tools=[TOOL]) == "b"


def test_the_process_is_started_again_and_is_not_shared_by_a_fork(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert bounded_render(tokenizer, TALK) == TALK[0]["content"]
    process = rendering._renderer._process
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert bounded_render(tokenizer, TALK) == TALK[0]["content"]
    child = os.fork()
    if child == 0:  # through a pipe of its parent's, one would read the other's answers
        other = [{"role": "user", "content": "of the fork"}]
        told = all(bounded_render(tokenizer, other) == "of the fork" for _ in range(20))
        os._exit(0 if told and rendering._renderer._process.pid != process.pid else 1)
    assert all(bounded_render(tokenizer, TALK) == TALK[0]["content"] for _ in range(20))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("ends", [signal.SIGPROF, signal.SIGALRM, signal.SIGKILL])
def test_a_rendering_that_a_machine_held_up_is_tried_again(ends, tokenizer):
    """A virtual machine that stands still for seconds counts them as the process's own; nothing is lost by it."""
    tokenizer.chat_template = (
        "{% for i in range(9999) %}{% for j in range(60) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    )
    assert bounded_render(tokenizer, [{"role": "user", "content": "warm"}]) == "warm"
    process = rendering._renderer._process
    timer = threading.Timer(0.01, process.send_signal, [ends])
    timer.start()
    assert bounded_render(tokenizer, TALK) == TALK[0]["content"]
    timer.join()
    assert process.poll() == -ends
    assert bounded_render(tokenizer, TALK) == TALK[0]["content"]


def test_no_process_outlives_the_one_that_asked():
    """Whoever asked is gone: one whose template never ends has its time, and one that waits hears it by its pipe."""
    values = {"template": NEVER[0], "seconds": 0.5, "values": {}, "answers": {}}
    for request, status in ((values, -signal.SIGPROF), (values | {"template": "a"}, 0)):
        process = rendering._start()
        content = json.dumps(request).encode()
        process.stdin.write(struct.pack("<Q", len(content)) + content)
        process.stdin.close()
        assert process.wait(30) == status
        process.stdout.close()


def test_where_templates_are_rendered_one_that_never_ends_is_one_that_cannot_be_followed(tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    template = PromptTemplate(tokenizer)
    tokenizer.chat_template = NEVER[0] + " "
    with pytest.raises(DataError, match=r"line 3: the chat template refuses the prompt .*did not end"):
        prompt_ids("Why?", tokenizer, "line 3")
    said = template.example("Be brief.")
    assert said.startswith("the chat template refuses a question (the chat template did not end")
