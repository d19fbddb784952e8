"""``GET /v1/pad``: what this server's guidance is, for clients that may send it requests.

The path is under ``/v1``, so vLLM's ``--api-key`` protects the names of personas too.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pad_vllm.frontend import admission, engines
from pad_vllm.params import MAX_BETA, MAX_PREFERENCE_CHARS, MAX_PREFERENCES, PAD, PREFIX, REFERENCES

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from vllm.config import VllmConfig

PATH = "/v1/pad"


def about_server(vllm_config: VllmConfig | None) -> dict[str, Any]:
    """What requests may ask of the engines of ``vllm_config``'s server; docs/playground.md has the fields.

    ``guides`` is false where no engine would guide; then there is nothing else but the version and the arguments.
    """
    told: dict[str, Any] = {
        "version": installed_version(),
        "guides": False,
        "arguments": [f"{PREFIX}{field.name}" for field in fields(PAD)],
    }
    announced = engines.own(vllm_config)
    own = [(path, engine) for path, engine in announced.items() if engine.configured]
    if not own or (vllm_config is not None and admission.drops_processors(vllm_config)):
        return told
    path, engine = own[0]  # the engines of one server have one configuration
    model = None if vllm_config is None else vllm_config.model_config
    return told | {
        "guides": True,
        **(engine.about or {}),
        "personas": list(engines.personas_of(announced)[path].arguments),
        "default_persona": engine.default_persona,
        "heads": list(engine.head_names),
        "adapters": list(engine.adapters),
        "references": list(REFERENCES),
        "limits": {
            "beta": MAX_BETA,
            "top_k": engine.max_top_k,
            "preferences": MAX_PREFERENCES,
            "preference_chars": MAX_PREFERENCE_CHARS,
            "preference_tokens": engine.max_preference_tokens if engine.tokenizer else 0,
        },
        "logprobs_mode": getattr(model, "logprobs_mode", None),
        "max_logprobs": getattr(model, "max_logprobs", None),
    }


def installed_version() -> str | None:
    try:
        return version("pad-vllm")
    except PackageNotFoundError:  # it is on PYTHONPATH
        return None


async def send_about(request: Request) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(about_server(engines.of_this_request()))
