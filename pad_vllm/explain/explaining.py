"""Answers to one prompt by an engine in this process, with what the base model and guidance did to each token.

vLLM's own raw ``logprobs`` give the base model's part. A trace's rows (:mod:`pad_vllm.worker.kept_rows`) give that of
guidance.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pad_vllm.checks import check_int, check_number, check_text, shown
from pad_vllm.config import PADConfig
from pad_vllm.errors import one_line
from pad_vllm.params import PAD, GuidanceParams
from pad_vllm.personas import prefixed

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    from pad_vllm.worker.kept_rows import KeptRows, RowEffect

REPLACEMENT = "�"
"""What a tokenizer writes for a part of a character."""


@dataclass(frozen=True)
class ExplainedToken:
    """A token of an answer."""

    token_id: int
    text: str
    """What it adds to the answer; empty: a part of a character, which a later token completes"""
    probability: float
    """That the base model gave it"""
    first_id: int
    first_text: str
    """What the base model found most likely in its place"""
    first_probability: float
    effect: RowEffect | None
    """None if the answer is not guided"""


@dataclass(frozen=True)
class ExplainedAnswer:
    """An answer under one setting."""

    label: str
    contexts: tuple[str, ...]
    """What the rewards of its tokens are of, by name"""
    tokens: tuple[ExplainedToken, ...]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def effects(self) -> list[RowEffect]:
        return [token.effect for token in self.tokens if token.effect is not None]

    @property
    def rewards(self) -> list[float | None]:
        """The mean of each context; None for one that is not read."""
        columns = zip(*(effect.rewards for effect in self.effects), strict=True)
        return [None if None in column else math.fsum(column) / len(column) for column in columns]

    @property
    def divergence(self) -> float | None:
        """The mean, in nats; None: it is not guided."""
        divergences = [effect.divergence for effect in self.effects]
        return math.fsum(divergences) / len(divergences) if divergences else None

    @property
    def num_others(self) -> int:
        """How many tokens differ from the base model's first choice."""
        return sum(token.token_id != token.first_id for token in self.tokens)


@dataclass(frozen=True)
class Explanation:
    """Answers to one prompt; the first is unguided."""

    model: str
    reward_model: str
    prompt: str
    answers: tuple[ExplainedAnswer, ...]


def explain(
    model: str,
    pad: Mapping[str, Any],
    prompt: str,
    settings: Sequence[Mapping[str, Any]],
    *,
    chat: bool = False,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    engine: Mapping[str, Any] | None = None,
) -> Explanation:
    """Answer a prompt with a vLLM engine in this process: once unguided, and once under each of the settings.

    Args:
        model: path or hub id of the base model.
        pad: the ``pad`` section of a server's ``additional_config``.
        prompt: text; with ``chat``, what the user says.
        settings: the guidance of each answer; the prefix ``pad_`` may be left out.
        chat: whether to put the prompt into the model's chat template.
        max_tokens: most tokens of each answer.
        temperature: 0 takes the most likely token.
        seed: seed of the sampling, the same for each answer.
        engine: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and what is allowed.
    """
    check_text("the prompt", prompt)
    check_int("--max-tokens", max_tokens, 1)
    check_number("--temperature", temperature, 0, 100)
    if not settings:
        raise ValueError("nothing to explain: give at least one setting by --with")
    config, engine = PADConfig.from_pad(pad), engine or {}
    asked = [read_setting(setting, config) for setting in settings]
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if engine.get(name, 1) != 1:
            raise ValueError(
                f"{name}={shown(engine[name])}: must be 1, because pad-vllm explain runs the engine in its own "
                "process, on one device"
            )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the rows are kept in this process
    from vllm import SamplingParams

    from pad_vllm.worker.kept_rows import RowKeeper

    names = [str(i) for i in range(len(asked))]
    common: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "logprobs": 1}
    params = [SamplingParams(**common)]
    for name, one in zip(names, asked, strict=True):
        params.append(SamplingParams(**common, extra_args=one.extra_args() | {"pad_trace": name}))
    with RowKeeper(max_tokens) as keeper:
        llm = start_engine(model, pad, len(params), engine)
    try:
        outputs = answer_all(llm, prompt, chat, params)
        tokenizer = llm.get_tokenizer()
        answers = [ExplainedAnswer("unguided", (), tokens_of(outputs[0], None, tokenizer))]
        for name, setting, output in zip(names, settings, outputs[1:], strict=True):
            answers.append(explained(label_of(setting), output, keeper.take(name), tokenizer))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return Explanation(model, config.reward_model, prompt, tuple(answers))


def read_setting(setting: Mapping[str, Any], config: PADConfig) -> PAD:
    """A request's guidance, checked against the configuration. Raises ValueError if a server would refuse it."""
    try:
        if not isinstance(setting, Mapping):
            raise ValueError(f"must be an object, not {type(setting).__name__}")
        asked = PAD.from_extra_args(prefixed(setting)) or PAD()
        if config.default_persona is not None and asked.persona is None:
            asked = replace(asked, persona=config.default_persona)
        if config.resolve(asked) is None:
            raise ValueError("asks for no guidance")
    except ValueError as error:
        raise ValueError(f"--with {shown(setting)}: {error}") from None
    return asked


def label_of(setting: Mapping[str, Any]) -> str:
    """A setting in a line."""
    words = (f"{str(k).removeprefix('pad_')}: {_in_words(v)}" for k, v in setting.items())
    return "; ".join(words) or "the default persona"


def _in_words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_in_words, value))
    return value if isinstance(value, str) else json.dumps(value)


def start_engine(model: str, pad: Mapping[str, Any], num_requests: int, engine: Mapping[str, Any]) -> LLM:
    """An engine that guides as ``pad`` says, but without a default persona and without files of traces."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "logits_processors": ["pad_vllm:PADLogitsProcessor"],
        "max_num_seqs": num_requests,
        "enforce_eager": True,  # compiling would take longer than a few answers
        **engine,
        "additional_config": {"pad": {**pad, "default_persona": None, "trace": None}},
        "distributed_executor_backend": "uni",
        "logprobs_mode": "raw_logprobs",
    }
    try:
        return LLM(model, **arguments)
    except (ValueError, OSError, TypeError) as error:  # the last for an argument that vLLM does not have
        raise ValueError(f"{model!r} cannot be started: {one_line(error)}") from None


def answer_all(llm: LLM, prompt: str, chat: bool, params: Sequence[Any]) -> list[RequestOutput]:
    """Raises ValueError where one of the requests is refused."""
    from vllm.exceptions import VLLMValidationError

    if chat and not getattr(llm.get_tokenizer(), "chat_template", None):
        raise ValueError("--chat: the model's tokenizer has no chat template; leave it out")
    try:
        if not chat:
            return llm.generate([prompt] * len(params), list(params), use_tqdm=False)
        return llm.chat([[{"role": "user", "content": prompt}]] * len(params), list(params), use_tqdm=False)
    except VLLMValidationError as error:  # in some of vLLM's releases no ValueError
        raise ValueError(one_line(error)) from None


def explained(label: str, output: RequestOutput, rows: KeptRows | None, tokenizer: Any) -> ExplainedAnswer:
    """Raises ValueError where guidance failed."""
    if rows is None:
        raise ValueError(
            f"--with {label}: nothing was recorded, because pad-vllm's plugin hook did not run; if VLLM_PLUGINS is "
            "set, add 'pad' to it"
        )
    if rows.failed:
        raise ValueError(f"--with {label}: guidance failed; the log says why")
    return ExplainedAnswer(label, contexts_of(rows.params), tokens_of(output, rows, tokenizer))


def contexts_of(params: GuidanceParams) -> tuple[str, ...]:
    """What the rewards of a request are of."""
    names = []
    for (preference, adapter), weight in zip(params.readings, params.preference_weights, strict=True):
        words = [*([preference] if preference else []), *([f"adapter {adapter}"] if adapter else [])]
        name = ", ".join(words) or ("value heads" if params.weights else "reward model")
        names.append(name if len(params.readings) == 1 else f"{weight:+.3g} {name}")
    return tuple(names)


def tokens_of(output: RequestOutput, rows: KeptRows | None, tokenizer: Any) -> tuple[ExplainedToken, ...]:
    """``rows`` None: of an unguided answer."""
    ids, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs or ()
    begin = read = 0  # of the ids: those before ``read`` are text, and it is read behind those from ``begin`` on
    tokens = []
    for i, (token, found) in enumerate(zip(ids, logprobs, strict=True)):
        first, of_first = min(found.items(), key=lambda one: one[1].rank)
        before = len(tokenizer.decode(ids[begin:read]) if read else "")
        text, of_other = (tokenizer.decode([*ids[begin:i], one])[before:] for one in (token, first))
        effect = None if rows is None else rows.effects.get(i)
        if not text.endswith(REPLACEMENT) or i + 1 == len(ids):
            begin, read = read, i + 1
        else:
            text = ""
        if first == token or of_other.endswith(REPLACEMENT):
            of_other = text if first == token else ""
        base = math.exp(found[token].logprob), first, of_other, math.exp(of_first.logprob)
        tokens.append(ExplainedToken(token, text, *base, effect))
    return tuple(tokens)
