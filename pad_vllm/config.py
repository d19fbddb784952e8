"""The configuration of a server: ``additional_config["pad"]``, typed and checked once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pad_vllm.checks import check_int, check_number, check_text, did_you_mean
from pad_vllm.errors import one_line
from pad_vllm.params import (
    MAX_BETA,
    MAX_DIVERGENCE,
    PAD,
    GuidanceParams,
    check_adapters,
    check_persona,
    check_reference,
)
from pad_vllm.personas import read_personas
from pad_vllm.reading import read_json, read_yaml
from pad_vllm.reward.folder import DEFAULTS_FILE, files_beside, locate_defaults, read_defaults
from pad_vllm.reward.heads import locate_heads
from pad_vllm.reward.source import SERVED, Source, beside, check_paths, source_of
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE, check_prompt_template

if TYPE_CHECKING:
    from vllm.config import ModelConfig

MAX_TOP_K = 1024
"""The largest ``max_top_k`` allowed."""
MIN_TRACE_FILE_BYTES = 4096
"""The smallest ``trace_file_bytes`` allowed."""
CHATS = ("auto", "strict")
"""The values of ``chat``."""


@dataclass(frozen=True)
class PADConfig:
    """The engine's configuration of PAD.

    Args:
        reward_model: path or hub id of the personalized reward model; setting it activates the plugin. ``base`` means
            the served model itself, whose weights are not loaded again. The served model's own path or hub id means
            the same, unless ``dtype``, ``quantization`` or ``revision`` differ. It may be a PEFT adapter: one made for
            the served model shares its weights; any other is merged into its own model, which is loaded.
        heads: path of a value-head file; by default, the file beside the model, if there is one.
        prompt_template: text around ``{prompt}``, with ``{preference}`` in it.
        insert_after: text with which prompts begin, and behind which the preference is inserted.
        chat: what to do with a prompt that begins as a chat, but not as the chat template writes one. ``auto`` reads it
            as plain text, with a warning; ``strict`` refuses the request.
        beta: guidance strength, if a request sets none.
        max_divergence: bound on each token's divergence in nats, if a request sets none; None sets no bound.
        top_k: number of candidates, if a request sets none.
        max_top_k: most candidates that a request may set.
        reference: what the reward is measured against, if a request sets nothing: ``base``, the base model;
            ``neutral``, the reward model without the preference; or ``none``, which takes the reward model's own log
            probability. The default is ``base`` for a reward model that was made for guidance (it has a ``pad.json``
            or value heads beside it), and ``neutral`` for any other.
        personas: name -> request arguments (``pad_preference``, ``pad_weights``, ...; the prefix may be left out), or
            the path of a JSON or YAML file of them. The server takes new versions of this file while it runs.
        default_persona: persona of requests that set no guidance.
        kv_cache_memory_bytes: size of the reward model's KV cache; by default, computed from the engine's.
        max_num_batched_tokens: most tokens in one forward of the reward model; at most 2048 when absent.
        dtype: of the reward model; by default, the base model's.
        quantization, revision, trust_remote_code: as vLLM's options, for the reward model.
        adapters: name -> path or hub id of a PEFT LoRA adapter of the reward model.
        adapter_base: path or hub id of the model for which ``reward_model``, an adapter, was made; by default, the one
            that the adapter names.
        trace: folder to which traces of requests are written; by default, nothing is traced.
        trace_text: whether traces contain the texts of preferences, prompts and answers.
        trace_file_bytes, trace_files: size of a file of traces, and how many files an engine keeps.

    Raises:
        ValueError: a value is not allowed; the message names the key, the value and what is allowed.
    """

    reward_model: str
    heads: str | None = None
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    insert_after: str | None = None
    chat: str = "auto"
    beta: float = 1.0
    max_divergence: float | None = None
    top_k: int = 10
    max_top_k: int = 64
    reference: str = "base"
    personas: Mapping[str, PAD] = field(default_factory=dict)
    default_persona: str | None = None
    kv_cache_memory_bytes: int | None = None
    max_num_batched_tokens: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_base: str | None = None
    trace: str | None = None
    trace_text: bool = False
    trace_file_bytes: int = 64 * 2**20
    trace_files: int = 16
    source: Source = field(init=False, compare=False)
    """Where the reward model's weights come from"""
    why_reference: str = field(default="as configured", init=False, compare=False)
    """Why ``reference`` has its value, for the log."""
    personas_file: str | None = field(default=None, init=False, compare=False)
    """The file of the personas, which the engine watches while it runs (:mod:`pad_vllm.worker.watch`)."""

    def __post_init__(self) -> None:
        names = ("reward_model", "heads", "insert_after", "default_persona", "dtype", "quantization", "revision")
        for name in (*names, "adapter_base", "trace"):
            value = getattr(self, name)
            if value is not None or name == "reward_model":
                check_text(f"pad.{name}", value)
        check_text("pad.prompt_template", self.prompt_template)
        try:
            check_prompt_template(self.prompt_template)
        except ValueError as error:
            raise ValueError(f"pad.prompt_template={self.prompt_template!r}: {error}") from None
        if self.chat not in CHATS:
            raise ValueError(f"pad.chat={self.chat!r}: must be one of {', '.join(map(repr, CHATS))}")
        check_number("pad.beta", self.beta, 0, MAX_BETA)
        if self.max_divergence is not None:
            check_number("pad.max_divergence", self.max_divergence, 0, MAX_DIVERGENCE)
        check_int("pad.max_top_k", self.max_top_k, 1, MAX_TOP_K)
        check_int("pad.top_k", self.top_k, 1, self.max_top_k)
        check_reference("pad.reference", self.reference)
        for name in ("kv_cache_memory_bytes", "max_num_batched_tokens"):
            if getattr(self, name) is not None:
                check_int(f"pad.{name}", getattr(self, name), 1)
        for name in ("trust_remote_code", "trace_text"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"pad.{name}={getattr(self, name)!r}: must be true or false")
        check_int("pad.trace_file_bytes", self.trace_file_bytes, MIN_TRACE_FILE_BYTES)
        check_int("pad.trace_files", self.trace_files, 1)
        object.__setattr__(self, "source", Source(self.reward_model, self.reward_model, self.revision))
        object.__setattr__(self, "adapters", check_paths("pad.adapters", self.adapters))
        personas: Any = self.personas
        if isinstance(personas, str):
            object.__setattr__(self, "personas_file", os.path.abspath(personas))
            personas = read_file("pad.personas", personas)
        object.__setattr__(self, "personas", read_personas(personas, self.max_top_k, self.adapters))
        if self.default_persona is not None:
            check_persona(self.default_persona, self.personas, "pad.default_persona")

    @classmethod
    def from_additional_config(cls, additional_config: Any, base: ModelConfig | None = None) -> PADConfig | None:
        """Read vLLM's ``additional_config``, the files it names, and the defaults that the reward model brings; None
        when it does not configure PAD. A key that is given, if only as null, overrides the reward model's default.

        Args:
            base: of the served model, if there is one; the reward model may be that.

        Raises:
            ValueError: ``pad`` is malformed; the message names the key, the value and what is allowed.
        """
        pad = read_pad(additional_config)
        return None if pad is None else cls.from_pad(pad, base)

    @classmethod
    def from_pad(cls, pad: Mapping[str, Any], base: ModelConfig | None = None) -> PADConfig:
        """As :meth:`from_additional_config`, of what ``pad`` says there."""
        known = {f.name for f in fields(cls) if f.init}
        for key in pad:
            if key not in known:
                raise ValueError(f"pad.{key}: no such key; {did_you_mean(str(key), known)}")
        if pad.get("reward_model") is None:
            raise ValueError("pad.reward_model is missing: give the path or hub id of the reward model")
        given = {key: value for key, value in pad.items() if value is not None}
        source = cls._source(given, base)
        path = None
        if source is not None and source.reward_model != SERVED:  # which is no name of a hub's
            path = locate_defaults(source.reward_model, source.revision)
        defaults = {key: value for key, value in read_defaults(path).items() if key not in pad} if path else {}
        try:
            config = cls(**defaults, **given)
            assert source is not None  # texts, or refused
            config._set_source(source, base)
        except ValueError as error:
            if any(str(error).startswith(f"pad.{key}") for key in defaults):
                raise ValueError(f"{path}: {error}") from None
            raise
        if "reference" in defaults:
            object.__setattr__(config, "why_reference", f"{DEFAULTS_FILE} says so")
        elif "reference" not in given and source.model != SERVED:
            config._choose_reference(path)
        return config

    def _choose_reference(self, defaults_file: Path | None) -> None:
        """What nobody said: by what the reward model says of itself."""
        try:
            source = self.source
            heads = self.heads or locate_heads(None, source.reward_model, source.revision)
            is_there = defaults_file or files_beside(source.model, source.model_revision, ("config.json",))
        except (OSError, ValueError):
            heads = is_there = None
        if not is_there:
            return  # loading it says so better
        beside = [name for name, file in ((DEFAULTS_FILE, defaults_file), ("value heads", heads)) if file]
        if beside:
            reference, why = (
                "base",
                f"beside it {'are' if heads else 'is'} {' and '.join(beside)}: it was made for guidance",
            )
        else:
            reference = "neutral"
            why = f"neither {DEFAULTS_FILE} nor value heads beside it say that it was made for guidance"
        object.__setattr__(self, "reference", reference)
        object.__setattr__(self, "why_reference", why)

    @staticmethod
    def _source(given: dict[str, Any], base: ModelConfig | None) -> Source | None:
        texts = (given.get(key) for key in ("reward_model", "revision", "adapter_base"))
        return source_of(given, base) if all(isinstance(text, str | None) for text in texts) else None  # else refused

    def _set_source(self, source: Source, base: ModelConfig | None) -> None:
        object.__setattr__(self, "source", source)
        if source.is_served and base is not None:
            object.__setattr__(self, "trust_remote_code", base.trust_remote_code)
        if self.adapter_base is not None and not source.is_adapter:
            raise ValueError(
                f"pad.adapter_base={self.adapter_base!r}: pad.reward_model is not an adapter; leave adapter_base out"
            )
        if source.is_served and source.is_adapter and self.adapters:
            raise ValueError(
                f"pad.adapters: pad.reward_model={self.reward_model!r} is itself an adapter of the served model, and "
                f"adapters cannot be stacked; set pad.reward_model to {SERVED!r} and list this adapter in pad.adapters"
            )

    @property
    def example_preference(self) -> str:
        """A text to show where preferences stand: of the first persona that has one."""
        texts = (text for persona in self.personas.values() for text in persona.preferences)
        return next(texts, "Be concise.")

    def resolve(self, asked: PAD | None, admitted: PAD | None = None) -> GuidanceParams | None:
        """The guidance of a request. Its own fields come first, then those of its persona (or of the default persona),
        then the configuration's.

        Returns None if the request sets no guidance and there is no default persona.

        Args:
            asked: the request's own fields.
            admitted: its persona, as admission sent it; if None, the persona is looked up as it was at the start.

        Raises:
            ValueError: the persona is unknown, there is not one weight for each preference, or top_k is over
                ``max_top_k``.
        """
        name = self.default_persona if asked is None or asked.persona is None else asked.persona
        if name is None and (asked is None or not asked.asks_for_guidance):
            return None
        persona = admitted or PAD()
        if admitted is None and name is not None:
            persona = self.personas[check_persona(name, self.personas)]
        merged = asked.over(persona) if asked is not None else persona
        check_adapters(merged.adapters, self.adapters)
        top_k = self.top_k if merged.top_k is None else check_int("pad_top_k", merged.top_k, 1, self.max_top_k)
        beta = self.beta if merged.beta is None else merged.beta
        bound = self.max_divergence if merged.max_divergence is None else merged.max_divergence
        num = max(merged.num_contexts, 1)
        texts, adapters = (one * num if len(one) == 1 else one for one in (merged.preferences, merged.adapters))
        weights = merged.preference_weights or (1 / num,) * num
        reference = merged.reference or self.reference
        return GuidanceParams(
            texts,
            weights,
            merged.weights,
            beta,
            top_k,
            reference,
            merged.cache_salt,
            adapters,
            bound,
            name,
            merged.trace,
        )


def read_pad(additional_config: Any) -> Mapping[str, Any] | None:
    """``additional_config["pad"]``, from its file where it is the path of one; None when PAD is not configured.

    Paths in the file are relative to the file's folder, if they are there.

    Raises:
        ValueError: it is neither an object nor the path of one.
    """
    pad = additional_config.get("pad") if isinstance(additional_config, Mapping) else None
    if pad is None or pad == {}:
        return None
    if isinstance(pad, str):
        folder = Path(pad).parent
        pad = read_file("additional_config: pad", pad)
        if isinstance(pad, Mapping):
            named = ("reward_model", "heads", "personas", "adapter_base")
            pad = {key: beside(folder, value) if key in named else value for key, value in pad.items()}
            if isinstance(adapters := pad.get("adapters"), dict):
                pad["adapters"] = {name: beside(folder, path) for name, path in adapters.items()}
    if not isinstance(pad, Mapping):
        raise ValueError(f"additional_config: pad={pad!r} must be an object, not {type(pad).__name__}")
    return pad


def read_file(key: str, path: str) -> Any:
    """What a JSON or YAML file says.

    Raises:
        ValueError: naming ``key``, the file and, where there is one, the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{key}={path!r}: cannot be read ({error.strerror})") from None
    return parse_file(key, path, content)


def parse_file(key: str, path: str, content: bytes) -> Any:
    """As :func:`read_file`, of what has been read."""
    try:
        text = content.decode("utf-8-sig")
        return read_json(text) if path.endswith(".json") else read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{key}={path!r}: {one_line(error)}") from None
