"""Admission: refuse a bad request in the frontend, by what only the engine knows.

vLLM checks a request's parameters in the frontend process, through a classmethod that gets no engine configuration. The
reward model and the personas are in the engine's workers, where an exception would end the engine for everybody. So a
request is checked against what the engines have announced (:mod:`pad_vllm.channel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.checks import check_int, shown
from pad_vllm.config import read_pad
from pad_vllm.frontend import engines
from pad_vllm.frontend.prompts import check_prompt, room, template_of
from pad_vllm.params import (
    ADMITTED,
    MAX_LOGIT_BIAS,
    PAD,
    check_adapters,
    check_logit_bias,
    check_num_chars,
    check_weights,
)
from pad_vllm.personas import Admitted, Personas, over_persona

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

NOT_LOADED = (
    "Check three things: speculative decoding on the V1 runner drops logits processors; VLLM_PLUGINS, if it is set, "
    f"must include 'pad'; and if the engine runs on another machine, {ANNOUNCE_DIR} must name a folder that both share"
)


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
    if engines.is_serving() and vllm_config is not None and prompt_ids is not None:
        _limit(sampling_params, asked or PAD(), admitted, vllm_config, prompt_ids)
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


def _limit(
    sampling_params: SamplingParams,
    asked: PAD,
    admitted: Admitted | None,
    vllm_config: VllmConfig,
    prompt_ids: Sequence[int],
) -> None:
    """Let an answer end by its length where the reward model's longest context is full, as it ends at
    ``max_model_len``. Only an API server's parameters are its own to change; others' answers end by their end token."""
    most = vllm_config.model_config.max_model_len - len(prompt_ids)
    if sampling_params.max_tokens is not None:
        most = min(most, sampling_params.max_tokens)
    texts = over_persona(asked, admitted).read_preferences
    guiding = (one for one in engines.own(vllm_config).values() if asked.asks_for_guidance or one.guides_all)
    found = min((room(engine, texts, vllm_config, prompt_ids, most) for engine in guiding), default=most)
    if found < most:
        sampling_params.max_tokens = found
        sampling_params.min_tokens = min(sampling_params.min_tokens, found)


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
        template_of(announcement.tokenizer, announcement, vllm_config).check_preferences(asked.preferences)
    if asked.adapter is not None:
        check_adapters(asked.adapters, announcement.adapters)
    over_persona(asked, admitted)  # lists and weights of other lengths
    if prompt_ids is not None:
        check_prompt(announcement, asked, admitted, vllm_config, prompt_ids)


def is_beam_search(params: SamplingParams) -> bool:
    """Whether these are a step of vLLM's beam search, which is made of requests for one token and its logprobs."""
    return (params.max_tokens, params.detokenize, params.watermarking) == (1, False, False) and bool(params.logprobs)
