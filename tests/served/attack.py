"""Requests of every kind that reach a server's port: good and bad, guided and not, and clients that go away."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.malformed import malformed

CHAT = [{"role": "user", "content": "say why"}]
XARGS, EXTRA_ARGS = ("vllm_xargs",), ("sampling_params", "extra_args")
ASKED = {"pad_persona": "terse"}


@dataclass(frozen=True)
class Route:
    """A path that answers, its body, where guidance goes in it, and where the answer stands."""

    path: str
    body: dict[str, Any]
    place: tuple[str, ...] = XARGS
    answer: Callable[[dict], Any] | None = None
    """None: it cannot be guided."""


ROUTES = (
    Route("/v1/completions", {"prompt": "say why", "max_tokens": 6}, XARGS, lambda a: a["choices"][0]["text"]),
    Route(
        "/v1/chat/completions",
        {"messages": CHAT, "max_tokens": 6},
        XARGS,
        lambda a: a["choices"][0]["message"]["content"],
    ),
    Route(
        "/v1/chat/completions/batch",
        {"messages": [CHAT, CHAT], "max_tokens": 6},
        XARGS,
        lambda a: [choice["message"]["content"] for choice in a["choices"]],
    ),
    Route(
        "/v1/responses",
        {"input": "say why", "max_output_tokens": 6},
        XARGS,
        lambda a: a["output"][0]["content"][0]["text"],
    ),
    Route("/v1/messages", {"messages": CHAT, "max_tokens": 6}, XARGS, lambda a: a["content"][0]["text"]),
    Route(
        "/inference/v1/generate",
        {"token_ids": [0, 50, 60, 70], "sampling_params": {"max_tokens": 6, "temperature": 0}},
        EXTRA_ARGS,
        lambda a: a["choices"][0]["token_ids"],
    ),
    Route("/invocations", {"prompt": "say why", "max_tokens": 6}, XARGS, lambda a: a["choices"][0]["text"]),
    Route("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [5, 6]}),
    Route("/v1/systemone", {"state": "a", "questions": {"q": {"type": "noul"}}}),
    Route("/v1/decisions", {"input": "a", "questions": [{"type": "boolean", "question": "b"}]}),
    Route("/cohere/v2/chat", {"messages": CHAT, "max_tokens": 6}),
)
CONTENT_TYPES = (
    *(("application/json",), ("Application/JSON",), ("application/json; charset=utf-16",), ("text/plain",), ()),
    *(("application/json", "text/plain"), ("text/plain", "application/json"), ("application/vnd.a+json",)),
    *(("multipart/form-data; boundary=x", "application/json"), ("application/json", "multipart/form-data; boundary=x")),
)
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")
PREFIXES = ("", "", "/api", "/api", "/api/api", "/")


@dataclass(frozen=True)
class Attack:
    route: Route
    body: bytes
    path: str
    content_types: tuple[str, ...] = ("application/json",)
    kind: str = "good"
    goes_away: bool = False
    case: Any = field(default=None, repr=False)


def put(body: dict[str, Any], place: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """A body with arguments in one of its fields."""
    if not place:
        return body | arguments
    return body | {place[0]: put(body.get(place[0]) or {}, place[1:], arguments)}


def text_of(route: Route, arguments: dict[str, Any] | None, place: tuple[str, ...] | None = None) -> str:
    body = {"model": "base", "temperature": 0, **route.body}
    return json.dumps(put(body, route.place if place is None else place, arguments) if arguments else body)


def attacks(rng: random.Random, num: int, num_heads: int, max_top_k: int) -> list[Attack]:
    """``kind``: "silent" asks for nothing; "guided" asks in the right place; "bad" must be refused."""
    made = []
    for i in range(num):
        route, kind = ROUTES[i % len(ROUTES)], rng.choice(("silent", "guided", "guided", "misplaced", "bad", "twice"))
        if kind == "silent" and route.answer is None:
            kind = "misplaced"
        if kind in ("silent", "guided"):
            text = text_of(route, ASKED if kind == "guided" else None)
        elif kind == "misplaced":
            places = [(), ("metadata",), ("chat_template_kwargs",), ("VLLM_XARGS",), ("extra_body", "vllm_xargs")]
            wrong = rng.choice([{"pad_persona": "terse"}, {"PAD-Persona": "terse"}, {"pad": {"persona": "terse"}}])
            text = text_of(route, wrong, rng.choice(places))
            if rng.random() < 0.2:
                text = text.replace("pad_", "\\u0070ad_")
        elif kind == "bad":
            text = text_of(route, malformed(rng, num_heads, max_top_k))
        else:
            key = json.dumps(route.place[0])
            text = text_of(route, ASKED)[:-1] + f", {key}: {{}}}}"
        plain = rng.random() < 0.4
        made.append(
            Attack(
                route,
                text.encode("utf-8" if plain else rng.choice(ENCODINGS)),
                ("" if plain else rng.choice(PREFIXES)) + route.path + ("" if plain or rng.random() < 0.9 else "/"),
                ("application/json",) if plain else rng.choice(CONTENT_TYPES),
                kind,
                kind in ("silent", "guided") and rng.random() < 0.15,
                text[:300],
            )
        )
    return made


def send(port: int, attack: Attack) -> tuple[int, str]:
    """HTTP status and body; 0 where the client has gone before the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest("POST", attack.path)
    for content_type in attack.content_types:
        connection.putheader("Content-Type", content_type)
    connection.putheader("Content-Length", str(len(attack.body)))
    connection.endheaders(attack.body)
    try:
        if attack.goes_away:
            return 0, ""
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
