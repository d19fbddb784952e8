"""Where a preference goes in a chat, found on the token ids of the rendered conversation.

A server sees the ids that a chat template wrote, not its messages. :mod:`~pad_vllm.reward.chat_structure` learns what a
template writes around them; here a prompt's messages are found by it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pad_vllm.reward.chat_parser import UNKNOWN, Message
from pad_vllm.reward.chat_structure import ChatStructure
from pad_vllm.reward.marked_text import NO_TOKEN, MarkedText, is_marker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(f"vllm.{__name__}")

SEPARATOR = "\n\n"
"""Between texts that become one message, as the content of a system message and the preference."""
MAX_KINDS = 64
"""Of prompts that are not understood, of each of which a log tells once."""
HEAD = 512
"""Token ids of a prompt that are read where others wait: what opens messages is shorter."""


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


class MisreadPromptError(Exception):
    """A prompt begins as a chat, and with no message that the chat template writes. ``kind``: what such prompts have in
    common."""

    def __init__(self, kind: str) -> None:
        super().__init__("A prompt begins with no message that the chat template writes")
        self.kind = kind


class Kinds:
    """Which kinds of prompts were told of already: at most :data:`MAX_KINDS`."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def is_new(self, kind: str) -> bool:
        if kind in self._known or len(self._known) >= MAX_KINDS:
            return False
        self._known.add(kind)
        return True


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

    def find(self, prompt_ids: Sequence[int]) -> Place | None:
        """Where a preference goes in a prompt that opens with a message, or None: at the end of the user's own system
        message at its head, or of the one that the template wrote where there is no other; else at the start of the
        first message.

        Raises:
            MisreadPromptError: it begins as a chat, and is none that the template writes.
        """
        pieces = self.marked.pieces(prompt_ids)
        text = "".join(pieces)
        leading, first = self.structure.leading(self.structure.grammar.messages(text))
        system = self.structure.own_system(text, leading)
        if system is not None:
            return self._end_of_system(pieces, text, system)
        if first is None or first.role == UNKNOWN:
            if self.structure.looks_like_chat(text):
                raise MisreadPromptError(self.structure.kind(text))
            return None
        return cut(pieces, first.start, self.marked, strip_left=self.structure.strips_left.get(first.role, False))

    def opens_no_message(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt begins as a chat, and with nothing that opens a message, by its first :data:`HEAD` ids."""
        text = self.marked.read(prompt_ids[:HEAD])
        return self.structure.looks_like_chat(text) and not self.structure.grammar.opens(text)

    def is_misread(self, prompt_ids: Sequence[int]) -> bool:
        """Whether :meth:`find` would raise MisreadPromptError; of a prompt of more than :data:`HEAD` ids, whether its
        first say so."""
        if len(prompt_ids) > HEAD:
            return self.opens_no_message(prompt_ids)
        try:
            self.find(prompt_ids)
        except MisreadPromptError:
            return True
        return False

    def _end_of_system(self, pieces: list[str], text: str, message: Message) -> Place:
        strips = self.structure.strips_system
        if message.end is None:  # one that does not end takes the preference where it begins
            return cut(pieces, message.start, self.marked, strip_left=strips)
        body = text[message.start : message.end]
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
            "PAD cannot find where the chat template puts messages (%s), so it puts a preference at the start of the "
            "prompt, after BOS. Set pad.insert_after to put it elsewhere.",
            " ".join(str(error).split()) or repr(error),
        )
        return None
