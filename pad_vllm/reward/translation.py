"""A base model's prompt as the reward model's: the same text, between the role markers of the other chat template.

The messages of a prompt are found by what the base's chat template writes around them
(:mod:`~pad_vllm.reward.chat_structure`), and written again by the reward model's. Contents are kept byte for byte and
never become markers. What the base's template wrote by itself and has no counterpart, such as a date, tools that it
describes, or a role that only the base has, stays as text: at the head of a prompt in the system message. A prompt that
is no chat, or whose template one of the two lacks, is plain text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.chat import SEPARATOR, Kinds
from pad_vllm.reward.chat_parser import INSERTED, UNKNOWN, WRITTEN
from pad_vllm.reward.chat_structure import CONTENTS, ChatStructure
from pad_vllm.reward.marked_text import ATOMS, NO_TOKEN, MarkedText, is_marker
from pad_vllm.reward.memo import Memo, size_of
from pad_vllm.reward.renderings import render

logger = logging.getLogger(f"vllm.{__name__}")

CHATS_BYTES = 2**24
"""Of what the reward model's template writes between the contents of chats."""


class ReadMessage(NamedTuple):
    role: str
    content: str


class Chat(NamedTuple):
    """Messages, and what the assistant has begun to answer; None: a finished conversation."""

    messages: list[ReadMessage]
    answer: str | None


class Translated(NamedTuple):
    """A prompt as the reward model's.

    ``begins_answer``: it is a chat whose next token is the first of an answer. ``is_misread``: it begins as a chat of
    the base's, and was not understood.
    """

    ids: list[int]
    begins_answer: bool = False
    is_misread: bool = False


class PromptTranslator:
    """Translates prompts.

    Args:
        base, reward: the two tokenizers.
        ends: end tokens of the base -> the reward model's.
    """

    def __init__(self, base: ByteTokens, reward: ByteTokens, ends: Mapping[int, int]) -> None:
        self.base, self.reward = base, reward
        self.marked = MarkedText(base.tokenizer)
        same = {atom: reward.markers[name] for atom, name in self.marked.spelled.items() if name in reward.markers}
        self._ids = same | {self.marked.atoms[i]: end for i, end in ends.items() if i in self.marked.atoms}
        """Of markers that have a counterpart in plain text"""
        names = sorted(reward.markers, key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._render = Memo(self._render_literals, CHATS_BYTES, size_of)
        self._kinds = Kinds()

    def translate(self, prompt_ids: Sequence[int]) -> list[int]:
        """The reward model's ids of a base model's prompt."""
        return self.read(prompt_ids).ids

    def read(self, prompt_ids: Sequence[int]) -> Translated:
        """As :meth:`translate`, with whether the prompt was understood."""
        text = self.marked.read(prompt_ids).replace(NO_TOKEN, "")
        structure, is_misread = self.structure, False
        if structure is not None:
            chat = self._conversation(structure, text)
            if chat is not None and (ids := self._translate_chat(chat)):
                return Translated(ids, begins_answer=chat.answer == "")
            is_misread = structure.looks_like_chat(text)
            if is_misread and self._kinds.is_new(structure.kind(text)):
                why = "begins as a chat, but not as the base model's chat template writes one"
                if chat is not None:
                    roles = ", ".join(message.role for message in chat.messages)
                    why = f"is a chat that the reward model's chat template refuses ({roles})"
                logger.warning("A prompt %s. PAD translates it as plain text.", why)
        return Translated(self._translate_plain(text), is_misread=is_misread)

    @cached_property
    def structure(self) -> ChatStructure | None:
        """Of the base's chat template; None where one of the two has none that can be followed."""
        both = (self.base.tokenizer, self.reward.tokenizer)
        if not all(getattr(tokenizer, "chat_template", None) for tokenizer in both):
            return None
        try:
            return ChatStructure(self.marked)
        except Exception as error:  # whatever a template or a tokenizer raises
            logger.warning(
                "PAD cannot follow the base model's chat template (%s), so it translates prompts as plain text.", error
            )
            return None

    @cached_property
    def _bos(self) -> list[int]:
        """What the reward model reads for the base's BOS before a plain text: its own, unless messages begin with
        it."""
        tokenizer = self.reward.tokenizer
        if tokenizer.bos_token_id is None:
            return []
        talk = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc", strict=True)
        ]
        text = render(tokenizer, talk, generate=False) if getattr(tokenizer, "chat_template", None) else None
        is_opener = text is not None and text.count(tokenizer.bos_token) > 1
        return [] if is_opener else [tokenizer.bos_token_id]

    @cached_property
    def _adds_space(self) -> tuple[bool, bool]:
        """Whether base and reward model write a space before a text that has none."""

        def adds_space(tokens: ByteTokens) -> bool:
            return tokens.decode(tokens.tokenizer.encode("a", add_special_tokens=False)).startswith(b" ")

        return adds_space(self.base), adds_space(self.reward)

    def _translate_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        if self.marked.bos and text.startswith(self.marked.bos):
            ids += self._bos
            text = text[1:]
        base_adds, reward_adds = self._adds_space
        if base_adds:
            text = text.removeprefix(" ")
        items: list[int | str] = [" "] if reward_adds and not is_marker(text[:1]) and text[:1] != " " else []
        for part in re.split(f"({ATOMS})", text):
            items.append(self._ids[part] if part in self._ids else self.marked.decode(part))
        return ids + self._encode(items) or [*self._bos] or self._encode([" "])

    def _conversation(self, structure: ChatStructure, text: str) -> Chat | None:
        """The messages of a prompt, or None where it is none of the template's."""
        found = list(structure.grammar.messages(text))
        leading, _ = structure.leading(found)
        system: list[str] = []
        for message in leading:
            content = text[message.start : message.end_or(text)]
            if content in structure.defaults:
                continue  # the reward model's template has its own
            if message.role == INSERTED:
                content = re.sub(ATOMS, "", content)
            if message.role != "system" or structure.strips_system:
                content = content.strip()
            system.append(self.marked.decode(content))
        texts = [part for part in system if part.strip()]
        messages = [ReadMessage("system", SEPARATOR.join(texts))] if system else []
        answer = None
        for message in found[len(leading) :]:
            content = text[message.start : message.end_or(text)]
            if message.role == "assistant" and message.end is None:
                answer = self.marked.decode(content)
            elif message.role not in (UNKNOWN, INSERTED, WRITTEN):
                messages.append(ReadMessage(message.role, self.marked.decode(content)))
            elif content := self.marked.decode(re.sub(ATOMS, "", content)).strip():
                last = messages.pop() if messages else ReadMessage("system", "")
                content = SEPARATOR.join(part for part in (last.content, content) if part.strip())
                messages.append(last._replace(content=content))
        return Chat(messages, answer) if messages else None

    def _translate_chat(self, chat: Chat) -> list[int] | None:
        for messages in self._as_others_know_them(chat.messages):
            rendered = self._render(self._shape(messages), chat.answer is not None)
            if rendered is not None:
                break
        else:
            return None
        order, literals = rendered
        items: list[int | str] = []
        for i, literal in enumerate(literals):
            at = 0
            for marker in self._markers.finditer(literal):
                items += [literal[at : marker.start()], self.reward.markers[marker[0]]]
                at = marker.end()
            items.append(literal[at:])
            if i < len(order):
                items.append(messages[order[i]].content.strip())
        items.append(chat.answer or "")
        if self._adds_space[1] and (first := next((i for i, item in enumerate(items) if item != ""), None)) is not None:
            items[first:first] = [" "] if isinstance(items[first], str) else []
        return self._encode(items)

    @staticmethod
    def _as_others_know_them(messages: list[ReadMessage]) -> Iterator[list[ReadMessage]]:
        """A conversation in ways that templates may know: as it is, or without a role that few have, or, where there is
        no system turn, with its text before the next one's."""
        yield messages
        if any(message.role == "developer" for message in messages):
            messages = [ReadMessage("system" if m.role == "developer" else m.role, m.content) for m in messages]
            yield messages
        if messages[0].role == "system" and len(messages) > 1:
            system, first, *rest = messages
            joined = SEPARATOR.join(part for part in (system.content, first.content) if part.strip())
            yield [ReadMessage(first.role, joined), *rest]

    @staticmethod
    def _shape(messages: Sequence[ReadMessage]) -> tuple[tuple[str, str, str], ...]:
        """Of each message its role, and the white space around its content, which some templates take away."""
        return tuple(
            (role, text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :] if text.strip() else "")
            for role, text in messages
        )

    def _render_literals(
        self, shape: tuple[tuple[str, str, str], ...], generate: bool
    ) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
        """In which order the reward model's template writes contents (some put the system text into the last turn), and
        what it writes before, between and after them, their white space included."""
        messages = [
            {"role": role, "content": f"{left}{CONTENTS[0]}{i:07}{CONTENTS[1]}{right}"}
            for i, (role, left, right) in enumerate(shape)
        ]
        text = render(self.reward.tokenizer, messages, generate)
        if text is None:
            return None
        # One pass: a chat may have thousands of messages, and everybody waits.
        parts = tuple(re.split(f"{CONTENTS[0]}([0-9]{{7,}}){CONTENTS[1]}", text))
        order = tuple(map(int, parts[1::2]))
        return (order, parts[::2]) if sorted(order) == list(range(len(shape))) else None

    def _encode(self, items: Sequence[int | str]) -> list[int]:
        """Token ids, and texts between them, each encoded as a whole."""
        ids: list[int] = []
        text = ""
        for item in [*items, None]:
            if isinstance(item, str):
                text += item
                continue
            if text:
                ids += self.reward.encode_one(text.encode(errors="surrogateescape"))
                text = ""
            if item is not None:
                ids.append(item)
        return ids
