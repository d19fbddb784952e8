"""Admission: refusing a bad request in the frontend, with what only the engine knows.

vLLM checks a request's parameters in the frontend process, through a classmethod that gets no engine configuration;
the reward model and the personas are in the engine's workers. An exception there would end the engine for everybody.
So an engine that starts announces what it accepts, in a file of a folder whose name every process finds in its
environment: the ``vllm.general_plugins`` hook puts it there before vLLM starts the others.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import sys
import tempfile
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pad_vllm.config import read_pad
from pad_vllm.params import MAX_LOGIT_BIAS, PAD, check_int, check_logit_bias, check_persona
from pad_vllm.reward.template import PromptTemplate

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

ANNOUNCE_DIR = "PAD_VLLM_ANNOUNCE_DIR"
"""Environment: the folder. Set it by hand to one that all machines share when frontend and engine are on different
machines."""
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
NOT_LOADED = (
    "Speculative decoding on the V1 runner drops logits processors; VLLM_PLUGINS must include 'pad' where it is set; "
    f"{ANNOUNCE_DIR} must name a shared folder where the engine runs on another machine"
)
FOLDER_PREFIX = "pad-vllm-"
OWNER = "owner.lock"
MAX_FRAMES = 8
"""Between vLLM's input processor and this module there are fewer."""


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
    instance_id: str = ""
    """vLLM's id of the engine, which its frontend on the same machine knows too."""
    labels: tuple[str, str] = ("", "")
    """The engine's labels in metrics: name of the base model, number of the engine."""

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
            tokenizer = json.dumps(self.tokenizer, sort_keys=True)
            _template(tokenizer, self.prompt_template, self.max_preference_tokens).encode_preference(asked.preference)


def check_weights(weights: tuple[float, ...], head_names: tuple[str, ...]) -> None:
    """Raise ValueError unless there is one weight for each value head."""
    if not head_names:
        raise ValueError("pad_weights: the reward model has no value heads")
    if len(weights) != len(head_names):
        raise ValueError(
            f"pad_weights: {len(weights)} weights for {len(head_names)} value heads ({', '.join(head_names)}); give "
            "one for each, in this order"
        )


@functools.lru_cache(maxsize=8)
def _template(tokenizer: str, prompt_template: str, max_preference_tokens: int) -> PromptTemplate:
    from transformers import AutoTokenizer

    try:
        template = PromptTemplate(AutoTokenizer.from_pretrained(**json.loads(tokenizer)), prompt_template)
    except OSError as error:
        raise ValueError(f"pad_preference: the frontend cannot read the reward model's tokenizer ({error})") from error
    template.max_preference_tokens = max_preference_tokens
    return template


def make_folder() -> None:
    """Make the folder of announcements, once for a frontend and its engines."""
    if ANNOUNCE_DIR in os.environ:
        return
    try:
        _sweep(Path(tempfile.gettempdir()))
        folder, owner = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX)), os.getpid()
        lock = _locked(folder / OWNER)
    except OSError as error:
        logger.warning("No folder for announcements of PAD engines: %s", error)
        return
    os.environ[ANNOUNCE_DIR] = str(folder)
    also = os.environ.get(RAY_COPIES)  # or Ray's workers would not know the folder
    os.environ[RAY_COPIES] = f"{also},{ANNOUNCE_DIR}" if also else ANNOUNCE_DIR

    def remove() -> None:
        lock.close()
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def _sweep(root: Path) -> None:
    """Remove the folders of processes that were killed before they could."""
    for folder in root.glob(f"{FOLDER_PREFIX}*"):
        locks = [folder / OWNER, *folder.glob("*.json")]
        with contextlib.suppress(OSError):  # another user's, or without an owner's lock: let it be
            if all(_is_abandoned(path) for path in locks):
                shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path, text: str = "") -> TextIO:
    """A new file with a lock that is held until it is closed, or its process and all forked from it have ended."""
    part = path.with_suffix(".part")
    file = part.open("w")
    with contextlib.suppress(OSError):  # some file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.write(text)
    file.flush()
    part.rename(path)
    return file


def _is_abandoned(path: Path) -> bool:
    """Whether nobody holds a file's lock: its process is gone, in whatever namespace it ran. OSError if it is not
    there."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            return False
    return True


def is_beam_search(params: SamplingParams) -> bool:
    """Whether these are a step of vLLM's beam search, which is made of requests for one token and its logprobs."""
    return (params.max_tokens, params.detokenize, params.watermarking) == (1, False, False) and bool(params.logprobs)


def announce(announcement: Announcement, engine: object) -> Path | None:
    """Tell the frontends what ``engine`` accepts, for as long as the object and its process live.

    Returns:
        The announcement's file; None where an engine that does not guide found no place for one.

    Raises:
        ValueError: an engine that guides cannot write where its frontends would look.
    """
    try:
        make_folder()
        folder = Path(os.environ.get(ANNOUNCE_DIR, os.devnull))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.json"
        file = _locked(path, json.dumps(asdict(announcement)))
    except OSError as error:
        if not announcement.configured:
            return None  # without it, the frontend refuses guidance all the same
        raise ValueError(
            f"pad cannot tell the frontend what it accepts ({error}); set {ANNOUNCE_DIR} to a writable folder"
        ) from error
    owner = os.getpid()  # a forked child inherits the finalizer, and is not the engine

    def withdraw() -> None:
        file.close()
        if os.getpid() == owner:
            path.unlink(missing_ok=True)
            stats_path(path).unlink(missing_ok=True)

    weakref.finalize(engine, withdraw)
    return path


def stats_path(announcement: Path) -> Path:
    """Where an engine's first rank shows its numbers, beside its announcement."""
    return announcement.with_suffix(".stats")


def announced() -> dict[Path, Announcement]:
    """What the living engines of this frontend accept, by their files."""
    folder = Path(os.environ.get(ANNOUNCE_DIR, "/nonexistent"))
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return {}
    return {path: announcement for path in paths if (announcement := _read(path)) is not None}


@functools.lru_cache(maxsize=64)
def _parse(path: Path) -> Announcement:
    record = json.loads(path.read_text())
    return Announcement(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})


def _read(path: Path) -> Announcement | None:
    """A living engine's announcement; None for one withdrawn, left by an engine that was killed, or unreadable."""
    try:
        return None if _is_abandoned(path) else _parse(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("Cannot read the announcement %s of a PAD engine: %r", path, error)
        return None


def validate(sampling_params: SamplingParams) -> None:
    """Refuse a request whose guidance is malformed, or which no engine of this frontend could guide.

    Raises:
        ValueError: the message names the argument, its value and what is allowed. vLLM turns it into HTTP 400.
    """
    asked = PAD.from_extra_args(sampling_params.extra_args)
    vllm_config = _engine_of_this_request()
    if asked is None:
        _validate_unasked(sampling_params, vllm_config)
        return
    check_logit_bias(sampling_params.logit_bias)
    engines = list(announced().values())
    if vllm_config is not None:  # of several in this process; on another machine, it has an id of its own
        engines = [engine for engine in engines if engine.instance_id == vllm_config.instance_id] or engines
    if not engines or (vllm_config is not None and drops_processors(vllm_config)):
        raise ValueError(
            f"{', '.join(asked.extra_args())}: no engine has announced PAD guidance to this frontend, so the request "
            f"would go unguided. {NOT_LOADED}"
        )
    errors = []
    for engine in engines:
        try:
            return engine.check(asked)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _validate_unasked(sampling_params: SamplingParams, vllm_config: VllmConfig | None) -> None:
    """Refuse a request that asks for nothing, where everybody was to be guided and this one would not be."""
    is_beam, bias = is_beam_search(sampling_params), sampling_params.logit_bias or ()
    if (is_beam or len(bias) > MAX_LOGIT_BIAS) and any(engine.guides_all for engine in announced().values()):
        check_logit_bias(sampling_params.logit_bias)
        raise ValueError(
            "beam search cannot be guided: it goes by log-probabilities of the base model, and this server guides "
            "every request (pad.default_persona)"
        )
    if vllm_config is None or not drops_processors(vllm_config):
        return
    pad = read_pad(vllm_config.additional_config)
    if pad is not None and pad.get("default_persona") is not None:
        raise ValueError(
            f"this server is to guide every request (pad.default_persona), and its engine cannot. {NOT_LOADED}"
        )


def drops_processors(vllm_config: VllmConfig) -> bool:
    """Whether vLLM leaves logits processors out in silence: it then neither builds them nor says so."""
    return vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner


def _engine_of_this_request() -> VllmConfig | None:
    """The configuration of the engine that a request is being admitted to, from the frames of vLLM's input processor:
    it hands ``validate_params`` none."""
    frame = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code.co_name == "_validate_params":
            return getattr(frame.f_locals.get("self"), "vllm_config", None)
    return None
