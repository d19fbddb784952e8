"""Which tokens of a tokenizer only mark, and which one its chat template writes behind an answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError
from tokenizers import Tokenizer

from pad_vllm.reward.renderings import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL = re.compile(
    r"\[\S+\]"  # [INST], [multimodal]
    r"|[<\[{(]?[|\uff5c].+[|\uff5c][>\]})]?"  # <|im_start|>, DeepSeek's with the wide bar, |||PHONE|||
    r"|<\W*(?:unused|reserved|placeholder|extra_id)\w*>",
    re.DOTALL | re.IGNORECASE,
)
"""What no text has that a tokenizer would have a token for."""
TAG = re.compile(r"<\S+>")
ANSWER = "qzxjkvqw"
"""That no template writes."""
TALK = ({"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "b"})


def marker_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that only mark: role markers, ends, ``<think>``, tool tags. A user's text never becomes one.

    A token that is special marks. One that was added and is not special is text where it is blank, as Gemma's runs of
    spaces and newlines, or a word. Any other marks, if

    - the chat template spells it or writes it (``<think>`` of Qwen 3, ``<｜User｜>`` of DeepSeek, ``<code>`` of
      SmolLM 3), or
    - it has a form that no text has: ``<|name|>`` with either bar, ``[NAME]``, ``<unused0>``, or
    - it is a tag, ``<name>``, and the model's own vocabulary does not have it: it was added for a task, as
      ``<tool_call>`` is. With the tags of HTML, as ``<table>``, Gemma's vocabulary was made: those are text.

    Returns:
        Their ids by what they are written as.
    """
    special = set(tokenizer.all_special_ids)
    spelled = template_text(tokenizer)
    written = ids_of_a_chat(tokenizer)

    def only_marks(token_id: int, content: str) -> bool:
        if not re.search(r"[^\w\s▁]", content):
            return False
        if content in spelled or token_id in written or CONTROL.fullmatch(content):
            return True
        return TAG.fullmatch(content) is not None and not is_in_model(tokenizer, token_id, content)

    found = {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or i in special or only_marks(i, token.content)
    }
    return found | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def is_in_model(tokenizer: PreTrainedTokenizerBase, token_id: int, content: str) -> bool:
    """Whether an added token is one of the model's own vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return backend.model.token_to_id(content) is not None
    return token_id < tokenizer.vocab_size


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template has in quotation marks or outside of its expressions."""
    template = getattr(tokenizer, "chat_template", None) or ""
    sources = template.values() if isinstance(template, dict) else [template]
    try:
        tokens = [token for source in sources for token in Environment().lex(source)]
    except TemplateError:
        return "\n".join(sources)
    return "\n".join(value for _, kind, value in tokens if kind in ("data", "string"))


def render_talk(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str | None:
    """A finished conversation as a folder's chat template writes it; None where there is none, or it refuses."""
    return render(tokenizer, messages, generate=False) if getattr(tokenizer, "chat_template", None) else None


def ids_of_a_chat(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    text = render_talk(tokenizer, TALK)
    return set() if text is None else set(tokenizer.encode(text, add_special_tokens=False))


def answer_end(tokenizer: PreTrainedTokenizerBase, ends: Collection[int], markers: Collection[int]) -> int | None:
    """The token that the chat template writes behind an answer; None where it writes none, or there is no template.

    Args:
        ends: tokens that are known to end answers.
        markers: ids of :func:`marker_tokens`.
    """
    for messages in (TALK[:2], TALK):
        text = render_talk(tokenizer, messages)
        if text is None:
            continue
        head, _, tail = text.rpartition(ANSWER)
        before, behind = (tokenizer.encode(part, add_special_tokens=False) for part in (head, tail))
        end = next((i for i in behind if i in markers), None)
        if end not in ends and end == next((i for i in before[::-1] if i in markers), None):
            continue  # what opens an answer: the generation prompt, from a template that writes it always
        # Where another turn follows, it may be that turn's first.
        if end is not None and (len(messages) == 2 or end in ends):
            return end
    return None
