"""Admission: refusing a bad request in the frontend, with what only the engine knows.

vLLM checks a request's parameters in the frontend process, through a classmethod that gets no engine configuration;
the reward model and the personas are in the engine's workers. An exception there would end the engine for everybody.
So an engine that starts announces what it accepts, in a file of a folder whose name every process finds in its
environment: the ``vllm.general_plugins`` hook puts it there before vLLM starts the others.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pad_vllm.params import PAD, PREFIX, check_int, check_persona
from pad_vllm.reward.template import PromptTemplate

if TYPE_CHECKING:
    from vllm import SamplingParams

logger = logging.getLogger(f"vllm.{__name__}")

ANNOUNCE_DIR = "PAD_VLLM_ANNOUNCE_DIR"
"""Environment: the folder. Set it by hand to one that all machines share when frontend and engine are on different
machines."""
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@dataclass(frozen=True)
class Announcement:
    """What an engine accepts. ``configured`` false: it runs without a reward model and accepts no guidance."""

    configured: bool
    personas: tuple[str, ...] = ()
    head_names: tuple[str, ...] = ()
    max_top_k: int = 0
    max_preference_tokens: int = 0
    tokenizer: dict[str, Any] | None = None
    """Arguments of ``AutoTokenizer.from_pretrained``; None: no tokenizer, and so no text preferences."""
    prompt_template: str = ""
    guides_all: bool = False
    """A default persona guides requests that ask for nothing."""

    def check(self, asked: PAD) -> None:
        """Raise ValueError if this engine cannot do what a request asks."""
        if not self.configured:
            raise ValueError(
                f"{', '.join(asked.extra_args())}: this server runs without a reward model; start it with "
                '--additional-config \'{"pad": {"reward_model": ...}}\''
            )
        if asked.persona is not None:
            check_persona(asked.persona, self.personas)
        if asked.top_k is not None:
            check_int("pad_top_k", asked.top_k, 1, self.max_top_k)
        if asked.weights is not None:
            check_weights(asked.weights, self.head_names)
        if asked.preference is not None:
            if self.tokenizer is None:
                raise ValueError("pad_preference: this server has no tokenizer (skip_tokenizer_init)")
            template = _template(json.dumps(self.tokenizer, sort_keys=True), self.prompt_template)
            check_preference(template, asked.preference, self.max_preference_tokens)


def check_weights(weights: tuple[float, ...], head_names: tuple[str, ...]) -> None:
    """Raise ValueError unless there is one weight for each value head."""
    if not head_names:
        raise ValueError("pad_weights: the reward model has no value heads")
    if len(weights) != len(head_names):
        raise ValueError(
            f"pad_weights: {len(weights)} weights for {len(head_names)} value heads ({', '.join(head_names)}); give "
            "one for each, in this order"
        )


def check_preference(template: PromptTemplate, preference: str, max_tokens: int) -> None:
    """Raise ValueError if a preference takes more than ``max_tokens`` in the reward model's prompt."""
    num_tokens = template.num_added_tokens(preference) - template.num_added_tokens("")
    if num_tokens > max_tokens:
        raise ValueError(f"pad_preference: {num_tokens} tokens, at most {max_tokens} are allowed")


@functools.lru_cache(maxsize=8)
def _template(tokenizer: str, prompt_template: str) -> PromptTemplate:
    from transformers import AutoTokenizer

    try:
        return PromptTemplate(AutoTokenizer.from_pretrained(**json.loads(tokenizer)), prompt_template)
    except OSError as error:
        raise ValueError(f"pad_preference: the frontend cannot read the reward model's tokenizer ({error})") from error


def register() -> None:
    """The ``vllm.general_plugins`` hook, run in every process before its engine is configured."""
    _make_folder()
    _refuse_beam_search_over_http()


def _make_folder() -> None:
    """Make the folder of announcements, once for a frontend and its engines."""
    if ANNOUNCE_DIR in os.environ:
        return
    try:
        folder, owner = tempfile.mkdtemp(prefix="pad-vllm-"), os.getpid()
    except OSError as error:
        logger.warning("No folder for announcements of PAD engines: %s", error)
        return
    os.environ[ANNOUNCE_DIR] = folder
    also = os.environ.get(RAY_COPIES)  # or Ray's workers would not know the folder
    os.environ[RAY_COPIES] = f"{also},{ANNOUNCE_DIR}" if also else ANNOUNCE_DIR
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))


def _refuse_beam_search_over_http() -> None:
    """Let a request for guidance and beam search at once be refused.

    vLLM's API server drops ``vllm_xargs`` on the way to beam search, before it asks any plugin, and would answer
    unguided. It makes the parameters in a method of the request, where a ValueError becomes HTTP 400.
    """
    for module, name in (("chat_completion", "ChatCompletionRequest"), ("completion", "CompletionRequest")):
        request_class = getattr(sys.modules.get(f"vllm.entrypoints.openai.{module}.protocol"), name, None)
        make_params = getattr(request_class, "to_beam_search_params", None)
        if make_params is None or hasattr(make_params, "__wrapped__"):
            continue

        @functools.wraps(make_params)
        def refuse_or_make(self, *args, _make_params=make_params, **kwargs):
            asked = [key for key in getattr(self, "vllm_xargs", None) or {} if str(key).startswith(PREFIX)]
            if asked:
                raise ValueError(f"{', '.join(asked)}: beam search cannot be guided; leave out use_beam_search")
            return _make_params(self, *args, **kwargs)

        request_class.to_beam_search_params = refuse_or_make


def is_beam_search(params: SamplingParams) -> bool:
    """Whether these are a step of vLLM's beam search, which is made of requests for one token and its logprobs."""
    return (params.max_tokens, params.detokenize, params.watermarking) == (1, False, False) and bool(params.logprobs)


def announce(announcement: Announcement, engine: object) -> None:
    """Tell the frontends what ``engine`` accepts, for as long as the object and its process live.

    Raises:
        ValueError: an engine that guides cannot write where its frontends would look.
    """
    try:
        register()
        folder = Path(os.environ.get(ANNOUNCE_DIR, os.devnull))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()} | asdict(announcement)))
        part.rename(path)
    except OSError as error:
        if not announcement.configured:
            return  # without it, the frontend refuses guidance all the same
        raise ValueError(
            f"pad cannot tell the frontend what it accepts ({error}); set {ANNOUNCE_DIR} to a writable folder"
        ) from error
    owner = os.getpid()  # a forked child inherits the finalizer, and is not the engine
    weakref.finalize(engine, lambda: os.getpid() == owner and path.unlink(missing_ok=True))


def announcements() -> list[Announcement]:
    """What the living engines of this frontend accept."""
    folder = Path(os.environ.get(ANNOUNCE_DIR, "/nonexistent"))
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return []
    return [announcement for path in paths if (announcement := _read(path)) is not None]


@functools.lru_cache(maxsize=64)
def _parse(path: Path) -> tuple[str, int, Announcement]:
    record = json.loads(path.read_text())
    host, pid = record.pop("host"), record.pop("pid")
    lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
    return host, pid, Announcement(**record | lists)


def _read(path: Path) -> Announcement | None:
    """A living engine's announcement; None for one withdrawn, left by an engine that was killed, or unreadable."""
    try:
        host, pid, announcement = _parse(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("Cannot read the announcement %s of a PAD engine: %r", path, error)
        return None
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # alive, and somebody else's
    return announcement


def validate(sampling_params: SamplingParams) -> None:
    """Refuse a request whose guidance is malformed, or which no engine of this frontend could guide.

    Raises:
        ValueError: the message names the argument, its value and what is allowed. vLLM turns it into HTTP 400.
    """
    asked = PAD.from_extra_args(sampling_params.extra_args)
    if asked is None and not is_beam_search(sampling_params):
        return
    engines = announcements()
    if asked is None:
        if any(engine.guides_all for engine in engines):
            raise ValueError(
                "beam search cannot be guided: it goes by log-probabilities of the base model, and this server guides "
                "every request (pad.default_persona)"
            )
        return
    if not engines:
        raise ValueError(
            f"{', '.join(asked.extra_args())}: no engine has announced PAD guidance to this frontend, so the request "
            "would go unguided. Speculative decoding on the V1 runner drops logits processors; VLLM_PLUGINS must "
            f"include 'pad' where it is set; {ANNOUNCE_DIR} must name a shared folder where the engine runs on "
            "another machine"
        )
    errors = []
    for engine in engines:
        try:
            return engine.check(asked)
        except ValueError as error:
            errors.append(error)
    raise errors[0]
