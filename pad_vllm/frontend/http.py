"""Refusing, over HTTP, guidance that stands where vLLM's API server would ignore it: HTTP 400.

That is: arguments elsewhere than in ``vllm_xargs``, and any arguments where an endpoint has no way for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pad_vllm.channel import announced
from pad_vllm.params import is_known, is_ours

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SCORING_ENDPOINTS = ("/generative_scoring", "/v1/systemone", "/v1/decisions")
"""Heads of paths that answer by log-probabilities of the base model, which leave guidance out."""
UNGUIDED_ENDPOINTS = ("/cohere/", *SCORING_ENDPOINTS)
"""Heads of paths whose requests carry no arguments of plugins."""
NOT_ARGUMENTS = frozenset(
    {
        *("messages", "input", "prompt", "system", "instructions", "documents"),
        *("tools", "functions", "response_format", "structured_outputs", "text", "json_schema"),
    }
)
"""Fields of a request that hold its text or its schemas: what is called pad there is none of our business."""


def misplaced(body: Any, path: str = "") -> str | None:
    """What is wrong with the place of guidance in a request's body, as a sentence; None where nothing is."""
    if not isinstance(body, Mapping):
        return None
    if path.startswith(UNGUIDED_ENDPOINTS):
        found = next(_asked(body, ("", "vllm_xargs")), None)
        return found and f"{found}: this endpoint cannot be guided; vLLM takes no such arguments here"
    allowed, shown = ("vllm_xargs",), '{"vllm_xargs": {"pad_...": ...}}'
    if path.endswith("/inference/v1/generate"):
        allowed, shown = ("sampling_params", "extra_args"), '{"sampling_params": {"extra_args": {"pad_...": ...}}}'
    found = next((where for where in _asked(body) if tuple(where.split(".")[:-1]) != allowed), None)
    return found and f"{found}: guidance goes into {'.'.join(allowed)}, as in {shown}; elsewhere it would be ignored"


def unguided(path: str) -> str | None:
    """What is wrong with a request to ``path`` that asks for nothing, where everybody was to be guided."""
    if path.startswith(SCORING_ENDPOINTS) and any(engine.guides_all for engine in announced().values()):
        return (
            "pad.default_persona: this server guides every request, and this endpoint answers by log-probabilities of "
            "the base model"
        )
    return None


def _asked(body: Mapping[str, Any], loosely: tuple[str, ...] = ("",)) -> Iterator[str]:
    """Where a body says something that was meant for PAD, with dots between the keys. On top, and in the fields named
    ``loosely``, that is whatever looks like it; deeper, only what PAD knows."""
    waiting: list[tuple[str, Any]] = [("", body)]
    while waiting:
        where, value = waiting.pop()
        for key, inner in value.items():
            if (is_ours(key) and where in loosely) or is_known(key) or _is_object(key, inner):
                yield f"{where}.{key}".removeprefix(".")
            elif isinstance(inner, Mapping) and key not in NOT_ARGUMENTS:
                waiting.append((f"{where}.{key}".removeprefix("."), inner))


def _is_object(key: str, value: Any) -> bool:
    """Whether this is guidance as one object, as the server's configuration has it: ``"pad": {"preference": ...}``."""
    return key == "pad" and isinstance(value, Mapping) and any(is_known(k) or is_known(f"pad_{k}") for k in value)


class RefuseMisplaced:
    """ASGI middleware: HTTP 400 for a request with guidance where the server would ignore it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content_type = dict(scope.get("headers", ())).get(b"content-type", b"")
        if scope["type"] != "http" or scope["method"] != "POST" or b"json" not in content_type:
            return await self.app(scope, receive, send)
        received: list[Message] = []
        while not received or (received[-1]["type"] == "http.request" and received[-1].get("more_body")):
            received.append(await receive())
        words = _read(b"".join(message.get("body", b"") for message in received), scope["path"])
        words = words or unguided(scope["path"])
        if words:
            from starlette.responses import JSONResponse

            error = {"message": words, "type": "BadRequestError", "param": words.split(":")[0], "code": 400}
            return await JSONResponse({"error": error}, 400)(scope, receive, send)

        async def again() -> Message:
            return received.pop(0) if received else await receive()

        return await self.app(scope, again, send)


def _read(body: bytes, path: str) -> str | None:
    if b"pad" not in body.lower() and b"\\u" not in body:
        return None
    try:
        return misplaced(json.loads(body), path)
    except (ValueError, RecursionError):
        return None  # vLLM will say so
