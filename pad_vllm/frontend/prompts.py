"""A prompt held against an engine, in the frontend: whether the reward model has room for it with its preference, and
whether a strict engine would understand it.

What an engine reads a prompt with, the frontend reads too: the reward model's tokenizer, which is announced, and the
base's, which its own configuration names.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pad_vllm.channel import Announcement
from pad_vllm.checks import shown
from pad_vllm.errors import one_line
from pad_vllm.frontend import engines
from pad_vllm.params import PAD
from pad_vllm.personas import Admitted, over_persona
from pad_vllm.reward.chat import chat_format
from pad_vllm.reward.chat_structure import CONTENTS
from pad_vllm.reward.renderings import render
from pad_vllm.reward.template import SEAM_TOKENS, PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig

LONG_TOKEN = 4
"""In the reward model's tokens; few tokens of the base are longer. A prompt that fits by this bound is not counted."""
MAX_SEAM_TOKENS = SEAM_TOKENS + 1
"""By how many a preference in a chat may differ from one in a plain prompt."""
ROLE_TOKENS = 4
"""Upper bound, in the reward model's tokens, on the text beside a chat's marker: the name of a role, a newline."""
Misreads = Callable[[Sequence[int]], bool]
"""Whether a prompt begins as a chat, and is none that the chat template writes."""

logger = logging.getLogger(f"vllm.{__name__}")


def check_prompt(
    announcement: Announcement,
    asked: PAD,
    admitted: Admitted | None,
    vllm_config: VllmConfig | None,
    prompt_ids: Sequence[int],
) -> None:
    """Raise ValueError for a prompt that the engine would not guide. The worker checks what cannot be known here."""
    texts = over_persona(asked, admitted).read_preferences
    if announcement.chat == "strict" and vllm_config is not None:
        is_misread = _misreads(announcement, vllm_config)
        if (announcement.base_tokenizer or texts) and is_misread(prompt_ids):
            raise ValueError(
                "the prompt begins as a chat, but with no message that the chat template writes, and this server "
                "refuses such prompts (pad.chat='strict'); send messages for the template to render, or plain text"
            )
    if announcement.max_context_len:
        _check_len(announcement, texts, vllm_config, prompt_ids)


def _check_len(
    announcement: Announcement, texts: Sequence[str], vllm_config: VllmConfig | None, prompt_ids: Sequence[int]
) -> None:
    """Raise ValueError where the reward model has too few positions for a prompt with the longest of ``texts``.

    A context is composed only where that decides. With another tokenizer a translated prompt is as long as the reward
    model's tokenizer makes its text; the worker counts exactly, and ends what does not fit.
    """
    most, num_prompt = announcement.max_context_len, len(prompt_ids)
    added = _num_added(announcement, vllm_config, texts)
    if announcement.base_tokenizer is not None:
        if announcement.tokenizer is None or (num_prompt * LONG_TOKEN) + added <= most:
            return
        base = _arguments(announcement.base_tokenizer, vllm_config)
        reward = _arguments(announcement.tokenizer, vllm_config)
        num_prompt = _num_translated(base, reward, prompt_ids)
    elif abs(num_prompt + added - most) <= MAX_SEAM_TOKENS:
        composed = _longest_context(announcement, vllm_config, prompt_ids, texts)
        added = added if composed is None else composed - num_prompt
    if (missing := num_prompt + added - most) > 0:
        raise ValueError(
            f"the prompt takes {num_prompt} of the reward model's tokens and its preference {added}, which is "
            f"{missing} more than the reward model's {most} positions; shorten one of the two"
        )


def room(
    announcement: Announcement,
    texts: Sequence[str],
    vllm_config: VllmConfig,
    prompt_ids: Sequence[int],
    num_tokens: int,
) -> int:
    """How many of ``num_tokens`` an answer has room for in the reward model's longest context, with one of ``texts``.
    The last token never enters it. With another tokenizer nobody can tell here, and the worker ends what is full."""
    most = announcement.max_context_len
    if not most or announcement.base_tokenizer is not None:
        return num_tokens
    at_most = len(prompt_ids) + _num_added(announcement, vllm_config, texts) + MAX_SEAM_TOKENS
    if at_most + num_tokens <= most:
        return num_tokens
    composed = _longest_context(announcement, vllm_config, prompt_ids, texts)
    return num_tokens if composed is None else min(num_tokens, most - composed + 1)


def _num_added(announcement: Announcement, vllm_config: VllmConfig | None, texts: Sequence[str]) -> int:
    """What the longest of some preferences adds to a plain prompt."""
    if announcement.tokenizer is None:
        return 0
    template = template_of(announcement.tokenizer, announcement, vllm_config)
    return max(map(template.num_added_tokens, texts), default=0)


def _longest_context(
    announcement: Announcement, vllm_config: VllmConfig | None, prompt_ids: Sequence[int], texts: Sequence[str]
) -> int | None:
    """The tokens of a prompt with the longest of some preferences, as the engine composes them; None where that cannot
    be told."""
    if not texts:
        return len(prompt_ids)
    if vllm_config is None:
        return None
    try:
        template = _composer(*_tokenizers(announcement, vllm_config), *_places(announcement))
        return max(len(template.compose(prompt_ids, text)) for text in texts)
    except Exception as error:  # of a tokenizer or a template
        logger.warning("The frontend cannot compose a context, so the engine decides whether it fits: %r", error)
        return None


def _num_translated(base: str, reward: str, prompt_ids: Sequence[int]) -> int:
    """A lower bound on the reward model's tokens for a prompt of the base's. A chat's markers and roles are left out:
    the reward model's template writes others; and a system message that the base's template wrote by itself."""
    marks, opening = _added(base), _opening(base)
    if tuple(prompt_ids[: len(opening)]) == opening:
        prompt_ids = prompt_ids[len(opening) :]
    text = _tokenizer(base).decode([i for i in prompt_ids if i not in marks])
    num_marks = sum(i in marks for i in prompt_ids)
    return max(len(_tokenizer(reward).encode(text, add_special_tokens=False)) - ROLE_TOKENS * num_marks, 0)


@functools.lru_cache(maxsize=8)
def _added(arguments: str) -> frozenset[int]:
    tokenizer = _tokenizer(arguments)
    return frozenset((*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids))


@functools.lru_cache(maxsize=8)
def _opening(arguments: str) -> tuple[int, ...]:
    """What a chat template writes before the text of a first user."""
    tokenizer = _tokenizer(arguments)
    text = render(tokenizer, [{"role": "user", "content": CONTENTS[0]}])
    return () if text is None else tuple(tokenizer.encode(text.partition(CONTENTS[0])[0], add_special_tokens=False))


def prepare(vllm_config: VllmConfig) -> None:
    """Read the tokenizers at the start. Otherwise the first request that needs them would make all others wait."""
    for engine in engines.own(vllm_config).values():
        if engine.tokenizer is not None:
            try:
                template_of(engine.tokenizer, engine, vllm_config)
                if engine.base_tokenizer is None and engine.max_context_len:
                    _composer(*_tokenizers(engine, vllm_config), *_places(engine))
            except Exception as error:  # each request with a preference will say so
                logger.warning("The frontend cannot read the reward model's tokenizer: %r", error)
        if engine.chat == "strict":
            _misreads(engine, vllm_config)


def _misreads(announcement: Announcement, vllm_config: VllmConfig) -> Misreads:
    """What tells prompts that an engine would not understand."""
    is_pair = announcement.base_tokenizer is not None
    return _misreads_of(is_pair, *_tokenizers(announcement, vllm_config), *_places(announcement))


def _tokenizers(announcement: Announcement, vllm_config: VllmConfig) -> tuple[str, str]:
    """The reward model's and the base's, as :func:`_tokenizer` takes them; "" where there is none. Which model it
    serves, the frontend knows by itself."""
    model = vllm_config.model_config
    base = {"pretrained_model_name_or_path": model.tokenizer, "revision": model.tokenizer_revision}
    return (
        "" if announcement.tokenizer is None else _arguments(announcement.tokenizer, vllm_config),
        "" if model.skip_tokenizer_init else _arguments(base, vllm_config),
    )


def _places(announcement: Announcement) -> tuple[str, str | None]:
    """Where a preference stands."""
    return announcement.prompt_template, announcement.insert_after


@functools.lru_cache(maxsize=8)
def _composer(reward: str, base: str, prompt_template: str, insert_after: str | None) -> PromptTemplate:
    """What composes an engine's contexts, where both models have one tokenizer: by the base's chat template, where it
    has one."""
    tokenizer = _tokenizer(reward)
    theirs = _tokenizer(base) if base else tokenizer
    chat_tokenizer = theirs if getattr(theirs, "chat_template", None) else tokenizer
    return PromptTemplate(tokenizer, prompt_template, insert_after, chat_tokenizer)


@functools.lru_cache(maxsize=8)
def _misreads_of(is_pair: bool, reward: str, base: str, prompt_template: str, insert_after: str | None) -> Misreads:
    if not reward:
        return _misreads_none
    try:
        if not is_pair:
            return _composer(reward, base, prompt_template, insert_after).is_misread
        theirs = _tokenizer(base or reward)
        if not all(getattr(one, "chat_template", None) for one in (theirs, _tokenizer(reward))):
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


def template_of(
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
