"""Refuse guidance over HTTP (status 400) that vLLM's API server would ignore.

That is guidance anywhere but in ``vllm_xargs``, and any guidance for an endpoint that takes no arguments of plugins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pad_vllm.checks import shown_name
from pad_vllm.frontend import admission, engines, prompts
from pad_vllm.params import LIKE_OURS, is_known, is_ours

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.config import VllmConfig

SCORING_ENDPOINTS = ("/generative_scoring", "/v1/systemone", "/v1/decisions")
"""Beginnings of paths that answer with log-probabilities of the base model, which guidance does not change."""
UNGUIDED_ENDPOINTS = ("/cohere/", *SCORING_ENDPOINTS)
"""Beginnings of paths whose requests carry no arguments of plugins."""
NOT_ARGUMENTS = frozenset(
    {
        *("messages", "input", "prompt", "system", "instructions", "documents"),
        *("tools", "functions", "response_format", "structured_outputs", "text", "json_schema"),
    }
)
"""Fields of a request that hold its text or its schemas. A name with pad in them is not an argument."""


MAX_LIKE = 100
"""Most names in a body that may begin like PAD's. More are no accident, and checking each would take long."""
LOST = "(given twice)"
"""Where what a later field of the same name replaces stands for :func:`misplaced`."""
FORMS = (b"multipart/form-data", b"application/x-www-form-urlencoded")
"""Types of bodies that vLLM reads as forms: those of audio endpoints."""


class BodyField(NamedTuple):
    """A field of a body, and the one that it stands in."""

    key: str
    outer: BodyField | None

    def keys(self) -> list[str]:
        keys: list[str] = []
        place: BodyField | None = self
        while place is not None:
            keys.append(place.key)
            place = place.outer
        return keys[::-1]

    def shown(self) -> str:
        """The keys with dots between them, no longer than a line."""
        return shown_name(".".join(self.keys()))


def misplaced(body: Any, path: str = "") -> str | None:
    """A sentence that says which guidance in a request's body is at the wrong place; None if there is none."""
    if not isinstance(body, Mapping):
        return None
    if path.startswith(UNGUIDED_ENDPOINTS):
        found = next(_asked(body, ("vllm_xargs",)), None)
        return (
            found
            and f"{found.shown()}: this endpoint cannot be guided, because vLLM takes no arguments of plugins here"
        )
    allowed, shown = ["vllm_xargs"], '{"vllm_xargs": {"pad_...": ...}}'
    if path == "/inference/v1/generate":
        allowed, shown = ["sampling_params", "extra_args"], '{"sampling_params": {"extra_args": {"pad_...": ...}}}'
    found = next((place for place in _asked(body) if place.keys()[:-1] != allowed), None)
    where = ".".join(allowed)
    return found and f"{found.shown()}: guidance goes into {where}, as in {shown}; elsewhere it would be ignored"


def unguided(path: str, vllm_config: VllmConfig | None = None) -> str | None:
    """A sentence that says why a request to ``path`` without guidance is refused, if every request must be guided;
    None if it is not."""
    if path.startswith(SCORING_ENDPOINTS) and admission.guides_all(vllm_config):
        return (
            "pad.default_persona: this server guides every request, but this endpoint cannot be guided: it answers "
            "with the base model's log-probabilities"
        )
    return None


def _asked(body: Mapping[str, Any], loosely: tuple[str, ...] = ()) -> Iterator[BodyField]:
    """Where a body says something that was meant for PAD. On top, and in the fields named ``loosely``, that is whatever
    looks like it; deeper, only what PAD knows."""
    waiting: list[tuple[BodyField | None, Any]] = [(None, body)]
    num_like = 0
    while waiting:
        outer, value = waiting.pop()
        if isinstance(value, list):
            waiting += ((outer, inner) for inner in value if isinstance(inner, (Mapping, list)))
            continue
        is_loose = outer is None or (outer.outer is None and outer.key in loosely)
        is_meant = is_ours if is_loose else is_known
        for key, inner in value.items():
            if LIKE_OURS.match(key):
                num_like += 1
                if num_like > MAX_LIKE:
                    yield BodyField(f"(over {MAX_LIKE} names like it)", BodyField(key, outer))
                    return
            if is_meant(key) or (key == "pad" and _is_guidance(inner)):
                yield BodyField(key, outer)
            elif isinstance(inner, (Mapping, list)) and key not in NOT_ARGUMENTS:
                waiting.append((BodyField(key, outer), inner))


def _is_guidance(value: Any) -> bool:
    """Whether this is guidance as one object, as the server's configuration has it: ``"pad": {"preference": ...}``."""
    return isinstance(value, Mapping) and any(is_known(key) or is_known(f"pad_{key}") for key in value)


class RefuseMisplaced:
    """ASGI middleware: HTTP 400 for a request with guidance where the server would ignore it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        vllm_config = engines.enter(scope)
        if scope["type"] == "lifespan" and vllm_config is not None:
            prompts.prepare(vllm_config)
        if scope["type"] != "http" or scope["method"] != "POST" or _content_type(scope) in FORMS:
            return await self.app(scope, receive, send)
        received: list[Message] = []
        while not received or (received[-1]["type"] == "http.request" and received[-1].get("more_body")):
            received.append(await receive())
        path = route_path(scope)
        words = _read(b"".join(message.get("body", b"") for message in received), path) or unguided(path, vllm_config)
        if words:
            from starlette.responses import JSONResponse

            error = {"message": words, "type": "BadRequestError", "param": words.split(":")[0], "code": 400}
            return await JSONResponse({"error": error}, 400)(scope, receive, send)

        async def again() -> Message:
            return received.pop(0) if received else await receive()

        return await self.app(scope, again, send)


def _content_type(scope: Scope) -> bytes:
    """The media type that vLLM reads: the first of several, in lower case."""
    values = (value for name, value in scope.get("headers", ()) if name == b"content-type")
    return next(values, b"").split(b";")[0].strip().lower()


def route_path(scope: Scope) -> str:
    """The path by which a request is routed: without ``--root-path``, if it begins with that."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _read(body: bytes, path: str) -> str | None:
    # UTF-16 and UTF-32, which JSON may come in too, have zeros; and a name may be escaped.
    if b"pad" not in body.lower() and b"\\u" not in body and b"\0" not in body:
        return None
    try:
        return misplaced(json.loads(body, object_pairs_hook=_all_pairs), path)
    except ValueError:
        return None  # vLLM will say so
    except RecursionError:
        return "the body: its objects and lists are nested too deeply to be read"


def _all_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As ``dict``, which keeps the last field of a name, with what it loses."""
    read = dict(pairs)
    if len(read) < len(pairs):
        kept: set[str] = set()
        lost: list[dict[str, Any]] = []
        for key, value in reversed(pairs):
            if key in kept:
                lost.append({key: value})
            kept.add(key)
        read[LOST] = lost
    return read
