"""Which bodies of requests have guidance where vLLM's API server would ignore it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from pad_vllm import channel
from pad_vllm.frontend import patches
from pad_vllm.frontend.http import UNGUIDED_ENDPOINTS, RefuseMisplaced, misplaced, unguided

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
        ("/v1/systemone", {"vllm_xargs": {"pad_beta": 1}, "questions": {}}, "vllm_xargs.pad_beta"),
        ("/generative_scoring", {"pad_beta": 1}, "pad_beta"),
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


GUIDED_ROUTES = {
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/inference/v1/generate", "/invocations"),
}
"""Their requests become sampling parameters with the arguments in them. ``/invocations`` is any of the others."""
AUDIO_ROUTES = {"/v1/audio/transcriptions", "/v1/audio/translations"}
"""Of bases that hear, which do not start with guidance."""
OTHER_ROUTES = {
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel", "/ping"),
    *(
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/abort_requests",
        "/inference/v1/abort_requests",
    ),
    *("/start_profile", "/stop_profile", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
    *("/collective_rpc", "/sleep", "/wake_up", "/release_kv_cache_memory", "/pause", "/resume"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    *("/weight_checker", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply"),
    *("/v1/embeddings", "/v2/embed", "/classify", "/pooling", "/score", "/v1/score"),
    *("/rerank", "/v1/rerank", "/v2/rerank"),
}
"""They generate nothing. Nor does a path that ends in render or derender: text to tokens and back."""


def post_routes(monkeypatch) -> set[str]:
    """Paths of the installed vLLM's API server that take POST, with everything that it can offer."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ENABLE_COHERE_API", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-fault-tolerance"])
    app = build_app(args, (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS))
    waiting, found = list(app.routes), set()
    while waiting:
        route = waiting.pop()
        waiting += getattr(route, "routes", None) or []
        if "POST" in (getattr(route, "methods", None) or ()):
            found.add(route.path)
    return found


def test_every_route_is_guided_or_refused_or_generates_nothing(monkeypatch):
    """A new endpoint of a new vLLM has to be looked at: else it could answer unguided in silence."""
    found = post_routes(monkeypatch)
    assert found >= {"/v1/chat/completions", "/v1/systemone", "/generative_scoring"}
    known = GUIDED_ROUTES | AUDIO_ROUTES | OTHER_ROUTES
    unknown = {
        path
        for path in found - known
        if not path.startswith(UNGUIDED_ENDPOINTS) and not path.endswith(("/render", "/derender"))
    }
    assert not unknown


def test_a_batch_of_chats_carries_its_arguments():
    """Its requests are made from fields that it does not declare."""
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest

    chat = [{"role": "user", "content": "a"}]
    batch = BatchChatCompletionRequest(model="base", messages=[chat], vllm_xargs={"pad_beta": 1.5})
    request = batch.to_chat_completion_request(chat)
    assert request.to_sampling_params(8, {}).extra_args == {"pad_beta": 1.5}


def test_a_requests_own_cache_salt_separates_users_in_the_reward_model_too():
    """Of every class that becomes sampling parameters, and of tokens in, tokens out; a request without is untouched."""
    import vllm
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    patches.install()
    requests = {
        ChatCompletionRequest: {"messages": [{"role": "user", "content": "a"}]},
        CompletionRequest: {"prompt": "a"},
        ResponsesRequest: {"input": "a"},
    }
    for request_class, body in requests.items():
        request = request_class(model="base", cache_salt="tenant", vllm_xargs={"other": 1}, **body)
        extra_args = request.to_sampling_params(8, {}).extra_args
        assert {"other": 1, "pad_cache_salt": "tenant"}.items() <= extra_args.items()
        assert request.vllm_xargs == {"other": 1}
        assert "pad_cache_salt" not in (request_class(model="base", **body).to_sampling_params(8, {}).extra_args or {})
        both = request_class(model="base", cache_salt="tenant", vllm_xargs={"pad_cache_salt": "other"}, **body)
        with pytest.raises(ValueError, match="pad_cache_salt='other': the request's cache_salt is another"):
            both.to_sampling_params(8, {})
    request = SimpleNamespace(cache_salt="tenant", sampling_params=vllm.SamplingParams())
    with pytest.raises(AttributeError, match="_check_model"):  # it went on to vLLM's own, which has no server here
        asyncio.run(ServingTokens.serve_tokens(object(), request))
    assert request.sampling_params.extra_args == {"pad_cache_salt": "tenant"}


def test_scores_are_refused_where_every_request_is_guided(tmp_path, monkeypatch):
    monkeypatch.setenv(channel.ANNOUNCE_DIR, str(tmp_path))
    assert unguided("/v1/systemone") is None
    engine = type("Engine", (), {})()
    channel.announce(channel.Announcement(True, personas=("house",), default_persona="house"), engine)
    assert unguided("/v1/systemone").startswith("pad.default_persona: this server guides every request")
    assert unguided("/v1/completions") is None
