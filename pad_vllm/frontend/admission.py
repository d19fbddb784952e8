"""Admission: refuse a bad request in the frontend, by what only the engine knows.

vLLM checks a request's parameters in the frontend process, through a classmethod that gets no engine configuration. The
reward model and the personas are in the engine's workers, where an exception would end the engine for everybody. So a
request is checked against what the engines have announced (:mod:`pad_vllm.channel`).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.checks import check_int, shown
from pad_vllm.config import read_pad
from pad_vllm.errors import one_line
from pad_vllm.frontend import engines
from pad_vllm.params import (
    ADMITTED,
    MAX_LOGIT_BIAS,
    PAD,
    check_adapters,
    check_logit_bias,
    check_num_chars,
    check_weights,
)
from pad_vllm.personas import Admitted, Personas
from pad_vllm.reward.chat import chat_format
from pad_vllm.reward.template import PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.config import VllmConfig

NOT_LOADED = (
    "Check three things: speculative decoding on the V1 runner drops logits processors; VLLM_PLUGINS, if it is set, "
    f"must include 'pad'; and if the engine runs on another machine, {ANNOUNCE_DIR} must name a folder that both share"
)
LONG_TOKEN = 4
"""In the reward model's tokens; few tokens of the base are longer. A prompt that fits by this bound is not counted."""

ROLE_TOKENS = 4
"""Upper bound, in the reward model's tokens, on the text beside a chat's marker: the name of a role, a newline."""
Misreads = Callable[[Sequence[int]], bool]
"""Whether a prompt begins as a chat, and is none that the chat template writes."""

logger = logging.getLogger(f"vllm.{__name__}")


def validate(sampling_params: SamplingParams) -> None:
    """Refuse a request if its guidance is malformed, or if no engine of this frontend can guide it. Otherwise send its
    persona along with it, as the persona is now.

    Raises:
        ValueError: the message names the argument, its value and what is allowed. vLLM turns it into HTTP 400.
    """
    extra_args = dict(sampling_params.extra_args or {})
    before = extra_args.pop(ADMITTED, None)
    if before is not None and not isinstance(before, Admitted):
        raise ValueError(f"{ADMITTED}={shown(before)}: no such argument; a persona is named by pad_persona")
    asked = PAD.from_extra_args(extra_args)
    vllm_config, prompt_ids = engines.of_this_request(), engines.prompt_of_this_request()
    if asked is not None and asked.trace is not None:
        check_traces(list(engines.own(vllm_config).values()), asked.trace)
    # An API server checks a request twice, and its persona is that of the first time. Whoever calls an engine in Python
    # may give the same parameters again much later.
    kept = before if engines.is_serving() else None
    if asked is None or not asked.asks_for_guidance:
        admitted = _validate_unasked(sampling_params, asked, vllm_config, prompt_ids, kept)
    else:
        check_logit_bias(sampling_params.logit_bias)
        admitted = _validate_asked(asked, vllm_config, prompt_ids, kept)
    if admitted is not None:
        sampling_params.extra_args = {**extra_args, ADMITTED: admitted}
    elif before is not None:
        sampling_params.extra_args = extra_args


def _validate_asked(
    asked: PAD, vllm_config: VllmConfig | None, prompt_ids: Sequence[int] | None, kept: Admitted | None
) -> Admitted | None:
    """Check a request that sets guidance; returns its persona, if it has one."""
    check_num_chars(asked.preferences)
    own = engines.own(vllm_config)
    if not own or (vllm_config is not None and drops_processors(vllm_config)):
        raise ValueError(
            f"{', '.join(asked.extra_args())}: no engine has announced PAD guidance to this frontend, so the request "
            f"would go unguided. {NOT_LOADED}"
        )
    personas, errors = engines.personas_of(own), []
    for path, engine in own.items():
        try:
            admitted = kept or _persona(engine, personas[path], asked)
            check_request(engine, asked, admitted, vllm_config, prompt_ids)
            return admitted
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _persona(engine: Announcement, personas: Personas, asked: PAD) -> Admitted | None:
    """The request's own persona or the default one, as it is now. Raises ValueError if there is no such persona."""
    if asked.persona is not None and engine.configured:
        return personas.admit(asked.persona)
    name = engine.default_persona
    return None if name is None or name not in personas.arguments else personas.admit(name)


def _validate_unasked(
    sampling_params: SamplingParams,
    asked: PAD | None,
    vllm_config: VllmConfig | None,
    prompt_ids: Sequence[int] | None,
    kept: Admitted | None,
) -> Admitted | None:
    """Check a request that sets no guidance: refuse it if every request must be guided and this one cannot be.
    Returns the default persona, if there is one."""
    own = engines.own(vllm_config)
    guiding = {path: engine for path, engine in own.items() if engine.guides_all}
    personas, admitted = engines.personas_of(own) if guiding else {}, kept
    for path, engine in guiding.items():
        admitted = admitted or _persona(engine, personas[path], PAD())
        if prompt_ids is not None:
            check_prompt(engine, asked or PAD(), admitted, vllm_config, prompt_ids)
    is_beam, bias = is_beam_search(sampling_params), sampling_params.logit_bias or ()
    if (is_beam or len(bias) > MAX_LOGIT_BIAS) and guiding:
        check_logit_bias(sampling_params.logit_bias)
        raise ValueError(
            "beam search cannot be guided, because it ranks texts by the base model's log-probabilities, and this "
            "server guides every request (pad.default_persona)"
        )
    if vllm_config is None or not drops_processors(vllm_config):
        return admitted
    pad = read_pad(vllm_config.additional_config)
    if pad is not None and pad.get("default_persona") is not None:
        raise ValueError(
            f"this server must guide every request (pad.default_persona), but its engine cannot guide. {NOT_LOADED}"
        )
    return admitted


def check_traces(own: list[Announcement], trace: str) -> None:
    """Raise ValueError if a request has an id for traces, but no engine keeps any."""
    if not any(engine.traces for engine in own):
        raise ValueError(
            f"pad_trace={shown(trace)}: this server keeps no traces; leave it out, or set pad.trace, the folder of "
            "traces, in the server's configuration"
        )


def drops_processors(vllm_config: VllmConfig) -> bool:
    """Whether vLLM leaves logits processors out without saying so."""
    return vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner


def guides_all(vllm_config: VllmConfig | None) -> bool:
    """Whether an engine of this frontend also guides requests without guidance of their own."""
    return any(engine.guides_all for engine in engines.own(vllm_config).values())


def check_request(
    announcement: Announcement,
    asked: PAD,
    admitted: Admitted | None = None,
    vllm_config: VllmConfig | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> None:
    """Raise ValueError if an engine cannot do what a request sets; also for its prompt, if that is known.

    Args:
        admitted: its persona, or the default one.
    """
    if not announcement.configured:
        raise ValueError(
            f"{', '.join(asked.extra_args())}: this server runs without a reward model; start it with "
            '--additional-config \'{"pad": {"reward_model": ...}}\''
        )
    if asked.top_k is not None:
        check_int("pad_top_k", asked.top_k, 1, announcement.max_top_k)
    if asked.weights is not None:
        check_weights(asked.weights, announcement.head_names)
    if asked.preference is not None:
        if announcement.tokenizer is None:
            raise ValueError("pad_preference: this server has no tokenizer (skip_tokenizer_init)")
        _template_of(announcement.tokenizer, announcement, vllm_config).check_preferences(asked.preferences)
    if asked.adapter is not None:
        check_adapters(asked.adapters, announcement.adapters)
    _merged(asked, admitted)  # lists and weights of other lengths
    if prompt_ids is not None:
        check_prompt(announcement, asked, admitted, vllm_config, prompt_ids)


def _merged(asked: PAD, admitted: Admitted | None) -> PAD:
    """A request's own fields over those of its persona."""
    persona = None if admitted is None else PAD.from_extra_args(admitted["arguments"])
    return asked.over(persona or PAD())


def check_prompt(
    announcement: Announcement,
    asked: PAD,
    admitted: Admitted | None,
    vllm_config: VllmConfig | None,
    prompt_ids: Sequence[int],
) -> None:
    """Raise ValueError for a prompt that the engine would not guide. The worker checks what cannot be known here."""
    if announcement.chat == "strict" and vllm_config is not None:
        is_misread = _misreads(announcement, vllm_config)
        if (announcement.base_tokenizer or _reads_preference(_merged(asked, admitted))) and is_misread(prompt_ids):
            raise ValueError(
                "the prompt begins as a chat, but with no message that the chat template writes, and this server "
                "refuses such prompts (pad.chat='strict'); send messages for the template to render, or plain text"
            )
    if announcement.max_context_len:
        check_prompt_len(announcement, asked, admitted, vllm_config, prompt_ids)


def _reads_preference(merged: PAD) -> bool:
    """Whether the reward model reads a preference for a request. It does not read one of weight 0."""
    texts = merged.preferences
    weights = merged.preference_weights or (1.0,) * len(texts)
    texts = texts * len(weights) if len(texts) == 1 else texts  # of several adapters
    totals = dict.fromkeys(texts, 0.0)
    for text, weight in zip(texts, weights, strict=bool(texts)):
        totals[text] += weight
    return any(totals.values())


def check_prompt_len(
    announcement: Announcement,
    asked: PAD,
    admitted: Admitted | None,
    vllm_config: VllmConfig | None,
    prompt_ids: Sequence[int],
) -> None:
    """Raise ValueError for a prompt whose longest context the reward model has too few positions for.

    With another tokenizer a translated prompt is as long as the reward model's tokenizer makes its text; the worker
    counts exactly, and ends what does not fit.
    """
    most, num_prompt = announcement.max_context_len, len(prompt_ids)
    added = 0 if admitted is None else admitted["num_tokens"]
    if asked.preferences and announcement.tokenizer is not None:
        template = _template_of(announcement.tokenizer, announcement, vllm_config)
        added = max(map(template.num_added_tokens, asked.preferences))
    if announcement.base_tokenizer is not None:
        if announcement.tokenizer is None or (num_prompt * LONG_TOKEN) + added <= most:
            return
        base = _arguments(announcement.base_tokenizer, vllm_config)
        reward = _arguments(announcement.tokenizer, vllm_config)
        num_prompt = _num_translated(base, reward, prompt_ids)
    if (missing := num_prompt + added - most) > 0:
        raise ValueError(
            f"the prompt takes {num_prompt} of the reward model's tokens and its preference {added}, which is "
            f"{missing} more than the reward model's {most} positions; shorten one of the two"
        )


def _num_translated(base: str, reward: str, prompt_ids: Sequence[int]) -> int:
    """A lower bound on the reward model's tokens for a prompt of the base's. A chat's markers and roles are left out:
    the reward model's template writes others."""
    marks = _added(base)
    text = _tokenizer(base).decode([i for i in prompt_ids if i not in marks])
    num_marks = sum(i in marks for i in prompt_ids)
    return max(len(_tokenizer(reward).encode(text, add_special_tokens=False)) - ROLE_TOKENS * num_marks, 0)


@functools.lru_cache(maxsize=8)
def _added(arguments: str) -> frozenset[int]:
    tokenizer = _tokenizer(arguments)
    return frozenset((*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids))


def prepare(vllm_config: VllmConfig) -> None:
    """Read the tokenizers at the start. Otherwise the first request that needs them would make all others wait."""
    for engine in engines.own(vllm_config).values():
        if engine.tokenizer is not None:
            try:
                _template_of(engine.tokenizer, engine, vllm_config)
            except Exception as error:  # each request with a preference will say so
                logger.warning("The frontend cannot read the reward model's tokenizer: %r", error)
        if engine.chat == "strict":
            _misreads(engine, vllm_config)


def _misreads(announcement: Announcement, vllm_config: VllmConfig) -> Misreads:
    """What tells prompts that an engine would not understand. Which model it serves, the frontend knows by itself."""
    model = vllm_config.model_config
    base = {"pretrained_model_name_or_path": model.tokenizer, "revision": model.tokenizer_revision}
    return _misreads_of(
        "" if announcement.tokenizer is None else _arguments(announcement.tokenizer, vllm_config),
        "" if model.skip_tokenizer_init else _arguments(base, vllm_config),
        announcement.base_tokenizer is not None,
        announcement.prompt_template,
        announcement.insert_after,
    )


@functools.lru_cache(maxsize=8)
def _misreads_of(reward: str, base: str, is_pair: bool, prompt_template: str, insert_after: str | None) -> Misreads:
    """As the engine has it: by the base's chat template, where it has one. ``reward``, ``base``: of :func:`_tokenizer`;
    "" where there is none."""
    if not reward:
        return _misreads_none
    try:
        tokenizer = _tokenizer(reward)
        theirs = _tokenizer(base) if base else tokenizer
        has_template = bool(getattr(theirs, "chat_template", None))
        if not is_pair:
            chat_tokenizer = theirs if has_template else tokenizer
            return PromptTemplate(tokenizer, prompt_template, insert_after, chat_tokenizer).is_misread
        if not has_template or not getattr(tokenizer, "chat_template", None):
            return _misreads_none
        chat = chat_format(theirs)
        return _misreads_none if chat is None else chat.opens_no_message
    except Exception as error:  # of a tokenizer or a template
        logger.warning(
            "The frontend cannot tell which prompts pad.chat='strict' refuses, so the engine decides: %r", error
        )
        return _misreads_none


def _misreads_none(prompt_ids: Sequence[int]) -> bool:
    """Where it cannot be told."""
    return False


def _template_of(
    tokenizer: dict[str, Any], announcement: Announcement, vllm_config: VllmConfig | None
) -> PromptTemplate:
    """``tokenizer``: that of the announcement, which has one."""
    arguments = _arguments(tokenizer, vllm_config)
    return _template(arguments, announcement.prompt_template, announcement.max_preference_tokens)


def _arguments(tokenizer: dict[str, Any], vllm_config: VllmConfig | None) -> str:
    """Of an announced tokenizer. An announcement cannot say that code may run: it is a file."""
    return json.dumps(dict(tokenizer, trust_remote_code=engines.may_run_code(tokenizer, vllm_config)), sort_keys=True)


@functools.lru_cache(maxsize=8)
def _template(tokenizer: str, prompt_template: str, max_preference_tokens: int) -> PromptTemplate:
    template = PromptTemplate(_tokenizer(tokenizer), prompt_template)
    template.max_preference_tokens = max_preference_tokens
    return template


@functools.lru_cache(maxsize=8)
def _tokenizer(arguments: str) -> PreTrainedTokenizerBase:
    """``arguments``: of ``AutoTokenizer.from_pretrained``, as JSON."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**json.loads(arguments))
    except (OSError, ValueError) as error:
        words = shown(one_line(error))
        raise ValueError(f"pad_preference: the frontend cannot read the reward model's tokenizer ({words})") from error


def is_beam_search(params: SamplingParams) -> bool:
    """Whether these are a step of vLLM's beam search, which is made of requests for one token and its logprobs."""
    return (params.max_tokens, params.detokenize, params.watermarking) == (1, False, False) and bool(params.logprobs)
