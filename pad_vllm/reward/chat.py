"""Where a preference goes in a chat, found on the token ids of the rendered conversation.

A server sees the ids that a chat template wrote, not its messages. :mod:`~pad_vllm.reward.chat_structure` learns what a
template writes around them; here a prompt's messages are found by it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pad_vllm.reward.chat_parser import Message
from pad_vllm.reward.chat_structure import CONTENTS, ChatStructure
from pad_vllm.reward.marked_text import NO_TOKEN, MarkedText, is_marker
from pad_vllm.reward.renderings import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(f"vllm.{__name__}")

SEPARATOR = "\n\n"
"""Between the content of a system message and the preference."""
KIND_TOKENS, KIND_MARKERS = 64, 4
"""Prompts are of one kind if their first so many tokens begin with the same so many markers."""


class Seam(NamedTuple):
    """How a preference's text joins what stands around it."""

    left: str = ""
    """Text before the preference that one token held together with what follows it."""
    lead: str = ""
    right: str = ""
    strip_left: bool = False
    """The template strips contents, and the preference begins one."""
    strip_right: bool = False


class Place(NamedTuple):
    """A preference goes between ``ids[:start]`` and ``ids[end:]``; the seam has the text of ``ids[start:end]``, and is
    None in a plain prompt."""

    start: int
    end: int
    seam: Seam | None = None
    ends_system: bool = False
    """It stands at the end of a system message, which users may share."""
    is_misread: bool = False
    """The prompt begins as a chat, and is none that the chat template writes."""


class ChatFormat:
    """Finds where a preference goes in prompts that a chat template wrote.

    Args:
        tokenizer: whose chat template renders the prompts.

    Raises:
        ValueError: the template writes no user message in a way that could be found again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.marked = MarkedText(tokenizer)
        self.structure = ChatStructure(self.marked)
        self.adds_prefix = self.marked.adds_prefix
        self.bos_once = self.structure.grammar.bos_once
        self._strips_left = {role: self._strips(role, "left") for role in ("user", "assistant", "developer")}
        self._strips_system = self._strips("system", "right")

    def find(self, prompt_ids: Sequence[int]) -> Place | None:
        """Where a preference goes in a prompt that opens with a message, or None: at the end of the user's own system
        message at its head, or of the one that the template wrote where there is no other; else at the start of the
        first message."""
        pieces = self.marked.pieces(prompt_ids)
        text = "".join(pieces)
        leading, first = self.structure.leading(self.structure.grammar.messages(text))
        system = self.structure.own_system(text, leading)
        if system is not None:
            return self._end_of_system(pieces, text, system)
        if first is None:
            return None
        return cut(pieces, first.start, self.marked, strip_left=self._strips_left.get(first.role, False))

    def looks_like_chat(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt begins with a token that marks more than its beginning."""
        start = int(bool(prompt_ids) and prompt_ids[0] == self.tokenizer.bos_token_id and self.bos_once)
        return len(prompt_ids) > start and prompt_ids[start] in self.marked.atoms

    def kind(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """What prompts that are not understood have in common where they are written by one template."""
        markers = [i for i in prompt_ids[:KIND_TOKENS] if i in self.marked.atoms]
        return tuple(markers[:KIND_MARKERS])

    def _end_of_system(self, pieces: list[str], text: str, message: Message) -> Place:
        strips = self._strips_system
        if message.end is None:  # one that does not end takes the preference where it begins
            return cut(pieces, message.start, self.marked, strip_left=strips)
        body = text[message.begin : message.end]
        # Stripped, an empty content leaves what the template itself writes before it.
        empty = not body or (strips and body[-1].isspace())
        place = cut(
            pieces,
            message.end,
            self.marked,
            lead="" if empty else SEPARATOR,
            strip_left=empty and strips,
            strip_right=strips,
        )
        return place._replace(ends_system=True)

    def _strips(self, role: str, side: str) -> bool:
        word = CONTENTS[0]
        content = f" \n {word}" if side == "left" else f"{word} \n "
        rest = [{"role": "user", "content": CONTENTS[1]}] if role == "system" else []
        rendered = [render(self.tokenizer, [{"role": role, "content": text}, *rest]) for text in (content, word)]
        return rendered[0] is not None and rendered[0] == rendered[1]


def cut(pieces: list[str], at: int, marked: MarkedText, **seam: Any) -> Place:
    """The place ``at`` characters into a prompt's pieces; a token that goes on there is taken into the seam."""
    start = 0
    for start, piece in enumerate(pieces):  # noqa: B007
        if at < len(piece):
            break
        at -= len(piece)
    else:
        start, at = len(pieces), 0
    if at == 0 or is_marker(pieces[start][:1]) or pieces[start] == NO_TOKEN:
        return Place(start, start, Seam(**seam))
    left, right = marked.decode(pieces[start][:at]), marked.decode(pieces[start][at:])
    try:
        (left + right).encode()
    except UnicodeEncodeError:  # within a character
        return Place(start, start, Seam(**seam))
    return Place(start, start + 1, Seam(left=left, right=right, **seam))


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format of a tokenizer's chat template; None where there is no template, or it hides its messages."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatFormat(tokenizer)
    except Exception as error:  # whatever the template or the tokenizer raises, prompts are composed as plain text
        logger.warning(
            "Where the chat template puts messages cannot be found (%s), so a preference goes to the head of a prompt, "
            "after BOS; pad.insert_after says where else.",
            " ".join(str(error).split()) or repr(error),
        )
        return None
