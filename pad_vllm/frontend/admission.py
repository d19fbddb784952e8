"""Admission: refusing a bad request in the frontend, with what only the engine knows.

vLLM checks a request's parameters in the frontend process, through a classmethod that gets no engine configuration;
the reward model and the personas are in the engine's workers. An exception there would end the engine for everybody.
So a request is held against what the engines announced (:mod:`pad_vllm.channel`).
"""

from __future__ import annotations

import functools
import json
import sys
from typing import TYPE_CHECKING

from pad_vllm.channel import ANNOUNCE_DIR, Announcement, announced
from pad_vllm.config import read_pad
from pad_vllm.params import (
    MAX_LOGIT_BIAS,
    PAD,
    check_int,
    check_logit_bias,
    check_persona,
    check_preference_weights,
    check_weights,
)
from pad_vllm.reward.template import PromptTemplate

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

NOT_LOADED = (
    "Speculative decoding on the V1 runner drops logits processors; VLLM_PLUGINS must include 'pad' where it is set; "
    f"{ANNOUNCE_DIR} must name a shared folder where the engine runs on another machine"
)
MAX_FRAMES = 8
"""Between vLLM's input processor and this module there are fewer."""


def validate(sampling_params: SamplingParams) -> None:
    """Refuse a request whose guidance is malformed, or which no engine of this frontend could guide.

    Raises:
        ValueError: the message names the argument, its value and what is allowed. vLLM turns it into HTTP 400.
    """
    asked = PAD.from_extra_args(sampling_params.extra_args)
    vllm_config = _engine_of_this_request()
    if asked is None or not asked.asks_for_guidance:
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
            return check(engine, asked)
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


def check(announcement: Announcement, asked: PAD) -> None:
    """Raise ValueError if an engine cannot do what a request asks."""
    if not announcement.configured:
        raise ValueError(
            f"{', '.join(asked.extra_args())}: this server runs without a reward model; start it with "
            '--additional-config \'{"pad": {"reward_model": ...}}\''
        )
    if asked.persona is not None:
        check_persona(asked.persona, announcement.personas)
    if asked.top_k is not None:
        check_int("pad_top_k", asked.top_k, 1, announcement.max_top_k)
    if asked.weights is not None:
        check_weights(asked.weights, announcement.head_names)
    if asked.preference is not None:
        if announcement.tokenizer is None:
            raise ValueError("pad_preference: this server has no tokenizer (skip_tokenizer_init)")
        tokenizer = json.dumps(announcement.tokenizer, sort_keys=True)
        template = _template(tokenizer, announcement.prompt_template, announcement.max_preference_tokens)
        template.check_preferences(asked.preferences)
    elif asked.preference_weights is not None:
        personas = dict(zip(announcement.personas, announcement.num_preferences, strict=False))
        name = announcement.default_persona if asked.persona is None else asked.persona
        check_preference_weights(asked.preference_weights, personas.get(name, 0))


@functools.lru_cache(maxsize=8)
def _template(tokenizer: str, prompt_template: str, max_preference_tokens: int) -> PromptTemplate:
    from transformers import AutoTokenizer

    try:
        template = PromptTemplate(AutoTokenizer.from_pretrained(**json.loads(tokenizer)), prompt_template)
    except OSError as error:
        raise ValueError(f"pad_preference: the frontend cannot read the reward model's tokenizer ({error})") from error
    template.max_preference_tokens = max_preference_tokens
    return template


def is_beam_search(params: SamplingParams) -> bool:
    """Whether these are a step of vLLM's beam search, which is made of requests for one token and its logprobs."""
    return (params.max_tokens, params.detokenize, params.watermarking) == (1, False, False) and bool(params.logprobs)
