"""Every patch of vLLM's API server: what it would drop, guidance among it, before it asks any plugin.

That is: arguments that stand elsewhere than in ``vllm_xargs`` (:mod:`.http`), and all arguments on the way to beam
search.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from pad_vllm.channel import announced
from pad_vllm.frontend import admission
from pad_vllm.frontend.http import RefuseMisplaced, misplaced
from pad_vllm.params import PREFIX, is_ours, shown

SALT = f"{PREFIX}cache_salt"

REQUESTS = (
    ("chat_completion", "ChatCompletionRequest"),
    ("completion", "CompletionRequest"),
    ("responses", "ResponsesRequest"),
)


def install() -> None:
    """Put the checks into vLLM's API server, where this process has imported it; as often as one likes."""
    for module, name in REQUESTS:
        request_class = getattr(sys.modules.get(f"vllm.entrypoints.openai.{module}.protocol"), name, None)
        _wrap(request_class, "to_sampling_params", _refuse_early)
        _wrap(request_class, "to_beam_search_params", _refuse_beams)
    serving = sys.modules.get("vllm.entrypoints.scale_out.token_in_token_out.serving")
    _wrap(getattr(serving, "ServingTokens", None), "serve_tokens", _pass_cache_salt)
    _wrap(sys.modules.get("vllm.entrypoints.launchers.app"), "init_entrypoints_middleware", _add_middleware)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    function = getattr(owner, name, None)
    if function is not None and not hasattr(function, "__wrapped__"):
        setattr(owner, name, functools.wraps(function)(wrapper(function)))


def _refuse_early(make_params: Callable) -> Callable:
    """A ValueError where a request becomes parameters is HTTP 400, streamed or not; later, a stream has begun."""

    def make(request, *args, **kwargs):
        _refuse_beside(request)
        params = make_params(request, *args, **kwargs)
        pass_cache_salt(request, params)
        if any(is_ours(key) for key in params.extra_args or {}) and announced():  # none: it only renders
            admission.validate(params)
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
    given = params.extra_args or {}
    if given.get(SALT, salt) != salt:
        raise ValueError(f"{SALT}={shown(given[SALT])}: the request's cache_salt is another; leave one of them out")
    params.extra_args = {**given, SALT: salt}


def _pass_cache_salt(generate: Callable) -> Callable:
    async def serve(self, request, *args, **kwargs):
        pass_cache_salt(request, request.sampling_params)
        return await generate(self, request, *args, **kwargs)

    return serve


def _refuse_beams(make_params: Callable) -> Callable:
    def make(request, *args, **kwargs):
        _refuse_beside(request)
        if asked := [key for key in request.vllm_xargs or {} if is_ours(key)]:
            raise ValueError(f"{', '.join(asked)}: beam search cannot be guided; leave out use_beam_search")
        return make_params(request, *args, **kwargs)

    return make


def _refuse_beside(request: Any) -> None:
    """For requests that come in no HTTP body of their own, as those of vLLM's batch runner."""
    if words := misplaced(request.model_extra):
        raise ValueError(words)


def _add_middleware(init: Callable) -> Callable:
    def add(args, app, *rest, **kwargs):
        app.add_middleware(RefuseMisplaced)  # first, so that vLLM's own stand before it: authentication is theirs
        return init(args, app, *rest, **kwargs)

    return add
