"""Added tokens that a base model writes inside an answer: what opens and ends its reasoning, its tool calls."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from pad_vllm.reward.rendering import bounded_render

NAMED_TAG = re.compile(r"<(/?)([\w-]+)>")
REASONING, CONTENT = "qzxjkvqb", "qzxjkvqd"
"""That no template writes."""
QUESTION = {"role": "user", "content": "a"}
ROLES = ("bos_token", "pad_token", "unk_token", "mask_token", "cls_token", "sep_token")


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int], reasoning: Collection[int] = ()
) -> dict[int, str]:
    """The added tokens that a base model may write before its answer is over, and no end token.

    These are what its chat template writes inside one answer with reasoning or tool calls; what vLLM's reasoning
    configuration names; and tags of which the template knows one and the vocabulary both, as ``<think>`` and
    ``</think>``, for templates that take reasoning out of what they render. A role marker, an image's token or a
    reserved one is none of these.

    Args:
        tokenizer: the base model's.
        ends: its end tokens.
        reasoning: token ids that begin or end its reasoning, as vLLM knows them; ordinary ones do not count.
    """
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i not in ends}
    written = {i for ids in _answers(tokenizer, ends) for i in ids} | {*reasoning}
    parts = {tokenizer.special_tokens_map.get(role) for role in ROLES}
    names = {token.content for token in added.values() if not token.special}
    template = str(tokenizer.chat_template)  # one, or several by name
    written |= {
        i
        for i, token in added.items()
        if token.content in names
        and (tag := NAMED_TAG.fullmatch(token.content))
        and {f"<{tag[2]}>", f"</{tag[2]}>"} <= names
        and any(name in template for name in (f"<{tag[2]}>", f"</{tag[2]}>"))
    }
    return {i: added[i].content for i in sorted(written & added.keys()) if added[i].content not in parts}


def _answers(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> Iterator[list[int]]:
    """Token ids of answers, as the chat template writes them: behind what it writes before any, up to an end token."""
    plain = {"role": "assistant", "content": CONTENT}
    before = _render(tokenizer, [QUESTION], True)
    if before is None:
        return
    behind = (_render(tokenizer, [QUESTION, plain], False) or "").partition(CONTENT)[2]
    reasons = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), REASONING)
    calls: list[dict[str, Any]] = [{"tool_calls": [call]} for call in _calls()]
    for more in (reasons, *calls):
        text = _render(tokenizer, [QUESTION, {**plain, **more}], False)
        if text is None:
            continue
        ids = tokenizer.encode(text.removesuffix(behind), add_special_tokens=False)
        start = tokenizer.encode(before, add_special_tokens=False)
        common = next((i for i, pair in enumerate(zip(ids, start, strict=False)) if pair[0] != pair[1]), len(start))
        ids = ids[common:]
        yield ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _calls() -> Iterator[dict]:
    """A tool call, in the forms that templates take: arguments as an object, or as text."""
    for arguments in ({CONTENT: CONTENT}, f'{{"{CONTENT}": "{CONTENT}"}}'):
        function = {"name": CONTENT, "arguments": arguments}
        yield {"id": "a23456789", "type": "function", "function": function}


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], generate: bool) -> str | None:
    try:
        return bounded_render(tokenizer, messages, add_generation_prompt=generate)
    except Exception:  # there is no template, or it raises what it likes
        return None
