"""Which of the engines that announced themselves are this frontend's own, and what its own configuration says.

Servers may share a folder of announcements: one that is named by hand, or that a common launcher made. A frontend goes
by its own engines alone; and whether a tokenizer may bring code is for its own configuration to say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pad_vllm.channel import LAUNCH, Announcement, announced, data_parallel_address, mark_served, without_rank
from pad_vllm.config import read_pad
from pad_vllm.personas import Personas, personas_shown

if TYPE_CHECKING:
    from starlette.types import Scope
    from vllm.config import VllmConfig

MAX_FRAMES = 8
"""Between vLLM's input processor and this module there are fewer."""

NO_PERSONAS = Personas()

Server = tuple[str, str]
"""An engine's ``instance_id`` without its data-parallel rank, and its ``data_parallel_address``."""

_serving: ContextVar[VllmConfig | None] = ContextVar("pad_serving", default=None)
_rendering: ContextVar[bool] = ContextVar("pad_rendering", default=False)
_servers: set[Server] = set()
"""Those that this process is a frontend of; empty as long as it has none, or nobody knows."""
_trusted: dict[str, frozenset[tuple[Any, Any]]] = {}
"""By ``instance_id``; the configuration may be a file, and is read once."""


def enter(scope: Scope) -> VllmConfig | None:
    """Note for an HTTP request, or a server's start, which engine the application has."""
    client = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    vllm_config = getattr(client, "vllm_config", None)
    _serving.set(vllm_config)
    _rendering.set(str(scope.get("path", "")).endswith("/render"))
    if vllm_config is not None:
        _servers.add(server(vllm_config))
    return vllm_config


def of_this_request() -> VllmConfig | None:
    """The configuration of the engine that a request is being admitted to: that of the application which serves it, or
    from the frames of vLLM's input processor, which hands ``validate_params`` none."""
    if (vllm_config := _serving.get()) is not None:
        return vllm_config
    frame = sys._getframe(1).f_back
    for _ in range(MAX_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name == "_validate_params":
            return getattr(frame.f_locals.get("self"), "vllm_config", None)
        frame = frame.f_back
    return None


def prompt_of_this_request() -> Sequence[int] | None:
    """The ids of its prompt, from the frames of vLLM's servers and of its input processor; None where they show none,
    and the worker decides."""
    frame = sys._getframe(1).f_back
    for _ in range(MAX_FRAMES):
        if frame is None:
            return None
        for name in ("engine_input", "prompt"):
            prompt = frame.f_locals.get(name)
            if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt_token_ids"), Sequence):
                return prompt["prompt_token_ids"]
        frame = frame.f_back
    return None


def server(vllm_config: VllmConfig) -> Server:
    # A frontend that balances nothing beyond its machine has no engines of others.
    parallel = vllm_config.parallel_config
    is_alone = parallel.local_engines_only or parallel.data_parallel_size == 1
    return mark_served(vllm_config.instance_id), "" if is_alone else data_parallel_address(vllm_config)


def own(vllm_config: VllmConfig | None = None) -> dict[Path, Announcement]:
    """What the engines of ``vllm_config``'s server announced, by their files; without it, those of every server that
    this process is a frontend of. One of several API servers has a configuration of its own, with another id than the
    one from which the engines have theirs: its own are those that were launched with it."""
    servers = _servers if vllm_config is None else {server(vllm_config)}
    found = announced()
    if not servers:
        return found
    ids, addresses = {one for one, _ in servers}, {address for _, address in servers if address}
    mine = {
        path: engine
        for path, engine in found.items()
        if without_rank(engine.instance_id) in ids or engine.data_parallel_address in addresses
    }
    if mine or addresses:
        return mine
    return {path: engine for path, engine in found.items() if engine.launch == os.environ.get(LAUNCH)} or found


def is_serving() -> bool:
    """Whether this is done for a request of an API server's, whose parameters are its own."""
    return _serving.get() is not None


def is_rendering() -> bool:
    """Whether the client gets the request back, as tokens and parameters that it may send later."""
    return _rendering.get()


def personas_of(own: Mapping[Path, Announcement]) -> dict[Path, Personas]:
    """What requests get of the personas, by the engines' files: for all engines of a server what the first of them
    shows, so that it is one version whichever frontend admits a request and whichever engine guides it."""
    found: dict[str, Personas] = {}

    def server_of(path: Path) -> str:
        return own[path].data_parallel_address or without_rank(own[path].instance_id) or path.stem

    for path in sorted(own, key=lambda path: (own[path].labels[1].zfill(8), path)):
        if server_of(path) not in found and (personas := personas_shown(path)) is not None:
            found[server_of(path)] = personas
    return {path: found.get(server_of(path), NO_PERSONAS) for path in own}


def may_run_code(tokenizer: Mapping[str, Any], vllm_config: VllmConfig | None) -> bool:
    """Whether this frontend's own configuration trusts the code of an announced tokenizer.

    Args:
        tokenizer: arguments of ``AutoTokenizer.from_pretrained``, which may come from anywhere.
        vllm_config: the frontend's own.
    """
    if vllm_config is None:
        return False
    named = tokenizer.get("pretrained_model_name_or_path"), tokenizer.get("revision")
    if vllm_config.instance_id not in _trusted:
        _trusted[vllm_config.instance_id] = frozenset(_read_trusted(vllm_config))
    return named in _trusted[vllm_config.instance_id]


def _read_trusted(vllm_config: VllmConfig) -> Iterator[tuple[Any, Any]]:
    """Name and revision of what this frontend's own configuration trusts."""
    pad, model = read_pad(vllm_config.additional_config) or {}, vllm_config.model_config
    if pad.get("trust_remote_code") is True:
        yield pad.get("reward_model"), pad.get("revision")
        yield pad.get("adapter_base"), None
    if model is not None and model.trust_remote_code is True:
        yield model.tokenizer, model.tokenizer_revision
        yield model.model, model.revision
