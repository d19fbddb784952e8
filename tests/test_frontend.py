"""Which bodies of requests have guidance where vLLM's API server would ignore it."""

from __future__ import annotations

import asyncio
import json

import pytest

from pad_vllm.frontend.http import RefuseMisplaced, misplaced

pytestmark = pytest.mark.every_release

SCHEMA = {"type": "object", "properties": {"pad_beta": {"type": "number"}}}


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"pad_beta": 1, "pad_perona": "validation names it"}},
        {"tools": [{"function": {"name": "pad_beta", "parameters": SCHEMA}}]},
        {"response_format": {"json_schema": {"schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"messages": [{"role": "user", "content": "pad_beta", "pad_beta": 1}]},
        {"mm_processor_kwargs": {"pad": True, "pad_token": 0}, "padding": True},
        ["pad_beta"],
        None,
    ],
)
def test_what_is_in_its_place_passes(body):
    assert misplaced(body, "/v1/chat/completions") is None


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/completions", {"pad_anything": 1}, "pad_anything"),
        ("/v1/completions", {"a": {"b": {"PAD-Beta": 1}}}, "a.b.PAD-Beta"),
        ("/v1/completions", {"metadata": {"pad": {"beta": 1}}}, "metadata.pad"),
        ("/inference/v1/generate", {"vllm_xargs": {"pad_beta": 1}}, "vllm_xargs.pad_beta"),
        ("/cohere/v2/chat", {"vllm_xargs": {"pad_perona": 1}}, "vllm_xargs.pad_perona"),
    ],
)
def test_what_would_be_ignored_is_named(path, body, where):
    assert misplaced(body, path).startswith(f"{where}: ")


def test_generate_has_a_place_of_its_own():
    assert misplaced({"sampling_params": {"extra_args": {"pad_beta": 1}}}, "/inference/v1/generate") is None


def post(body: bytes, pieces: int, content_type: bytes = b"application/json") -> tuple[bytes, int]:
    """What the application behind the middleware reads, and the status that the client sees."""
    size = -(-len(body) // pieces)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    waiting = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    read, sent = [], []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            read.append(message["body"])
            if not message["more_body"]:
                return await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"content-type", content_type)]}
    asyncio.run(RefuseMisplaced(app)(scope, receive, send))
    return b"".join(read), sent[0]["status"]


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_middleware_passes_bodies_on_as_they_came(pieces):
    for body in (b'{"prompt": "pad_beta \\u00e9"}', b'{"pad_beta": ', b"[" * 100_000, "[1, é".encode("latin-1")):
        assert post(body, pieces) == (body, 200)
    assert post(json.dumps({"pad_beta": 1}).encode(), pieces) == (b"", 400)
    assert post(b'{"\\u0070ad_beta": 1}', pieces) == (b"", 400)
    assert post(b'{"pad_beta": 1}', pieces, b"multipart/form-data") == (b'{"pad_beta": 1}', 200)
