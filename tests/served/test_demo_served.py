"""``make demo`` and ``make serve-demo``, each with one question and shorter answers than a user gets."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from pad_vllm.demo.users import USERS
from tests.support.engine import Worker


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


def demo(*arguments: str) -> str:
    worker = Worker("v1")
    try:
        return worker.run(run_demo, *arguments)
    finally:
        worker.close()


def test_five_users_and_nobody(tmp_path):
    out = demo("--svg", str(tmp_path / "demo.svg"))
    for name, user in USERS.items():
        assert out.count(f"{name}:") == 1, out
        assert user.what.split()[0] in out
    assert out.count("nobody: unguided") == 1
    assert out.count("words ✓") >= 1, out
    picture = (tmp_path / "demo.svg").read_text()
    assert "<svg" in picture
    assert re.findall(r"https?://[^\s\"]+", picture) == ["http://www.w3.org/2000/svg"]  # it loads nothing


def test_users_of_one_server():
    """Users who want lists and few words, and nobody, streamed side by side; measured as the demo prints it."""
    out = demo("--serve")
    assert "$ vllm serve" in out
    # How streams fall into batches moves the last digits of logits, and so which of a sampled answer's words come: what
    # is asked of SmolLM2 here is the wish that it heeds best.
    assert re.search(r"omar: lists [\d.]+ > [\d.]+ [✓✗]", out), out
    assert re.search(r"noor: length [\d.]+ > [\d.]+ ✓", out), out
