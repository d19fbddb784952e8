"""Chat templates, rendered in a bounded time.

A template comes with a folder, from whoever made it, and is a program: nested loops need not end, and ``9 ** 9 ** 9``
holds the interpreter's lock while it is computed, so no thread of this process could stop it. They are rendered in a
process of their own (:mod:`pad_vllm.reward.rendering_process`), which the kernel ends when its time is up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 2.0
"""Of a processor's time for one rendering, which takes a millisecond as a rule."""
PATIENCE = (1, 3)
"""Times that, for one rendering: what took too long is tried again before the template is blamed, for a machine that
stood still counts as its time. A template that took too long each time is not rendered again."""
_LENGTH = struct.Struct("<Q")
_SCRIPT = Path(__file__).with_name("rendering_process.py")


def bounded_render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    seconds: float | None = None,
    **variables: Any,
) -> str:
    """``tokenizer.apply_chat_template(messages, tokenize=False, **variables)``, in a bounded time and memory. May be
    called from any thread.

    Args:
        messages: of one conversation; what JSON can hold.
        seconds: at most, and three times that where it takes longer; :data:`RENDER_SECONDS` when None.
        variables: for the template, such as ``tools`` and ``add_generation_prompt``; what JSON can hold. A function,
            such as ``strftime_now``, is asked once, for "%d %b %Y", and always gives the template that answer.

    Raises:
        ValueError: there is no template, it refuses the messages, or it takes more time or memory than it is given.
    """
    from transformers import PreTrainedTokenizerBase

    if getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **variables)  # code, which is trusted
    template = tokenizer.get_chat_template(tools=variables.get("tools"))
    answers = {name: value("%d %b %Y") for name, value in variables.items() if callable(value)}
    given = {**tokenizer.special_tokens_map, **variables, "messages": list(messages)}
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **given}
    values = {name: value for name, value in given.items() if name not in answers}
    return _renderer.render(template, {"values": values, "answers": answers}, seconds or RENDER_SECONDS)


class _Renderer:
    """The process, started when it is needed; it ends by itself when nobody has asked for a while, and with us."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._refused: dict[str, str] = {}
        """Template -> why it is not rendered again."""

    def render(self, template: str, variables: Mapping[str, Any], seconds: float) -> str:
        try:
            values = json.dumps({"template": template, **variables})
        except (TypeError, RecursionError) as error:
            raise ValueError(f"the conversation cannot be written as JSON ({error})") from None
        with self._lock:
            if template in self._refused:
                raise ValueError(self._refused[template])
            statuses = []
            for times in PATIENCE:
                status, answer = self._ask(f'{{"seconds": {seconds * times}, {values[1:]}'.encode())
                if status is None:
                    break
                statuses.append(status)  # 0: it had been idle for long, and ended as it was asked
            if status in (-signal.SIGPROF, -signal.SIGALRM):
                words = f"the chat template did not end within {seconds:g} seconds"
                if set(statuses) == {-signal.SIGPROF}:  # and not for all else that the machine had to do
                    self._refused[template] = words
                raise ValueError(words)
        if status is not None:
            raise ValueError(f"the process that renders chat templates ended with status {status}")
        read = json.loads(answer)
        if "error" in read:
            raise ValueError(read["error"])
        return read["text"]

    def _ask(self, request: bytes) -> tuple[int | None, bytes]:
        """None and the answer, or the status with which the process ended."""
        if self._process is None or self._process.poll() is not None:
            self.forget()
            self._process = _start()
        asked, answered = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answered is not None
        try:
            asked.write(_LENGTH.pack(len(request)) + request)
            asked.flush()
            (length,) = _LENGTH.unpack(answered.read(_LENGTH.size))
            if len(answer := answered.read(length)) == length:
                return None, answer
        except (OSError, struct.error):  # the pipe is closed
            pass
        return self._process.wait(), b""

    def forget(self) -> None:
        """Let the process go: it ends when its pipe is closed."""
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process is not None else ():
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    # By its path, and without its folder among those of modules: it imports jinja2 alone, and starts in no time.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", str(_SCRIPT)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError as error:
        raise ValueError(f"no process could be started to render chat templates in ({error})") from None


_renderer = _Renderer()


def _renew() -> None:
    global _renderer
    _renderer = _Renderer()


os.register_at_fork(after_in_child=_renew)  # the pipes are the parent's
atexit.register(lambda: _renderer.forget())
