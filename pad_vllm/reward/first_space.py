"""Whether a model's answers begin with a space.

A tokenizer that puts one before a text puts it before an answer as well, if the generation prompt ends with a special
token; and some templates write it themselves, as ``[/INST] That``. Then ``That`` with its space is what the model says
first, and another model says it without.
"""

from __future__ import annotations

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.markers import ANSWER
from pad_vllm.reward.rendering import bounded_render
from pad_vllm.reward.token_tables import FirstSpace


def first_space(base: ByteTokens, reward: ByteTokens) -> FirstSpace:
    """What becomes of the first space of a base's answer that a reward model reads in its own chat."""
    spaces = answers_begin_with_space(base), answers_begin_with_space(reward)
    if None in spaces or spaces[0] == spaces[1]:
        return None
    return "drop" if spaces[0] else "add"


def answers_begin_with_space(tokens: ByteTokens) -> bool | None:
    """Whether a model's answers do, behind its generation prompt; None where its template does not say."""
    tokenizer = tokens.tokenizer
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        before = bounded_render(tokenizer, talk[:1], add_generation_prompt=True)
        whole = bounded_render(tokenizer, talk)
    except Exception:  # there is no template, or it raises what it likes
        return None
    start, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (before, whole))
    common = next((i for i, pair in enumerate(zip(ids, start, strict=False)) if pair[0] != pair[1]), len(start))
    said, found, _ = tokens.decode(ids[common:]).partition(ANSWER.encode())
    return said == b" " if found else None
