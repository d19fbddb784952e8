"""Every patch of vLLM's API server: what it would drop, guidance among it, before it asks any plugin.

That is: arguments that stand elsewhere than in ``vllm_xargs`` (:mod:`.http`), all arguments on the way to beam search,
and all requests that would be answered by log-probabilities where everybody was to be guided. And one path more, which
says what the server's guidance is (:mod:`.about`); and ``pad_*`` under the ``/metrics`` of several API processes.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any

from prometheus_client import multiprocess

from pad_vllm.checks import shown, shown_name
from pad_vllm.frontend import about, admission, collector, engines
from pad_vllm.frontend.http import RefuseMisplaced, misplaced, unguided
from pad_vllm.params import PREFIX, is_ours

SALT = f"{PREFIX}cache_salt"

REQUESTS = (
    ("chat_completion", "ChatCompletionRequest"),
    ("completion", "CompletionRequest"),
    ("responses", "ResponsesRequest"),
)


ENDPOINTS = (
    ("anthropic", "AnthropicServingMessages", "create_messages", "/v1/messages"),
    ("cohere", "CohereServingChatV2", "create_chat_v2", "/cohere/v2/chat"),
    ("scale_out.token_in_token_out", "ServingTokens", "serve_tokens", "/inference/v1/generate"),
    ("generate.generative_scoring", "ServingGenerativeScoring", "create_generative_scoring", "/generative_scoring"),
    ("generate.structured_decisions", "ServingStructuredDecisions", "create_decision", "/v1/systemone"),
    ("openai.decisions", "OpenAIServingDecisions", "create_decisions", "/v1/decisions"),
)
"""What answers requests whose class drops arguments as it reads them, or never becomes sampling parameters: package,
class, method, and the path that it is offered under. The last is of 0.33."""


def install() -> None:
    """Put the checks into vLLM's API server, where this process has imported it; as often as one likes."""
    for module, name in REQUESTS:
        request_class = getattr(sys.modules.get(f"vllm.entrypoints.openai.{module}.protocol"), name, None)
        _wrap(request_class, "to_sampling_params", _refuse_early)
        _wrap(request_class, "to_beam_search_params", _refuse_beams)
    for package, name, method, path in ENDPOINTS:
        serving_class = getattr(sys.modules.get(f"vllm.entrypoints.{package}.serving"), name, None)
        _wrap(serving_class, method, functools.partial(_refuse_at, path))
    _wrap(sys.modules.get("vllm.entrypoints.launchers.app"), "init_entrypoints_middleware", _add_to_app)
    _wrap(multiprocess.MultiProcessCollector, "collect", _add_metrics)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    function = getattr(owner, name, None)
    if function is not None and not hasattr(function, "_pad_wraps"):
        wrapped = functools.wraps(function)(wrapper(function))
        wrapped._pad_wraps = function  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _refuse_early(make_params: Callable) -> Callable:
    """A ValueError where a request becomes parameters is HTTP 400, streamed or not; later, a stream has begun."""

    def make(request, *args, **kwargs):
        _refuse_beside(request)
        params = make_params(request, *args, **kwargs)
        pass_cache_salt(request, params)
        # Without an engine it only renders, or it is no API server, and the engine's own check is early enough.
        if any(is_ours(key) for key in params.extra_args or {}) and engines.of_this_request() is not None:
            # What a persona says is for the engine alone, not for a client that gets its request back.
            admission.validate(copy.copy(params) if engines.is_rendering() else params)
        return params

    return make


def pass_cache_salt(request: Any, params: Any) -> None:
    """A request's own ``cache_salt`` separates users in the reward model's KV cache too.

    Raises:
        ValueError: it says another one in its arguments.
    """
    salt = getattr(request, "cache_salt", None)
    if not salt:
        return
    if not salt.strip():  # vLLM takes white space; for PAD it would be no text
        salt = f"white space {hashlib.sha256(salt.encode()).hexdigest()}"
    given = params.extra_args or {}
    if given.get(SALT, salt) != salt:
        raise ValueError(f"{SALT}={shown(given[SALT])}: the request's cache_salt is another; leave one of them out")
    params.extra_args = {**given, SALT: salt}


def _refuse_beams(make_params: Callable) -> Callable:
    def make(request, *args, **kwargs):
        _refuse_beside(request)
        if asked := [key for key in request.vllm_xargs or {} if is_ours(key)]:
            raise ValueError(f"{shown_name(', '.join(asked))}: beam search cannot be guided; leave out use_beam_search")
        return make_params(request, *args, **kwargs)

    return make


def _refuse_beside(request: Any) -> None:
    """For requests that come in no HTTP body of their own, as those of vLLM's batch runner."""
    if words := misplaced(request.model_extra):
        raise ValueError(words)


def _refuse_at(path: str, answer: Callable) -> Callable:
    """By the body as vLLM itself has read it."""

    async def checked(self, request, raw_request=None, *args, **kwargs):
        body = getattr(raw_request, "_json", None) or getattr(request, "model_extra", None)
        if words := misplaced(body, path) or unguided(path, engines.of_this_request()):
            raise ValueError(words)
        if (params := getattr(request, "sampling_params", None)) is not None:
            pass_cache_salt(request, params)
        return await answer(self, request, raw_request, *args, **kwargs)

    return checked


def _add_to_app(init: Callable) -> Callable:
    def add(args, app, *rest, **kwargs):
        from starlette.routing import Route

        app.router.routes.append(Route(about.PATH, about.send_about, methods=["GET"]))
        app.add_middleware(RefuseMisplaced)  # first, so that vLLM's own stand before it: authentication is theirs
        return init(args, app, *rest, **kwargs)

    return add


def _add_metrics(collect: Callable) -> Callable:
    """Several API processes answer from files that each of them writes its own counts into. The engines' numbers are in
    none of them: whoever answers reads the boards."""

    def collect_all(self):
        yield from collect(self)
        yield from collector.Collector().collect()

    return collect_all
