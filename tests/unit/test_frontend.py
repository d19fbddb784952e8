"""Which bodies of requests have guidance where vLLM's API server would ignore it."""

from __future__ import annotations

import asyncio
import importlib
import json
from types import SimpleNamespace

import pytest

from pad_vllm import channel
from pad_vllm.frontend import patches
from pad_vllm.frontend.http import SCORING_ENDPOINTS, UNGUIDED_ENDPOINTS, RefuseMisplaced, misplaced, unguided
from pad_vllm.params import PAD

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


JSON = ((b"content-type", b"application/json"),)


def post(
    body: bytes, pieces: int = 1, headers=JSON, path: str = "/v1/completions", root: str = ""
) -> tuple[bytes, int]:
    """What the application behind the middleware reads, and the status that the client sees."""
    size = max(-(-len(body) // pieces), 1)
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

    scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": headers}
    asyncio.run(RefuseMisplaced(app)(scope, receive, send))
    return b"".join(read), sent[0]["status"]


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_middleware_passes_bodies_on_as_they_came(pieces):
    for body in (b'{"prompt": "pad_beta \\u00e9"}', b'{"pad_beta": ', "[1, é".encode("latin-1")):
        assert post(body, pieces) == (body, 200)
    assert post(json.dumps({"pad_beta": 1}).encode(), pieces) == (b"", 400)
    assert post(b'{"\\u0070ad_beta": 1}', pieces) == (b"", 400)
    form = ((b"content-type", b"Multipart/Form-Data; boundary=x"), *JSON)
    assert post(b'{"pad_beta": 1}', pieces, form) == (b'{"pad_beta": 1}', 200)


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_body_is_read_as_vllm_reads_it(encoding):
    for text in ('{"pad_beta": 1}', '{"metadata": [{"\\u0070ad-Beta": 1}]}', '{"a": 1, "pad": {"beta": 1}}'):
        assert post(text.encode(encoding)) == (b"", 400), text
    harmless = '{"prompt": "pad_beta"}'.encode(encoding)
    assert post(harmless) == (harmless, 200)


@pytest.mark.parametrize(
    "headers",
    [
        ((b"content-type", b"Application/JSON"),),
        ((b"content-type", b"APPLICATION/JSON; charset=utf-16"),),
        (*JSON, (b"content-type", b"text/plain")),
        (*JSON, (b"content-type", b"multipart/form-data")),
        ((b"content-type", b"application/vnd.api+json"),),
        ((b"content-type", b"text/plain"),),
        (),
    ],
)
def test_a_header_does_not_hide_a_body(headers):
    assert post(b'{"pad_beta": 1}', headers=headers) == (b"", 400)


def test_a_name_that_is_given_twice_hides_nothing():
    """JSON's readers keep the last."""
    for body in (
        b'{"vllm_xargs": {"pad_beta": 1}, "vllm_xargs": {}}',
        b'{"vllm_xargs": {"pad_beta": 1, "pad_beta": 0}}',
        b'{"vllm_xargs": {"pad_beta": 1}, "vllm_xargs": null, "prompt": "a"}',
    ):
        assert post(body) == (b"", 400)
    twice = b'{"prompt": "pad", "prompt": "b", "vllm_xargs": {"pad_beta": 1}}'
    assert post(twice) == (twice, 200)


def test_a_path_is_compared_without_the_servers_root(tmp_path, monkeypatch):
    body = b'{"vllm_xargs": {"pad_beta": 1}}'
    generate = b'{"sampling_params": {"extra_args": {"pad_beta": 1}}}'
    for root in ("", "/api", "/a/b/"):
        at = root.rstrip("/")
        for path in ("/generative_scoring", "/v1/systemone", "/v1/decisions", "/cohere/v2/chat"):
            assert post(body, path=at + path, root=root) == (b"", 400)
            assert post(body, path=path, root=root) == (b"", 400)
        assert post(body, path=f"{at}/v1/completions", root=root) == (body, 200)
        assert post(generate, path=f"{at}/inference/v1/generate", root=root) == (generate, 200)
        assert post(body, path=f"{at}/inference/v1/generate", root=root) == (b"", 400)
    monkeypatch.setenv(channel.ANNOUNCE_DIR, str(tmp_path))
    engine = type("Engine", (), {})()
    channel.announce(channel.Announcement(True, default_persona="house"), engine)
    assert post(b"{}", path="/api/v1/systemone", root="/api") == (b"", 400)
    assert post(b"{}", path="/api/v1/completions", root="/api") == (b"{}", 200)


def test_a_body_that_cannot_be_read_is_refused_or_left_to_vllm():
    deep = b'{"pad": ' * 100_000
    assert post(deep) == (b"", 400)
    number = b'{"pad": ' + b"9" * 5000 + b"}"
    assert post(number) == (number, 200)


@pytest.mark.parametrize("where", ["key", "path", "xargs", "twice"])
def test_a_refusal_repeats_no_more_than_a_line(where):
    long = "x" * 10_000
    body = {
        "key": {f"pad_{long}": 1},
        "path": {long: {long: {"pad_beta": 1}}},
        "xargs": {"metadata": {"pad_beta": long}},
        "twice": {long: [[{"pad": {"beta": long}}]]},
    }[where]
    assert 0 < len(misplaced(body, "/v1/completions")) < 300
    assert 0 < len(misplaced({"vllm_xargs": body}, "/v1/systemone")) < 300


def test_names_are_compared_once_each(monkeypatch):
    """However many there are, and however deep."""
    from pad_vllm.frontend import http

    calls = []
    for name in ("is_known", "is_ours"):
        monkeypatch.setattr(http, name, calls.append)
    body: dict = {f"a{i}": {} for i in range(1000)}
    for i in range(900):
        body = {f"b{i}": body}
    assert misplaced(body, "/v1/completions") is None
    assert len(calls) == 1900


class Request:
    """A request whose class dropped what it does not know, and the HTTP request that it came in."""

    model_extra = None

    def __init__(self, body):
        self._json = body


def serving_classes() -> dict[str, tuple[type, str]]:
    """Path -> the class of the installed vLLM that answers there, and its method."""
    found = {}
    for package, name, method, path in patches.ENDPOINTS:
        try:
            module = importlib.import_module(f"vllm.entrypoints.{package}.serving")
        except ImportError:
            assert path in ("/v1/decisions", "/cohere/v2/chat")  # 0.33's, and what needs Cohere's package
            continue
        found[path] = getattr(module, name), method
    patches.install()
    return found


def test_each_request_class_has_a_second_check(tmp_path, monkeypatch):
    """Where a body got past the middleware, vLLM's own reading of it is held against the same rule."""
    classes = serving_classes()
    assert classes.keys() >= {"/v1/messages", "/generative_scoring", "/v1/systemone", "/inference/v1/generate"}

    def call(path: str, body) -> None:
        serving_class, method = classes[path]
        bare = serving_class.__new__(serving_class)
        asyncio.run(getattr(bare, method)(Request(body), Request(body)))

    for path in classes:
        with pytest.raises(ValueError, match=r"pad_beta: (this endpoint cannot be|guidance goes into)"):
            call(path, {"metadata": {"pad_beta": 1}})
        with pytest.raises(AttributeError):  # it is let through: there is no engine behind it
            call(path, {"metadata": {"other": 1}})
    monkeypatch.setenv(channel.ANNOUNCE_DIR, str(tmp_path))
    engine = type("Engine", (), {})()
    channel.announce(channel.Announcement(True, default_persona="house"), engine)
    for path in classes.keys() & set(SCORING_ENDPOINTS):
        with pytest.raises(ValueError, match=r"pad.default_persona: this server guides every request"):
            call(path, {"state": "a"})


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
        blank = [request_class(model="base", cache_salt=salt, **body) for salt in (" ", "\t" * 128)]  # vLLM takes them
        salts = {PAD.from_extra_args(one.to_sampling_params(8, {}).extra_args).cache_salt for one in blank}
        assert len(salts) == 2
    request = SimpleNamespace(cache_salt="tenant", sampling_params=vllm.SamplingParams())
    with pytest.raises(AttributeError, match="_check_model"):  # it went on to vLLM's own, which has no server here
        asyncio.run(ServingTokens.serve_tokens(object(), request))
    assert request.sampling_params.extra_args == {"pad_cache_salt": "tenant"}


def test_scores_are_refused_where_every_request_is_guided(tmp_path, monkeypatch):
    monkeypatch.setenv(channel.ANNOUNCE_DIR, str(tmp_path))
    assert unguided("/v1/systemone") is None
    engine = type("Engine", (), {})()
    channel.announce(channel.Announcement(True, default_persona="house"), engine)
    assert unguided("/v1/systemone").startswith("pad.default_persona: this server guides every request")
    assert unguided("/v1/completions") is None
