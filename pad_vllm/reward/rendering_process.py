"""The process in which chat templates are rendered; :mod:`pad_vllm.reward.rendering` starts it as a script.

Reads requests and writes answers, JSON after its length. The environment is that of transformers' chat templates.
"""

from __future__ import annotations

import json
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

IDLE_SECONDS = 300
MEMORY_BYTES = 2**30
MAX_TEXT = 2**24
"""Characters of a rendered conversation."""
MAX_ERROR = 300
_LENGTH = struct.Struct("<Q")


class Generation(Extension):
    """``{% generation %}``, which marks what an assistant wrote, leaves it as it is."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def rendered(template: str, values: dict[str, Any], answers: dict[str, str]) -> dict[str, str]:
    functions = {name: (lambda *_, answer=answer: answer) for name, answer in answers.items()}
    try:
        text = compiled(template).render(**values, **functions)
    except Exception as error:  # a template raises what it likes
        return {"error": (" ".join(str(error).split()) or type(error).__name__)[:MAX_ERROR]}
    if len(text) > MAX_TEXT:
        return {"error": f"the chat template wrote {len(text):,} characters, at most {MAX_TEXT:,} are read"}
    return {"text": text}


def main() -> None:
    for ends in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ends, signal.SIG_DFL)  # no function of ours: it ends the process wherever that is
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGALRM])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, and meant for the one who asks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    stdin = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    stdout = sys.stdout.buffer
    while select.select([stdin], [], [], IDLE_SECONDS)[0] and (head := read(stdin, _LENGTH.size)):
        request = json.loads(read(stdin, *_LENGTH.unpack(head)))
        give(request.pop("seconds"))
        answer = json.dumps(rendered(**request)).encode()
        give(0)
        stdout.write(_LENGTH.pack(len(answer)) + answer)
        stdout.flush()


def give(seconds: float) -> None:
    """So much of a processor's time, or end; 0: all. A clock's time counts tenfold: a machine may have more to do."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def read(stream: Any, length: int) -> bytes:
    """So many bytes; none where the stream has ended."""
    parts = []
    while length and (part := stream.read(length)):
        parts.append(part)
        length -= len(part)
    return b"" if length else b"".join(parts)


if __name__ == "__main__":
    main()
